"""Counts, FLOPs, bias shapes and receptive fields against the mask written out and loops over it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vicinal.pattern import (
    AxisTable,
    Full,
    Grid,
    Halo,
    Near,
    Same,
    Window,
    bias_shape,
    bounds,
    count,
    draw,
    flops,
    heads,
    mask,
    receptive_field,
    union,
)

PATTERNS = [
    (Near(3), (17,)),
    (Near(4, dilation=2), (13,)),
    (Near(5), (4, 7)),
    (Near(3, border="wrap"), (5, 6)),
    ((Near(3), Window(4, shift=1)), (5, 9)),
    ((Full(causal=True), Near(3), Near(4)), (3, 4, 5)),
    ((Same(), Grid(2), Halo(2, 1)), (3, 4, 5)),
    (union((Same(), Full()), (Full(), Same())), (4, 7)),
    (union(Near(3), Near(3, dilation=2), Near(5, border="crop")), (11,)),
    (union(Near(3), (Full(), Same(), Same()), Near(3)), (3, 4, 2)),
    (union(Near(3), Near(3)), (6, 5)),
    (heads(Near(3), Full()), (4, 5)),
    (heads((Full(), Window(2)), (Window(2), Full())), (4, 6)),
    (heads(Same(), union(Near(3), Window(4)), Grid(3)), (9,)),
]

each_pattern = pytest.mark.parametrize(("pattern", "grid"), PATTERNS, ids=lambda value: f"{value}")


def sees_by_axes(pattern: tuple, query: tuple[int, ...], key: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether a query sees a key under one kind per axis, one axis after the other."""
    return all(
        AxisTable.of(kind, length).mask()[at, to]
        for kind, at, to, length in zip(pattern, query, key, grid, strict=True)
    )


@pytest.mark.parametrize(
    ("kinds", "grid"),
    [
        ((Near(3), Window(2)), (3, 5)),
        ((Full(causal=True), Near(2)), (4, 3)),
        ((Same(), Near(3), Window(2, shift=1)), (2, 3, 4)),
    ],
    ids=lambda value: f"{value}",
)
def test_mask_is_the_product_over_the_axes_in_their_order(kinds, grid):
    seen = mask(kinds, grid)
    assert seen.shape == (*grid, *grid)
    assert seen.dtype == torch.bool
    places = list(itertools.product(*map(range, grid)))
    for query, key in itertools.product(places, places):
        assert bool(seen[(*query, *key)]) == sees_by_axes(kinds, query, key, grid)


def test_mask_of_two_grids_has_the_axes_of_both():
    seen = mask((Near(3), Full()), (4, 3), (8, 5))
    assert seen.shape == (4, 3, 8, 5)
    assert seen.sum().item() == 4 * 3 * 3 * 5


def test_mask_of_heads_has_one_more_axis_and_that_of_a_union_none():
    left, right = (Full(), Window(2)), (Window(2), Full())
    expected = torch.stack([mask(left, (4, 6)), mask(right, (4, 6))])
    assert (mask(heads(left, right), (4, 6)) == expected).all()
    assert (mask(union(left, right), (4, 6)) == expected.any(0)).all()
    assert (mask(heads(left, union(left, right)), (4, 6))[1] == expected.any(0)).all()


@each_pattern
def test_count_equals_the_sum_of_the_mask(pattern, grid):
    seen = mask(pattern, grid)
    assert count(pattern, grid) == int(seen.sum())
    assert type(count(pattern, grid)) is int
    groups = len(bounds(pattern, grid).groups)
    assert count(pattern, grid, heads=2 * groups) == 2 * int(seen.sum())
    assert flops(pattern, grid, head_dim=3, value_dim=5) == 2 * int(seen.sum()) * (3 + 5)


@pytest.mark.parametrize("query_length", [1, 4, 7])
@pytest.mark.parametrize("key_length", [1, 3, 12])
def test_count_on_two_grids_equals_the_sum_of_the_mask(query_length, key_length):
    for pattern in (Near(3), Near(4, border="crop"), Full(), union(Near(3), Near(5))):
        seen = mask(pattern, (query_length, 3), (key_length, 3))
        assert count(pattern, (query_length, 3), (key_length, 3)) == int(seen.sum())


@given(
    st.lists(
        st.tuples(*[st.sampled_from([Near(3), Near(2, 2), Window(3, 1), Same(), Full(), Halo(2, 1)])] * 3),
        min_size=1,
        max_size=4,
    ),
    st.tuples(*[st.integers(1, 5)] * 3),
)
def test_count_of_any_union_counts_each_pair_once(members, grid):
    seen = mask(union(*members), grid)
    assert (seen == torch.stack([mask(member, grid) for member in members]).any(0)).all()
    assert count(union(*members), grid) == int(seen.sum())


