"""What `vicinal show` looks at: the keys of one query, how far a stack of layers reaches, and the classes of tiles."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vicinal.ops.tiling import Visits, classify, cut, visits
from vicinal.pattern import AnyPattern, Group, Heads, bounds
from vicinal.pattern.draw import check_query
from vicinal.pattern.numbers import as_integer
from vicinal.pattern.table import AxisTable

Booleans = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Seen:
    """The keys `[*key_grid]` that one query sees under one pattern, or under one group of its heads."""

    name: str
    query: tuple[int, ...]
    keys: Booleans
    has_own_place: bool
    """Whether queries and keys stand on one grid, so that the query's place can be marked."""


def seen(
    pattern: AnyPattern,
    grid: Sequence[int],
    key_grid: Sequence[int] | None = None,
    query: Sequence[int] | None = None,
) -> list[Seen]:
    """What one query (None: the middle one) sees; one entry per group of `heads`.

    >>> [(view.name, int(view.keys.sum())) for view in seen(heads(Near(7), (Same(), Full())), (20, 30))]
    [('Near(7)', 49), ('(Same(), Full())', 30)]
    """
    table = bounds(pattern, grid, key_grid)
    place = check_query(query, table.grid)
    start = _only(place, table.grid)
    is_one_grid = table.grid == table.key_grid
    names = group_names(pattern, len(table.groups))
    return [
        Seen(name, place, _spread(group, start), is_one_grid) for name, group in zip(names, table.groups, strict=True)
    ]


def group_names(pattern: AnyPattern, groups: int) -> list[str]:
    """A name for each head group: how its pattern is written, where that is known.

    >>> group_names(heads(Near(3), Full()), 2)
    ['Near(3)', 'Full()']
    """
    if isinstance(pattern, Heads):
        return [repr(group) for group in pattern.groups]
    return [repr(pattern)] if groups == 1 else [f"group {number}" for number in range(groups)]


@dataclasses.dataclass(frozen=True)
class Reach:
    """How deep a stack must be for each key: `layers[key]` layers, or 0 where the whole stack does not reach it."""

    names: tuple[str, ...]
    query: tuple[int, ...]
    layers: Integers
    has_own_place: bool


def reach(
    schedule: Sequence[AnyPattern],
    grid: Sequence[int],
    key_grid: Sequence[int] | None = None,
    query: Sequence[int] | None = None,
) -> Reach:
    """The receptive field of one query over a stack of layers, first layer first.

    With `key_grid` the first layer reads from that grid. Only the chosen query is followed, so that grids may be
    large; `vicinal.pattern.receptive_field` answers for all queries at once.

    >>> reach([Near(3), Near(3, dilation=3)], (15,)).layers.tolist()
    [0, 0, 0, 2, 2, 2, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    """
    if not schedule:
        raise ValueError("schedule must name at least one pattern")
    tables = [bounds(layer, grid, key_grid if depth == 0 else None) for depth, layer in enumerate(schedule)]
    place = check_query(query, tables[0].grid)
    layers = np.zeros(tables[0].key_grid, dtype=np.int64)
    for depth in range(1, len(tables) + 1):
        reached = _only(place, tables[0].grid)
        for table in reversed(tables[:depth]):
            reached = functools.reduce(operator.or_, (_spread(group, reached) for group in table.groups))
        layers[reached & (layers == 0)] = depth
    is_one_grid = tables[0].grid == tables[0].key_grid
    return Reach(tuple(map(repr, schedule)), place, layers, is_one_grid)


def _only(place: tuple[int, ...], grid: tuple[int, ...]) -> Booleans:
    chosen = np.zeros(grid, dtype=np.bool_)
    chosen[place] = True
    return chosen


def _spread(group: Group, queries: Booleans) -> Booleans:
    """All keys that any of the queries sees: axis by axis, since a member is a product of its axes."""
    found = []
    for member in group.members:
        keys = queries
        for axis, table in enumerate(member):
            keys = np.moveaxis(_along(table, np.moveaxis(keys, axis, 0)), 0, axis)
        found.append(keys)
    return functools.reduce(operator.or_, found)


def _along(table: AxisTable, queries: Booleans) -> Booleans:
    """The keys `[length, ...]` of one axis that any of the queries `[len(table), ...]` sees."""
    keys = np.zeros((table.length, *queries.shape[1:]), dtype=np.bool_)
    for query in np.flatnonzero(queries.reshape(len(table), -1).any(1)):
        places = (table.start[query] + table.step * np.arange(table.count[query])) % table.length
        keys[places] |= queries[query]
    return keys


@dataclasses.dataclass(frozen=True)
class TileMap:
    """One pattern (a head group's union member) cut into tiles: the class of each pair of tiles, and the work.

    `axes` holds an int8 matrix per axis, `[query tiles, key tiles]`, of the classes in `vicinal.ops.tiling`.
    """

    name: str
    axes: tuple[npt.NDArray[np.int8], ...]
    work: Visits

    @property
    def shape(self) -> tuple[int, int]:
        """Query tiles and key tiles, all axes together."""
        queries, keys = (math.prod(sizes) for sizes in zip(*(axis.shape for axis in self.axes), strict=True))
        return queries, keys

    def pairs(self) -> npt.NDArray[np.int8]:
        """The class of every (query tile, key tile) pair: of what the axes say, the emptiest."""
        whole = self.axes[0]
        for axis in self.axes[1:]:
            joined = np.minimum(whole[:, None, :, None], axis[None, :, None, :])
            whole = joined.reshape(whole.shape[0] * axis.shape[0], whole.shape[1] * axis.shape[1])
        return whole


def tile_maps(
    pattern: AnyPattern,
    grid: Sequence[int],
    key_grid: Sequence[int] | None = None,
    *,
    query_tile: Sequence[int],
    key_tile: Sequence[int] | None = None,
) -> list[TileMap]:
    """How a pattern falls into tiles of so many queries by so many keys; one entry per head group and union member.

    With a dilation the queries and keys of a tile are neighbors within one residue class, and a query tile is held
    against the key tiles of the class that it sees.

    >>> [tiles] = tile_maps(Near(5), (9,), query_tile=(3,))
    >>> tiles.pairs().tolist(), tiles.work.visited
    ([[2, 1, 0], [1, 2, 1], [0, 1, 2]], 7)
    """
    table = bounds(pattern, grid, key_grid)
    queries = _tile_sizes("query_tile", query_tile, table.rank)
    keys = queries if key_tile is None else _tile_sizes("key_tile", key_tile, table.rank)
    maps = []
    for name, group in zip(group_names(pattern, len(table.groups)), table.groups, strict=True):
        for number, member in enumerate(group.members):
            part = f", member {number}" if len(group.members) > 1 else ""
            axes = tuple(classify(cut(axis, queries[place]), keys[place]) for place, axis in enumerate(member))
            maps.append(TileMap(f"{name}{part}", axes, visits(member, queries, keys)))
    return maps


def _tile_sizes(name: str, sizes: Sequence[int], rank: int) -> tuple[int, ...]:
    """One size per axis; a single one stands for all axes."""
    given = tuple(as_integer("tiles", f"{name}[{axis}]", size, 1) for axis, size in enumerate(sizes))
    if len(given) not in (1, rank):
        raise ValueError(f"tiles: {name} must have 1 or {rank} sizes, got {len(given)}")
    return given * rank if len(given) == 1 else given
