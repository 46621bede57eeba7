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


@pytest.mark.parametrize(("layer", "length"), [(0, 14), (1, 7), (2, 7)])
def test_a_query_attends_to_the_keys_of_its_pattern_alone(layer, length):
    model = shipped("dinat_fashion_mnist")
    mixer = [module for module in model.task.model.modules() if isinstance(module, PatternAttention)][layer]
    image = torch.from_numpy(sample(model).images[3]).permute(2, 0, 1)
    weights, query = attended(model, mixer, image, (12, 14))
    assert query == (12 * length // 28, length // 2)
    allowed = mask(at(mixer.pattern, (length, length)), (length, length))[query].numpy()
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert (weights[allowed] > 0).all()
    assert (weights[~allowed] == 0).all()
    assert np.count_nonzero(weights) == 9


def test_the_row_shows_an_accuracy_above_its_baseline(tmp_path):
    outcome = show_dinat(tmp_path)
    assert outcome.picture.read_bytes()[:4] == b"\x89PNG"
    assert outcome.number > outcome.baseline > 80
    assert "ms an image" in outcome.note
