"""The tiles of one problem, in chunks that are computed together: their rows, their masks, where they read a bias."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vicinal.ops.packing import ordinary_tensors
from vicinal.ops.tiled.rows import GroupHeads, TileRows
from vicinal.ops.tiling import AxisTiles
from vicinal.pattern.bounds import Member

Integers: TypeAlias = npt.NDArray[np.int64]

MOST_REMEMBERED_BYTES = 16 << 20
"""Row numbers and masks of a set of tiles are kept between calls up to this size."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Some tiles of a `TileSet` for some samples, computed together.

    An item is a tile of a sample, samples outermost. `query` and `key` are the rows that all items take, item by
    item and head by head. `padding` `[items, 1, shared * queries, 1]` marks queries that do not count, where there are
    any. `shapes` are the shapes of the tiles and `which[item]` says which of them an item has; None where all have the
    same. `masks` remembers masks; None where the chunk is not kept.
    """

    samples: slice
    tiles: int
    query: TileRows
    key: TileRows
    padding: torch.Tensor | None
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
        self._remembered: dict[tuple[int, int, torch.device, GroupHeads], list[Chunk]] = {}

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

    def chunks(self, capacity: int, samples: int, device: torch.device, heads: GroupHeads) -> Iterable[Chunk]:
        """All tiles of all samples in chunks of at most `capacity`; long runs of one shape are kept together."""
        row = self.num_tiles // self.counts[0]
        if row < capacity < self.num_tiles:
            capacity -= capacity % row  # whole rows of tiles, whose tokens may follow each other in memory
        key = (min(capacity, self.num_tiles * samples), samples, device, heads)
        known = self._remembered.get(key)
        if known is not None:
            return known
        rows = self.queries * heads.count + self.keys * len(heads.key)
        needed = self.num_tiles * samples * (2 * rows + self.queries * self.keys // max(capacity, 1)) * 4
        if needed > MOST_REMEMBERED_BYTES or len(self._remembered) >= 8:
            return self._make(max(capacity, 1), samples, device, heads, lasts=False)
        self._remembered[key] = list(self._make(max(capacity, 1), samples, device, heads, lasts=True))
        return self._remembered[key]

    def _make(
        self, capacity: int, samples: int, device: torch.device, heads: GroupHeads, *, lasts: bool
    ) -> Iterator[Chunk]:
        at_once = max(1, capacity // self.num_tiles)
        for tiles in self._runs(min(capacity, self.num_tiles)):
            for begin in range(0, samples, at_once):
                with ordinary_tensors():
                    number = torch.arange(begin, min(begin + at_once, samples), device=device)
                    chunk = self._chunk(tiles, number, slice(begin, begin + len(number)), heads, lasts=lasts)
                yield chunk  # outside: the caller's modes are its own again

    def whole(self, samples: int, device: torch.device, heads: GroupHeads) -> Chunk:
        """All tiles of all samples in one chunk, in torch operations: `samples` may be symbolic."""
        number = torch.arange(samples, device=device)
        return self._chunk(np.arange(self.num_tiles), number, slice(0, samples), heads, lasts=False)

    def _chunk(self, tiles: Integers, number: torch.Tensor, samples: slice, heads: GroupHeads, *, lasts: bool) -> Chunk:
        device, count = number.device, number.shape[0]
        shapes, which = np.unique(self._shape_of[tiles], return_inverse=True)
        query_heads = [head for shared in heads.query for head in shared]
        query_tokens = torch.from_numpy(self._rows(tiles, [axis.query for axis in self.axes], self._grid)).to(device)
        key_tokens = torch.from_numpy(self._rows(tiles, self._keys, self._key_grid)).to(device)
        query_size, key_size = math.prod(self._grid) * heads.num_query, math.prod(self._key_grid) * heads.num_key
        query = _numbered(query_tokens, query_heads, heads.num_query, number, query_size)
        key = _numbered(key_tokens, heads.key, heads.num_key, number, key_size)
        padding = kept = None
        if self.has_padding:
            is_padding = ~self._outer(tiles, [axis.is_query for axis in self.axes])
            padding = torch.from_numpy(is_padding).to(device).repeat(count, heads.shared)[:, None, :, None]
            own = np.repeat(~is_padding[:, None], heads.count, 1)
            kept = torch.from_numpy(np.flatnonzero(own)).to(device)
            kept = (kept + (number - number[0])[:, None] * own.size).flatten()
        return Chunk(
            samples=samples,
            tiles=len(tiles),
            query=TileRows(query, kept=kept, lasts=lasts),
            key=TileRows(key, lasts=lasts),
            padding=padding,
            shapes=shapes,
            which=None if len(shapes) == 1 else torch.from_numpy(which.reshape(-1)).to(device).repeat(count),
            masks={} if lasts else None,
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


def _numbered(
    tokens: torch.Tensor, heads: Sequence[int], num_heads: int, samples: torch.Tensor, sample_size: int
) -> torch.Tensor:
    """Row numbers of some tokens `[tiles, tokens]` of some heads of some samples, in the order sample, tile, head."""
    own = tokens[:, None, :] * num_heads + torch.tensor(heads, device=tokens.device)[:, None]
    return (own.flatten() + samples[:, None] * sample_size).flatten()


def _product(seen: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    whole = np.ones((len(seen[0]), 1, 1), dtype=np.bool_)
    for axis in seen:
        queries, keys = whole.shape[1] * axis.shape[1], whole.shape[2] * axis.shape[2]
        whole = (whole[:, :, None, :, None] & axis[:, None, :, None, :]).reshape(-1, queries, keys)
    return whole