def test_count_weighs_each_group_by_its_heads():
    near, full = count(Near(3), (8,)), count(Full(), (8,))
    assert (near, full) == (24, 64)
    assert count(heads(Near(3), Full()), (8,)) == near + full
    assert count(heads(Near(3), Full()), (8,), heads=6) == 3 * near + 3 * full
    assert count(heads(Near(3), Full(), sizes=(1, 3)), (8,)) == near + 3 * full
    assert count(heads(Near(3), Full(), sizes=(1, 3)), (8,), heads=4) == near + 3 * full
    with pytest.raises(ValueError, match="is for 4 heads, the query has 5"):
        count(heads(Near(3), Full(), sizes=(1, 3)), (8,), heads=5)
    with pytest.raises(ValueError, match="3 heads do not divide into 2"):
        count(heads(Near(3), Full()), (8,), heads=3)
    for nonsense in (0, -2, 1.5, True):
        with pytest.raises(ValueError, match="count: heads must be"):
            count(Near(3), (8,), heads=nonsense)


def test_count_of_a_video_needs_no_mask_of_it():
    tokens = 30 * 48 * 80
    assert count((Near(18), Near(24), Near(24)), (30, 48, 80)) == tokens * 18 * 24 * 24
    assert count(Full(), (30, 48, 80), heads=24) == 24 * tokens**2  # beyond 32 bits


def test_flops_are_four_per_pair_and_channel_and_two_and_a_half_times_that_backward():
    pairs = 56 * 56 * 49
    assert flops(Near(7), (56, 56), head_dim=32, heads=2) == 2 * pairs * 4 * 32 == 39_337_984
    assert flops(Near(7), (56, 56), head_dim=32, heads=2, batch=3) == 3 * 39_337_984
    assert flops(Near(7), (56, 56), head_dim=32, heads=2, backward=True) == 98_344_960
    assert flops(Near(7), (56, 56), head_dim=32, value_dim=64) == 2 * pairs * (32 + 64)
    assert flops(Near(1), (1,), head_dim=1, value_dim=2, backward=True) == 15  # exact, no rounding
    assert flops(Near(3), (4,), (8,), head_dim=2) == 4 * 3 * 4 * 2


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (Near(7), (13, 13)),
        ((Near(7), Near(5, dilation=2)), (13, 9)),
        (Near(30), (59, 59)),
        (Window(4, shift=2), (7, 7)),
        (Grid(4), (7, 7)),
        (Halo(4, 1), (9, 9)),
        (Full(), (23, 31)),
        (Same(), (1, 1)),
        ((Full(causal=True), Same()), (23, 1)),
        (heads(Near(7), (Full(), Window(4))), ((13, 13), (23, 7))),
        (heads(Near(3), Near(3)), ((5, 5), (5, 5))),
        (union(Near(7)), (13, 13)),
    ],
    ids=repr,
)
def test_bias_shape_is_that_of_the_table_per_axis(pattern, shape):
    assert bias_shape(pattern, (12, 16)) == shape
    table = bounds(pattern, (12, 16))
    assert bias_shape(table) == shape
    assert bias_shape(table.slice(0, 3, 5).shift(1, 2, 9)) == shape


def test_bias_shape_on_two_grids_follows_the_keys():
    assert bias_shape((Full(), Near(3)), (4, 5), (8, 10)) == (15, 5)


def test_bias_is_refused_where_a_key_has_no_single_place():
    for pattern in (union(Near(3), Full()), heads(Near(3), union(Same(), Full()))):
        with pytest.raises(ValueError, match="a union takes no bias"):
            bias_shape(pattern, (8,))
    with pytest.raises(ValueError, match="no relative positions"):
        bias_shape(bounds(Near(3), (8,)).transpose())


def reach(layers: list, grid: tuple[int, ...]) -> np.ndarray:
    """Which inputs reach which outputs, by walking back from each output, one layer after the other."""
    places = list(itertools.product(*map(range, grid)))
    seen = []
    for layer in layers:
        layer_mask = mask(layer, grid).numpy()
        groups = layer_mask[None] if layer_mask.ndim == 2 * len(grid) else layer_mask
        seen.append(
            {query: {tuple(key) for key in np.argwhere(groups[(slice(None), *query)].any(0))} for query in places}
        )
    field = np.zeros((*grid, *grid), dtype=bool)
    for output in places:
        frontier = {output}
        for layer in reversed(seen):
            frontier = set().union(*(layer[query] for query in frontier))
        for key in frontier:
            field[(*output, *key)] = True
    return field


