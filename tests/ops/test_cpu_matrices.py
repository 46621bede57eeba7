"""Bfloat16 in the matrix registers of Intel's processors (amx): what tiles and dense groups must do there."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops.cpu import library
from vicinal.pattern import AxisTable, Bounds, Group, Near, Window, mask, union

from ..conftest import has_compiler
from .conftest import Forced, Shrink
from .problems import PROBLEMS, SAMPLE, Problem, near
from .test_cpu import MANY_UNITS, from_forked_child, same_bits
from .test_cpu_dense import PROBLEMS as CLOSED
from .tolerance import assert_agrees, judge, run

if library.reason_missing() is not None and not has_compiler():
    pytest.skip("no C++ compiler, so there is no library to test", allow_module_level=True)
if library.load().best_isa != "amx":
    pytest.skip("no matrix registers here, or not for this process", allow_module_level=True)

DIMS = ((1, 24), (5, 1), (24, 40), (40, 5), (72, 16), (96, 33), (160, 72), (64, 128))

WIDE = (
    *(Problem((57,), Near(size), heads=1, has_bias=size % 2 == 1) for size in (2, 3, 16, 17, 18, 19, 33, 34, 49, 55)),
    *(Problem((7, 43), (Near(3), Near(size)), heads=1) for size in (13, 14, 29, 30, 41)),
    Problem((130,), Near(101), has_bias=True),
    Problem((24, 23), Near(21), heads=1),
)
"""Tiles that see 16 keys of a row and a few more or less, 32, or so many that they take several passes."""

UNEVEN_BIAS = (
    Problem((70,), Near(8, stride=3), has_bias=True),
    Problem((21, 16), near((4, 5), stride=(2, 3)), has_bias=True, batch=2, heads=4, kv_heads=2),
    Problem((30, 12), Near(3), key_grid=(15, 20), has_bias=True),
    Problem((15,), Near(7), key_grid=(44,), has_bias=True, extra_tokens=5),
    Problem((28,), Near(5, dilation=4, border="wrap"), has_bias=True),
    Problem((4, 9, 10), (Near(2), Near(4, stride=2), Near(3, border="crop")), has_bias=True),
)

SCALES = tuple(Problem((37,), Near(9), scale=scale, has_bias=scale == 0.0) for scale in (0.0, -0.5, 1.5, -3.0))

SHRUNK = (
    *SAMPLE[1:5],
    *UNEVEN_BIAS[:3],
    Problem((130,), Near(101), has_bias=True),
    Problem((97,), union(Near(7), Near(5, dilation=9)), heads=4, kv_heads=2, extra_tokens=3),
    Problem((19, 22), near((3, 4), dilation=(2, 1), causal=(True, False)), heads=4, kv_heads=1, has_bias=True),
    Problem((20, 18), Near(3), batch=2, grids=((9, 18), (20, 1)), has_bias=True),
)


@pytest.fixture(autouse=True)
def matrices(forced: Forced) -> None:
    forced("tiles", "amx")


def agrees(problem: Problem) -> None:
    assert_agrees(run(problem, torch.bfloat16, "cpu"), judge(problem, torch.bfloat16))


SOME = (*PROBLEMS[::4], *WIDE, *UNEVEN_BIAS, *SCALES)
OTHERS = [pytest.param(problem, marks=pytest.mark.slow) for problem in PROBLEMS if problem not in SOME]


@pytest.mark.parametrize("problem", [*SOME, *OTHERS], ids=str)
def test_matrices_agree_with_the_oracle(problem: Problem) -> None:
    agrees(problem)


@pytest.mark.parametrize(("head_dim", "value_dim"), DIMS)
def test_odd_head_dims_agree_with_the_oracle(head_dim: int, value_dim: int) -> None:
    agrees(Problem((9, 13), Near(5), head_dim=head_dim, value_dim=value_dim, has_bias=True, extra_tokens=2))


@pytest.mark.parametrize("problem", CLOSED, ids=str)
def test_dense_groups_agree_with_the_oracle(problem: Problem, forced: Forced) -> None:
    forced("dense" if problem.kv_heads == problem.heads or not problem.has_bias else "auto", "amx")
    agrees(dataclasses.replace(problem, head_dim=40, value_dim=24))


@pytest.mark.parametrize("problem", SHRUNK, ids=str)
def test_small_units_and_panels_agree_with_the_oracle(problem: Problem, shrink: Shrink) -> None:
    poison = ctypes.CDLL(str(library.path())).vicinal_poison_workspace
    poison.argtypes, poison.restype = (), None
    for bytes_ in (1, 3 << 12, 1 << 15):
        shrink(bytes_)
        poison()
        agrees(problem)


def results(threads: int, problems: Sequence[Problem] = (*SAMPLE, *MANY_UNITS, UNEVEN_BIAS[1])) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [part for problem in problems for part in run(problem, torch.bfloat16, "cpu").values()]
    finally:
        torch.set_num_threads(before)


def test_same_bits_whatever_the_number_of_threads() -> None:
    once = results(1)
    for threads in (2, 5):
        assert same_bits(once, results(threads)), threads


def test_several_python_threads_at_once_get_what_one_gets() -> None:
    once = results(2)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert all(same_bits(once, found) for found in pool.map(lambda _: results(2), range(4)))


def test_torchs_own_products_between_calls_are_not_disturbed() -> None:
    """They use the same registers, in shapes of their own."""
    left, right = torch.randn(2, 130, 130).bfloat16().unbind(0)
    before = results(1, SAMPLE), left @ right
    for _ in range(3):
        assert same_bits(before[0], results(1, SAMPLE))
        assert torch.equal(before[1], left @ right)


def _send_results(sender: Any) -> None:
    sender.send([part.float().numpy() for part in results(2, SAMPLE)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_forked_child_may_use_the_registers_too() -> None:
    once = [part.float() for part in results(2, SAMPLE)]
    assert same_bits(once, from_forked_child(_send_results))


INPUTS = ("query", "key", "value", "grad_out")

HIDING = (
    ("tiles", Near(7), (61,)),
    ("tiles", Near(6, causal=True), (61,)),
    ("tiles", Near(3, border="wrap"), (37,)),
    ("tiles", (Near(3), Near(5)), (9, 13)),
    ("tiles", Window(4, shift=1), (10, 11)),
    ("tiles", union(Near(3), Near(3, dilation=5)), (41,)),
    ("dense", Window(4, shift=1), (10, 11)),
    ("dense", Window(17), (34, 6)),
    ("dense", Near(7, dilation=3), (21,)),
)


def computed(tensors: dict[str, torch.Tensor], pattern: Any) -> dict[str, torch.Tensor]:
    leaves = [tensors[name].clone().requires_grad_() for name in INPUTS[:3]]
    out, lse = vicinal.attention(*leaves, pattern, return_lse=True, backend="cpu")
    grads = torch.autograd.grad(out, leaves, tensors["grad_out"])
    found = {"out": out.detach(), "lse": lse.detach()[..., None]}
    found.update(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
    return {name: tensor.flatten(1, -3)[0, :, 0].float() for name, tensor in found.items()}


def touched(name: str, place: int, sees: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which queries' and keys' results depend on a query, a key, a value or a gradient: [queries, keys] -> [place]."""
    alone = torch.zeros(len(sees), dtype=torch.bool)
    alone[place] = True
    queries = alone if name in ("query", "grad_out") else sees[:, place]
    keys, none = sees[queries].any(0), torch.zeros_like(alone)
    gives_out = name != "grad_out"
    return {
        "out": queries if gives_out else none,
        "lse": queries if name in ("query", "key") else none,
        "grad_query": queries,
        "grad_key": keys,
        "grad_value": none if name == "value" else keys,
    }


