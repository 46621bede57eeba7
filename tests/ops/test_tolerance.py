"""The tolerance itself: it must let nothing through that is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vicinal.pattern import AxisTable, Bounds, Near, bounds
from vicinal.pattern.bounds import Group

from .oracle import dense
from .problems import PROBLEMS, SAMPLE, Problem, draw
from .tolerance import Judgment, assert_agrees, disagreement, judge, largest, with_gradients

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def judgments(dtype: torch.dtype) -> list[tuple[Problem, Judgment]]:
    problems = PROBLEMS[::5] if dtype in (torch.float32, torch.float64) else SAMPLE
    return [(problem, judge(problem, dtype)) for problem in problems]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tolerance_rejects_results_that_are_all_zero(dtype: torch.dtype) -> None:
    for problem, judgment in judgments(dtype):
        for name, exact in judgment.exact.items():
            if largest(exact) > 0:
                zero = torch.where(exact.isinf(), exact, 0.0)
                assert disagreement(name, zero, judgment), f"{problem}: {name} may be all zero"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tolerance_stays_below_a_tenth_of_every_result(dtype: torch.dtype) -> None:
    for problem, judgment in judgments(dtype):
        for name, exact in judgment.exact.items():
            if largest(exact) > 0:
                assert judgment.allowed[name] < largest(exact) / 10, f"{problem}: {name}"


def one_window_moved(kernel_size: int, length: int, moved: int) -> Bounds:
    """`Near(kernel_size)`, but one query's window lies one key too far to the right."""
    table = bounds(Near(kernel_size), (length,)).groups[0].members[0][0]
    start = np.array(table.start)
    start[moved:] = np.maximum(start[moved:], start[moved] + 1)
    return Bounds((Group(((AxisTable(start, table.count, 1, length),),)),))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [19, 211], ids=lambda length: f"n{length}")
def test_tolerance_rejects_one_window_that_is_one_key_off(length: int, dtype: torch.dtype) -> None:
    right = Problem((length,), Near(5), head_dim=16)
    wrong = dataclasses.replace(right, pattern=one_window_moved(5, length, length // 2))
    tensors = {name: tensor.double().requires_grad_() for name, tensor in draw(right, dtype).items()}
    judgment = judge(right, dtype)
    assert_agrees(with_gradients(right, tensors, dense(right, tensors)), judgment)
    results = with_gradients(right, tensors, dense(wrong, tensors))
    # exchanging one key may move the lse by less than half precision can tell
    names = set(results) - ({"lse"} if dtype.itemsize == 2 else set())
    assert all(disagreement(name, results[name], judgment) for name in names)


def test_tolerance_rejects_nan_and_a_missing_infinity() -> None:
    problem = next(problem for problem in PROBLEMS if problem.grids is not None)
    judgment = judge(problem, torch.float32)
    lse = judgment.exact["lse"]
    assert disagreement("lse", lse, judgment) is None
    assert disagreement("lse", lse.nan_to_num(neginf=0.0), judgment)
    assert disagreement("lse", -lse, judgment)
    out = judgment.exact["out"].clone()
    out.view(-1)[3] = torch.nan
    assert disagreement("out", out, judgment)