@pytest.mark.parametrize(
    ("layers", "grid"),
    [
        ([Near(3)], (9,)),
        ([Near(3), Near(3)], (9,)),
        ([Near(3), Near(3, dilation=3)], (19,)),
        ([Near(3), Near(3, dilation=2), Near(3), Near(3, dilation=4)], (13,)),
        ([Near(3, causal=True), Window(4)], (11,)),
        ([Window(4), Near(3, causal=True)], (11,)),
        ([Window(3), Window(3, shift=1)], (6, 7)),
        ([Window(2), Grid(2)], (4, 6)),
        ([(Same(), Near(3)), (Near(3), Same())], (4, 5)),
        ([heads((Full(), Window(2)), (Window(2), Full()))] * 2, (4, 4)),
        ([heads(Near(3), Near(3, dilation=2)), Window(4)], (13,)),
        ([union((Same(), Full()), (Full(), Same())), Same()], (3, 4)),
        ([Near(3), union(Same(), Window(2))], (4, 5)),
        ([Near(3), heads(Full(causal=True), Same()), Near(3)], (2, 3, 3)),
    ],
    ids=lambda value: f"{value}",
)
def test_receptive_field_equals_walking_back_through_the_layers(layers, grid):
    field = receptive_field(layers, grid)
    assert field.dtype == torch.bool
    assert (field.numpy() == reach(layers, grid)).all()


def test_receptive_field_of_dinat_covers_an_axis_where_nat_does_not():
    local = receptive_field([Near(7)] * 4, (56,))
    assert int(local[28].sum()) == 4 * 6 + 1
    alternating = receptive_field([Near(7), Near(7, dilation=8)] * 2, (56,))
    assert bool(alternating.all())


def test_receptive_field_takes_one_pattern_or_one_per_layer():
    pair = (Near(3), Window(2))
    assert (receptive_field(pair, (4, 6)) == mask(pair, (4, 6))).all()
    assert (receptive_field(heads(Near(3), Full()), (5,)) == mask(heads(Near(3), Full()), (5,)).any(0)).all()
    as_list = receptive_field([pair, Near(3)], (4, 6))
    assert (receptive_field((pair, Near(3)), (4, 6)) == as_list).all()
    assert not (receptive_field([Near(3), pair], (4, 6)) == as_list).all(), "the first layer comes first"
    with pytest.raises(ValueError, match="the list of patterns is empty"):
        receptive_field([], (4,))
    with pytest.raises(ValueError, match="grid is needed"):
        receptive_field([Near(3)])


def test_receptive_field_of_two_grids_reads_the_first_layer_from_the_key_grid():
    field = receptive_field([Near(3), Near(3)], (5,), (10,))
    expected = (mask(Near(3), (5,)).float() @ mask(Near(3), (5,), (10,)).float()) > 0
    assert field.shape == (5, 10)
    assert (field == expected).all()


@each_pattern
def test_bounds_stand_wherever_a_pattern_does(pattern, grid):
    table = bounds(pattern, grid)
    for argument in ((), (grid,), (grid, grid), (list(grid), None)):
        assert bounds(table, *argument) is table
        assert (mask(table, *argument) == mask(pattern, grid)).all()
        assert count(table, *argument) == count(pattern, grid)
        assert flops(table, *argument, head_dim=4) == flops(pattern, grid, head_dim=4)
        assert draw(table, *argument) == draw(pattern, grid)
        assert (receptive_field(table, *argument) == receptive_field(pattern, grid)).all()
    assert (receptive_field([table, table]) == receptive_field([pattern, pattern], grid)).all()


@pytest.mark.parametrize("function", [bounds, mask, count, bias_shape, draw, receptive_field])
def test_bounds_refuse_another_grid(function):
    table = bounds(Near(3), (8,), (9,))
    assert function(table, (8,), (9,)) is not None
    with pytest.raises(ValueError, match=r"this Bounds has grid \(8,\), got \(9,\)"):
        function(table, (9,))
    with pytest.raises(ValueError, match=r"this Bounds has key_grid \(9,\), got \(8,\)"):
        function(table, (8,), (8,))
    with pytest.raises(ValueError, match="grid must be a tuple of 1 to 3 axis lengths, got 8"):
        function(table, 8)


def test_sliced_and_transposed_bounds_are_counted_as_they_are():
    table = bounds(Near(3), (6, 8)).slice(0, 1, 4).shift(1, 2, 5)
    seen = mask(Near(3), (6, 8))[1:4, :, :, 2:7]
    assert (mask(table) == seen).all()
    assert count(table) == int(seen.sum())
    assert (mask(table.transpose()) == seen.permute(2, 3, 0, 1)).all()
    assert count(table.transpose()) == int(seen.sum())
