"""NAT and DiNAT: against transformers' DiNAT, with its attention computed densely, and their schedules."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vicinal.models import nat
from vicinal.pattern import Near, Window, mask

from .parity import assert_close, assert_gradients_close, take_over

SMALL = nat.NatConfig(16, (3, 2, 2), (1, 2, 4), 2, None, 0.0, dilations=((1, 4), (1, 2), (1,)), num_classes=10)


def dense_attention(module, hidden_states, output_attentions=False):
    """What transformers' module should compute, with a mask over all pairs instead of NATTEN."""
    batch, height, width, _ = hidden_states.shape
    heads, dim, size, step = module.num_attention_heads, module.attention_head_size, module.kernel_size, module.dilation
    query, key, value = (
        layer(hidden_states).reshape(batch, height * width, heads, dim).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    )
    rows, columns = (torch.arange(n) for n in (height, width))
    # a pair may see each other only if it is a multiple of the dilation apart, so the division has no rest
    apart = [(places[None] - places[:, None]).div(step, rounding_mode="floor") + size - 1 for places in (rows, columns)]
    apart = [distance.clamp(0, 2 * size - 2) for distance in apart]
    bias = module.rpb[:, apart[0][:, None, :, None], apart[1][None, :, None, :]].reshape(heads, height * width, -1)
    scores = query @ key.transpose(-1, -2) / dim**0.5 + bias
    seen = mask(Near(size, dilation=step), (height, width)).reshape(height * width, -1)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = (weights @ value).transpose(1, 2).reshape(batch, height, width, heads * dim)
    return (out, weights) if output_attentions else (out,)


@pytest.fixture
def transformers_dinat(monkeypatch, lively):
    modeling = pytest.importorskip("transformers.models.dinat.modeling_dinat")
    monkeypatch.setattr(modeling, "requires_backends", lambda *_: None)
    monkeypatch.setattr(modeling.NeighborhoodAttention, "forward", dense_attention)

    def make(config: nat.NatConfig):
        from transformers import DinatConfig

        assert not isinstance(config.dilations, str)
        there = DinatConfig(
            embed_dim=config.dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            kernel_size=config.kernel_size,
            dilations=[
                [word.dilation for word in level] for level in nat.dilated(7, config.dilations, config.depths, {})
            ],
            mlp_ratio=float(config.mlp_ratio),
            layer_scale_init_value=config.layer_scale or 0.0,
            num_labels=config.num_classes,
            drop_path_rate=0.0,
        )
        return lively(modeling.DinatForImageClassification(there))

    return make


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("size", [(112, 112), (112, 144), (70, 101)], ids=["divisible", "wide", "padded"])
@torch.no_grad()
def test_equals_transformers(size, layer_scale, transformers_dinat):
    config = dataclasses.replace(SMALL, layer_scale=layer_scale)
    theirs, ours = transformers_dinat(config), nat.build(config).eval()
    take_over(nat.TRANSFORMERS_LAYOUT, ours, theirs)
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), theirs(images).logits)


def test_gradients_equal_those_of_transformers(transformers_dinat):
    theirs, ours = transformers_dinat(SMALL), nat.build(SMALL).eval()
    take_over(nat.TRANSFORMERS_LAYOUT, ours, theirs)
    assert_gradients_close(ours, theirs, torch.randn(1, 3, 70, 101))


@torch.no_grad()
def test_equals_transformers_on_our_operator(lively):
    """The same through the adapter, which is how users run transformers' model."""
    pytest.importorskip("transformers")
    from transformers import DinatConfig, DinatForImageClassification

    from vicinal.adapters.transformers import patch_dinat, unpatch_dinat

    there = {"embed_dim": 16, "depths": [3, 2, 2], "num_heads": [1, 2, 4], "mlp_ratio": 2.0, "num_labels": 10}
    patch_dinat()
    try:
        dilations = [[1, 4, 1], [1, 2], [1, 1]]
        theirs = lively(DinatForImageClassification(DinatConfig(**there, dilations=dilations, drop_path_rate=0.0)))
        ours = nat.build(SMALL).eval()
        take_over(nat.TRANSFORMERS_LAYOUT, ours, theirs)
        for size in ((112, 112), (70, 101)):
            images = torch.randn(1, 3, *size)
            assert_close(ours(images), theirs(images).logits)
    finally:
        unpatch_dinat()


@torch.no_grad()
def test_the_last_level_at_224_is_full_attention(lively):
    """A 7x7 map under a 7x7 kernel: every token sees every other, at the same bias as in a window."""
    block = lively(nat.build(SMALL).stages[1].blocks[0])
    near = torch.randn(1, 7, 7, 32)
    expected = block(near)
    block.mixer.pattern = Window(7)
    torch.testing.assert_close(block(near), expected)


@pytest.mark.parametrize("name", nat.PRESETS)
def test_presets_alternate_and_fill_every_layer(name):
    depths = nat.VARIANTS["dinat_large"].depths
    words = nat.dilated(7, name, depths, nat.PRESETS)
    assert [len(level) for level in words] == list(depths)
    assert all(word.dilation == 1 for level in words for word in level[::2])


def test_published_dilations():
    words = nat.dilated(7, "seg640", (3, 4, 18, 5), nat.PRESETS)
    level2 = "1 2 1 3 1 4 1 5 1 2 1 3 1 4 1 5 1 5"
    assert [" ".join(str(word.dilation) for word in level) for level in words] == [
        "1 20 1",
        "1 5 1 10",
        level2,
        "1 2 1 2 1",
    ]


def test_dilations_as_far_as_they_fit_are_the_published_ones_at_224():
    config = dataclasses.replace(nat.VARIANTS["dinat_mini"], dilations="max")
    words = nat.dilated(config.kernel_size, config.dilations, config.depths, nat.PRESETS)
    given = nat.dilated(7, "cls224", config.depths, nat.PRESETS)
    for level, side in enumerate((56, 28, 14, 7)):
        for word, published in zip(words[level], given[level], strict=True):
            found = word.at((side, side))
            assert found in (published.at((side, side)), (published.at((side, side)),) * 2)


@pytest.mark.parametrize("dilations", ["cls999", ((1,), (1,)), ((1,), (), (1,))])
def test_wrong_dilations_are_refused(dilations):
    with pytest.raises(ValueError, match="dilations must be"):
        nat.build(dataclasses.replace(SMALL, dilations=dilations))
