"""Two hand-written variants of local attention: what a capable user writes in an afternoon of plain torch.

Query tiles against the clamped union of their keys: keys are gathered by an index, the mask is added, and both are
made beforehand; a dilated problem is first regrouped by residue. Inputs are `[batch, heads, *grid, head_dim]`.

Written once and frozen: these are what our own speed is held against, so they are never tuned again, in either
direction. (Their tiles may be chosen after the fact, which favors them: every tile is tried, the best reported.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vicinal.measure.peers.dense import additive, axis_tables
from vicinal.measure.task import HEADS_FIRST, NotRun, Prepared, Task
from vicinal.pattern.table import AxisTable

TILES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((128,), (256,)),
    2: ((4, 4), (7, 7), (8, 8), (16, 16)),
    3: ((2, 4, 4), (2, 8, 8), (4, 8, 8)),
}
"""Tiles tried for each number of axes; those that do not divide the grid are left out."""

MOST_BYTES, PORTION_BYTES = 2 << 30, 256 << 20
"""What needs more than the first goes through in portions of the second, recomputed in the backward.

Only the largest problem does, which would not fit otherwise; portions this small are also its fastest.
"""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def halo_bmm(task: Task) -> list[Prepared]:
    """Tiles by batched matrix products and a softmax."""
    scale = task.problem.head_dim**-0.5

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = (query * scale) @ key.transpose(-1, -2)
        if mask is not None:
            scores += mask
        return scores.softmax(-1) @ value

    return _candidates(task, attend)


def halo_sdpa(task: Task) -> list[Prepared]:
    """Tiles by torch's scaled dot-product attention."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return _candidates(task, attend)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One way to cut a problem: sizes, which keys each tile gathers, and what is added to its scores.

    `keys` `[tiles, keys]` are places within a residue group, and `mask` `[tiles, queries, keys]`; either is None
    where it would change nothing: all keys in their order, or no key hidden.
    """

    tile: tuple[int, ...]
    steps: tuple[int, ...]
    keys: torch.Tensor | None
    mask: torch.Tensor | None
    num_tiles: int
    num_keys: int


def _candidates(task: Task, attend: Attend) -> list[Prepared]:
    tables = axis_tables(task)
    lengths, steps = tuple(map(len, tables)), tuple(table.step for table in tables)
    if any(length % step or table.wraps for length, step, table in zip(lengths, steps, tables, strict=True)):
        raise NotRun("written for axes that the dilation divides and that do not wrap")
    groups = tuple(length // step for length, step in zip(lengths, steps, strict=True))
    tiles = [tile for tile in TILES[len(groups)] if not any(map(int.__mod__, groups, tile))]
    if not tiles:
        raise NotRun(f"none of its tiles divides a grid of {groups}")
    return [
        Prepared(_made(task, _tiling(task, tables, groups, tile), attend), HEADS_FIRST, "x".join(map(str, tile)))
        for tile in tiles
    ]


def _tiling(task: Task, tables: Sequence[AxisTable], groups: tuple[int, ...], tile: tuple[int, ...]) -> Tiling:
    keys, seen = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1, 1), dtype=np.bool_)
    for table, length, size in zip(tables, groups, tile, strict=True):
        # every residue group of an axis that its step divides has the same windows; the first stands for all
        first, last = table.start[:: table.step] // table.step, table.last[:: table.step] // table.step
        low, high = first.reshape(-1, size).min(1), last.reshape(-1, size).max(1)
        width = int((high - low).max()) + 1
        own = np.minimum(low, length - width)[:, None] + np.arange(width)
        sees = (own[:, None] >= first.reshape(-1, size, 1)) & (own[:, None] <= last.reshape(-1, size, 1))
        keys = _outer(keys * length, own, np.add)
        seen = _outer(seen, sees, np.logical_and)
    num_tiles, num_keys = keys.shape
    in_order = num_tiles == 1 and num_keys == math.prod(groups)
    return Tiling(
        tile=tile,
        steps=tuple(table.step for table in tables),
        keys=None if in_order else torch.from_numpy(keys).to(task.device),
        mask=None if seen.all() else additive(torch.from_numpy(seen), task),
        num_tiles=num_tiles,
        num_keys=num_keys,
    )


def _outer(left: np.ndarray, right: np.ndarray, join: Callable[..., np.ndarray]) -> np.ndarray:
    """Join every entry with every entry, axis by axis; the first axes of both become one, and so on."""
    sizes = [a * b for a, b in zip(left.shape, right.shape, strict=True)]
    outer = tuple(slice(None) if position % 2 == 0 else None for position in range(2 * left.ndim))
    inner = tuple(None if position % 2 == 0 else slice(None) for position in range(2 * left.ndim))
    return np.asarray(join(left[outer], right[inner])).reshape(sizes)


def _made(task: Task, tiling: Tiling, attend: Attend) -> Callable[..., torch.Tensor]:
    problem = task.problem
    rank, queries = len(problem.grid), math.prod(tiling.tile)
    samples = problem.batch * math.prod(tiling.steps)
    # the grid axis by axis as (tile, query of the tile, residue), and the order that puts residues and tiles first
    split = [part for length, size, step in zip(problem.grid, tiling.tile, tiling.steps, strict=True)
             for part in (length // size // step, size, step)]  # fmt: skip
    axes = range(2, 2 + 3 * rank, 3)
    order = [0, *(axis + 2 for axis in axes), 1, *axes, *(axis + 1 for axis in axes), 2 + 3 * rank]
    back = [order.index(position) for position in range(len(order))]
    by_residue = [
        part for length, step in zip(problem.grid, tiling.steps, strict=True) for part in (length // step, step)
    ]
    pairs = range(2, 2 + 2 * rank, 2)
    residue_order = [0, *(axis + 1 for axis in pairs), 1, *pairs, 2 + 2 * rank]
    portions = _portions(task, tiling, samples)

    def portion(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if keys is not None:
            index, shape = keys.reshape(-1), (len(key), *keys.shape, -1)
            key, value = key.index_select(1, index).view(shape), value.index_select(1, index).view(shape)
        return attend(query, key, value, mask)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, dim = query.shape[0], query.shape[1], query.shape[-1]
        tiles = query.view(batch, heads, *split, dim).permute(order)
        shape = tiles.shape
        tiles = tiles.reshape(samples * heads, tiling.num_tiles, queries, dim)
        if math.prod(tiling.steps) > 1:
            key, value = (
                tensor.view(batch, heads, *by_residue, dim).permute(residue_order).reshape(samples * heads, -1, dim)
                for tensor in (key, value)
            )
        else:
            key, value = key.flatten(2, -2).flatten(0, 1), value.flatten(2, -2).flatten(0, 1)
        if tiling.keys is None:
            key, value = key.unsqueeze(1), value.unsqueeze(1)
        if portions == 1:
            out = portion(tiles, key, value, tiling.keys, tiling.mask)
        else:
            assert tiling.keys is not None
            masks = itertools.repeat(None) if tiling.mask is None else tiling.mask.chunk(portions)
            parts = zip(tiles.chunk(portions, 1), tiling.keys.chunk(portions), masks)  # noqa: B905 - masks may repeat
            run = checkpoint if torch.is_grad_enabled() else lambda function, *given, **_: function(*given)
            out = torch.cat(
                [run(portion, part, key, value, own, mask, use_reentrant=False) for part, own, mask in parts], 1
            )
        return out.view(shape).permute(back).reshape(query.shape)

    return call


def _portions(task: Task, tiling: Tiling, samples: int) -> int:
    """In how many portions the tiles go through, so that gathered keys and scores stay within bounds."""
    if tiling.keys is None:
        return 1
    queries = math.prod(tiling.tile)
    per_key = 2 * task.problem.head_dim + (3 if task.backward else 2) * queries
    needed = samples * task.problem.heads * tiling.num_tiles * tiling.num_keys * per_key * task.dtype.itemsize
    return 1 if needed <= MOST_BYTES else min(tiling.num_tiles, math.ceil(needed / PORTION_BYTES))
