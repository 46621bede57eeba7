"""Packed tables: nothing is lost on the way to the operator, and each sample of a padded batch gets its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vicinal.ops.api import pack_whole_tables
from vicinal.ops.packing import Layout, layout_of, layout_of_padded, pack_sample_tables, pack_tables, unpack_row
from vicinal.pattern import (
    AxisTable,
    Bounds,
    Full,
    Grid,
    Halo,
    Near,
    Same,
    Window,
    bias_shape,
    bounds,
    heads,
    union,
)

from .problems import CRISS_CROSS, HYDRA, MIXED

TABLES: dict[str, Bounds] = {
    "17": bounds(Near(5, dilation=2), (17,)),
    "12-wrap": bounds(Near(5, dilation=2, border="wrap"), (12,)),
    "9x13": bounds((Window(4, shift=1), Halo(3, 2)), (9, 13)),
    "4x6x5": bounds((Full(causal=True), Grid(3), Same()), (4, 6, 5)),
    "9x7-criss-cross": bounds(CRISS_CROSS, (9, 7)),
    "9x7-hydra": bounds(HYDRA, (9, 7)),
    "12x8-mixed": bounds(MIXED, (12, 8)),
    "14x10-on-5x4": bounds(Near(3), (14, 10), (5, 4)),
    "sliced": bounds(heads(Near(3), Near(5)), (20,)).slice(0, 3, 11).shift(0, 1, 14),
    "transposed": bounds((Near(4, stride=2), Window(3)), (9, 8)).transpose(),
}

by_table = pytest.mark.parametrize("name", TABLES)


def num_heads(table: Bounds) -> int:
    return sum(group.heads or 2 for group in table.groups)


def assert_same_table(found: AxisTable, wanted: AxisTable) -> None:
    assert (found.start[found.count > 0] == wanted.start[wanted.count > 0]).all()
    assert (found.count == wanted.count).all()
    assert (found.step, found.length, found.wraps, len(found)) == (
        wanted.step,
        wanted.length,
        wanted.wraps,
        len(wanted),
    )
    if found.bias_length is not None:
        assert found.bias_length == wanted.bias_length
        assert (found.center == wanted.center).all()


@by_table
def test_packed_tables_come_back_as_they_were(name: str) -> None:
    table = TABLES[name]
    packed = pack_tables(table)
    assert packed.dtype == np.int32
    assert len(packed) == 1
    groups = unpack_row(packed[0], layout_of(table, num_heads(table)), table.grid)
    for members, group in zip(groups, table.groups, strict=True):
        for member, wanted in zip(members, group.members, strict=True):
            for axis, wanted_axis in zip(member, wanted, strict=True):
                assert_same_table(axis, wanted_axis)


@by_table
def test_layout_comes_back_from_its_numbers(name: str) -> None:
    layout = layout_of(TABLES[name], num_heads(TABLES[name]))
    assert all(type(number) is int for number in layout.packed)
    assert Layout.unpack(layout.packed) == layout
    assert Layout.unpack(list(layout.packed)) == layout


@by_table
def test_layout_tells_steps_counts_windows_and_bias(name: str) -> None:
    table = TABLES[name]
    layout = layout_of(table, num_heads(table))
    assert layout.heads == num_heads(table)
    for place, group in zip(layout.groups, table.groups, strict=True):
        assert place.window == sum(int(np.prod([axis.count.max() for axis in member])) for member in group.members)
        for own, member in zip(place.members, group.members, strict=True):
            for axis, wanted in zip(own, member, strict=True):
                assert (axis.step, axis.wraps, axis.most) == (wanted.step, wanted.wraps, wanted.count.max())
        if len(group.members) > 1 or any(axis.bias_length is None for axis in group.members[0]):
            assert place.bias_shape is None
        else:
            assert place.bias_shape == tuple(axis.bias_length for axis in group.members[0])


def test_layout_of_one_group_has_the_public_bias_shape() -> None:
    pattern: Any = (Near(5, dilation=2), Halo(3, 1), Window(4))
    layout = layout_of(bounds(pattern, (7, 8, 9)), 3)
    assert layout.groups[0].bias_shape == bias_shape(pattern, (7, 8, 9)) == (9, 7, 7)
    assert layout.bias_sizes == (3 * 9 * 7 * 7,)


PADDED: list[tuple[Any, tuple[int, ...], list[list[int]]]] = [
    (Near(5), (11,), [[11], [4], [1]]),
    (Near(4, dilation=3, stride=2), (13,), [[13], [7], [2]]),
    (Near(4, dilation=2, stride=3, causal=True), (13,), [[13], [8], [1]]),
    (Near(5, border="crop"), (9,), [[9], [3]]),
    (Near(5, dilation=2, border="wrap"), (12,), [[12], [8], [2]]),
    (Window(4, shift=2), (11,), [[11], [5], [4], [3]]),
    (Halo(3, 2), (11,), [[11], [5], [1]]),
    (Grid(3), (12,), [[12], [9], [3]]),
    (Full(causal=True), (6,), [[6], [2]]),
    ((Same(), Full()), (4, 5), [[4, 5], [1, 5], [3, 1]]),
    (MIXED, (7, 9), [[7, 9], [7, 2], [1, 1], [5, 6]]),
    (union(Near(3), Near(3, dilation=2)), (9,), [[9], [4]]),
    (heads(Near(3), Window(2), sizes=(1, 3)), (4, 3, 5), [[4, 3, 5], [2, 3, 1]]),
]


@pytest.mark.parametrize(
    ("pattern", "grid", "grids"),
    PADDED,
    ids=lambda value: repr(value).replace(" ", "") if not isinstance(value, list) else "",
)
def test_tables_of_each_sample_are_those_of_its_own_grid(
    pattern: Any, grid: tuple[int, ...], grids: list[list[int]]
) -> None:
    rows = pack_sample_tables(pattern, grid, torch.tensor(grids))
    assert rows.dtype == torch.int32
    layout = layout_of_padded(pattern, grid, num_heads(bounds(pattern, grid)))
    assert rows.shape == (len(grids), pack_tables(bounds(pattern, grid)).shape[1])
    assert Layout.unpack(layout.packed) == layout
    for row, own in zip(rows.numpy(), grids, strict=True):
        wanted = bounds(pattern, own)
        for members, group in zip(unpack_row(row, layout, grid), wanted.groups, strict=True):
            for member, wanted_member in zip(members, group.members, strict=True):
                for axis, wanted_axis in zip(member, wanted_member, strict=True):
                    assert (axis.start == wanted_axis.start).all()
                    assert (axis.count == wanted_axis.count).all()
                    assert (axis.step, axis.length, axis.wraps) == (
                        wanted_axis.step,
                        wanted_axis.length,
                        wanted_axis.wraps,
                    )


@pytest.mark.parametrize(("pattern", "grid", "grids"), PADDED[:9:2], ids=lambda value: "")
def test_queries_beyond_a_sample_see_nothing(pattern: Any, grid: tuple[int, ...], grids: list[list[int]]) -> None:
    (length,) = grid
    rows = pack_sample_tables(pattern, grid, torch.tensor(grids))
    header, counts = rows[:, :4], rows[:, 4 + length : 4 + 2 * length]
    for (own,), head, count in zip(grids, header.tolist(), counts, strict=True):
        assert head[1] == head[3] == own
        assert (count[:own] > 0).all()
        assert not count[own:].any()


def test_tables_of_samples_are_made_without_looking_at_their_sizes() -> None:
    """On the meta device there is nothing to look at: what synchronizes there raises."""
    for pattern, grid, grids in PADDED:
        made = pack_sample_tables(pattern, grid, torch.tensor(grids, device="meta"))
        assert made.device.type == "meta"
        assert made.shape == pack_sample_tables(pattern, grid, torch.tensor(grids)).shape


@pytest.mark.parametrize("key_grid", [(9,), (4, 5), (2, 3, 4)], ids=lambda grid: "x".join(map(str, grid)))
def test_extra_queries_see_the_whole_grid_of_their_sample(key_grid: tuple[int, ...]) -> None:
    rank = len(key_grid)
    own = [list(key_grid), [1] * rank, [max(length - 1, 1) for length in key_grid]]
    grid = (3, *(1,) * (rank - 1))
    rows = pack_whole_tables(torch.tensor(own), key_grid, grid)
    layout = layout_of(bounds(Full(), grid, key_grid), 2)
    for row, sizes in zip(rows.numpy(), own, strict=True):
        ((member,),) = unpack_row(row, layout, grid)
        for axis, length, queries in zip(member, sizes, grid, strict=True):
            assert axis.mask().shape == (queries, length)
            assert axis.mask().all()
