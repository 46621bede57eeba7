"""The tile simulator: how fast attention under a pattern can be on a kernel that works in tiles.

A kernel cuts queries and keys into fixed boxes of the grid and visits every key tile of which a query tile sees
anything. Dense attention visits all. What remains of the saving in FLOPs is counted here, from the tables, before
anything runs: by the worst query tile, because the tiles that run side by side are done when the slowest is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from vicinal.ops.tiling import Visits, visits
from vicinal.pattern.bounds import AnyPattern, bounds
from vicinal.pattern.counting import group_pairs
from vicinal.pattern.numbers import as_integer


@dataclasses.dataclass(frozen=True)
class Simulation:
    """The answer of `simulate`. Bounds are speed-ups over dense attention cut into the same tiles.

    >>> found = simulate(Near(8), (64,), query_tile=8, key_tile=8)
    >>> found.flop_bound, round(found.attention_bound, 2), found.is_block_sparse
    (8.0, 2.67, False)

    `flop_bound` is what the saved FLOPs promise. `attention_bound` is what is left of it where every query tile takes
    as long as the worst one, `mean_bound` where each takes its own time. With `attention_share`, the part of a
    model's time that dense attention takes, `end_to_end_bound` is the speed-up of the model (Amdahl's law) at the
    attention bound and `end_to_end_flop_bound` that at the FLOP bound. `is_block_sparse` says whether every visited
    key tile is seen whole by its query tile, so that no mask is computed at all. `sparsity` is the part of all
    (query, key) pairs that is left out. `visits` has one record for each member of each head group.
    """

    pattern: AnyPattern
    grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    sparsity: float
    flop_bound: float
    attention_bound: float
    mean_bound: float
    is_block_sparse: bool
    visits: tuple[tuple[Visits, ...], ...]
    attention_share: float | None = None

    @property
    def end_to_end_bound(self) -> float | None:
        """The model's speed-up at the attention bound."""
        return None if self.attention_share is None else amdahl(self.attention_bound, self.attention_share)

    @property
    def end_to_end_flop_bound(self) -> float | None:
        """The model's speed-up at the FLOP bound."""
        return None if self.attention_share is None else amdahl(self.flop_bound, self.attention_share)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found |= {"end_to_end_bound": self.end_to_end_bound, "end_to_end_flop_bound": self.end_to_end_flop_bound}
        found["pattern"] = repr(self.pattern)
        found["visits"] = [[member.to_dict() for member in group] for group in self.visits]
        return found


def amdahl(speedup: float, share: float) -> float:
    """The speed-up of a whole of which a share is sped up.

    >>> amdahl(10.0, 0.5) == 1 / 0.55
    True
    """
    return 1.0 / (1.0 - share + share / speedup)


def simulate(
    pattern: AnyPattern,
    grid: Sequence[int] | None = None,
    key_grid: Sequence[int] | None = None,
    *,
    query_tile: Sequence[int] | int,
    key_tile: Sequence[int] | int,
    heads: int | None = None,
    attention_share: float | None = None,
) -> Simulation:
    """How much faster than dense attention a pattern can be on a kernel of these tiles.

    Key tiles are static: the key grid (for a dilated axis each of its residue classes) is cut from its start into
    boxes of `key_tile`, and a box is visited or not. The members of a union are visited one after another.

    >>> video = (Near(18, stride=16), Near(24, stride=8), Near(24, stride=8))
    >>> found = simulate(video, (30, 48, 80), query_tile=(4, 8, 8), key_tile=(2, 8, 8), attention_share=0.607)
    >>> round(found.attention_bound, 2), round(found.end_to_end_bound, 2), found.is_block_sparse
    (11.11, 2.23, True)

    Args:
        pattern: axis kinds, `heads(...)`, `union(...)`, or a `Bounds`.
        grid: the grid of the queries.
        key_grid: that of the keys, where it differs.
        query_tile: queries of a tile, of all axes or one per axis.
        key_tile: keys of a tile.
        heads: how many heads there are; it matters where `heads(...)` has groups without sizes. One each by default.
        attention_share: the part of a model's time that dense attention takes, between 0 and 1.
    """
    table = bounds(pattern, grid, key_grid)
    queries, keys = tile_of("query_tile", query_tile, table.rank), tile_of("key_tile", key_tile, table.rank)
    share = None if attention_share is None else check_share(attention_share)
    fixed = [group.heads for group in table.groups]
    if heads is not None:
        sizes = list(table.split(as_integer("simulate", "heads", heads, 1)))
    else:
        sizes = [1 if size is None else size for size in fixed]
    found = tuple(
        tuple(visits(member, queries, keys, even=False) for member in group.members) for group in table.groups
    )
    pairs = sum(size * group_pairs(group) for size, group in zip(sizes, table.groups, strict=True))
    dense_pairs = sum(sizes) * math.prod(table.grid) * math.prod(table.key_grid)
    dense_visits = sum(sizes) * _tiles(table.grid, queries) * _tiles(table.key_grid, keys)
    weighted = [(size, member) for size, group in zip(sizes, found, strict=True) for member in group]
    worst = sum(size * member.query_tiles * member.worst for size, member in weighted)
    visited = sum(size * member.visited for size, member in weighted)
    return Simulation(
        pattern=pattern,
        grid=table.grid,
        key_grid=table.key_grid,
        query_tile=queries,
        key_tile=keys,
        sparsity=1 - pairs / dense_pairs,
        flop_bound=dense_pairs / max(pairs, 1),
        attention_bound=dense_visits / max(worst, 1),
        mean_bound=dense_visits / max(visited, 1),
        is_block_sparse=all(member.full == member.visited for _, member in weighted) and len(weighted) == len(sizes),
        visits=found,
        attention_share=share,
    )


def _tiles(grid: Sequence[int], tile: Sequence[int]) -> int:
    return math.prod(-(-length // size) for length, size in zip(grid, tile, strict=True))


def tile_of(name: str, tile: Any, rank: int) -> tuple[int, ...]:
    """A tile as one size per axis."""
    sizes = tuple(tile) if isinstance(tile, Sequence) and not isinstance(tile, str) else (tile,) * rank
    if len(sizes) != rank:
        raise ValueError(f"simulate: {name} must be one integer or {rank} of them, one per axis, got {tile!r}")
    return tuple(as_integer("simulate", f"{name}[{axis}]", size, 1) for axis, size in enumerate(sizes))


def check_share(share: Any) -> float:
    """A share as a number between 0 and 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"simulate: attention_share must be a number between 0 and 1, got {share!r}")
    return float(share)
