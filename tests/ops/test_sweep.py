"""Random problems: any pattern on any grid with any features, every back end against the oracle."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from vicinal.ops import backend as backends
from vicinal.pattern import AxisKind, Bounds, Full, Grid, Halo, Near, Same, Window, bounds, heads, union

from .problems import Problem
from .tolerance import assert_agrees, judge, run

MOST_TOKENS = {1: 40, 2: 11, 3: 6}
"""The longest axis for each rank: the oracle is dense."""


def divisors(length: int) -> list[int]:
    return [number for number in range(1, length + 1) if length % number == 0]


@st.composite
def near(draw: st.DrawFn, length: int) -> Near:
    kernel_size, dilation = draw(st.integers(1, length + 2)), draw(st.integers(1, max(length // 2, 1)))
    border = draw(st.sampled_from(["shift", "crop", "wrap"]))
    if border == "wrap":
        return Near(kernel_size, draw(st.sampled_from(divisors(length))), border="wrap")
    stride = draw(st.integers(1, min(kernel_size, 5)))
    return Near(kernel_size, dilation, stride, draw(st.booleans()), border)


@st.composite
def window(draw: st.DrawFn, length: int) -> Window:
    size = draw(st.integers(1, length + 2))
    return Window(size, draw(st.integers(0, size - 1)))


def kinds(length: int) -> st.SearchStrategy[AxisKind]:
    """A kind that may stand on an axis of this length."""
    return st.one_of(
        near(length),
        near(length),
        window(length),
        st.builds(Halo, st.integers(1, length + 1), st.integers(0, length)),
        st.sampled_from(divisors(length)).map(Grid),
        st.builds(Full, st.booleans()),
        st.just(Same()),
    )


def kinds_between_grids(length: int) -> st.SearchStrategy[AxisKind]:
    nearest = st.builds(Near, st.integers(1, length + 2), border=st.sampled_from(["shift", "crop"]))
    return st.one_of(nearest, st.just(Full()))


@st.composite
def patterns(draw: st.DrawFn, grid: tuple[int, ...], key_grid: tuple[int, ...], num_heads: int) -> Any:
    """A product, a union of products, or groups of heads of either."""
    make = kinds if grid == key_grid else kinds_between_grids
    product = st.tuples(*map(make, key_grid))
    group = st.one_of(product, product, st.lists(product, min_size=2, max_size=3).map(lambda some: union(*some)))
    if num_heads == 1 or draw(st.integers(0, 2)):
        return draw(group)
    sizes = draw(
        st.lists(st.integers(1, num_heads), min_size=2, max_size=3).filter(lambda some: sum(some) == num_heads)
    )
    return heads(*(draw(group) for _ in sizes), sizes=tuple(sizes))


def takes_bias(pattern: Any) -> bool:
    groups = getattr(pattern, "groups", (pattern,))
    return not any(hasattr(group, "members") for group in groups)


@st.composite
def cut_tables(draw: st.DrawFn, table: Bounds) -> Bounds:
    """The table after a few of the operations it is closed under; one that a wrapping axis refuses is left out."""
    for _ in range(draw(st.integers(0, 2))):
        axis = draw(st.integers(0, table.rank - 1))
        length, keys = table.grid[axis], table.key_grid[axis]
        start = draw(st.integers(0, length - 1))
        offset = draw(st.integers(-2, keys))
        operation = draw(st.sampled_from(["slice", "shift", "transpose"]))
        try:
            if operation == "slice":
                table = table.slice(axis, start, draw(st.integers(start + 1, length)))
            elif operation == "shift":
                table = table.shift(axis, offset, draw(st.integers(1, keys)))
            else:
                table = table.transpose()
        except ValueError:
            hypothesis.assume(False)
    return table


@st.composite
def own_grids(draw: st.DrawFn, pattern: Any, grid: tuple[int, ...], batch: int) -> tuple[tuple[int, ...], ...]:
    """True sizes of the samples of a padded batch, on which the pattern may stand."""
    found = []
    for _ in range(batch):
        sizes = tuple(draw(st.integers(1, length)) for length in grid)
        try:
            bounds(pattern, sizes)
        except ValueError:
            sizes = grid
        found.append(sizes)
    return tuple(found)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rank = draw(st.integers(1, 3))
    grid = draw(st.tuples(*[st.integers(1, MOST_TOKENS[rank])] * rank))
    key_grid = draw(st.one_of(st.just(grid), st.just(grid), st.tuples(*[st.integers(1, MOST_TOKENS[rank])] * rank)))
    kv_heads, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    pattern = draw(patterns(grid, key_grid, kv_heads * shared))
    batch, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 1, 4]))
    grids, has_bias = None, takes_bias(pattern) and draw(st.booleans())
    if grid == key_grid and draw(st.integers(0, 2)) == 0:
        grids = draw(own_grids(pattern, grid, batch))
    elif draw(st.integers(0, 2)) == 0:
        has_bias, pattern = False, draw(cut_tables(bounds(pattern, grid, key_grid)))
        grid, key_grid = pattern.grid, pattern.key_grid
    lengths = draw(st.one_of(st.none(), st.tuples(*[st.integers(0, tokens)] * batch))) if tokens else None
    return Problem(
        grid=grid,
        pattern=pattern,
        key_grid=None if grid == key_grid else key_grid,
        heads=kv_heads * shared,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 9)),
        value_dim=draw(st.one_of(st.none(), st.integers(1, 9))),
        batch=batch,
        has_bias=has_bias,
        extra_tokens=tokens,
        extra_lengths=lengths,
        extra_queries=draw(st.sampled_from([0, 0, 1, 3])),
        grids=grids,
        scale=draw(st.sampled_from([None, None, 0.0, -0.5, 1.5])),
    )


def check(problem: Problem, dtype: torch.dtype) -> None:
    hypothesis.note(f"repr: {problem!r}")
    for name in backends.usable():
        assert_agrees(run(problem, dtype, name), judge(problem, dtype))


@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_random_problem_agrees_with_the_oracle(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype)


@given(problems(), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=20)
def test_random_problem_in_half_precision_agrees_with_the_oracle(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype)


@pytest.mark.slow
@given(problems(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
@settings(max_examples=3000)
def test_many_random_problems_agree_with_the_oracle(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype)
