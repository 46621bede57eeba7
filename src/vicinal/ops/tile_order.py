"""Tile order: the tokens of a grid laid out so that every tile, a small box of the grid, is one piece of memory.

A kernel that knows sequences only, such as FlexAttention's, then works on boxes of the grid. Where a pattern is
dilated, each residue class of an axis is cut by itself, and the tiles of all classes stand in one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vicinal.ops.packing import ordinary_tensors
from vicinal.ops.tiling import Booleans, Integers
from vicinal.pattern.table import AxisTable


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """An order of the tokens of `grid`: tile by tile, and within a tile axis by axis.

    `tile` are the sides of a tile, `step` the residue classes that each axis falls into. Short tiles are filled up by
    repeating their last coordinate, so there may be more positions than tokens.

    >>> order = TileOrder((4, 4), (2, 2), (1, 1))
    >>> order.enter(torch.arange(16).reshape(1, 4, 4)).tolist()
    [[0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    step: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.grid) == len(self.tile) == len(self.step):
            given = f"{self.grid}, {self.tile}, {self.step}"
            raise ValueError(f"TileOrder: grid, tile and step must have one entry per axis, got {given}")
        if min(self.grid + self.tile + self.step) < 1:
            raise ValueError(
                f"TileOrder: grid, tile and step must be at least 1, got {self.grid}, {self.tile}, {self.step}"
            )

    @property
    def volume(self) -> int:
        """Tokens a tile has room for."""
        return math.prod(self.tile)

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole grid."""
        return math.prod(len(axis_pieces(*axis)[0]) for axis in self._axes())

    @property
    def num_positions(self) -> int:
        """Places in the order: at least as many as tokens."""
        return self.num_tiles * self.volume

    def _axes(self) -> list[tuple[int, int, int]]:
        return list(zip(self.grid, self.tile, self.step, strict=True))

    def coordinates(self, axis: int) -> Integers:
        """The coordinate on an axis of the token at every position: int64 `[positions]`."""
        return self._spread([axis_pieces(*sizes)[0] for sizes in self._axes()], axis)

    def is_token(self) -> Booleans:
        """Which positions hold a token of their own, and do not repeat another: bool `[positions]`."""
        inside = [axis_pieces(*sizes)[1] for sizes in self._axes()]
        whole = np.ones(self.num_positions, dtype=np.bool_)
        for axis in range(len(self.grid)):
            whole &= self._spread(inside, axis)
        return whole

    def _spread(self, pieces: Sequence[Any], axis: int) -> Any:
        """The array `[tiles of the axis, side]` of one axis, at every position."""
        rank = len(self.grid)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = pieces[axis].shape
        whole = [piece.shape[0] for piece in pieces] + [piece.shape[1] for piece in pieces]
        return np.broadcast_to(pieces[axis].reshape(shape), whole).reshape(-1)

    def enter(self, tokens: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """`[..., *grid, ...]` to `[..., positions, ...]`, the grid beginning at `axis`; copies."""
        flat = tokens.flatten(axis, axis + len(self.grid) - 1) if len(self.grid) > 1 else tokens
        return flat.index_select(axis, _index(self, tokens.device)[0])

    def leave(self, ordered: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """`[..., positions, ...]` back to `[..., *grid, ...]`; what repeated a token is dropped."""
        flat = ordered.index_select(axis, _index(self, ordered.device)[1])
        return flat.unflatten(axis, self.grid) if len(self.grid) > 1 else flat


@functools.lru_cache(maxsize=1024)
def axis_pieces(length: int, tile: int, step: int) -> tuple[Integers, Booleans]:
    """An axis in tiles of one residue class each: coordinates, and which are their own, both `[tiles, tile]`.

    >>> axis_pieces(5, 2, 2)[0].tolist()
    [[0, 2], [4, 4], [1, 3]]
    """
    rows, inside = [], []
    for residue in range(min(step, length)):
        members = np.arange(residue, length, step)
        places = np.arange(-(-len(members) // tile) * tile).reshape(-1, tile)
        rows.append(members[np.minimum(places, len(members) - 1)])
        inside.append(places < len(members))
    return np.concatenate(rows), np.concatenate(inside)


@functools.lru_cache(maxsize=64)
def _index(order: TileOrder, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at every position, and the position of every token."""
    places = np.ravel_multi_index([order.coordinates(axis) for axis in range(len(order.grid))], order.grid)
    own = np.flatnonzero(order.is_token())
    positions = np.empty(math.prod(order.grid), dtype=np.int64)
    positions[places[own]] = own
    with ordinary_tensors():
        return torch.from_numpy(places).to(device), torch.from_numpy(positions).to(device)


@functools.lru_cache(maxsize=4096)
def axis_classes(
    table: AxisTable, query_tile: int, key_tile: int, query_step: int, key_step: int
) -> tuple[Booleans, Booleans]:
    """Which tiles of an axis see anything of which key tiles, and which see them whole: bool `[tiles, key tiles]`.

    Both axes are in tile order with these steps, each the table's own or 1. A key tile that is filled up is never
    seen whole: a kernel must mask what fills it up.
    """
    queries, _ = axis_pieces(len(table), query_tile, query_step)
    keys, is_key = axis_pieces(table.length, key_tile, key_step)
    begin, end = keys[:, 0], keys[:, 0] + key_step * is_key.sum(1)
    start, count = table.start[:, None], table.count[:, None]
    seen = np.zeros((len(table), len(keys)), dtype=np.int64)
    turns = range(-2, 3) if table.wraps else range(1)
    for turn in turns:
        first = start + turn * table.length
        upto = np.clip(-((first - end) // table.step), 0, count)
        before = np.clip(-((first - begin) // table.step), 0, count)
        seen += np.where((first - begin) % key_step == 0, upto - before, 0)
    rows = seen[queries]
    return np.asarray((rows > 0).any(1)), np.asarray((rows == key_tile).all(1))
