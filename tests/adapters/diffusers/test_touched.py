"""What `apply` touches in a model of diffusers, what `restore` gives back, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vicinal import Full, Near
from vicinal.pattern import bounds

pytest.importorskip("diffusers")

import diffusers

from vicinal.adapters.diffusers import apply, hosts, restore
from vicinal.adapters.diffusers.processors import Processor

from .models import LOCAL, VIDEO, Masked, all_models, assert_close, decoded, draw, ltx, ours, processors, wan, wan_call

# what diffusers does in eager mode on a CPU, and says so
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@all_models
def test_restore_puts_back_what_was_there(make, choice):
    model = make()
    before, keys = processors(model), list(model.state_dict())
    assert apply(model, choice) is model
    assert list(model.state_dict()) == keys
    assert ours(model)
    assert restore(restore(model)) is model
    assert all(first is second for first, second in zip(before, processors(model), strict=True))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@all_models
def test_applying_again_replaces_and_does_not_stack(make, choice):
    model = make()
    before = processors(model)
    apply(model, choice)
    count = len(ours(model))
    apply(apply(model, Full()), choice)
    assert len(ours(model)) == count
    assert not any(isinstance(processor.replaced, Processor) for processor in ours(model))
    assert len(model._forward_pre_hooks) <= 1
    restore(model)
    assert all(first is second for first, second in zip(before, processors(model), strict=True))


@all_models
def test_a_refused_apply_changes_nothing(make, choice):
    model = apply(make(), choice)
    before = processors(model)
    with pytest.raises(ValueError, match="axes"):
        apply(model, lambda layer: Near(3) if layer == 0 else (Near(3), Near(3)))
    assert all(first is second for first, second in zip(before, processors(model), strict=True))


def test_a_copy_has_its_own_grid_and_can_be_restored():
    model = apply(wan(), LOCAL)
    other = copy.deepcopy(model)
    video = torch.randn(1, 4, 3, 8, 10)
    with torch.no_grad():
        assert torch.equal(wan_call(other, video), wan_call(model, video))
    assert ours(other)[0].source is not ours(model)[0].source
    restore(other)
    assert not other._forward_pre_hooks
    assert len(model._forward_pre_hooks) == 1


def test_processors_set_over_ours_stay_and_the_watching_ends():
    model = wan()
    theirs = model.blocks[0].attn1.processor
    apply(model, LOCAL).set_attn_processor(theirs)
    assert len(model._forward_pre_hooks) == 1
    restore(model)
    assert all(processor is theirs for processor in processors(model))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the host's norms under autocast
@pytest.mark.parametrize(("make", "call"), [*VIDEO.values(), (ltx, decoded)], ids=[*VIDEO, "ltx"])
def test_autocast_is_obeyed(make, call):
    model = make()
    draw(model)
    video = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = call(model, video)
        found = call(apply(model, "ltx-decoder" if make is ltx else Full()), video)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert_close(found, wanted, 8 * torch.finfo(torch.bfloat16).eps)


def test_weights_saved_with_ours_load_without(tmp_path):
    model, video = wan(), torch.randn(1, 4, 2, 6, 6)
    with torch.no_grad():
        wanted = wan_call(model, video)
        apply(model, LOCAL).save_pretrained(tmp_path)
        again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
        assert_close(wan_call(again, video), wanted)


def test_a_joint_model_is_refused_with_the_reason():
    joint = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=1, attention_head_dim=8, axes_dims_rope=(2, 2, 4),
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match="text and video tokens together, which is not covered yet"):
        apply(joint, Near(3))


JOINT = ["FluxTransformer2DModel", "Flux2Transformer2DModel", "HunyuanVideoTransformer3DModel", "SD3Transformer2DModel",
         "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel", "CogVideoXTransformer3DModel",
         "HunyuanImageTransformer2DModel", "QwenImageTransformer2DModel", "MochiTransformer3DModel"]  # fmt: skip


@pytest.mark.parametrize("name", JOINT)
def test_joint_models_are_known_by_the_names_they_have(name):
    assert getattr(diffusers, name).__name__ == name
    assert hosts.JOINT.fullmatch(name)


def test_other_models_are_refused_with_what_is_supported():
    with pytest.raises(TypeError, match="must be one of LTX2VideoDiffusionDecoderModel, WanTransformer3DModel"):
        apply(nn.Linear(2, 2), Near(3))
    with pytest.raises(TypeError, match=r"WanTransformer3DModel.*got Linear"):
        restore(nn.Linear(2, 2))
    tiny = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    with pytest.raises(TypeError, match="other models of diffusers are not covered yet"):
        apply(tiny, Near(3))
    pipeline = diffusers.DDPMPipeline(nn.Identity(), diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match=r"such as pipeline\.transformer"):
        apply(pipeline, Near(3))


@pytest.mark.parametrize(
    ("make", "choice", "grid", "said"),
    [
        (wan, "ltx-decoder", None, "this model has no presets"),
        (ltx, "natten", None, "the presets 'ltx-decoder', got 'natten'"),
        (wan, (Near(3), Near(3)), None, "got 2 axes"),
        (wan, bounds(Near(3), (4, 4)), None, "got 2 axes"),
        (wan, Near, None, r"write Near\(\.\.\.\)"),
        (wan, 7, None, "preset_or_pattern must be an axis kind"),
        (wan, None, None, "preset_or_pattern must be an axis kind"),
        (wan, Near(3), (4, 4), "numbers of tokens along"),
        (wan, Near(3), (4, 4, 0), "grid"),
        (ltx, Near(3), (4, 4, 4), "know their grid"),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_arguments_that_mean_nothing_are_refused(make, choice, grid, said):
    with pytest.raises(ValueError, match=said):
        apply(make(), choice, grid=grid)


def test_the_back_end_is_the_one_asked_for():
    model, video = wan(), torch.randn(1, 4, 2, 4, 4)
    with pytest.raises(ValueError, match="nothing"):
        apply(model, LOCAL, backend="nothing")
    with torch.no_grad():
        wanted = wan_call(apply(model, LOCAL), video)
        assert_close(wan_call(apply(model, LOCAL, backend="reference"), video), wanted)
    assert {processor.backend for processor in ours(model)} == {"reference"}


def test_a_processor_that_does_something_else_is_not_thrown_away():
    model = wan()
    model.blocks[1].attn1.set_processor(Masked(None, torch.ones(1)))
    with pytest.raises(ValueError, match="layer 1 has the processor Masked"):
        apply(model, Near(3))


def test_a_mask_beside_the_pattern_is_refused():
    model = apply(wan(), Near(3), grid=(1, 2, 2))
    tokens = torch.randn(1, 4, 24)
    with pytest.raises(ValueError, match="attention_mask"):
        model.blocks[0].attn1(tokens, attention_mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model.blocks[0].attn1(tokens, encoder_hidden_states=tokens)


def test_an_old_diffusers_is_refused(monkeypatch):
    model = wan()
    for version in ("0.41.2", "0.9.0.dev0", "unknown"):
        monkeypatch.setattr(diffusers, "__version__", version)
        with pytest.raises(ImportError, match=f"needs diffusers 0.42 or newer, found {version}"):
            apply(model, Near(3))
    monkeypatch.setattr(diffusers, "__version__", "1.0.0.dev0")
    apply(model, Near(3))


@all_models
def test_a_diffusers_of_another_shape_is_refused(make, choice, monkeypatch):
    model = make()
    host = hosts.host_of(model)
    kind = getattr(sys.modules[host.home], host.replaces[0])
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", lambda self, attn, tokens, grid: tokens)
        with pytest.raises(RuntimeError, match=f"{kind.__name__} takes tokens, grid instead of hidden_states"):
            apply(model, choice)
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules[host.home], kind.__name__)
        with pytest.raises(RuntimeError, match=f"there is no {kind.__name__}"):
            apply(model, choice)
    for layer in hosts.layers_of(host, model):
        del layer.to_out
    with pytest.raises(RuntimeError, match="has no to_out"):
        apply(model, choice)
    for name in ("decoder", "blocks", "transformer_blocks", "control_blocks"):
        if hasattr(model, name):
            setattr(model, name, nn.ModuleList())
    with pytest.raises(RuntimeError, match="has no layers named"):
        apply(model, choice)


def test_without_diffusers_the_import_says_how_to_get_it():
    code = "import sys; sys.modules['diffusers'] = None; import vicinal.adapters.diffusers"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode
    assert "ModuleNotFoundError: vicinal.adapters.diffusers needs diffusers 0.42 or newer: pip install" in ran.stderr


def test_the_page_shows_the_measured_figures():
    root = Path(__file__).parents[3]
    spec = importlib.util.spec_from_file_location("ltx_decoder", root / "benchmarks" / "ltx_decoder.py")
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, "ltx_decoder", script)
        spec.loader.exec_module(script)
    page, found = (root / "docs" / "diffusers.md").read_text(), json.loads(script.RESULTS.read_text())
    assert [row["case"]["name"] for row in found["rows"][::2]] == list(script.CASES)
    assert script.shown(page, found) == page, "run benchmarks/ltx_decoder.py again"
