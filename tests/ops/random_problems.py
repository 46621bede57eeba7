"""Random problems from a seed: any kinds on any axes with any features, small, and a few that leave ragged blocks.

Hypothesis (test_sweep.py) looks for the simplest problem that fails; this draws very many, quickly.
"""

from __future__ import annotations

from random import Random
from typing import Any

from vicinal.pattern import AxisKind, Full, Grid, Halo, Near, Same, Window, bounds, heads, union

from .problems import Problem

LONGEST = {1: 60, 2: 12, 3: 6}
"""The longest axis for each rank: the oracle is dense."""


def random_problem(rng: Random) -> Problem:
    rank = rng.randint(1, 3)
    grid = key_grid = _grid(rng, rank)
    if rng.random() < 0.15:
        key_grid = _grid(rng, rank)
    kv_heads, shared = rng.randint(1, 2), rng.choice((1, 1, 2, 3))
    pattern = _pattern(rng, grid, key_grid, kv_heads * shared)
    batch, tokens = rng.choice((1, 1, 2, 3)), rng.choice((0, 0, 0, 1, 4, 19))
    grids, table = None, None
    if grid == key_grid and rng.random() < 0.25:
        grids = tuple(_own_grid(rng, pattern, grid) for _ in range(batch))
    elif rng.random() < 0.2:
        table = _cut(rng, bounds(pattern, grid, key_grid))
        grid, key_grid = table.grid, table.key_grid
    lengths = tuple(rng.randint(0, tokens) for _ in range(batch)) if tokens and rng.random() < 0.5 else None
    return Problem(
        grid=grid,
        pattern=pattern if table is None else table,
        key_grid=None if grid == key_grid else key_grid,
        heads=kv_heads * shared,
        kv_heads=kv_heads,
        head_dim=_dim(rng),
        value_dim=_dim(rng) if rng.random() < 0.3 else None,
        batch=batch,
        has_bias=table is None and _takes_bias(pattern) and rng.random() < 0.5,
        extra_tokens=tokens,
        extra_lengths=lengths,
        extra_queries=rng.choice((0, 0, 0, 0, 0, 2)),
        grids=grids,
        scale=rng.choice((None, None, None, 0.0, -0.5, 1.5)),
    )


def _grid(rng: Random, rank: int) -> tuple[int, ...]:
    longest = LONGEST[rank]
    if rank == 1 and rng.random() < 0.05:
        longest = 300  # several passes of the kernels
    return tuple(rng.randint(1, longest) for _ in range(rank))


def _dim(rng: Random) -> int:
    """Mostly of a few vectors and a rest; sometimes more than is taken at once."""
    return (
        rng.choice((rng.randint(1, 9), rng.randint(1, 40), 8, 16, 32)) if rng.random() < 0.95 else rng.randint(120, 300)
    )


def _divisor(rng: Random, length: int) -> int:
    return rng.choice([number for number in range(1, length + 1) if length % number == 0])


def _near(rng: Random, length: int) -> Near:
    kernel_size = rng.randint(1, rng.choice((min(length, 7), length + 2)))
    dilation = rng.randint(1, rng.choice((2, max(length // 2, 1))))
    border = rng.choice(("shift", "shift", "crop", "wrap"))
    if border == "wrap":
        return Near(kernel_size, _divisor(rng, length), border="wrap")
    stride = rng.choice((1, rng.randint(1, min(kernel_size, 5))))
    return Near(kernel_size, dilation, stride, rng.random() < 0.3, border)


def _kind(rng: Random, length: int) -> AxisKind:
    """A kind that may stand on an axis of this length."""
    choice = rng.randrange(10)
    if choice < 5:
        return _near(rng, length)
    if choice == 5:
        size = rng.randint(1, length + 2)
        return Window(size, rng.randrange(size))
    if choice == 6:
        return Halo(rng.randint(1, length + 1), rng.randint(0, length))
    if choice == 7:
        return Grid(_divisor(rng, length))
    return Full(rng.random() < 0.5) if choice == 8 else Same()


def _kind_between_grids(rng: Random, length: int) -> AxisKind:
    return Full() if rng.random() < 0.3 else Near(rng.randint(1, length + 2), border=rng.choice(("shift", "crop")))


def _pattern(rng: Random, grid: tuple[int, ...], key_grid: tuple[int, ...], num_heads: int) -> Any:
    make = _kind if grid == key_grid else _kind_between_grids

    def group() -> Any:
        def product() -> tuple[AxisKind, ...]:
            return tuple(make(rng, length) for length in key_grid)

        return product() if rng.random() < 0.7 else union(*(product() for _ in range(rng.randint(2, 3))))

    if num_heads == 1 or rng.random() < 0.7:
        return group()
    first = rng.randint(1, num_heads - 1)
    return heads(group(), group(), sizes=(first, num_heads - first))


def _takes_bias(pattern: Any) -> bool:
    return not any(hasattr(group, "members") for group in getattr(pattern, "groups", (pattern,)))


def _own_grid(rng: Random, pattern: Any, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The true sizes of a sample of a padded batch, on which the pattern may stand."""
    sizes = tuple(rng.randint(1, length) for length in grid)
    try:
        bounds(pattern, sizes)
    except ValueError:
        return grid
    return sizes


def _cut(rng: Random, table: Any) -> Any:
    """The table after one or two of the operations it is closed under, if it allows them."""
    for _ in range(rng.randint(1, 2)):
        axis = rng.randrange(table.rank)
        start = rng.randrange(table.grid[axis])
        try:
            match rng.randrange(3):
                case 0:
                    table = table.slice(axis, start, rng.randint(start + 1, table.grid[axis]))
                case 1:
                    table = table.shift(
                        axis, rng.randint(-2, table.key_grid[axis]), rng.randint(1, table.key_grid[axis])
                    )
                case _:
                    table = table.transpose()
        except ValueError:
            continue
    return table
