"""What is particular to the compiled CPU back end: strategies, instruction sets, threads, processes, strides."""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops import backend as backends
from vicinal.ops.cpu import library
from vicinal.pattern import Full, Near, Window, heads, union

from ..conftest import has_compiler
from .conftest import Forced
from .layouts import LAYOUTS
from .problems import PROBLEMS, SAMPLE, Problem
from .test_agreement import short
from .tolerance import assert_agrees, judge, run

if library.reason_missing() is not None and not has_compiler():
    pytest.skip("no C++ compiler, so there is no library to test", allow_module_level=True)

STRATEGIES = ["simple", "tiles"]
ISAS = library.ISAS[1 : library.ISAS.index(library.load().best_isa) + 1]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_strategy_agrees_with_the_oracle(problem: Problem, strategy: str, forced: Forced) -> None:
    forced(strategy)
    assert_agrees(run(problem, torch.float32, "cpu"), judge(problem, torch.float32))


FOR_BFLOAT16 = ("avx512_bf16", "amx")
"""Other types get what they get with avx512."""


@pytest.mark.parametrize(
    ("isa", "dtype"),
    [
        pytest.param(isa, dtype, id=f"{isa}-{short(dtype)}")
        for isa in ISAS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if dtype == torch.bfloat16 or isa not in FOR_BFLOAT16
    ],
)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_instruction_set_agrees_with_the_oracle(problem: Problem, isa: str, dtype: torch.dtype, forced: Forced) -> None:
    forced(isa=isa)
    assert_agrees(run(problem, dtype, "cpu"), judge(problem, dtype))


@pytest.mark.skipif(library.load().best_isa == library.ISAS[-1], reason="this machine has every instruction set")
def test_instruction_set_that_the_machine_lacks_is_refused(forced: Forced) -> None:
    forced(isa=library.ISAS[-1])
    query = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=f"isa must not be {library.ISAS[-1]}: this machine and this build .* have"):
        vicinal.attention(query, query, query, Near(3), backend="cpu")


def test_products_of_bfloat16_are_used_where_they_are_quick() -> None:
    def usual(dtype: torch.dtype) -> str:
        query = torch.zeros(1, 56, 56, 2, 32, dtype=dtype)
        tiles = vicinal.explain(query, query, query, Near(7), backend="cpu").tiles
        assert tiles is not None
        return str(tiles["groups"][0]["isa"])

    best = library.load().best_isa
    without = "avx512" if best in FOR_BFLOAT16 else best
    assert usual(torch.float32) == without
    assert usual(torch.float16) == without
    cpuinfo = Path("/proc/cpuinfo")
    if best == "amx":
        assert usual(torch.bfloat16) == "amx"
    elif cpuinfo.exists():
        assert usual(torch.bfloat16) == (best if "AuthenticAMD" in cpuinfo.read_text() else without)


@pytest.mark.parametrize("variable", ["VICINAL_CPU_STRATEGY", "VICINAL_CPU_ISA"])
def test_environment_variable_of_no_meaning_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load.cache_clear()
    monkeypatch.setenv(variable, "fastest")
    with pytest.raises(ValueError, match=f"{variable} must be one of .*, got 'fastest'"):
        library.load()
    monkeypatch.undo()
    assert library.load()


def results(threads: int, problems: Sequence[Problem] = SAMPLE) -> list[torch.Tensor]:
    """Outputs and gradients of a few problems, whole bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [part for problem in problems for part in run(problem, torch.float32, "cpu").values()]
    finally:
        torch.set_num_threads(before)


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


MANY_UNITS = (
    Problem((34, 41), Near(7), heads=4, kv_heads=2, batch=2, has_bias=True, extra_tokens=3),
    Problem((600,), heads(Near(31), Near(9, dilation=5)), heads=4, kv_heads=1, value_dim=20),
)
"""Work for many threads, unlike most of the table's problems; the last one's head groups share a key head."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_bits_whatever_the_number_of_threads(strategy: str, forced: Forced) -> None:
    forced(strategy)
    problems = (*SAMPLE, *MANY_UNITS)
    once = results(1, problems)
    for threads in (2, 3, 5):
        assert same_bits(once, results(threads, problems)), threads


def test_several_python_threads_at_once_get_what_one_gets() -> None:
    problems = (*SAMPLE[::4], *MANY_UNITS)
    once = results(2, problems)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(same_bits(once, found) for found in pool.map(lambda _: results(2, problems), range(8)))


