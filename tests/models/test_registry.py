"""Names, overrides, and pretrained weights from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vicinal
from vicinal.models import loading, registry
from vicinal.models.layout import to_theirs
from vicinal.models.table import markdown

from . import published

TINY = {"depths": (1, 1, 1, 1), "dim": 16, "num_heads": (1, 1, 2, 4)}


def test_the_names_of_the_design_are_there():
    sizes = ("tiny", "small", "base", "large")
    names = {f"nat_{size}" for size in ("mini", *sizes[:3])} | {f"dinat_{size}" for size in ("mini", *sizes)}
    names |= {f"dinat_s_{size}" for size in sizes} | {f"swin_{size}" for size in sizes}
    names |= {f"{kind}_{size}" for kind in ("nat_isotropic", "dinat_isotropic", "vitrpb") for size in ("small", "base")}
    assert names <= set(vicinal.list_models())
    assert vicinal.list_models("*isotropic*") == sorted(name for name in names if "isotropic" in name)


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(ValueError, match="did you mean dinat_tiny"):
        vicinal.create_model("dinat_tinny")


def test_an_unknown_option_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no option colour; it has dim, .*kernel_size"):
        vicinal.create_model("nat_mini", colour=3)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_pretrained_from_a_file(ending, tmp_path):
    file = tmp_path / f"weights.{ending}"
    state = published.state(published.nat(64, (3, 4, 6, 5), 3))
    save_file(state, file) if ending == "safetensors" else torch.save({"model": state}, file)
    model = vicinal.create_model("nat_mini", pretrained=file)
    assert torch.equal(model.head.classifier.weight, state["head.weight"])
    fresh = vicinal.create_model("dinat_mini", pretrained=str(file), num_classes=7, dilations="max")
    assert fresh.head.classifier.weight.shape == (7, 512)
    assert torch.equal(fresh.head.norm.weight, state["norm.weight"])
    without = vicinal.create_model("nat_mini", pretrained=file, num_classes=0)
    assert without(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    wider = vicinal.create_model("nat_mini", pretrained=file, kernel_size=9)
    assert wider.stages[0].blocks[0].mixer.rpb.shape == (2, 17, 17)


def test_a_file_of_another_model_is_refused_with_its_keys(tmp_path):
    torch.save(published.state(published.nat(64, (3, 4, 6, 4), 3)), tmp_path / "weights.pth")
    with pytest.raises(
        loading.CheckpointMismatch, match=r"nat_mini from .*13 missing \(levels.3.blocks.4.norm1.weight"
    ):
        vicinal.create_model("nat_mini", pretrained=tmp_path / "weights.pth")


def test_pretrained_true_takes_the_first_published(monkeypatch):
    asked = []
    monkeypatch.setattr(
        registry.checkpoint, "find", lambda source: asked.append(source) or (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        vicinal.create_model("dinat_mini", pretrained=True)
    assert asked == ["https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth"]


def test_published_sources_name_layouts_and_options_that_exist():
    for name, family in registry.families().items():
        for one in family.published.get(name, ()):
            assert one.layout in family.layouts
            registry.config_of(name, **one.changes)


def test_the_table_of_models_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text() == markdown(), "run python -m vicinal.models.table > docs/models.md"


def test_our_own_files_come_back(tmp_path):
    model = vicinal.create_model("swin_tiny", num_classes=5, **TINY)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = vicinal.create_model("swin_tiny", num_classes=5, pretrained=tmp_path / "weights.pt", **TINY).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images), model.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(("given", "meant"), [("NAT-Mini", "nat_mini"), ("SWIN_TINY", "swin_tiny")])
def test_a_name_in_other_letters_is_answered_with_the_right_one(given, meant):
    with pytest.raises(ValueError, match=f"did you mean {meant}"):
        vicinal.create_model(given)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("swin_tiny", {"depths": (2, 2)}, r"one per stage: depths \(2, 2\), num_heads \(3, 6, 12, 24\)"),
        ("nat_mini", {"num_heads": (2, 4, 8, 16, 32)}, "one per stage"),
        ("dinat_mini", {"dilations": 2}, "dilations must be 4 lists"),
        ("dinat_mini", {"dilations": (1, 2, 1, 2)}, "dilations must be 4 lists"),
        ("dinat_mini", {"dilations": None}, "dilations must be 4 lists"),
        ("vitrpb_small", {"image_size": 7}, "image_size must hold a patch"),
        ("nat_isotropic_small", {"patterns": ()}, "patterns one pattern"),
        ("nat_mini", {"features_only": True, "stages": 1}, "stages must be rising numbers"),
    ],
)
def test_a_wrong_option_is_a_sentence(name, overrides, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        vicinal.create_model(name, **overrides)


def test_position_biases_of_grids_and_other_patterns_are_interpolated(tmp_path):
    maxvit = {"dims": (8, 16), "depths": (1, 1), "stem_dim": 8, "head_dim": 4}
    isotropic = {"dim": 24, "depth": 1}
    torch.save(vicinal.create_model("maxvit_tiny", **maxvit).state_dict(), tmp_path / "maxvit.pth")
    torch.save(vicinal.create_model("nat_isotropic_small", **isotropic).state_dict(), tmp_path / "isotropic.pth")
    larger = vicinal.create_model("maxvit_tiny", tmp_path / "maxvit.pth", size=8, **maxvit)
    assert larger.stages[0].blocks[0][1].mixer.rpb.shape[1:] == (15, 15)
    patterns = (vicinal.Near(9),)
    wider = vicinal.create_model("nat_isotropic_small", tmp_path / "isotropic.pth", patterns=patterns, **isotropic)
    assert wider.stages[0].blocks[0].mixer.rpb.shape[1:] == (17, 17)


def test_chosen_maps_take_their_norms_from_a_whole_backbone(tmp_path):
    whole = vicinal.create_model("nat_mini", features_only=True, use_norms=True, **TINY)
    torch.nn.init.constant_(whole.norms["1"].weight, 3.0)
    torch.save({f"backbone.{name}": tensor for name, tensor in whole.state_dict().items()}, tmp_path / "whole.pth")
    options = {"features_only": True, "use_norms": True, "stages": (1,), **TINY}
    assert vicinal.create_model("nat_mini", tmp_path / "whole.pth", **options).norms["1"].weight[0] == 3.0


def test_tensors_that_cannot_be_put_together_are_misshapen():
    model = vicinal.create_model("swin_tiny", **TINY)
    family = registry.families()["swin_tiny"]
    for layout in family.layouts.values():
        state = {name: torch.tensor(1.0) for name in to_theirs(layout, model.state_dict())}
        _, _, fit = loading.match(state, model, family)
        assert fit.misshapen
        assert registry.classes_of(state, family) is None


def test_the_lazy_names_are_listed():
    assert {"create_model", "list_models"} <= set(dir(vicinal))
