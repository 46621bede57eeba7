"""The dense strategy: patterns whose queries fall into groups that see the same keys, and nobody else's."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops.cpu import library
from vicinal.pattern import Full, Grid, Near, Same, Window, heads, union

from ..conftest import has_compiler
from .conftest import Forced
from .layouts import LAYOUTS
from .problems import Problem
from .test_agreement import short
from .test_cpu import FOR_BFLOAT16, ISAS, results, same_bits
from .tolerance import assert_agrees, judge, run

if library.reason_missing() is not None and not has_compiler():
    pytest.skip("no C++ compiler, so there is no library to test", allow_module_level=True)

PROBLEMS = (
    Problem((64,), Window(8), has_bias=True),
    Problem((45,), Near(15, dilation=3), heads=3, has_bias=True, batch=2),
    Problem((14, 14), Window(7), heads=3, batch=2),
    Problem((14, 21), Window(7, shift=3), heads=2, has_bias=True, batch=3),
    Problem((21, 21), Near(7, dilation=3), value_dim=20),
    Problem((17, 13), Window(5), heads=4, kv_heads=2, batch=2),
    Problem((12, 18), (Same(), Full()), has_bias=True),
    Problem((12, 16), heads((Same(), Full()), (Full(), Same())), heads=4, has_bias=True),
    Problem((16, 16), Grid(4), heads=2),
    Problem((9, 11), Full(), batch=4, key_grid=(5, 10)),
    Problem((15, 16), Full(), batch=4, heads=1, has_bias=True),
    Problem((4, 9, 10), (Window(2), Window(3, shift=1), Full()), has_bias=True, heads=2),
    Problem((34, 6), Window(17), batch=2),  # 102 keys: a tail of two lanes in the widest vectors
)
"""Groups of one shape and of many, of few keys and many, a bias of few heads and of so many that slots are shared."""

MANY_HEADS = Problem((40, 28), Window(14, shift=5), heads=12, has_bias=True, batch=1)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa not in FOR_BFLOAT16])
@pytest.mark.parametrize("problem", [*PROBLEMS, MANY_HEADS], ids=str)
def test_groups_agree_with_the_oracle(problem: Problem, isa: str, forced: Forced) -> None:
    forced("dense" if problem.kv_heads == problem.heads or not problem.has_bias else "auto", isa)
    assert_agrees(run(problem, torch.float32, "cpu"), judge(problem, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_short_types_agree_with_the_oracle(dtype: torch.dtype, forced: Forced) -> None:
    forced("dense")
    for problem in PROBLEMS[::3]:
        assert_agrees(run(problem, dtype, "cpu"), judge(problem, dtype))


@pytest.mark.parametrize("lay", LAYOUTS, ids=lambda lay: lay.__name__)
def test_strides_agree_with_the_oracle(lay: Any, forced: Forced) -> None:
    forced("dense")
    for problem in (PROBLEMS[3], PROBLEMS[4]):
        assert_agrees(run(problem, torch.float32, "cpu", lay=lay), judge(problem, torch.float32))


def test_memory_of_earlier_calls_is_not_read(forced: Forced) -> None:
    forced("dense")
    poison = ctypes.CDLL(str(library.path())).vicinal_poison_workspace
    poison.argtypes, poison.restype = (), None
    for problem in PROBLEMS:
        poison()
        assert_agrees(run(problem, torch.float32, "cpu"), judge(problem, torch.float32))


def test_same_bits_whatever_the_number_of_threads(forced: Forced) -> None:
    forced("dense")
    problems = (*PROBLEMS, MANY_HEADS)
    once = results(1, problems)
    for threads in (2, 5):
        assert same_bits(once, results(threads, problems)), threads


def groups_of(pattern: Any, grid: tuple[int, ...], heads: int = 2) -> list[dict[str, Any]]:
    query = torch.empty(1, *grid, heads, 16)
    tiles = vicinal.explain(query, query, query, pattern, backend="cpu").tiles
    assert tiles is not None
    found: list[dict[str, Any]] = tiles["groups"]
    return found


def test_groups_are_found_and_counted() -> None:
    (group,) = groups_of(Window(7, shift=3), (14, 14))
    assert group["strategy"] == "dense"
    assert group["blocks"] == 9  # 4, 7 and 3 tokens on each axis
    assert group["pairs"] == (4**2 + 7**2 + 3**2) ** 2
    assert group["waste"] >= 1
    for pattern, grid in (
        (Near(7, dilation=2), (14, 14)),
        (Near(7, dilation=2), (15, 15)),
        ((Same(), Full()), (14, 30)),
        (Full(), (7, 7)),
    ):
        assert groups_of(pattern, grid, 4)[0]["strategy"] == "dense"


def test_other_problems_go_to_tiles() -> None:
    for pattern, grid in (
        (Near(7), (14, 14)),  # nearly every query sees other keys
        (Near(7, dilation=2), (20, 20)),
        (Near(3), (4096,)),  # groups of one query: keys would be copied three times over
        ((Near(3), Same()), (64, 64)),
        (Full(), (17, 17)),  # more keys than a group may have
        (heads(Window(7), Near(7)), (14, 14)),  # of two head groups, one
    ):
        assert groups_of(pattern, grid, 4)[0]["strategy"] == "tiles"
    assert groups_of(Full(), (7, 7), 2)[0]["strategy"] == "tiles"  # two groups keep few threads busy


def test_what_does_not_fall_into_groups_is_refused(forced: Forced) -> None:
    forced("dense")
    query = torch.zeros(1, 9, 1, 8)
    with pytest.raises(ValueError, match="strategy must not be dense where"):
        vicinal.attention(query, query, query, union(Near(3), Window(3)), backend="cpu")
    extra = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="strategy must not be dense where"):
        vicinal.attention(query, query, query, Full(), extra_key=extra, extra_value=extra, backend="cpu")
