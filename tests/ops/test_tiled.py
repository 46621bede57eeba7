"""What is particular to the portable back end: chunks, what it remembers, what it leaves behind."""

import gc
import math
from typing import Any

import pytest
import torch

import vicinal
from vicinal import Near, Window
from vicinal.ops import backend
from vicinal.ops.api import Call
from vicinal.ops.backend import Inputs
from vicinal.ops.packing import Layout, ordinary_tensors
from vicinal.ops.tiled import forward, parts, plain, plan, tiles
from vicinal.ops.tiled.rows import group_heads


@pytest.fixture
def forgetful(monkeypatch):
    """Many small chunks, none of them remembered: what a large problem does."""
    monkeypatch.setattr(parts, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(parts, "WHOLE_BYTES", 0)
    monkeypatch.setattr(tiles, "MOST_REMEMBERED_BYTES", 0)
    forget()
    yield
    forget()


def forget() -> None:
    plan._plan_row.cache_clear()
    plain._find.cache_clear()


def live_tensors() -> int:
    gc.collect()
    return sum(type(held) is torch.Tensor for held in gc.get_objects())


def test_backward_leaves_no_tensor_behind(forgetful):
    # once the chunks were made inside a context that switches gradients on: every chunk's copies stayed in a graph
    query, key, value = (torch.randn(1, 30, 31, 2, 8, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, 30, 31, 2, 8)

    def run() -> None:
        torch.autograd.grad(vicinal.na2d(query, key, value, 5), (query, key, value), grad)

    run()
    before = live_tensors()
    run()
    assert live_tensors() <= before


def test_chunks_run_under_the_callers_modes(forgetful):
    member = plan._plan_member(vicinal.bounds(Near(3), (16,)).groups[0].members[0], [], bounded=True, biased=False)
    with torch.no_grad():
        for _ in member.sets[0].chunks(1, 1, torch.device("cpu"), group_heads((1,), 1)[0]):
            assert not torch.is_grad_enabled()
        with ordinary_tensors():
            assert not torch.is_grad_enabled()


def test_what_inference_mode_remembers_serves_training(forgetful):
    query = torch.randn(1, 9, 9, 2, 8)
    with torch.inference_mode():
        vicinal.na2d(query, query, query, 3)
    query.requires_grad_()
    vicinal.na2d(query, query, query, 3).sum().backward()
    assert query.grad is not None


def test_small_chunks_give_what_one_chunk_gives(forgetful, monkeypatch):
    query, key, value = (torch.randn(2, 13, 11, 2, 8, requires_grad=True) for _ in range(3))

    def run() -> list[torch.Tensor]:
        out = vicinal.na2d(query, key, value, (5, 3), dilation=(1, 2))
        return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]

    small = run()
    monkeypatch.setattr(parts, "CHUNK_BYTES", 1 << 30)
    forget()
    for one, other in zip(small, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def inputs_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Any, bias: torch.Tensor | None = None
) -> Inputs:
    call = Call(query, key, value, pattern, bias, None, None, None, None, None)
    _, tables, vector, layout, _ = call.prepare("tiled")
    return Inputs(query, key, value, tables, vector, None, None, None, Layout.unpack(layout), call.scale)


PLAIN = [(Window(4), False, 140_000), (Near(3, dilation=2), False, 70_000), (Near(5), True, 270_000)]
"""Pattern, whether there is a bias, and a little more than all weights take."""


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 1 << 13])
@pytest.mark.parametrize("copies", [4, 1])
@pytest.mark.parametrize("pattern, biased, weights_bytes", PLAIN, ids=repr)
def test_gradients_from_what_was_kept_are_those_computed_again(
    pattern: Any, biased: bool, weights_bytes: int, copies: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "MOST_KEPT_BYTES", 1 << 30 if copies == 4 else weights_bytes)
    monkeypatch.setattr(parts, "WHOLE_BYTES", chunk_bytes)
    monkeypatch.setattr(parts, "CHUNK_BYTES", chunk_bytes)
    forget()
    query, grad_out = torch.randn(2, 8, 8, 4, 6).double(), torch.randn(2, 8, 8, 4, 3).double()
    key, value, grad_lse = torch.randn(2, 8, 8, 2, 6).double(), torch.randn(2, 8, 8, 2, 3).double(), grad_out[..., 0]
    bias = torch.randn(4, 9, 9).double() if biased else None
    inputs = inputs_of(query, key, value, pattern, bias)
    out, lse, kept = plain.forward_keeping(inputs)
    for found, wanted in zip((out, lse), forward.forward(inputs), strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(kept) == copies if chunk_bytes == 1 << 30 else len(kept) > copies
    for grads in ((grad_out, grad_lse), (grad_out, None), (None, grad_lse)):
        needs = (True, True, True, biased, False, False)
        found = plain.backward_from_kept(inputs, kept, *grads, needs)
        wanted = backend.find("tiled").backward(inputs, out, lse, *grads, needs)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    for place in range(3):
        found = plain.backward_from_kept(inputs, kept, grad_out, None, [place == number for number in range(6)])
        assert [grad is not None for grad in found] == [place == number for number in range(6)]
    forget()


@pytest.mark.parametrize("pattern, grid", [(Near(3), (13, 64)), (vicinal.heads(Near(3), Window(4)), (8, 8))], ids=repr)
def test_nothing_is_kept_of_large_problems_and_of_those_that_are_not_plain(pattern, grid, monkeypatch):
    monkeypatch.setattr(plain, "MOST_KEPT_BYTES", 10_000)
    forget()
    query = torch.randn(1, *grid, 4, 8)
    out, lse, kept = plain.forward_keeping(inputs_of(query, query, query, pattern))
    assert kept == ()
    wanted = vicinal.attention(query, query, query, pattern, return_lse=True, backend="reference")
    torch.testing.assert_close((out, lse), wanted)
    forget()


@pytest.mark.parametrize("size", [1.0, 60.0, 1000.0])
def test_scores_of_any_size_are_taken(size):
    """All keys are alike, so that every query's output is the mean of its window, however high or low the score."""
    key = torch.ones(1, 8, 8, 1, 4)
    query = size * torch.where(torch.rand(1, 8, 8, 1, 1) < 0.5, -key, key)
    value = torch.randn(1, 8, 8, 1, 4)
    inputs = inputs_of(query, key, value, Window(4))
    means = value.unflatten(2, (2, 4)).unflatten(1, (2, 4)).mean((2, 4), keepdim=True)
    for out, lse in (plain.forward(inputs), plain.forward_keeping(inputs)[:2]):
        torch.testing.assert_close(out.unflatten(2, (2, 4)).unflatten(1, (2, 4)), means.expand(1, 2, 4, 2, 4, 1, 4))
        torch.testing.assert_close(lse, 2 * query[..., 0] + math.log(16))


@pytest.mark.parametrize("is_large", [False, True])
def test_output_alone_is_the_output(is_large: bool) -> None:
    """The second call of a kind leaves the log-sum-exp out; large scores have their largest taken off first."""
    query, key, value = torch.randn(3, 2, 12, 15, 2, 16).unbind(0)
    query = 1e3 * query if is_large else query
    for pattern in (Near(5), Near(3, dilation=4), Window(3)):
        out, _ = vicinal.attention(query, key, value, pattern, backend="tiled", return_lse=True)
        for _ in range(2):
            alone = vicinal.attention(query, key, value, pattern, backend="tiled")
            torch.testing.assert_close(alone, out, rtol=0, atol=0)
