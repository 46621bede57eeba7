"""How the portable back end cuts up one problem: which tiles, in which order, with which masks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from vicinal.ops.packing import Layout, unpack_row
from vicinal.ops.tiled.tiles import TileSet
from vicinal.ops.tiling import AxisTiles, buckets, cut
from vicinal.pattern.bounds import Member
from vicinal.pattern.table import AxisTable

FORWARD_COSTS, BACKWARD_COSTS = (12.0, 300.0), (20.0, 1000.0)
"""Measured, in units of one score of one head: what a token of a tile costs to move, and what a tile costs besides."""

MOST_MASKED_SCORES = 1 << 22
"""Scores a single tile may have where its mask or its scores are held in memory."""

_TILE_SIZES = {
    1: (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    2: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 128, 256),
    3: (1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
}
"""Queries along an axis of a tile, tried for each rank."""


@dataclasses.dataclass(frozen=True)
class MemberPlan:
    """One union member on one grid: its sets of tiles."""

    member: Member
    sets: tuple[TileSet, ...]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One row of the packed tables: the grids it is for, and per group the plans of its members."""

    grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    groups: tuple[tuple[MemberPlan, ...], ...]


def choose_cut(member: Member, *, bounded: bool, masked: bool = False) -> tuple[AxisTiles, ...]:
    """The cut of every axis with the least modelled cost.

    A tile of Q queries and K keys costs `Q * K` scores, something for each token it moves, and something besides.
    With `bounded` (a backward, or a forward for autograd) a tile's scores are held in memory, and with `masked` its
    mask is in any case, so only tiles up to `MOST_MASKED_SCORES` are considered.

    >>> tiles = choose_cut(bounds(Window(7), (56, 56)).groups[0].members[0], bounded=True)
    >>> [(axis.num_tiles, axis.queries, axis.keys) for axis in tiles]
    [(8, 7, 7), (8, 7, 7)]
    """
    move, besides = BACKWARD_COSTS if bounded else FORWARD_COSTS
    best: tuple[float, tuple[AxisTiles, ...]] | None = None
    least: tuple[int, tuple[AxisTiles, ...]] | None = None
    for choice in itertools.product(*(_options(table, len(member)) for table in member)):
        queries, keys, tiles = (math.prod(sizes) for sizes in zip(*(size for size, _, _ in choice), strict=True))
        axes = tuple(axis for _, _, axis in choice)
        if least is None or queries * keys < least[0]:
            least = (queries * keys, axes)
        needs_mask = masked or not all(is_whole for _, is_whole, _ in choice)
        if (bounded or needs_mask) and queries * keys > MOST_MASKED_SCORES:
            continue
        cost = tiles * (queries * keys + move * (queries + keys) + besides)
        if best is None or cost < best[0]:
            best = (cost, axes)
    assert least is not None
    return best[1] if best is not None else least[1]


_Option: TypeAlias = tuple[tuple[int, int, int], bool, AxisTiles]


def _options(table: AxisTable, rank: int) -> list[_Option]:
    """Cuts of an axis worth comparing, each with its (queries, keys, tiles) and whether it needs no mask."""
    longest = -(-len(table) // table.step)
    found: dict[tuple[int, int], _Option] = {}
    for size in sorted({min(size, longest) for size in (*_TILE_SIZES[rank], longest)}):
        for aligned in (False, True):
            axis = cut(table, size, aligned=aligned)
            known = found.get((axis.queries, axis.keys))
            if known is None or axis.num_tiles < known[0][2]:
                sizes = (axis.queries, axis.keys, axis.num_tiles)
                found[axis.queries, axis.keys] = (sizes, bool(axis.is_whole.all()), axis)
    return list(found.values())


def plan_row(row: bytes, layout: tuple[int, ...], grid: tuple[int, ...], *, bounded: bool, biased: bool) -> RowPlan:
    """The plan of one row of packed tables; the same row is planned once."""
    return _plan_row(row, layout, grid, bounded, biased)


@functools.lru_cache(maxsize=64)
def _plan_row(row: bytes, layout: tuple[int, ...], grid: tuple[int, ...], bounded: bool, biased: bool) -> RowPlan:
    groups = unpack_row(np.frombuffer(row, dtype=np.int32), Layout.unpack(layout), grid)
    first = groups[0][0]
    return RowPlan(
        grid=tuple(len(table) for table in first),
        key_grid=tuple(table.length for table in first),
        groups=tuple(
            tuple(
                _plan_member(member, members[:number], bounded=bounded, biased=biased)
                for number, member in enumerate(members)
            )
            for members in groups
        ),
    )


def _plan_member(member: Member, earlier: Sequence[Member], *, bounded: bool, biased: bool) -> MemberPlan:
    tiles = choose_cut(member, bounded=bounded, masked=bool(earlier))
    sets = tuple(
        TileSet(axes, earlier, takes_bias=biased) for axes in itertools.product(*(buckets(axis) for axis in tiles))
    )
    return MemberPlan(member, sets)
