"""From a pattern and sizes to what the operator is called with: its back end, layout and tables.

Everything here works on plain values and is remembered. A compiler that traces a call sees these functions as
constants; patterns reach them as nested tuples (`pattern.key`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from vicinal.ops.backend import Problem, choose
from vicinal.ops.packing import Layout, layout_of, layout_of_padded, pack_tables
from vicinal.pattern.axis import Full
from vicinal.pattern.bounds import AnyPattern, Bounds, bounds_of_key
from vicinal.pattern.compose import check_pattern, pattern_key, pattern_of_key, pattern_rank

Key: TypeAlias = tuple[Any, ...]
Grid: TypeAlias = tuple[int, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """Tell a compiler to run the function while tracing and keep its result, as assume_constant_result does.

    Set by hand because the public decorator imports the compiler, which takes a second.
    """
    function._torchdynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def key_of(pattern: AnyPattern) -> tuple[Key, int | None]:
    """A pattern as plain values, and the number of axes it fixes (None where it fits any)."""
    if isinstance(pattern, Bounds):
        return pattern.key, pattern.rank
    check_pattern("pattern", pattern)
    return pattern_key(pattern), pattern_rank(pattern)


@functools.lru_cache(maxsize=1024)
def problem_layout(key: Key, grid: Grid, key_grid: Grid, heads: int, padded: bool) -> Layout:
    """The layout of a pattern on these grids, for so many heads."""
    if padded:
        if key[0] is Bounds:
            raise ValueError("grids must be None where pattern is a Bounds, which is for one grid only")
        return layout_of_padded(pattern_of_key(key), key_grid, heads)
    return layout_of(bounds_of_key(key, grid, key_grid), heads)


@functools.lru_cache(maxsize=1024)
def _choose(key: Key, problem_sizes: tuple[Any, ...], name: str | None) -> tuple[tuple[int, ...], str]:
    problem, layout = make_problem(key, *problem_sizes)
    return layout.pack(), choose(problem, name)


@constant
def chosen(key: Key, problem_sizes: tuple[Any, ...], name: str | None) -> tuple[tuple[int, ...], str]:
    """The packed layout and the name of the back end; raises what the pattern or the choice raises."""
    return _choose(key, problem_sizes, name)


def make_problem(
    key: Key,
    device: str,
    dtype: torch.dtype,
    grid: Grid,
    key_grid: Grid,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    features: tuple[bool, bool, bool, bool],
) -> tuple[Problem, Layout]:
    """The problem as back ends see it, and its layout. `features`: bias, extra keys, extra lengths, grids."""
    has_bias, has_extra_keys, has_extra_lengths, has_grids = features
    layout = problem_layout(key, grid, key_grid, heads, has_grids)
    problem = Problem(
        device=device,
        dtype=dtype,
        grid=grid,
        key_grid=key_grid,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        has_bias=has_bias,
        has_extra_keys=has_extra_keys,
        has_extra_lengths=has_extra_lengths,
        has_grids=has_grids,
        num_groups=len(layout.groups),
        num_members=max(len(group.members) for group in layout.groups),
    )
    return problem, layout


@functools.lru_cache(maxsize=256)
def _tables(key: Key, grid: Grid, key_grid: Grid, device: torch.device) -> torch.Tensor:
    packed = pack_tables(bounds_of_key(key, grid, key_grid))
    with torch.utils._python_dispatch._disable_current_modes():  # a cached tensor must be a real one
        return torch.from_numpy(packed).to(device)


@constant
def tables(key: Key, grid: Grid, key_grid: Grid, device: torch.device) -> torch.Tensor:
    """The packed tables of a pattern on these grids, on a device: int32 `[1, words]`."""
    return _tables(key, grid, key_grid, device)


@constant
def bias_shapes(layout: tuple[int, ...]) -> tuple[tuple[tuple[int, ...] | None, ...], tuple[int, ...]]:
    """For each head group the shape of its bias tables (None where it takes none), and its heads."""
    groups = Layout.unpack(layout).groups
    return tuple(group.bias_shape for group in groups), tuple(group.heads for group in groups)


def whole_grid_key(rank: int) -> Key:
    """The pattern by which extra queries, laid along the first axis, see the whole grid."""
    return pattern_key((Full(),) * rank)




@constant
def packed_layout(key: Key, grid: Grid, key_grid: Grid, heads: int) -> tuple[int, ...]:
    """The packed layout of a pattern on these grids."""
    return problem_layout(key, grid, key_grid, heads, False).pack()


@constant
def window(layout: tuple[int, ...]) -> int:
    """Entries of the widest window, in window order."""
    return Layout.unpack(layout).window


@functools.lru_cache(maxsize=32)
def _bias_index(key: Key, grid: Grid, key_grid: Grid, heads: int, device: torch.device) -> torch.Tensor:
    layout = problem_layout(key, grid, key_grid, heads, False)
    tables = bounds_of_key(key, grid, key_grid)
    width, offset, columns = layout.window, 0, []
    for group, place in zip(tables.groups, layout.groups, strict=True):
        index = np.zeros((1, 1), dtype=np.int64)
        for table in group.members[0]:
            assert table.center is not None
            assert table.bias_length is not None
            first = (table.start - table.center) // table.step + table.bias_length // 2
            axis = np.clip(first[:, None] + np.arange(table.count.max()), 0, table.bias_length - 1)
            queries, entries = index.shape[0] * len(axis), index.shape[1] * axis.shape[1]
            index = (index[:, None, :, None] * table.bias_length + axis[None, :, None, :]).reshape(queries, entries)
        index = np.pad(index, ((0, 0), (0, width - index.shape[1])))
        size = int(np.prod(place.bias_shape))
        columns.append(index[:, None] + (offset + size * np.arange(place.heads))[None, :, None])
        offset += size * place.heads
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.from_numpy(np.concatenate(columns, 1).reshape(*grid, heads, width)).to(device)


@constant
def bias_index(key: Key, grid: Grid, key_grid: Grid, heads: int, device: torch.device) -> torch.Tensor:
    """Where each entry in window order reads the bias vector: int64 `[*grid, heads, window]`."""
    return _bias_index(key, grid, key_grid, heads, device)
