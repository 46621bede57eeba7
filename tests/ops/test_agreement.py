"""Every back end on every problem: outputs and all gradients within the derived tolerance of an independent oracle."""

from __future__ import annotations

import pytest
import torch

from vicinal.ops import backend as backends

from .problems import PROBLEMS, SAMPLE, Problem
from .tolerance import assert_agrees, judge, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

every_backend = pytest.mark.parametrize("backend", backends.usable())
every_device = pytest.mark.parametrize("device", DEVICES)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@every_device
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_attention_agrees_with_the_oracle(problem: Problem, dtype: torch.dtype, backend: str, device: str) -> None:
    assert_agrees(run(problem, dtype, backend, device), judge(problem, dtype))


@every_device
@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_attention_in_half_precision_agrees_with_the_oracle(
    problem: Problem, dtype: torch.dtype, backend: str, device: str
) -> None:
    assert_agrees(run(problem, dtype, backend, device), judge(problem, dtype))
