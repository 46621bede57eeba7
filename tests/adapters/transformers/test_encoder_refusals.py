"""What attention by a pattern cannot do in an encoder of transformers is refused, with the reason."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import vicinal
from vicinal import Near

pytest.importorskip("transformers")

import transformers

from vicinal.adapters.transformers import HostChanged, encoder, register_attention

from .encoders import answer, build, call, on


@pytest.mark.parametrize("shape", [(1, 37), (1, 1, 37, 37)])
def test_a_mask_is_refused(shape):
    model = on(build("ViT"), "ours", Near(3))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        answer(model, torch.randn(1, 3, 48, 48), attention_mask=torch.ones(shape))


def test_dropout_is_refused_in_training_only():
    model = on(build("ViT", attention_probs_dropout_prob=0.1), "ours", Near(3))
    answer(model, torch.randn(1, 3, 48, 48))
    with pytest.raises(ValueError, match=r"dropout of attention probabilities must be 0, got 0\.1"):
        answer(model.train(), torch.randn(1, 3, 48, 48))


def test_a_windowed_model_is_refused_for_its_mask():
    config = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=32, window_size=4)
    model = on(transformers.SwinModel(config).eval(), "ours", Near(3))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model(torch.randn(1, 3, 32, 32))


def test_a_causal_model_is_refused():
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9
    )
    model = on(transformers.LlamaModel(config).eval(), "ours", Near(3), grid=(4,), num_prefix_tokens=0)
    with pytest.raises(ValueError, match="must not want a mask of its own"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_a_host_of_another_shape_is_named(monkeypatch):
    monkeypatch.delattr(transformers.masking_utils, "bidirectional_mask_function")
    spec = importlib.util.spec_from_file_location("encoder_again", encoder.__file__)
    with pytest.raises(HostChanged, match=r"does not fit this transformers: .*bidirectional_mask_function"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_host_that_is_broken_itself_is_not_called_changed(monkeypatch):
    """So it is where torchvision does not fit torch, which half of transformers imports."""

    def broken(name):
        raise ModuleNotFoundError(f"Could not import module {name!r}") from RuntimeError("no torchvision::nms")

    host = ModuleType("transformers")
    host.__getattr__ = broken
    monkeypatch.setitem(sys.modules, "transformers", host)
    spec = importlib.util.spec_from_file_location("encoder_again", encoder.__file__)
    with pytest.raises(ImportError, match="transformers cannot be imported here: no torchvision::nms"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)


def test_patches_that_stand_on_no_grid_are_not_taken_for_one():
    decoder = {f"decoder_{name}": size for name, size in TINY.items() if name != "image_size"}
    config = transformers.ViTMAEConfig(**TINY, **decoder, patch_size=8)
    model = on(transformers.ViTMAEModel(config).eval(), "ours", Near(3), grid=(2, 2))
    with pytest.raises(ValueError, match="does not suit vit_mae: its patches are shuffled"):
        model(torch.randn(1, 3, 32, 32))  # 4 of 16 patches, as many as in a square


def test_a_video_with_as_many_tokens_as_a_square_needs_its_grid():
    config = transformers.VivitConfig(**TINY, num_frames=8, tubelet_size=[2, 8, 8])
    model, video = on(transformers.VivitModel(config).eval(), "ours", Near(3)), torch.randn(1, 8, 3, 32, 32)
    with pytest.raises(ValueError, match="64 on the grid, but no grid was given, and none can be guessed"):
        model(video)
    assert answer(on(model, "ours", Near(3), grid=(4, 4, 4)), video).shape == (1, 65, 16)
    config = transformers.VideoMAEConfig(**TINY, num_frames=8, patch_size=8)
    model = on(transformers.VideoMAEModel(config).eval(), "ours", Near(3), num_prefix_tokens=0)
    with pytest.raises(ValueError, match="64 on the grid, but no grid was given, and none can be guessed"):
        model(video)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_causal": True}, "is_causal must be false"),
        ({"module": SimpleNamespace(is_causal=True)}, "is_causal must be false"),
        ({"position_bias": torch.zeros(1)}, "position_bias must be None"),
        ({"softcap": 30.0, "s_aux": 1.0}, "softcap, s_aux must be None"),
        ({"key": torch.randn(1, 4, 7, 8)}, "got 9 queries and 7 keys"),
        ({"grid": (0, 9)}, r"grid\[0\] must be at least 1, got 0"),
        ({"grid": (2, 4)}, r"but grid is \(2, 4\)"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_it_cannot_do_is_refused(given, message):
    register_attention("ours", Near(3), num_prefix_tokens=0)
    with pytest.raises(ValueError, match=message):
        call(**given)


@pytest.mark.parametrize("name", ["", "eager", "sdpa", "my_flash", "owner/kernel", "paged|near", 3])
def test_names_that_mean_something_are_refused(name):
    with pytest.raises(ValueError, match="name must be a word without any of eager"):
        register_attention(name, Near(3))


def test_a_name_of_somebody_else_is_refused():
    transformers.AttentionInterface.register("theirs", print)
    with pytest.raises(ValueError, match="somebody else has registered, got 'theirs'"):
        register_attention("theirs", Near(3))
    register_attention("ours", Near(3))
    register_attention("ours", Near(5))
    assert transformers.AttentionInterface._global_mapping["ours"].pattern == Near(5)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ([], {}, "list of at least one pattern"),
        ("near", {}, "pattern"),
        ([Near(3), 7], {}, "pattern"),
        ((Near(3), Near(3)), {"grid": (4,)}, "axes|axis"),
        (vicinal.bounds(Near(3), (6, 6)), {"grid": (5, 5)}, r"this Bounds has grid \(6, 6\)"),
        (Near, {}, r"write Near\(\.\.\.\)"),
        (Near(3), {"grid": ()}, "grid must be a tuple of 1 to 3 axis lengths"),
        (Near(3), {"grid": 14}, "grid must be a tuple of 1 to 3 axis lengths, got 14"),
        (Near(3), {"grid": (14.0, 14)}, r"grid\[0\] must be an integer of at least 1, got 14\.0"),
        (Near(3), {"num_prefix_tokens": -1}, "num_prefix_tokens must be at least 0"),
        (Near(3), {"num_prefix_tokens": "1"}, "num_prefix_tokens must be an integer"),
        (Near(3), {"backend": "nothing"}, "nothing"),
    ],
)
def test_what_is_no_pattern_is_refused_when_it_is_registered(pattern, options, message):
    with pytest.raises(ValueError, match=message):
        register_attention("ours", pattern, **options)
    assert "ours" not in transformers.AttentionInterface._global_mapping
