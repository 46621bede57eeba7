"""From a pattern and sizes to what the operator is called with: its back end, layout and tables.

Everything here works on plain values and is remembered. A compiler that traces a call sees these functions as
constants; patterns reach them as nested tuples (`pattern.key`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from vicinal.ops.backend import Problem, check_name, choose, find
from vicinal.ops.neighborhood import neighborhood_of
from vicinal.ops.operator import library
from vicinal.ops.packing import Layout, layout_of, layout_of_padded, ordinary_tensors, pack_tables
from vicinal.pattern.axis import Full
from vicinal.pattern.bounds import AnyPattern, Bounds, bounds_of_key
from vicinal.pattern.compose import check_pattern, pattern_key, pattern_of_key, pattern_rank
from vicinal.pattern.parse import parse

Key: TypeAlias = tuple[Any, ...]
Grid: TypeAlias = tuple[int, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """Tell a compiler to run the function while tracing and keep its result, as assume_constant_result does.

    Set by hand because the public decorator imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
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
    chosen_name = choose(problem, name)
    plan = find(chosen_name).plan
    if plan is not None:
        layout = dataclasses.replace(layout, plan=plan(problem, _bounds_or_none(key, problem)))
    return layout.packed, chosen_name


def _bounds_or_none(key: Key, problem: Problem) -> Bounds | None:
    try:
        return bounds_of_key(key, problem.grid, problem.key_grid)
    except ValueError:
        if problem.has_grids:  # a padded grid need not suit a pattern that suits its samples
            return None
        raise


@constant
def chosen(key: Key, problem_sizes: tuple[Any, ...], name: str | None) -> tuple[tuple[int, ...], str]:
    """The packed layout and the name of the back end; raises what the pattern or the choice raises."""
    check_name(name)  # before anything is looked up by it
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
        neighborhood=None if has_grids else neighborhood_of(bounds_of_key(key, grid, key_grid)),
    )
    return problem, layout


@functools.lru_cache(maxsize=256)
def _tables(key: Key, grid: Grid, key_grid: Grid, device: torch.device) -> torch.Tensor:
    packed = pack_tables(bounds_of_key(key, grid, key_grid))
    with ordinary_tensors():
        return torch.from_numpy(packed).to(device)


def _as_fake_as(like: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """`made` as it is, or as a fake tensor where `like` is one whose mode takes no real tensors beside it."""
    mode = getattr(like, "fake_mode", None)
    if mode is None or mode.allow_non_fake_inputs:
        return made
    fake: torch.Tensor = mode.from_tensor(made)
    return fake


def tables(key: Key, grid: Grid, key_grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """The packed tables of a pattern on these grids, on the device of `like`: int32 `[1, words]`."""
    if not torch.compiler.is_dynamo_compiling():
        return _as_fake_as(like, _tables(key, grid, key_grid, like.device))
    # in a traced graph the tables are made by an operator that names the pattern
    text, words = _named(key, grid, key_grid)
    found: torch.Tensor = torch.ops.vicinal.tables(like, text, grid, key_grid, words)
    return found


@constant
def _named(key: Key, grid: Grid, key_grid: Grid) -> tuple[str, int]:
    """A text that `_key_named` reads back, and the length of the packed tables."""
    if key[0] is Bounds:
        _PINNED.setdefault(text := f"Bounds {key[1]}", (key, bounds_of_key(key, grid, key_grid)))
    else:
        pattern = pattern_of_key(key)
        text = repr(pattern)
        try:
            is_known = pattern_key(parse(text)) == key
        except ValueError:
            is_known = False
        if not is_known:  # an axis kind of the user's own: known in this process only
            _PINNED[text] = (key, None)
    return text, _tables(key, grid, key_grid, torch.device("cpu")).shape[1]


_PINNED: dict[str, tuple[Key, Bounds | None]] = {}


def _key_named(text: str) -> Key:
    return _PINNED[text][0] if text in _PINNED else pattern_key(parse(text))


def _tables_operator(
    like: torch.Tensor, pattern: str, grid: list[int], key_grid: list[int], words: int
) -> torch.Tensor:
    del words
    return _tables(_key_named(pattern), tuple(grid), tuple(key_grid), like.device).clone()


def _tables_fake(like: torch.Tensor, pattern: str, grid: list[int], key_grid: list[int], words: int) -> torch.Tensor:
    del pattern, grid, key_grid
    return like.new_empty(1, words, dtype=torch.int32)


library.define("tables(Tensor like, str pattern, int[] grid, int[] key_grid, int words) -> Tensor")
library.impl("tables", _tables_operator, "CompositeExplicitAutograd")
torch.library.register_fake("vicinal::tables", _tables_fake, lib=library)


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
    return problem_layout(key, grid, key_grid, heads, False).packed


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
        size = math.prod(place.bias_shape or ())
        columns.append(index[:, None] + (offset + size * np.arange(place.heads))[None, :, None])
        offset += size * place.heads
    with ordinary_tensors():
        return torch.from_numpy(np.concatenate(columns, 1).reshape(*grid, heads, width)).to(device)


def bias_index(key: Key, grid: Grid, key_grid: Grid, heads: int, like: torch.Tensor) -> torch.Tensor:
    """Where each entry in window order reads the bias vector: int64 `[*grid, heads, window]`."""
    if not torch.compiler.is_dynamo_compiling():
        return _as_fake_as(like, _bias_index(key, grid, key_grid, heads, like.device))
    text, _ = _named(key, grid, key_grid)
    width = window(packed_layout(key, grid, key_grid, heads))
    found: torch.Tensor = torch.ops.vicinal.bias_index(like, text, grid, key_grid, heads, width)
    return found


def _bias_index_operator(
    like: torch.Tensor, pattern: str, grid: list[int], key_grid: list[int], heads: int, window: int
) -> torch.Tensor:
    del window
    return _bias_index(_key_named(pattern), tuple(grid), tuple(key_grid), heads, like.device).clone()


def _bias_index_fake(
    like: torch.Tensor, pattern: str, grid: list[int], key_grid: list[int], heads: int, window: int
) -> torch.Tensor:
    del pattern, key_grid
    return like.new_empty(*grid, heads, window, dtype=torch.int64)


library.define("bias_index(Tensor like, str pattern, int[] grid, int[] key_grid, int heads, int window) -> Tensor")
library.impl("bias_index", _bias_index_operator, "CompositeExplicitAutograd")
torch.library.register_fake("vicinal::bias_index", _bias_index_fake, lib=library)