def from_forked_child(send: Callable[[Any], None]) -> list[torch.Tensor]:
    """The arrays that a function sends through a pipe, when a fork of this process runs it."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=send, args=(sender,), daemon=True)
    child.start()
    try:
        assert receiver.poll(120), "the child hangs"
        return [torch.from_numpy(part) for part in receiver.recv()]
    finally:
        child.kill()
        child.join()


def _send_results(sender: Any) -> None:
    sender.send([part.numpy() for part in results(4)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_forked_child_computes_without_waiting_for_threads_it_does_not_have() -> None:
    """OpenMP's threads are not in the child; gcc's waits for them forever."""
    once = results(4)  # this process has used threads
    assert same_bits(once, from_forked_child(_send_results))


class Attended(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        query = torch.arange(1 * 9 * 2 * 8, dtype=torch.float32).reshape(1, 9, 2, 8).sin() + index
        return vicinal.attention(query, query, query, Near(3), backend="cpu")


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_data_loader_worker_computes() -> None:
    here = list(torch.utils.data.DataLoader(Attended(), batch_size=2))
    workers = torch.utils.data.DataLoader(Attended(), batch_size=2, num_workers=2, timeout=120)
    assert same_bits(here, list(workers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strided_views_give_what_contiguous_tensors_give(dtype: torch.dtype, strategy: str, forced: Forced) -> None:
    forced(strategy if dtype != torch.float64 else "simple")
    tensors = [torch.randn(2, 7, 9, heads, 16).to(dtype) for heads in (4, 2, 2)]
    grad = torch.randn(2, 7, 9, 4, 16).to(dtype)

    def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        given = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = vicinal.attention(*given, Near(5), backend="cpu")
        return [out.detach(), *torch.autograd.grad(out, given, grad)]

    wanted = attended(*tensors, grad)
    for lay in LAYOUTS:
        for found, expected in zip(attended(*map(lay, (*tensors, grad))), wanted, strict=True):
            torch.testing.assert_close(found, expected)


def test_expanded_gradient_is_taken_as_it_is() -> None:
    query = torch.randn(1, 6, 7, 2, 8, requires_grad=True)
    vicinal.attention(query, query, query, Near(3), backend="cpu").sum().backward()  # a gradient of stride 0
    ours, query.grad = query.grad, None
    vicinal.attention(query, query, query, Near(3), backend="tiled").sum().backward()
    torch.testing.assert_close(ours, query.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "dense"])
def test_lse_alone_has_the_gradients_that_zeros_beside_it_give(
    dtype: torch.dtype, strategy: str, forced: Forced
) -> None:
    forced(strategy if dtype != torch.float64 else "simple")
    tensors = [torch.randn(2, 8, 6, 2, dim).to(dtype).requires_grad_() for dim in (16, 16, 20)]
    out, lse = vicinal.attention(*tensors, Window(2), return_lse=True, backend="cpu")
    weight = torch.randn_like(lse)
    alone = torch.autograd.grad(lse, tensors, weight, retain_graph=True)
    beside = torch.autograd.grad((out, lse), tensors, (torch.zeros_like(out), weight))
    assert same_bits(list(alone), list(beside))


def test_minus_infinity_in_a_bias_hides_a_key() -> None:
    query, bias = torch.randn(1, 9, 2, 8, requires_grad=True), torch.zeros(2, 5)
    bias[:, 0] = bias[0, 4] = -torch.inf
    wanted = vicinal.attention(query, query, query, Near(3), bias=bias, backend="reference")
    found = vicinal.attention(query, query, query, Near(3), bias=bias, backend="cpu")
    torch.testing.assert_close(found, wanted)
    (slope,) = torch.autograd.grad(found.sin().sum(), query)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted.sin().sum(), query)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_comes_through_where_it_is_seen_and_only_there(isa: str, dtype: torch.dtype, forced: Forced) -> None:
    forced(isa=isa)
    for length, size in ((12, 3), (40, 17)):  # tiles of few and of many queries
        query, key, value = torch.randn(3, 1, length, 1, 8).to(dtype)
        key[0, length // 2] = torch.nan
        sees = [abs(index - length // 2) <= size // 2 for index in range(length)]
        out, lse = vicinal.attention(query, key, value, Near(size), backend="cpu", return_lse=True)
        assert out.isnan().any(-1).flatten().tolist() == sees
        assert lse.isnan().flatten().tolist() == sees


def test_dilations_may_have_a_common_multiple_beyond_all_numbers() -> None:
    primes = [number for number in range(2, 60) if all(number % smaller for smaller in range(2, number))]
    pattern = union(*(Near(2, dilation=prime) for prime in primes))
    query = torch.randn(1, 120, 1, 8)
    assert math.prod(primes) > 2**63
    found = vicinal.attention(query, query, query, pattern, backend="cpu")
    torch.testing.assert_close(found, vicinal.attention(query, query, query, pattern, backend="reference"))


def test_record_that_contradicts_itself_is_an_error_and_not_a_crash() -> None:
    query, extra = torch.randn(1, 6, 1, 8), torch.randn(1, 2, 1, 8)
    tables, layout = torch.zeros(1, 3, dtype=torch.int32), (1, 1, 1, 1, 5, 1, 0, 3)
    arguments = (query, query, query, tables, None, extra, extra, None, layout, 1.0, "cpu")
    with pytest.raises(ValueError, match=r"CPU kernels refuse the call: table_words must be 22 .*, got 3"):
        torch.ops.vicinal.attend(*arguments)


BEYOND = """
import ctypes, mmap
import torch, vicinal
from vicinal.pattern import AxisTable, Bounds, Group
memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin), mmap.PAGESIZE, 0) == 0
numbers = (ctypes.c_float * (7 * 16)).from_address(begin + mmap.PAGESIZE)
key = torch.frombuffer(numbers, dtype=torch.float32).view(1, 7, 1, 16)
table = AxisTable([-9, 0, 1, 2, 3, 4, 30], [0, 3, 3, 3, 3, 3, 0], 1, 7)
out = vicinal.attention(torch.ones(1, 7, 1, 16), key, key + 1, Bounds((Group(((table,),)),)), backend="cpu")
assert out[0, :, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0], out
"""
"""A query that sees nothing stands far before the keys, which begin behind a page that nobody may read."""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page as Linux does")
def test_query_that_sees_nothing_may_stand_beyond_the_keys() -> None:
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("pattern", [Near(5), heads(Near(3), Full()), union(Near(3), Window(4))], ids=repr)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_description_counts_the_pairs(pattern: Any, strategy: str, forced: Forced) -> None:
    forced(strategy)
    query = torch.empty(2, 9, 11, 2, 16)
    explanation = vicinal.explain(query, query, query, pattern)
    groups = explanation.tiles["groups"]
    assert explanation.backend == "cpu"
    assert {group["strategy"] for group in groups} == {strategy}
    heads_of_group = 2 // len(groups)
    pairs = sum(group["pairs"] * heads_of_group for group in groups)
    assert explanation.flops == 2 * 2 * pairs * (16 + 16)
    assert all(group["waste"] >= 1 for group in groups)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without the library."""
    from vicinal.ops import api, resolve

    def forget() -> None:
        api._KNOWN.clear()
        for remembered in (library.load, library.reason_missing, backends._warn_of_slow_path, resolve._choose):
            remembered.cache_clear()

    monkeypatch.delenv("VICINAL_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_PATH", library._PATH.with_name("_missing.so"))
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.usefixtures("missing")
def test_missing_library_is_told_once_and_the_portable_path_taken() -> None:
    query = torch.randn(1, 9, 2, 8)
    with pytest.warns(UserWarning, match="without its compiled kernels, many times slower: its library was not built"):
        vicinal.attention(query, query, query, Near(3))
    vicinal.attention(query, query, query, Near(5))  # and not again: warnings are errors here
    explanation = vicinal.explain(query, query, query, Near(3))
    assert explanation.backend == "tiled"
    assert "its library was not built" in explanation.refused["cpu"][0]


