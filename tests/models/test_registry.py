"""Names, overrides, and pretrained weights from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vicinal
from vicinal.models import loading, registry
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
