"""Cutting axes into tiles, straight from the tables.

An axis is cut into query tiles: a few queries of one residue class, with the interval of keys that covers what
they see. Because first and last keys never decrease within a class, that interval is the least cover, and whether
a tile needs a mask at all is known before anything runs. Kernels, `explain`, pictures and cost models use this file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vicinal.pattern.bounds import Member
from vicinal.pattern.counting import member_pairs
from vicinal.pattern.table import AxisTable

Integers: TypeAlias = npt.NDArray[np.int64]
Booleans: TypeAlias = npt.NDArray[np.bool_]

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Classes of a (query tile, key tile) pair: no pair is seen, some are, all are."""


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """An axis cut into `T` tiles of at most `Q` queries each.

    `query[t, i]` are query coordinates; short tiles repeat their last one and say so in `is_query[t, i]`.
    Tile t needs the keys `first[t] + step * u` (unwrapped) for `0 <= u < size[t]`, and its query i sees those
    with `low[t, i] <= u < high[t, i]`.
    """

    table: AxisTable
    query: Integers
    is_query: Booleans
    first: Integers
    size: Integers
    low: Integers
    high: Integers

    @property
    def num_tiles(self) -> int:
        """How many tiles there are."""
        return len(self.first)

    @property
    def queries(self) -> int:
        """Queries a tile has room for."""
        return self.query.shape[1]

    @property
    def keys(self) -> int:
        """Keys of the widest tile; one, which nobody sees, where no query sees any."""
        return max(int(self.size.max()), 1)

    @property
    def is_whole(self) -> Booleans:
        """Per tile: every query sees every key that a tile as wide as the widest would load."""
        return np.asarray(((self.low == 0) & (self.high == self.keys)).all(1))

    def take(self, tiles: Integers) -> AxisTiles:
        """Some of the tiles."""
        arrays = {name: getattr(self, name)[tiles] for name in ("query", "is_query", "first", "size", "low", "high")}
        return dataclasses.replace(self, **arrays)

    def key_coordinates(self) -> Integers:
        """Key coordinates `[T, keys]`; past the end of a tile's interval they repeat an allowed key."""
        place = np.minimum(np.arange(self.keys)[None], np.maximum(self.size, 1)[:, None] - 1)
        coordinate = self.first[:, None] + self.table.step * place
        return coordinate % self.table.length if self.table.wraps else np.clip(coordinate, 0, self.table.length - 1)

    def offsets(self) -> Integers:
        """`[T, Q]`: where query i reads a bias for key u of its tile: at index `offsets + u`."""
        if self.table.center is None or self.table.bias_length is None:
            raise ValueError("this table takes no bias")
        distance = self.first[:, None] - self.table.center[self.query]
        return distance // self.table.step + (self.table.bias_length - 1) // 2


