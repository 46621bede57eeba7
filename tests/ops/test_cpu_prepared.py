"""Calls like one before, on the CPU: they take a short way, which must tell apart whatever differs."""

from __future__ import annotations

import gc
import itertools
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops import api, packing, resolve
from vicinal.ops.cpu import library, prepared
from vicinal.pattern import Full, Near, Window, heads, union

from ..conftest import has_compiler
from .conftest import Forced
from .problems import SAMPLE
from .tolerance import run

if library.reason_missing() is not None and not has_compiler():
    pytest.skip("no C++ compiler, so there is no library to test", allow_module_level=True)

GRID = (5, 6)
SHAPE = (2, *GRID, 2, 8)
Tensors = list[torch.Tensor]


def inputs(*shape: int, requires_grad: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape or SHAPE, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


def gradients(tensors: Tensors, backend: str = "cpu") -> Tensors:
    """Output and gradients for a gradient that is not contiguous."""
    out = vicinal.attention(*tensors, Near(3), backend=backend)
    grad = torch.linspace(-1, 1, out.numel()).view(out.mT.shape).mT
    return [out.detach(), *torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], grad)]


def known() -> list[prepared._Prepared]:
    return [call for call in api._KNOWN.values() if isinstance(call, prepared._Prepared)]


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    api._KNOWN.clear()


def packed(tensors: Tensors) -> Tensors:
    return list(torch.stack([tensor.detach() for tensor in tensors], -3).requires_grad_().unbind(-3))


STRIDES: dict[str, Callable[[Tensors], Tensors]] = {
    "contiguous": lambda tensors: tensors,
    "heads first": lambda tensors: [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in tensors],
    "one of them": lambda tensors: [tensors[0], tensors[1].mT.contiguous().mT, tensors[2]],
    "expanded": lambda tensors: [tensors[0], tensors[1][:1].expand(SHAPE), tensors[2]],
    "parts of one": packed,
    "parts in another order": lambda tensors: [packed(tensors)[place] for place in (2, 0, 1)],
    "all the same": lambda tensors: [tensors[0]] * 3,
}


def test_other_strides_are_other_calls() -> None:
    ways = {name: lay(inputs()) for name, lay in STRIDES.items()}
    for _ in range(3):
        for name, tensors in ways.items():
            for found, wanted in zip(gradients(tensors), gradients(tensors, backend="reference"), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)
    assert len(known()) == len(ways) - 2  # which parts they are, and whether one is given thrice, strides do not tell


@pytest.mark.parametrize(
    "pattern", [Near(3), union(Near(3), Window(4)), heads(Near(3, border="wrap"), Full())], ids=repr
)
@pytest.mark.parametrize("strategy", ["simple", "tiles"])
def test_without_log_sum_exp_the_output_is_the_same(pattern: Any, strategy: str, forced: Forced) -> None:
    forced(strategy)
    tensors = inputs(requires_grad=False)
    wanted, lse = vicinal.attention(*tensors, pattern, return_lse=True, backend="cpu")
    for wants_lse in (False, True, False):
        found = vicinal.attention(*tensors, pattern, return_lse=wants_lse, backend="cpu")
        assert torch.equal(found[0] if wants_lse else found, wanted)
        assert not wants_lse or torch.equal(found[1], lse)


@pytest.mark.parametrize("lay", ["contiguous", "parts of one"])
def test_gradients_that_nobody_needs_are_not_taken(lay: str) -> None:
    tensors = [tensor.detach() for tensor in (*STRIDES[lay](inputs()), torch.linspace(-1, 1, 50).view(2, 5, 5))]
    weights = torch.randn(SHAPE), torch.randn(SHAPE[:-1])

    def grads(needed: tuple[int, ...], by: tuple[int, ...]) -> dict[int, torch.Tensor]:
        given = [tensor.detach().requires_grad_(place in needed) for place, tensor in enumerate(tensors)]
        results = vicinal.attention(*given[:3], Near(3), bias=given[3], return_lse=True)
        loss = sum((results[one] * weights[one]).sum() for one in by)
        found = torch.autograd.grad(loss, [given[place] for place in needed], allow_unused=True)
        return dict(zip(needed, found, strict=True))

    for by in ((0,), (0, 1), (1,)):
        wanted = grads((0, 1, 2, 3), by)
        for count, _ in itertools.product((1, 2, 3, 4), range(2)):
            for needed in itertools.combinations(range(4), count):
                for place, found in grads(needed, by).items():
                    torch.testing.assert_close(found, wanted[place], rtol=1e-5, atol=1e-6)


def test_gradients_lie_as_they_like() -> None:
    tensors = inputs()
    whole = torch.randn(SHAPE)
    lies = (
        whole,
        whole.mT.contiguous().mT,
        whole[:1, :1, :1, :1, :1].expand(SHAPE),
        torch.stack([whole] * 2, -1)[..., 0],
    )
    for _, grad in itertools.product(range(2), lies):
        found, wanted = (
            torch.autograd.grad(vicinal.attention(*tensors, Near(3)), tensors, given)
            for given in (grad, grad.clone(memory_format=torch.contiguous_format))
        )
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert len(known()[0].plans) == len(lies)


def test_threads_share_a_call() -> None:
    tensors = inputs(1, 20, 20, 2, 16)
    wanted = gradients(tensors)

    def work(_: int) -> bool:
        return all(torch.equal(*pair) for pair in zip(gradients(tensors), wanted, strict=True))

    gradients(tensors)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(80)))
    assert len(known()) == 1


