"""Measuring runs in one go: each by its own data, all by one extractor, into one file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vicinal.data import ImageFolders, Info
from vicinal.data.saving import save_png
from vicinal.recipes import distances
from vicinal.recipes.book import find
from vicinal.training.checkpoint import save_weights
from vicinal.training.written import to_plain

pytest.importorskip("PIL.Image")


class Brightness:
    """Mean and spread of pixels."""

    name = "mean and spread of pixels"

    def __call__(self, images):
        values = images.float().flatten(1)
        return torch.stack([values.mean(1), values.std(1)], 1)


def test_two_runs_are_measured_alike_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(distances, "open_extractor", lambda inception, size: Brightness())
    random = np.random.default_rng(0)
    folder = tmp_path / "data" / "test" / "made"
    folder.mkdir(parents=True)
    for number in range(8):
        save_png(random.integers(0, 256, (28, 28, 1), np.uint8), folder / f"{number}.png")
    (tmp_path / "data" / "train").symlink_to(tmp_path / "data" / "test")
    runs = []
    for name in (distances.GENERATOR, distances.BASELINE):
        recipe = replace(find(name, ()), data=ImageFolders(str(tmp_path / "data"), channels=1))
        pair = recipe.task.build(Info("made", ("a",), 1, (0.5,), (0.5,))).model
        (tmp_path / name).mkdir()
        written = {"recipe": json.dumps(to_plain(recipe))}
        save_weights(tmp_path / name / "model.safetensors", pair.state_dict(), written)
        runs.append(str(tmp_path / name))
    distances.main([*runs, "--count", "8", "--out", str(tmp_path / "result.json")])
    found = distances.read(tmp_path / "result.json")
    assert (found.extractor, found.pictures) == (Brightness.name, 8)
    assert found.ours > 0
    assert found.baseline > 0
    assert found.ours != found.baseline