def cut(table: AxisTable, tile: int, *, aligned: bool = False, even: bool = True) -> AxisTiles:
    """Cut an axis into tiles of at most `tile` queries of one residue class.

    With `aligned`, cuts also fall wherever the window changes, so that windows are tiled on their own boundaries.
    Without `even`, tiles have exactly `tile` queries and the last of a class what is left, as kernels of one fixed
    tile cut; else all are about equally large.

    >>> tiles = cut(AxisTable.of(Near(3), 8), 4)
    >>> tiles.query.tolist(), tiles.first.tolist(), tiles.size.tolist()
    ([[0, 1, 2, 3], [4, 5, 6, 7]], [0, 3], [5, 5])
    """
    longest = -(-len(table) // table.step)
    if even:
        tile = math.ceil(longest / math.ceil(longest / max(tile, 1)))
    firsts, lengths = [], []
    for residue in range(min(table.step, len(table))):
        start, count = table.start[residue :: table.step], table.count[residue :: table.step]
        edges = np.array([0, len(start)])
        if aligned:
            changes = (np.diff(start) != 0) | (np.diff(count) != 0)
            edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(start)]])
        runs = np.diff(edges)
        pieces = -(-runs // tile)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        firsts.append(residue + table.step * (np.repeat(edges[:-1], pieces) + nth * tile))
        lengths.append(np.minimum(np.repeat(runs, pieces) - nth * tile, tile))
    length = np.concatenate(lengths)[:, None]
    place = np.arange(length.max())[None]
    query = np.concatenate(firsts)[:, None] + table.step * np.minimum(place, length - 1)
    is_query = place < length
    return _cover(table, query, is_query)


def cut_evenly(table: AxisTable, pitch: int, phase: int = 0) -> AxisTiles:
    """Cut every residue class of an axis each `pitch` queries, the first tile `phase` queries short.

    >>> tiles = cut_evenly(AxisTable.of(Window(4, shift=2), 8), 4, phase=2)
    >>> tiles.query[tiles.is_query].tolist(), tiles.is_query.sum(1).tolist(), tiles.size.tolist()
    ([0, 1, 2, 3, 4, 5, 6, 7], [2, 4, 2], [2, 4, 2])
    """
    firsts, lengths = [], []
    for residue in range(min(table.step, len(table))):
        members = -(-(len(table) - residue) // table.step)
        edges = np.clip(np.arange(-phase, members + pitch, pitch), 0, members)
        lengths.append(np.diff(edges)[np.diff(edges) > 0])
        firsts.append(residue + table.step * edges[:-1][np.diff(edges) > 0])
    length = np.concatenate(lengths)[:, None]
    place = np.arange(pitch)[None]
    query = np.concatenate(firsts)[:, None] + table.step * np.minimum(place, length - 1)
    return _cover(table, query, place < length)


def _cover(table: AxisTable, query: Integers, is_query: Booleans) -> AxisTiles:
    """Add to tiles of queries the least interval of keys that each needs."""
    start, count = table.start[query], table.count[query]
    seeing = is_query & (count > 0)
    huge = np.iinfo(np.int64).max // 4
    first = np.where(seeing, start, huge).min(1)
    last = np.where(seeing, start + table.step * (count - 1), -huge).max(1)
    blind = ~seeing.any(1)
    first = np.where(blind, np.clip(start[:, 0] % table.step, 0, table.length - 1), first)
    size = np.where(blind, 0, (last - first) // table.step + 1)
    # where queries wrap, an interval may be longer than the axis: a key then stands in it twice, seen once
    low = np.where(count > 0, (start - first[:, None]) // table.step, 0)
    high = np.where(count > 0, low + count, 0)
    return AxisTiles(table, query, is_query, first, size, low, high)


def buckets(tiles: AxisTiles, most: int = 8) -> list[AxisTiles]:
    """Tiles sorted by how many keys they need, where loading the widest for all would waste much."""
    if tiles.num_tiles < 2 or tiles.size.sum() > 0.8 * tiles.num_tiles * tiles.keys:
        return [tiles]
    order = np.argsort(tiles.size, kind="stable")
    return [tiles.take(np.sort(part)) for part in np.array_split(order, min(most, tiles.num_tiles))]


def classify(tiles: AxisTiles, key_tile: int) -> npt.NDArray[np.int8]:
    """The class of every (query tile, key tile) pair of an axis: int8 `[T, key tiles]`.

    Key tiles are `key_tile` neighbors of one residue class, counted from the start of the axis; a query tile is
    held against those of the class it sees. On several axes a pair is empty where one axis is empty, full where
    all are full, and partial otherwise.

    >>> classify(cut(AxisTable.of(Near(5), 12), 4), 4).tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    table = tiles.table
    num_key_tiles = math.ceil(math.ceil(table.length / table.step) / key_tile)
    members = -((tiles.first % table.step - table.length) // table.step)  # keys in the class that a tile sees
    place = tiles.first // table.step  # place of the tile's first key in its class, unwrapped
    low, high = place[:, None] + tiles.low, place[:, None] + tiles.high
    touched = np.zeros((tiles.num_tiles, num_key_tiles), dtype=np.bool_)
    whole = np.zeros((tiles.num_tiles, num_key_tiles), dtype=np.bool_)
    turns = np.arange(-2, 3) if table.wraps else np.zeros(1, dtype=np.int64)
    for number in range(num_key_tiles):
        begin = np.minimum(number * key_tile, members)[:, None]
        end = np.minimum((number + 1) * key_tile, members)[:, None]
        seen = np.zeros_like(low)
        for turn in turns * (table.length // table.step):
            seen += np.maximum(np.minimum(high, end + turn) - np.maximum(low, begin + turn), 0)
        touched[:, number] = (seen > 0).any(1)
        whole[:, number] = (seen == end - begin).all(1)
    return np.where(whole & touched, FULL, np.where(touched, PARTIAL, EMPTY)).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class Visits:
    """How much work a tiling does: pairs of tiles visited, and the waste against the pairs that count."""

    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    query_tiles: int
    key_tiles: int
    visited: int
    full: int
    worst: int
    pairs_computed: int
    pairs_needed: int

    @property
    def waste(self) -> float:
        """Pairs computed for each pair needed."""
        return self.pairs_computed / max(self.pairs_needed, 1)

    def to_dict(self) -> dict[str, object]:
        """As plain values."""
        return {**dataclasses.asdict(self), "waste": round(self.waste, 4)}


def visits(member: Member, query_tile: Sequence[int], key_tile: Sequence[int], *, even: bool = True) -> Visits:
    """Count the tile pairs that a kernel with static key tiles visits; exact, axis by axis. `even` as in `cut`.

    >>> visits(bounds(Near(5), (12,)).groups[0].members[0], (4,), (4,)).visited
    7
    """
    tiles = [cut(table, size, even=even) for table, size in zip(member, query_tile, strict=True)]
    classes = [classify(axis, size) for axis, size in zip(tiles, key_tile, strict=True)]
    visited = [(axis > EMPTY).sum(1) for axis in classes]
    per_pair = math.prod(query_tile) * math.prod(key_tile)
    total = math.prod(int(axis.sum()) for axis in visited)
    return Visits(
        query_tile=tuple(query_tile),
        key_tile=tuple(key_tile),
        query_tiles=math.prod(axis.num_tiles for axis in tiles),
        key_tiles=math.prod(_key_tiles(table, size) for table, size in zip(member, key_tile, strict=True)),
        visited=total,
        full=math.prod(int((axis == FULL).sum()) for axis in classes),
        worst=math.prod(int(axis.max()) for axis in visited),
        pairs_computed=total * per_pair,
        pairs_needed=member_pairs(member),
    )


def _key_tiles(table: AxisTable, key_tile: int) -> int:
    """Key tiles of an axis: each residue class is cut by itself, and a class may be shorter than another."""
    return sum(-(-len(range(residue, table.length, table.step)) // key_tile) for residue in range(table.step))
