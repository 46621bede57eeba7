"""Multi-scale deformable attention against its definition, a loop over single places."""

from __future__ import annotations

import math

import pytest
import torch

from vicinal.layers import multiscale
from vicinal.layers.multiscale import MultiScaleDeformableAttention, centers, sum_of_samples

GRIDS = [(3, 5), (1, 7), (6, 2)]


def problem(dtype=torch.float64, batch=2, queries=4, heads=3, points=2):
    torch.manual_seed(0)
    tokens = sum(rows * columns for rows, columns in GRIDS)
    value = torch.randn(batch, tokens, heads, 5, dtype=dtype)
    places = torch.rand(batch, queries, heads, len(GRIDS), points, 2, dtype=dtype) * 2 - 0.5  # outside too
    weights = torch.randn(batch, queries, heads, len(GRIDS), points, dtype=dtype)
    return value, places, weights


def by_definition(value, places, weights):
    out = torch.zeros(*places.shape[:3], value.shape[-1], dtype=value.dtype)
    start = 0
    for level, (rows, columns) in enumerate(GRIDS):
        for index in torch.cartesian_prod(*map(torch.arange, (*places.shape[:3], places.shape[4]))):
            image, query, head, point = index.tolist()
            column, row = (places[image, query, head, level, point] * torch.tensor([columns, rows]) - 0.5).tolist()
            for i in (math.floor(row), math.floor(row) + 1):
                for j in (math.floor(column), math.floor(column) + 1):
                    if 0 <= i < rows and 0 <= j < columns:
                        share = (1 - abs(row - i)) * (1 - abs(column - j))
                        pixel = value[image, start + i * columns + j, head]
                        out[image, query, head] += weights[image, query, head, level, point] * share * pixel
        start += rows * columns
    return out.flatten(2)


@pytest.mark.parametrize("way", ["_by_rows", "_by_level"])
def test_both_ways_are_the_definition(way):
    value, places, weights = problem()
    torch.testing.assert_close(getattr(multiscale, way)(value, GRIDS, places, weights), by_definition(*problem()))


def test_both_ways_have_the_same_gradients():
    gradients = []
    for way in (multiscale._by_rows, multiscale._by_level):
        inputs = [tensor.requires_grad_() for tensor in problem()]
        way(inputs[0], GRIDS, inputs[1], inputs[2]).sin().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    value, places, weights = problem()
    exact = sum_of_samples(value, GRIDS, places, weights)
    found = sum_of_samples(value.to(dtype), GRIDS, places.float(), weights.to(dtype))
    assert found.dtype == dtype
    assert (found - exact).norm() < 0.03 * exact.norm()


def test_places_far_outside_read_nothing():
    value, places, weights = problem()
    assert not sum_of_samples(value, GRIDS, places + 1e12, weights).any()


def test_a_place_that_is_no_number_gives_no_number():
    value, places, weights = problem()
    exact = sum_of_samples(value, GRIDS, places, weights)
    places[1, 2, 0, 1, 0, 1] = float("nan")
    found = sum_of_samples(value, GRIDS, places, weights)
    assert found[1, 2, :5].isnan().all()
    found[1, 2, :5] = exact[1, 2, :5]
    torch.testing.assert_close(found, exact)


def test_the_start_looks_each_heads_own_way():
    layer = MultiScaleDeformableAttention(16, num_heads=4, num_levels=3, num_points=2)
    starts = layer.offsets.bias.detach().unflatten(0, (4, 3, 2, 2))
    assert starts[0, 0].tolist() == [[1, 0], [2, 0]]
    torch.testing.assert_close(starts[1, 2], torch.tensor([[0.0, 1.0], [0.0, 2.0]]), atol=1e-6, rtol=0)
    tokens = torch.randn(1, 34, 16)
    # all weights are equal, so a constant map stays as it is but where places fall outside
    out = layer(tokens, torch.ones(1, 34, 16), centers(GRIDS), GRIDS)
    assert out.shape == (1, 34, 16)


def test_wrong_grids_are_a_sentence():
    layer = MultiScaleDeformableAttention(16, num_heads=4)
    with pytest.raises(ValueError, match="grids must have 3 maps"):
        layer(torch.zeros(1, 4, 16), torch.zeros(1, 4, 16), centers([(2, 2)]), [(2, 2)])
    with pytest.raises(ValueError, match="multiple of num_heads"):
        MultiScaleDeformableAttention(10, num_heads=4)
