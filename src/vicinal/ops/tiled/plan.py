"""How the portable back end cuts up one problem: which tiles, in which order, with which masks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vicinal.ops.packing import Layout, ordinary_tensors, unpack_row
from vicinal.ops.tiling import AxisTiles, buckets, cut
from vicinal.pattern.bounds import Member
from vicinal.pattern.table import AxisTable

Integers: TypeAlias = npt.NDArray[np.int64]

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


MOST_REMEMBERED_BYTES = 8 << 20
"""Row numbers and masks of a set of tiles are kept between calls up to this size."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some tiles of a `TileSet` for some samples, computed together.

    `query_index` and `key_index` are row numbers `[items, tokens of a tile]`; an item is a tile of a sample, samples
    outermost. `keep` marks the queries that are not padding, where there is any. `shapes` are the shapes of the tiles
    and `which[item]` says which of them an item has; None where all have the same. `masks` remembers masks.
    """

    samples: slice
    tiles: int
    query_index: torch.Tensor
    key_index: torch.Tensor
    keep: torch.Tensor | None
    shapes: Integers
    which: torch.Tensor | None
    masks: dict[tuple[Any, ...], torch.Tensor] | None


class TileSet:
    """Tiles of equal size: every combination of the given tiles of each axis.

    Tiles whose masks look alike share a *shape*; there are few, however many tiles there are. `earlier` are
    the union members whose keys this one leaves out.
    """

    def __init__(self, axes: tuple[AxisTiles, ...], earlier: Sequence[Member], takes_bias: bool) -> None:
        self.axes = axes
        self.counts = tuple(axis.num_tiles for axis in axes)
        self.queries = math.prod(axis.queries for axis in axes)
        self.keys = math.prod(axis.keys for axis in axes)
        self.takes_bias = takes_bias
        self._grid = tuple(len(axis.table) for axis in axes)
        self._key_grid = tuple(axis.table.length for axis in axes)
        self._keys = [axis.key_coordinates() for axis in axes]
        self._seen_earlier = [
            [
                table.sees(axis.query[:, :, None], keys[:, None, :])
                for table, axis, keys in zip(member, axes, self._keys, strict=True)
            ]
            for member in earlier
        ]
        self.needs_mask = bool(earlier) or not all(axis.is_whole.all() for axis in axes)
        self.may_be_blind = bool(earlier) or any((axis.low == axis.high).any() for axis in axes)
        self.has_padding = not all(axis.is_query.all() for axis in axes)
        self._shape_of, self._example = self._shapes()
        self._remembered: dict[tuple[int, int, torch.device], list[Chunk]] = {}

    @property
    def num_tiles(self) -> int:
        """How many tiles there are."""
        return math.prod(self.counts)

    def _shapes(self) -> tuple[Integers, Integers]:
        """For each tile its shape, and for each shape one tile that has it."""
        per_axis = []
        for number, axis in enumerate(self.axes):
            columns = [np.zeros((axis.num_tiles, 1), dtype=np.int64)]
            if self.needs_mask:
                columns += [axis.low, axis.high]
                columns += [seen[number].reshape(axis.num_tiles, -1) for seen in self._seen_earlier]
            if self.takes_bias:
                columns.append(axis.offsets())
            per_axis.append(np.unique(np.concatenate(columns, 1), axis=0, return_inverse=True)[1].reshape(-1))
        code = np.zeros(1, dtype=np.int64)
        for inverse in per_axis:
            code = (code[:, None] * (inverse.max() + 1) + inverse[None]).reshape(-1)
        _, example, shape = np.unique(code, return_index=True, return_inverse=True)
        return shape.reshape(-1), example

    def chunks(self, capacity: int, samples: int, device: torch.device) -> Iterable[Chunk]:
        """All tiles of all samples in chunks of at most `capacity`; long runs of one shape are kept together."""
        key = (min(capacity, self.num_tiles * samples), samples, device)
        if key not in self._remembered:
            tokens = self.queries + self.keys + self.queries * self.keys // max(capacity, 1)
            made = self._make(max(capacity, 1), samples, device)
            if self.num_tiles * samples * tokens * 8 > MOST_REMEMBERED_BYTES or len(self._remembered) >= 8:
                return made
            self._remembered[key] = list(made)
        return self._remembered[key]

    def _make(self, capacity: int, samples: int, device: torch.device) -> Iterator[Chunk]:
        at_once = max(1, capacity // self.num_tiles)
        sample_tokens = math.prod(self._grid), math.prod(self._key_grid)
        for tiles in self._runs(min(capacity, self.num_tiles)):
            query_rows = self._rows(tiles, [axis.query for axis in self.axes], self._grid)
            key_rows = self._rows(tiles, self._keys, self._key_grid)
            shapes, which = np.unique(self._shape_of[tiles], return_inverse=True)
            is_query = self._outer(tiles, [axis.is_query for axis in self.axes]) if self.has_padding else None
            for begin in range(0, samples, at_once):
                number = np.arange(begin, min(begin + at_once, samples))[:, None, None]
                query_index = (query_rows + number * sample_tokens[0]).reshape(-1, self.queries)
                key_index = (key_rows + number * sample_tokens[1]).reshape(-1, self.keys)
                with ordinary_tensors():
                    chunk = Chunk(
                        samples=slice(begin, begin + len(number)),
                        tiles=len(tiles),
                        query_index=torch.from_numpy(query_index).to(device),
                        key_index=torch.from_numpy(key_index).to(device),
                        keep=_repeated(is_query, len(number), device),
                        shapes=shapes,
                        which=None if len(shapes) == 1 else _repeated(which.reshape(-1), len(number), device),
                        masks={},
                    )
                yield chunk  # outside: the caller's modes are its own again

    def whole(self, samples: int, device: torch.device) -> Chunk:
        """All tiles of all samples in one chunk, in torch operations: `samples` may be symbolic."""
        tiles = np.arange(self.num_tiles)
        query_rows = torch.from_numpy(self._rows(tiles, [axis.query for axis in self.axes], self._grid)).to(device)
        key_rows = torch.from_numpy(self._rows(tiles, self._keys, self._key_grid)).to(device)
        shapes, which = np.unique(self._shape_of, return_inverse=True)
        number = torch.arange(samples, device=device)[:, None, None]
        keep = None
        if self.has_padding:
            keep = torch.from_numpy(self._outer(tiles, [axis.is_query for axis in self.axes])).to(device)
        return Chunk(
            samples=slice(0, samples),
            tiles=self.num_tiles,
            query_index=(query_rows + number * math.prod(self._grid)).flatten(0, 1),
            key_index=(key_rows + number * math.prod(self._key_grid)).flatten(0, 1),
            keep=None if keep is None else keep.repeat(samples, 1),
            shapes=shapes,
            which=None if len(shapes) == 1 else torch.from_numpy(which.reshape(-1)).to(device).repeat(samples),
            masks=None,
        )

    def _runs(self, capacity: int) -> Iterator[Integers]:
        order = np.argsort(self._shape_of, kind="stable")
        edges = np.flatnonzero(np.diff(self._shape_of[order])) + 1
        mixed: list[Integers] = []
        for run in np.split(order, edges):
            whole = len(run) // capacity * capacity
            yield from (run[at : at + capacity] for at in range(0, whole, capacity))
            if whole < len(run):
                mixed.append(run[whole:])
        rest = np.concatenate(mixed) if mixed else order[:0]
        yield from (rest[at : at + capacity] for at in range(0, len(rest), capacity))

    def _rows(self, tiles: Integers, coordinates: Sequence[Integers], grid: tuple[int, ...]) -> Integers:
        """Flat token numbers `[tiles, tokens of a tile]`."""
        rows = np.zeros((len(tiles), 1), dtype=np.int64)
        for axis, places in enumerate(np.unravel_index(tiles, self.counts)):
            picked = coordinates[axis][places]
            rows = (rows[:, :, None] * grid[axis] + picked[:, None, :]).reshape(len(tiles), -1)
        return rows

    def _outer(self, tiles: Integers, flags: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
        whole = np.ones((len(tiles), 1), dtype=np.bool_)
        for axis, places in enumerate(np.unravel_index(tiles, self.counts)):
            whole = (whole[:, :, None] & flags[axis][places][:, None, :]).reshape(len(tiles), -1)
        return whole

    def mask(self, shapes: Integers) -> torch.Tensor:
        """Which keys of a tile each of its queries sees: bool `[shapes, queries, keys]`."""
        tiles = self._example[shapes]
        place = np.unravel_index(tiles, self.counts)
        seen = []
        for axis, places in zip(self.axes, place, strict=True):
            key = np.arange(axis.keys)
            seen.append((key >= axis.low[places][..., None]) & (key < axis.high[places][..., None]))
        whole = _product(seen)
        for member in self._seen_earlier:
            whole &= ~_product([axis[places] for axis, places in zip(member, place, strict=True)])
        return torch.from_numpy(whole)

    def window(self, shapes: Integers, most: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Window order within a tile: which key of the tile each entry is, and whether there is one.

        `most` are the largest counts along the axes; int64 and bool `[shapes, queries, prod(most)]`.
        """
        place = np.unravel_index(self._example[shapes], self.counts)
        index = np.zeros((len(shapes), 1, 1), dtype=np.int64)
        valid = np.ones((len(shapes), 1, 1), dtype=np.bool_)
        for axis, places, entries in zip(self.axes, place, most, strict=True):
            low, high = axis.low[places][..., None], axis.high[places][..., None]
            own = low + np.arange(entries)
            there = own < high
            own = np.clip(own, 0, axis.keys - 1)
            queries, width = index.shape[1] * own.shape[1], index.shape[2] * entries
            index = (index[:, :, None, :, None] * axis.keys + own[:, None, :, None, :]).reshape(-1, queries, width)
            valid = (valid[:, :, None, :, None] & there[:, None, :, None, :]).reshape(-1, queries, width)
        result = torch.from_numpy(index)
        exists = torch.from_numpy(valid)
        return result, exists & self.mask(shapes).gather(-1, result) if self._seen_earlier else exists

    def bias_index(self, shapes: Integers) -> torch.Tensor:
        """Where each (query, key) pair of a tile reads a flattened bias table: int64 `[shapes, queries, keys]`."""
        place = np.unravel_index(self._example[shapes], self.counts)
        index = np.zeros((len(shapes), 1, 1), dtype=np.int64)
        for axis, places in zip(self.axes, place, strict=True):
            length = axis.table.bias_length
            assert length is not None
            own = np.clip(axis.offsets()[places][..., None] + np.arange(axis.keys), 0, length - 1)
            queries, keys = index.shape[1] * own.shape[1], index.shape[2] * own.shape[2]
            index = (index[:, :, None, :, None] * length + own[:, None, :, None, :]).reshape(-1, queries, keys)
        return torch.from_numpy(index)


def _repeated(array: npt.NDArray[Any] | None, times: int, device: torch.device) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(np.concatenate([array] * times)).to(device)


def _product(seen: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    whole = np.ones((len(seen[0]), 1, 1), dtype=np.bool_)
    for axis in seen:
        queries, keys = whole.shape[1] * axis.shape[1], whole.shape[2] * axis.shape[2]
        whole = (whole[:, :, None, :, None] & axis[:, None, :, None, :]).reshape(-1, queries, keys)
    return whole


@dataclasses.dataclass(frozen=True)
class MemberPlan:
    """One union member on one grid: its sets of tiles."""

    member: Member
    sets: tuple[TileSet, ...]

    @functools.cached_property
    def keys_come_once(self) -> bool:
        """Whether every key of the grid stands in one tile, once, as under a window."""
        if len(self.sets) > 1:
            return False
        for axis in self.sets[0].axes:
            keys = axis.key_coordinates()
            if keys.size != axis.table.length or len(np.unique(keys)) != keys.size:
                return False
        return True


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