def test_tables_live_as_long_as_the_call() -> None:
    tensors = inputs()
    wanted = gradients(tensors)
    for remembered in (
        resolve._tables,
        resolve._choose,
        resolve.problem_layout,
        packing._unpack,
    ):
        remembered.cache_clear()
    gc.collect()
    held = [torch.full((1, known()[0].tables.shape[1]), 99, dtype=torch.int32) for _ in range(100)]
    assert all(torch.equal(*pair) for pair in zip(gradients(tensors), wanted, strict=True))
    del held


def test_a_call_keeps_none_of_its_tensors() -> None:
    tensors = inputs()
    count = torch._C._storage_Use_Count
    addresses = [tensor.untyped_storage()._cdata for tensor in tensors]
    before = [count(address) for address in addresses]
    gradients(tensors)
    assert len(known()) == 1
    assert [count(address) for address in addresses] == before


def test_number_of_threads_is_that_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs()
    gradients(tensors)
    seen = []
    for name in ("attend", "attend_backward"):
        function = getattr(known()[0], name)

        def noted(data: bytes, places: bytes, *others: Any, function: Callable[..., int] = function) -> int:
            seen.append(struct.unpack_from("=q", places)[0])
            return function(data, places, *others)

        setattr(known()[0], name, noted)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            gradients(tensors)
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 2, 3, 3]
    monkeypatch.setattr(library.Process, "num_threads", staticmethod(lambda: 0))
    with pytest.raises(ValueError, match=r"the CPU kernels refuse the call: threads must be in 1\.\."):
        gradients(tensors)


def test_hooks_may_bring_back_tensors_that_lie_otherwise() -> None:
    tensors = packed(inputs())
    for _ in range(2):
        wanted = gradients(tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.mT.clone().mT):
        found = gradients(tensors)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_tensor_holds_may_be_exchanged_before_the_backward() -> None:
    tensors = inputs()
    for _ in range(2):
        wanted = gradients(tensors)
    out = vicinal.attention(*tensors, Near(3), backend="cpu")
    tensors[1].data = tensors[1].data.transpose(1, 3).contiguous().transpose(1, 3)
    grad = torch.linspace(-1, 1, out.numel()).view(out.mT.shape).mT
    for one, other in zip(torch.autograd.grad(out, tensors, grad), wanted[1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "exchange",
    [torch.Tensor.double, torch.Tensor.bfloat16, lambda tensor: tensor[..., :4], lambda tensor: tensor[:, :2]],
)
@pytest.mark.parametrize("place", [0, 2])
def test_saved_tensors_of_other_sizes_or_types_are_refused(exchange: Callable[..., torch.Tensor], place: int) -> None:
    tensors = inputs()
    for _ in range(2):
        out = vicinal.attention(*tensors, Near(3), backend="cpu")
    tensors[place].data = exchange(tensors[place].data)
    with pytest.raises(RuntimeError, match="in the forward and is"):
        torch.autograd.grad(out.sum(), tensors[1])


def test_a_bias_may_be_exchanged_for_one_in_another_type() -> None:
    query, bias = inputs()[0], torch.linspace(-1, 1, 50).view(2, 5, 5)
    for exchange in (False, False, True):
        out = vicinal.attention(query, query, query, Near(3), bias=bias, backend="cpu")
        if exchange:
            bias.data = bias.data.to(torch.bfloat16)
        (grad,) = torch.autograd.grad(out.square().sum(), query)
        if not exchange:
            wanted = grad
    torch.testing.assert_close(grad, wanted, rtol=0.02, atol=0.1)


def test_changes_in_place_are_noticed_and_graphs_are_freed() -> None:
    tensors = inputs()
    for _ in range(2):
        query = tensors[0] * 1
        out = vicinal.attention(query, *tensors[1:], Near(3))
        first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(out.sum(), tensors), first, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out.sum(), tensors)
    query = tensors[0] * 1
    out = vicinal.attention(query, *tensors[1:], Near(3))
    query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_known_calls_are_differentiated_twice() -> None:
    tensors = [*inputs(1, 4, 4, 2, 3), torch.linspace(-1, 1, 50).view(2, 5, 5).requires_grad_()]
    found = {}
    for backend in ("cpu", "cpu", "reference"):
        out, lse = vicinal.attention(*tensors[:3], Near(3), bias=tensors[3], return_lse=True, backend=backend)
        grads = torch.autograd.grad(out.square().sum() + lse.sin().sum(), tensors, create_graph=True)
        found[backend] = torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)
    for one, other in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_modes_are_told_apart() -> None:
    tensors = inputs()
    for _ in range(2):
        assert vicinal.attention(*tensors, Near(3)).requires_grad
        with torch.no_grad():
            assert not vicinal.attention(*tensors, Near(3)).requires_grad
        with torch.inference_mode():
            assert vicinal.attention(*tensors, Near(3)).is_inference()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert vicinal.attention(*tensors, Near(3)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_second_time_gives_the_bits_of_the_first(dtype: torch.dtype) -> None:
    for problem in SAMPLE:
        first, second = (run(problem, dtype, "cpu") for _ in range(2))
        for name, wanted in first.items():
            assert torch.equal(second[name].nan_to_num(7.5), wanted.nan_to_num(7.5)), (problem, name)


def test_first_call_refuses_saved_tensors_of_other_sizes() -> None:
    api._KNOWN.clear()
    query, key, value = (torch.randn(1, 9, 9, 2, 16, requires_grad=True) for _ in range(3))
    out = vicinal.attention(query, key, value, Near(3), backend="cpu")
    value.data = torch.randn(1, 4, 4, 2, 16)
    with pytest.raises(RuntimeError, match="value no longer has the size and type"):
        out.sum().backward()
