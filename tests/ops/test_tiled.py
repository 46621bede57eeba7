"""What is particular to the portable back end: chunks, what it remembers, what it leaves behind."""

import gc

import pytest
import torch

import vicinal
from vicinal import Near
from vicinal.ops.packing import ordinary_tensors
from vicinal.ops.tiled import parts, plan, tiles
from vicinal.ops.tiled.rows import group_heads


@pytest.fixture
def forgetful(monkeypatch):
    """Many small chunks, none of them remembered: what a large problem does."""
    monkeypatch.setattr(parts, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(parts, "WHOLE_BYTES", 0)
    monkeypatch.setattr(tiles, "MOST_REMEMBERED_BYTES", 0)
    plan._plan_row.cache_clear()
    yield
    plan._plan_row.cache_clear()


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
    plan._plan_row.cache_clear()
    for one, other in zip(small, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
