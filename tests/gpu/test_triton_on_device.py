"""The Triton kernels on a GPU: `pytest -m gpu tests/gpu`. Not run anywhere so far: no GPU was at hand.

What says most comes first, the whole table of problems and the random ones last (see conftest.py on borrowed time).
Tolerances are those of the CPU tests: our error against float64 next to that of the same-precision eager computation.
"""

from __future__ import annotations

import os
import time
from random import Random
from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Near, Window, heads, union

from ..ops.problems import PROBLEMS, SAMPLE, Problem, arguments, draw
from ..ops.random_problems import random_problem
from ..ops.test_agreement import short
from ..ops.tolerance import assert_agrees, judge, run

# what warns on a device depends on its torch and its driver, and says nothing about the kernels
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

if not torch.cuda.is_available():
    pytest.skip("no GPU here: torch.cuda.is_available() is False", allow_module_level=True)

# without it cuBLAS warns wherever deterministic algorithms are on, which is in every test that fills fresh memory
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SWEEP_SECONDS = float(os.environ.get("VICINAL_SWEEP_SECONDS", "120"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_kernels_agree_with_the_oracle_on_a_few_of_every_sort(problem: Problem, dtype: torch.dtype) -> None:
    assert_agrees(run(problem, dtype, "triton", "cuda"), judge(problem, dtype))


def test_gpu_tensors_take_these_kernels_by_themselves() -> None:
    query = torch.randn(1, 14, 14, 2, 32, device="cuda", dtype=torch.float16)
    assert vicinal.explain(query, query, query, Near(7)).backend == "triton"
    plain = backends.Problem("cuda", torch.float16, (14, 14), (14, 14), 2, 2, 32, 32)
    assert not backends.find("triton").refusals(plain)


LARGE = (
    ((56, 56), Near(7), 32),
    ((56, 56), Near(7, dilation=8), 32),
    ((56, 56), Window(7, shift=3), 32),
    ((8, 24, 40), (Near(6), Near(8), Near(8)), 128),
    ((8, 24, 40), (Near(6, stride=4), Near(8, stride=8), Near(8, stride=8)), 128),
    ((4096,), Near(513), 80),
    ((48, 48), heads(Near(9), union(Near(3), Near(5, dilation=5))), 256),
)
"""Larger than the table's problems: many tiles, every class of them, all head dims' blocks."""


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("grid", "pattern", "head_dim"), LARGE, ids=str)
def test_large_problems_agree_with_the_portable_back_end(
    grid: tuple[int, ...], pattern: Any, head_dim: int, dtype: torch.dtype
) -> None:
    wide = [torch.randn(2, *grid, 2, head_dim, device="cuda", dtype=torch.float64) for _ in range(4)]
    narrow = [tensor.to(dtype) for tensor in wide]

    def results(tensors: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        query, key, value = (tensor.clone().requires_grad_() for tensor in tensors[:3])
        out, lse = vicinal.attention(query, key, value, pattern, return_lse=True, backend=backend)
        loss = (out * tensors[3]).sum(dtype=torch.float32 if out.dtype != torch.float64 else None) + lse.sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (query, key, value))]

    exact = results([tensor.double() for tensor in narrow], "tiled")
    eager = results(narrow, "tiled")
    for ours, wanted, plain in zip(results(narrow, "triton"), exact, eager, strict=True):
        size = wanted.abs().max()
        allowed = 2 * (plain.double() - wanted).abs().max() + 4 * torch.finfo(dtype).eps * size
        assert (ours.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_backward_gives_the_same_bits_again(problem: Problem) -> None:
    once = run(problem, torch.float16, "triton", "cuda")
    for _ in range(3):
        again = run(problem, torch.float16, "triton", "cuda")
        assert all(torch.equal(once[name], again[name]) for name in once)


def on_device(problem: Problem, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda().requires_grad_() for name, tensor in draw(problem, dtype).items()}


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_registration_is_right(problem: Problem) -> None:
    calls: list[tuple[Any, ...]] = []

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.vicinal.attend.default:
                calls.append(args)
            return func(*args, **(kwargs or {}))

    tensors = {name: tensor.detach() for name, tensor in on_device(problem, torch.float32).items()}
    with Note():
        vicinal.attention(**arguments(problem, tensors), backend="triton")
    assert calls
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for call in calls:
        torch.library.opcheck(torch.ops.vicinal.attend.default, call, test_utils=tests)


@pytest.mark.plain_memory
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_compiled_whole_graph_equals_eager(problem: Problem) -> None:
    torch._dynamo.reset()
    tensors = on_device(problem, torch.float16)
    given = arguments(problem, tensors)
    fixed = {name: given.pop(name) for name in ("grids", "extra_lengths") if name in given}

    def call(inputs: dict[str, torch.Tensor], **others: torch.Tensor) -> Any:
        return vicinal.attention(**{**arguments(problem, inputs), **others}, return_lse=True, backend="triton")

    found = torch.compile(call, fullgraph=True)(tensors, **fixed)
    wanted = call(tensors, **fixed)
    flat = torch.utils._pytree.tree_leaves
    torch.testing.assert_close(flat(found), flat(wanted), equal_nan=True)
    first, expected = (sum(part.nan_to_num(0.0, 0.0, 0.0).sum() for part in flat(some)) for some in (found, wanted))
    torch.testing.assert_close(
        torch.autograd.grad(first, list(tensors.values()), allow_unused=True),
        torch.autograd.grad(expected, list(tensors.values()), allow_unused=True),
        equal_nan=True,
    )


@pytest.mark.plain_memory
def test_forward_and_backward_are_captured_in_a_cuda_graph() -> None:
    pattern, dtype = heads(Near(7), union(Near(3), Near(5, dilation=3))), torch.float16
    query, key, value = (torch.randn(2, 24, 24, 4, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(2, 24, 24, 4, 64, device="cuda", dtype=dtype)

    def step() -> tuple[torch.Tensor, ...]:
        out = vicinal.attention(query, key, value, pattern, backend="triton")
        return out, *torch.autograd.grad(out, (query, key, value), grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and makes the tables
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor.normal_()
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


@pytest.mark.plain_memory
def test_nothing_waits_for_the_device() -> None:
    query = torch.randn(1, 12, 12, 2, 32, device="cuda").requires_grad_()
    vicinal.attention(query, query, query, Near(5), backend="triton").sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        vicinal.attention(query, query, query, Near(5), backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tf32_is_used_only_where_torch_may() -> None:
    from vicinal.ops.triton.launch import precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert precision(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_kernels_agree_with_the_oracle(problem: Problem, dtype: torch.dtype) -> None:
    assert_agrees(run(problem, dtype, "triton", "cuda"), judge(problem, dtype))


@pytest.mark.parametrize("seed", [int(os.environ.get("VICINAL_SWEEP_SEED", "0"))])
def test_random_problems_agree_with_the_oracle(seed: int) -> None:
    """Two minutes of them (`VICINAL_SWEEP_SECONDS`), from a seed (`VICINAL_SWEEP_SEED`)."""
    rng, begin, number = Random(seed), time.monotonic(), 0
    while time.monotonic() - begin < SWEEP_SECONDS:
        problem, dtype = random_problem(rng), rng.choice(DTYPES)
        try:
            assert_agrees(run(problem, dtype, "triton", "cuda"), judge(problem, dtype))
        except AssertionError as error:
            raise AssertionError(f"number {number} of seed {seed}, {dtype}: {problem!r}\n{error}") from error
        number += 1
    assert number > 20
