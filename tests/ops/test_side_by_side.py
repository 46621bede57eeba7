"""Gradients of parts of one tensor, written where autograd wants them."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.ops import side_by_side
from vicinal.ops.cpu import library
from vicinal.ops.side_by_side import empty_beside, unpack, whole_of


def attend(packed, split, backend=None):
    query, key, value = split(packed)
    return vicinal.na2d(query, key, value, 3, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_of_packed_is_what_unbind_gives(dtype):
    packed = torch.randn(2, 5, 6, 3, 4, 8, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 6, 4, 8, dtype=dtype)
    (ours,) = torch.autograd.grad(attend(packed, unpack), packed, grad)
    (theirs,) = torch.autograd.grad(attend(packed, lambda whole: whole.unbind(-3)), packed, grad)
    assert torch.equal(ours, theirs)


def test_cpu_kernels_spare_the_copy(monkeypatch):
    if library.reason_missing() is not None:
        pytest.skip(f"there are no kernels: {library.reason_missing()}")
    stacked = []
    stack = torch.stack
    monkeypatch.setattr(side_by_side.torch, "stack", lambda *given: stacked.append(1) or stack(*given))
    packed = torch.randn(1, 5, 6, 3, 2, 8, requires_grad=True)
    attend(packed, unpack).sum().backward()
    assert not stacked
    attend(packed, unpack, backend="tiled").sum().backward()
    assert stacked  # and the patch is seen


def test_parts_that_others_touch_are_stacked():
    packed = torch.randn(1, 6, 3, 2, 8, requires_grad=True)
    query, key, value = unpack(packed)
    out = vicinal.na1d(query, key * 2, value, 3).sum() + query.sum()
    (ours,) = torch.autograd.grad(out, packed)
    again = packed.detach().clone().requires_grad_()
    query, key, value = again.unbind(-3)
    (theirs,) = torch.autograd.grad(vicinal.na1d(query, key * 2, value, 3).sum() + query.sum(), again)
    torch.testing.assert_close(ours, theirs)


def test_only_part_of_it_used():
    packed = torch.randn(1, 6, 3, 2, 8, requires_grad=True)
    query, key, _ = unpack(packed)
    (grad,) = torch.autograd.grad(vicinal.na1d(query, key, torch.ones_like(key), 3).sum(), packed)
    assert grad.shape == packed.shape
    assert not grad[..., 2, :, :].any()


def test_twice():
    packed = torch.randn(1, 4, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda whole: vicinal.na1d(*unpack(whole), 3), packed)


def test_transforms_see_plain_operations():
    packed = torch.randn(4, 6, 3, 2, 8)
    grad = torch.func.grad(lambda whole: sum(part.square().sum() for part in unpack(whole)))(packed)
    torch.testing.assert_close(grad, 2 * packed)


def test_whole_of_refuses_what_is_not_whole():
    whole = torch.randn(2, 5, 3, 4, 8)
    query, key, value = whole.unbind(-3)
    assert whole_of([key, query, value]) is None
    assert whole_of([query, key, value.clone()]) is None
    assert whole_of([query[1:], key[1:], value[1:]]).shape == (1, 5, 3, 4, 8)
    assert whole_of([query[:, 1:], key[:, 1:], value[:, 1:]]) is None
    assert all(
        room.is_contiguous()
        for room in empty_beside([query, value], lambda shape, dtype: torch.empty(shape, dtype=dtype))
    )
