"""Our models under timm's entry points."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")

from vicinal.adapters import timm as adapter  # noqa: E402 - importing it registers
from vicinal.models import registry  # noqa: E402
from vicinal.models.layout import to_theirs  # noqa: E402

SMALL = {"dim": 16, "num_heads": (1, 1, 2, 4), "depths": (1, 1, 1, 1)}


def test_timm_gets_only_names_it_lacks():
    assert {"nat_tiny", "dinat_large", "dinat_s_base", "vitrpb_small", "cswin_tiny", "hornet_tiny"} <= set(
        adapter.REGISTERED
    )
    assert not [name for name in adapter.REGISTERED if name.startswith(("swin_", "convnext_", "davit_"))]
    for name in adapter.REGISTERED:
        assert timm.is_model(name)


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny"])
def test_create_model_is_ours(name):
    theirs = timm.create_model(name, num_classes=7, **SMALL).eval()
    ours = registry.create_model(name, num_classes=7, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(images), ours(images))
    torch.testing.assert_close(
        theirs.forward_head(theirs.forward_features(images), pre_logits=True), ours.embed(images)
    )
    theirs.reset_classifier(0)
    assert theirs(images).shape == (2, theirs.num_features)


def test_features_only():
    model = timm.create_model("dinat_mini", features_only=True, out_indices=(0, 2), **SMALL).eval()
    assert model.feature_info.channels() == [16, 64]
    assert model.feature_info.reduction() == [4, 16]
    assert [tuple(features.shape) for features in model(torch.randn(1, 3, 64, 96))] == [(1, 16, 16, 24), (1, 64, 4, 6)]
    assert not [name for name, _ in model.named_parameters() if "head" in name or "stages.3" in name]


def test_an_isotropic_model_has_one_feature_map():
    model = timm.create_model("nat_isotropic_small", features_only=True, dim=32, num_heads=2, depth=2)
    assert [tuple(features.shape) for features in model(torch.randn(1, 3, 64, 64))] == [(1, 32, 4, 4)]


@pytest.mark.parametrize("layout", ["published", "transformers", "vicinal"])
def test_local_weights_of_any_layout(layout, tmp_path):
    ours = registry.create_model("nat_mini", **SMALL).eval()
    family = registry.families()["nat_mini"]
    state = ours.state_dict() if layout == "vicinal" else to_theirs(family.layouts[layout], ours.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "weights.safetensors")
    model = timm.create_model(
        "nat_mini", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")}, **SMALL
    ).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), ours(images))


@pytest.mark.parametrize("name", ["nat_mini", "cswin_tiny", "vitrpb_small"])
def test_what_the_defaults_name_is_there(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    modules = dict(model.named_modules())
    assert isinstance(modules[model.default_cfg["first_conv"]], torch.nn.Conv2d)
    assert modules[model.default_cfg["classifier"]] is model.get_classifier()


def test_data_config_and_weight_decay():
    model = timm.create_model("dinat_mini", **SMALL)
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 224, 224)
    assert any("rpb" in name for name in model.no_weight_decay())
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