@pytest.mark.parametrize(("strategy", "pattern", "grid"), HIDING, ids=repr)
def test_what_nobody_sees_does_not_reach_results_whatever_it_is(
    strategy: str, pattern: Any, grid: tuple[int, ...], forced: Forced
) -> None:
    forced(strategy, "amx")
    torch.manual_seed(0)
    tensors = dict(zip(INPUTS, torch.randn(4, 1, *grid, 1, 24).bfloat16().unbind(0), strict=True))
    sees = mask(pattern, grid).reshape(math.prod(grid), -1)
    clean = computed(tensors, pattern)
    for name in INPUTS:
        for place in (0, 1, len(sees) // 2, len(sees) // 2 + 5, len(sees) - 1):
            for number in (torch.nan, torch.inf, -torch.inf):
                changed = tensors[name].clone()
                changed.view(len(sees), 24)[place, 3] = number
                found = computed({**tensors, name: changed}, pattern)
                for result, depends in touched(name, place, sees).items():
                    wanted = clean[result][~depends]
                    allowed = 2**-7 * float(clean[result].abs().max())
                    torch.testing.assert_close(found[result][~depends], wanted, rtol=0, atol=allowed)
                    if number is torch.nan:
                        assert found[result][depends].isnan().any(-1).all(), (name, place, result)


BOTH = pytest.mark.parametrize(("strategy", "pattern"), [("tiles", Near(9)), ("dense", Window(9))], ids=repr)


@BOTH
def test_huge_scores_leave_the_largest_alone(strategy: str, pattern: Any, forced: Forced) -> None:
    """The maximum was rounded once and its score not: beyond 1e9 their difference was one of large numbers."""
    forced(strategy, "amx")
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 63, 2, 32).bfloat16().unbind(0)
    for size in (1e3, 1e5, 1e8, 1e15):
        large = [(tensor * size).bfloat16() for tensor in (query, key)]
        out, lse = vicinal.attention(*large, value, pattern, return_lse=True, backend="cpu")
        wide = [part.double() for part in (*large, value)]
        exact = vicinal.attention(*wide, pattern, return_lse=True, backend="reference")
        torch.testing.assert_close(out.double(), exact[0], rtol=2**-8, atol=0)
        torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=0)


