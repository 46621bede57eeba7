"""Which strides and tiles reach how much of the bound: a search over the simulator, axis by axis.

The number of tiles visited is a product over the axes, so an axis is simulated by itself, once for each stride and
pair of tile sizes, and only what no other choice on that axis beats is combined with the other axes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from vicinal.ops.simulator import Simulation, check_share, simulate
from vicinal.ops.tiling import EMPTY, FULL, classify, cut
from vicinal.pattern.axis import AxisKind, Near
from vicinal.pattern.compose import Pattern, check_pattern, pattern_parts
from vicinal.pattern.numbers import as_grid, as_integer
from vicinal.pattern.table import AxisTable

MOST_MULTIPLES = 16

Tile: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _AxisChoice:
    """One axis under one stride: the stride, tile pairs by the worst query tile, and whether all are full."""

    stride: int
    cost: int
    is_full: bool


def search(
    pattern: Pattern,
    grid: Sequence[int],
    *,
    queries: int,
    keys: int,
    attention_share: float | None = None,
) -> list[Simulation]:
    """The strides and tiles worth choosing among, for a window that is settled; the highest bound first.

    Strides of `Near` axes that are not causal are tried from 1 (slide by one token, the window's best quality) to the
    kernel size (blocks), the pattern's own among them. Tiles are boxes of powers of two with room for `queries` and
    `keys` tokens. Of all of these, those are returned that no other beats in both the bound and how finely the window
    slides (the product of the strides); where bounds are equal, tiles that need no mask come first.

    >>> best = search((Near(18), Near(24), Near(24)), (30, 48, 80), queries=256, keys=128)[0]
    >>> round(best.attention_bound, 2), best.is_block_sparse
    (11.11, True)
    """
    lengths = as_grid("search", "grid", grid)
    check_pattern("pattern", pattern)
    parts, _ = pattern_parts(pattern, len(lengths))
    if len(parts) > 1 or len(parts[0]) > 1:
        raise ValueError(f"search: pattern must be one axis kind per axis, without heads or union, got {pattern!r}")
    if attention_share is not None:
        check_share(attention_share)
    query_tiles = list(boxes(as_integer("search", "queries", queries, 1), lengths))
    key_tiles = list(boxes(as_integer("search", "keys", keys, 1), lengths))
    found: dict[int, tuple[float, Tile, Tile, Tile]] = {}
    for query_tile, key_tile in itertools.product(query_tiles, key_tiles):
        axes = [_axis_choices(*axis) for axis in zip(parts[0][0], lengths, query_tile, key_tile, strict=True)]
        dense = math.prod(-(-n // q) * -(-n // k) for n, q, k in zip(lengths, query_tile, key_tile, strict=True))
        for choice in itertools.product(*axes):
            coarseness = math.prod(axis.stride for axis in choice)
            cost = math.prod(axis.cost for axis in choice) / dense
            rank = cost - 1e-12 * all(axis.is_full for axis in choice)
            if coarseness not in found or rank < found[coarseness][0]:
                found[coarseness] = (rank, tuple(axis.stride for axis in choice), query_tile, key_tile)
    best = []
    lowest = math.inf
    for _, (rank, strides, query_tile, key_tile) in sorted(found.items()):
        if rank < lowest - 1e-9:
            lowest = rank
            kinds = tuple(_strided(kind, stride) for kind, stride in zip(parts[0][0], strides, strict=True))
            tiles: dict[str, Any] = {"query_tile": query_tile, "key_tile": key_tile}
            best.append(simulate(kinds, lengths, **tiles, attention_share=attention_share))
    return best[::-1]


def boxes(volume: int, grid: Sequence[int]) -> Iterator[Tile]:
    """Boxes of `volume` tokens whose sides are powers of two, none more than twice as long as its axis.

    >>> list(boxes(8, (4, 100)))
    [(1, 8), (2, 4), (4, 2)]
    """
    if volume & (volume - 1):
        raise ValueError(f"search: tiles must hold a power of two of tokens, got {volume}")
    sides = [[1 << power for power in range(volume.bit_length()) if 1 << power < 2 * length] for length in grid]
    some = [box for box in itertools.product(*sides) if math.prod(box) == volume]
    if not some:
        raise ValueError(f"search: no tile of {volume} tokens fits the grid {tuple(grid)}")
    yield from some


@functools.lru_cache(maxsize=65536)
def _axis_choices(kind: AxisKind, length: int, query_tile: int, key_tile: int) -> tuple[_AxisChoice, ...]:
    """What an axis may choose: finer strides that cost no more push coarser ones out."""
    kept: list[_AxisChoice] = []
    for stride in _strides(kind, length):
        table = AxisTable.of(_strided(kind, stride), length)
        classes = classify(cut(table, query_tile, even=False), key_tile)
        visited = (classes > EMPTY).sum(1)
        choice = _AxisChoice(stride, len(visited) * int(visited.max()), bool((classes == FULL).sum() == visited.sum()))
        if not kept or (choice.cost, not choice.is_full) < (kept[-1].cost, not kept[-1].is_full):
            kept.append(choice)
    return tuple(kept)


def _strides(kind: AxisKind, length: int) -> list[int]:
    """Strides worth a try, ascending: one alone where an axis kind has none."""
    if not isinstance(kind, Near) or kind.causal or kind.border == "wrap":
        return [1]
    most = min(kind.kernel_size, length)
    jump = max(8, 8 * -(-most // (8 * MOST_MULTIPLES)))
    wanted = {kind.stride, *range(jump, most + 1, jump), *(1 << power for power in range(most.bit_length()))}
    wanted |= {divisor for divisor in range(1, most + 1) if most % divisor == 0}
    return sorted(stride for stride in wanted if stride <= kind.kernel_size)


def _strided(kind: AxisKind, stride: int) -> AxisKind:
    return dataclasses.replace(kind, stride=stride) if isinstance(kind, Near) and stride != kind.stride else kind