@pytest.mark.usefixtures("missing")
def test_missing_library_is_refused_by_name() -> None:
    query = torch.randn(1, 9, 2, 8)
    with pytest.raises(vicinal.BackendRefused, match="'cpu' cannot take this problem: cpu its library was not built"):
        vicinal.attention(query, query, query, Near(3), backend="cpu")


def test_library_of_another_interface_is_refused(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(library, "ABI", 99)
    with pytest.raises(OSError, match=r"has interface 2, this version of vicinal needs 99"):
        library.load()


def test_import_does_not_load_the_library() -> None:
    script = (
        "import vicinal; from vicinal.ops.cpu import library; "
        "assert not library.load.cache_info().currsize, 'loaded by the import'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_sums_over_thousands_of_keys_keep_their_digits() -> None:
    """Each pass over some hundred keys is summed up by itself; one long sum was two and a half times as far off."""
    query, key, value = torch.randn(3, 1, 4000, 1, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    flat = [tensor[0, :, 0] for tensor in (query, key, value)]

    def dense(dtype: torch.dtype) -> torch.Tensor:
        q, k, v = (tensor.to(dtype) for tensor in flat)
        return torch.softmax(q @ k.T / 4, -1) @ v

    right = dense(torch.float64)
    found = vicinal.attention(query, key, value, Full(), backend="cpu")[0, :, 0]
    errors = [float((one - right).square().mean().sqrt()) for one in (found, dense(torch.float32))]
    assert errors[0] < 1.5 * errors[1], errors
