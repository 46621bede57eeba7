"""The rows of NAT and DiNAT: attention weights are weights, and stay within the pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vicinal.layers.attention import PatternAttention
from vicinal.layers.words import at
from vicinal.pattern import mask
from vicinal.recipes.shipped import sample, shipped
from vicinal.tour.classify import attended, show_dinat

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("layer", [0, 1])
def test_a_query_attends_to_the_keys_of_its_pattern_alone(layer):
    model = shipped("dinat_fashion_mnist")
    mixer = [module for module in model.task.model.modules() if isinstance(module, PatternAttention)][layer]
    image = torch.from_numpy(sample(model).images[3]).permute(2, 0, 1)
    weights = attended(model, mixer, image, (6, 7))
    allowed = mask(at(mixer.pattern, (14, 14)), (14, 14))[6, 7].numpy()
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert (weights[allowed] > 0).all()
    assert (weights[~allowed] == 0).all()
    assert np.count_nonzero(weights) == 9


def test_the_row_shows_an_accuracy_above_its_baseline(tmp_path):
    outcome = show_dinat(tmp_path)
    assert outcome.picture.read_bytes()[:4] == b"\x89PNG"
    assert outcome.number > outcome.baseline > 80
    assert "ms an image" in outcome.note
