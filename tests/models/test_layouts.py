"""Strict loads of published key sets, and the way back to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicinal.models import checkpoint, loading, registry
from vicinal.models.layout import Layout, rule, split, stacked, to_ours, to_theirs

from . import published, published_others

MINI, SMALL, LARGE = (3, 4, 6, 5), (3, 4, 18, 5), (2, 2, 18, 2)
# name, options, layout, entries
SETS = {
    "nat_mini": ({}, "published", lambda: published.nat(64, MINI, 3)),
    "nat_small": ({}, "published", lambda: published.nat(96, SMALL, 2, layer_scale=True)),
    "dinat_small": ({}, "published", lambda: published.nat(96, SMALL, 2)),
    "dinat_mini-k11": ({"kernel_size": 11}, "published", lambda: published.nat(64, MINI, 3, kernel=11)),
    "dinat_mini-hub": ({}, "transformers", lambda: published.dinat_hub(64, MINI, 3)),
    "nat_small-hub": ({}, "transformers", lambda: published.dinat_hub(96, SMALL, 2, layer_scale=True)),
    "nat_mini-hub": (
        {},
        "transformers nat",
        lambda: (
            ("nat." + name.removeprefix("dinat."), shape) if name.startswith("dinat.") else (name, shape)
            for name, shape in published.dinat_hub(64, MINI, 3)
        ),
    ),
    "dinat_s_tiny": ({}, "published", lambda: published.dinat_s(96, (2, 2, 6, 2))),
    "dinat_isotropic_small": ({}, "published", lambda: published.isotropic(384, 7)),
    "vitrpb_small": ({}, "published vitrpb", lambda: published.isotropic(384, 14, index_of=14)),
    "swin_tiny": ({}, "published", lambda: published.swin(96, (2, 2, 6, 2))),
    "swin_small-w12": ({"window_size": 12}, "published", lambda: published.swin(96, LARGE, window=12)),
    "convnext_tiny": ({}, "published", published_others.convnext),
    "hornet_tiny": ({}, "published", published_others.hornet),
    "poolformer_s12": ({}, "published", published_others.poolformer),
    "van_b0": ({}, "published", published_others.van),
    "cswin_tiny": ({}, "published", published_others.cswin),
    "pvt_tiny": ({}, "published", published_others.pvt),
    "litv2_small": ({}, "published", published_others.litv2),
    "swin_tiny-hub": ({}, "hub", lambda: published.swin_hub(96, (2, 2, 6, 2))),
}


def meta(name, **options):
    with torch.device("meta"):
        return registry.create_model(name, **options)


@pytest.mark.parametrize("key", SETS)
def test_published_keys_load_strictly_and_come_back(key):
    options, layout_name, entries = SETS[key]
    name = key.split("-")[0]
    family = registry.families()[name]
    layout = family.layouts[layout_name]
    theirs = published.state(entries())
    model = meta(name, **options)
    ours, fit = to_ours(layout, theirs, {own: tensor.shape for own, tensor in model.state_dict().items()})
    assert fit.is_exact, str(fit)
    model.load_state_dict(ours, strict=True, assign=True)
    back = to_theirs(layout, model.state_dict())
    assert set(back) == set(theirs)
    for there, tensor in theirs.items():
        if not there.endswith("index"):
            assert torch.equal(back[there], tensor), there
        else:
            assert back[there].shape == tensor.shape


@pytest.mark.parametrize("key", ["dinat_small", "vitrpb_small", "swin_tiny-hub"])
def test_the_layout_is_found(key):
    _, layout_name, entries = SETS[key]
    best = registry.identify(published.state(entries()))[0]
    assert (best.name, best.problems) == (key.split("-")[0], 0)
    assert best.layout == layout_name or key == "vitrpb_small"  # its two layouts differ only on the way back


def test_what_does_not_fit_is_named():
    theirs = published.state(published.nat(64, MINI, 3))
    theirs["levels.9.more"] = theirs.pop("levels.0.blocks.1.mlp.fc1.bias")
    theirs["levels.0.blocks.0.attn.rpb"] = torch.zeros(2, 11, 11)
    with pytest.raises(loading.CheckpointMismatch) as caught:
        loading.load(meta("nat_mini"), theirs, registry.families()["nat_mini"])
    fit = caught.value.fit
    assert fit.missing == ("levels.0.blocks.1.mlp.fc1.bias",)
    assert fit.extra == ("levels.9.more",)
    assert fit.misshapen == ("levels.0.blocks.0.attn.rpb: (2, 11, 11) for (2, 13, 13)",)
    for word in (*fit.missing, *fit.extra, *fit.misshapen):
        assert word in str(caught.value)


def test_detection_backbones_bring_their_norms():
    theirs = published.state(published.nat(64, MINI, 3))
    for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
        del theirs[name]
    for level in range(4):
        theirs |= published.state(published.vectors(f"norm{level}", 64 * 2**level))
    content = {"meta": {}, "state_dict": {f"backbone.{name}": tensor for name, tensor in theirs.items()}}
    content["state_dict"]["decode_head.conv.weight"] = torch.zeros(1)
    state = checkpoint.unwrap(content).state
    model = registry.create_model("nat_mini", features_only=True, use_norms=True)
    assert loading.load(model, state, registry.families()["nat_mini"]) == "published"
    assert torch.equal(model.norms["2"].weight, theirs["norm2.weight"])


def test_the_backbone_inside_transformers_oneformer_is_found():
    theirs = published.state(published.dinat_hub(64, MINI, 3))
    inside = {
        name.removeprefix("dinat."): tensor for name, tensor in theirs.items() if "encoder" in name or "embed" in name
    }
    for level in range(4):
        inside |= published.state(published.vectors(f"hidden_states_norms.stage{level + 1}", 64 * 2**level))
    whole = {f"model.pixel_level_module.encoder.{name}": tensor for name, tensor in inside.items()}
    state = checkpoint.unwrap({**whole, "model.task_encoder.x": torch.zeros(1)}).state
    model = registry.create_model("dinat_mini", features_only=True, use_norms=True)
    assert loading.load(model, state, registry.families()["dinat_mini"]).startswith("transformers")
    assert torch.equal(model.norms["3"].bias, inside["hidden_states_norms.stage4.bias"])
    query = inside["encoder.levels.1.layers.2.attention.self.query.weight"]
    assert torch.equal(model.stages[1].blocks[2].mixer.qkv.weight[:128], query)


def test_features_load_from_a_classifier_and_leave_the_rest():
    theirs = published.state(published.nat(64, MINI, 3))
    model = registry.create_model("nat_mini", features_only=True, stages=(0, 1), use_norms=True)
    loading.load(model, theirs, registry.families()["nat_mini"])
    assert torch.equal(model.stages[1].blocks[0].norm1.weight, theirs["levels.1.blocks.0.norm1.weight"])
    assert torch.equal(model.norms["0"].weight, torch.ones(64))
    theirs["unheard.of"] = torch.zeros(1)
    with pytest.raises(loading.CheckpointMismatch, match="unheard"):
        loading.load(model, theirs, registry.families()["nat_mini"])


def test_position_bias_grows_from_13_to_21():
    theirs = published.state(published.nat(64, MINI, 3))
    model = registry.create_model("dinat_mini", kernel_size=11)
    family = registry.families()["dinat_mini"]
    with pytest.raises(loading.CheckpointMismatch):
        loading.load(model, theirs, family)
    loading.load(model, theirs, family, resize_bias=True)
    table = theirs["levels.2.blocks.3.attn.rpb"]
    expected = nn.functional.interpolate(table[None], size=(21, 21), mode="bicubic")[0]
    torch.testing.assert_close(model.stages[2].blocks[3].mixer.rpb.detach(), expected)


def test_a_rule_for_every_conversion():
    layout = Layout(
        (
            rule("qkv.{rest}", ("q.{rest}", "k.{rest}", "v.{rest}"), split(1, 1, 1)),
            rule(("scale1", "scale2"), "scales", stacked()),
            rule("stages.{i}.x", "levels.{i-1}.y"),
        ),
        prefix="net.",
    )
    ours = {
        "qkv.weight": torch.randn(6, 2),
        "scale1": torch.ones(2),
        "scale2": torch.zeros(2),
        "stages.3.x": torch.ones(1),
    }
    theirs = to_theirs(layout, ours)
    assert set(theirs) == {"net.q.weight", "net.k.weight", "net.v.weight", "net.scales", "net.levels.2.y"}
    back, fit = to_ours(layout, theirs, {name: tensor.shape for name, tensor in ours.items()})
    assert fit.is_exact
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor)
