"""The row of StyleNAT: honest without weights, and with them the distances that were measured, of both alike."""

from __future__ import annotations

import json

import pytest
import torch

import vicinal
from vicinal.recipes import distances, shipped
from vicinal.tour.generate import show_stylenat
from vicinal.tour.page import _number
from vicinal.training.checkpoint import save_weights

pytest.importorskip("matplotlib")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in place of that of the library's weights."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(distances.read, "__defaults__", (tmp_path / "stylenat_fashion_mnist.json",))
    return tmp_path


def ship(folder):
    model = vicinal.create_model("stylenat_fashion32")
    save_weights(folder / "stylenat_fashion_mnist.safetensors", model.state_dict(), {})


def result(**changes):
    kept = {"extractor": "made up", "generated": 500}
    names = ("stylenat_fashion_mnist", "stylenat_local_fashion_mnist")
    runs = [{"recipe": name, "frechet": value, **kept} for name, value in zip(names, (12.345, 23.456), strict=True)]
    runs[1] |= changes
    return json.dumps({"runs": runs})


def test_without_weights_the_row_says_so(folder):
    outcome = show_stylenat(folder)
    assert outcome.picture.read_bytes()[:4] == b"\x89PNG"
    assert (outcome.number, outcome.baseline) == (None, None)
    assert _number(outcome.number) == "not measured"
    assert "untrained generator's noise" in outcome.note
    assert "not measured" in outcome.note


def test_with_weights_and_no_measurement_the_row_says_so(folder):
    ship(folder)
    outcome = show_stylenat(folder)
    assert outcome.number is None
    assert "trained by the recipe stylenat_fashion_mnist" in outcome.note
    assert "not measured" in outcome.note


def test_with_both_the_row_shows_both_distances_and_by_what(folder):
    ship(folder)
    (folder / "stylenat_fashion_mnist.json").write_text(result())
    outcome = show_stylenat(folder)
    assert (outcome.number, outcome.baseline) == (12.3, 23.5)
    assert "by made up, of 500 pictures each" in outcome.note
    assert f"images/s on {torch.get_num_threads()} thread" in outcome.note


def test_the_picture_is_the_same_each_time(folder):
    ship(folder)
    first = show_stylenat(folder).picture.read_bytes()
    assert show_stylenat(folder).picture.read_bytes() == first


def test_distances_of_unlike_measurements_are_not_shown(folder):
    path = folder / "result.json"
    path.write_text(result(extractor="another"))
    with pytest.raises(ValueError, match="not measured alike"):
        distances.read(path)
    path.write_text(json.dumps({"runs": json.loads(result())["runs"][:1]}))
    assert distances.read(path) is None
    assert distances.read(folder / "none.json") is None