def test_query_that_sees_nothing_gets_zeros() -> None:
    table = AxisTable([-9, 0, 3, 3, 7, 7, 30], [0, 3, 0, 4, 0, 2, 0], 1, 9)
    pattern = Bounds((Group(((table,),)),))
    query, key, value = (torch.randn(1, length, 1, 40).bfloat16().requires_grad_() for length in (7, 9, 9))
    out, lse = vicinal.attention(query, key, value, pattern, return_lse=True, backend="cpu")
    nothing = [0, 2, 4, 6]
    assert not out[:, nothing].any()
    assert (lse == -torch.inf).flatten().nonzero().flatten().tolist() == nothing
    grads = torch.autograd.grad(out.float().sin().sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, nothing].any()


@BOTH
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7FC00101], ids=hex)
def test_nan_of_every_kind_comes_through(bits: int, strategy: str, pattern: Any, forced: Forced) -> None:
    """Those with low bits set, such as CUDA's own, once became finite weights."""
    forced(strategy, "amx")
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    query, key, value = torch.randn(3, 1, 63, 1, 32).bfloat16().unbind(0)
    bias = torch.zeros(1, 17)
    bias[0, 3] = nan
    found = vicinal.attention(query, key, value, pattern, bias=bias, return_lse=True, backend="cpu")
    wanted = vicinal.attention(query, key, value, pattern, bias=bias, return_lse=True, backend="reference")
    assert found[1].isnan().any()
    assert all(torch.equal(one.isnan(), other.isnan()) for one, other in zip(found, wanted, strict=True))
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    _, lse = vicinal.attention(*leaves, pattern, return_lse=True, backend="cpu")
    weight = torch.zeros_like(lse)
    weight[0, 30] = nan
    seen = mask(pattern, (63,))[30].flatten()
    grad_query, grad_key = torch.autograd.grad(lse, leaves[:2], weight)
    assert grad_query.isnan().any(-1).flatten().nonzero().flatten().tolist() == [30]
    assert torch.equal(grad_key.isnan().any(-1).flatten(), seen)


WITHOUT_PERMISSION = """
import ctypes, os
class Stack(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("flags", ctypes.c_int), ("bytes", ctypes.c_size_t)]
room = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 8192)), None) == 0
import torch, vicinal
from vicinal.ops.cpu import library
from vicinal.ops.api import _KNOWN
query = torch.randn(1, 9, 9, 1, 16).bfloat16()
vicinal.attention(query, query, query, vicinal.Near(3), backend="cpu")
print(library.load().best_isa)
os.environ["VICINAL_CPU_ISA"] = "amx"
library.load.cache_clear()
_KNOWN.clear()
try:
    vicinal.attention(query, query, query, vicinal.Near(3), backend="cpu")
except ValueError as refusal:
    print(refusal)
"""
"""The system lets nobody use the registers whose stack for signals is too small to save them."""


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux keeps the registers")
def test_process_that_may_not_use_the_registers_goes_without() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VICINAL_CPU")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PERMISSION], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    best, refusal = done.stdout.splitlines()
    assert best == "avx512_bf16"
    assert "isa must not be amx: this machine and this build of the library have avx512_bf16" in refusal
