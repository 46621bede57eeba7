"""Tensors that lie side by side in one, as a projection to query, key and value makes them, and their gradients.

Autograd would copy the gradients of such parts into one tensor. Where a back end writes them side by side to begin
with, that copy is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The parts `[..., heads, head_dim]` of `[..., parts, heads, head_dim]`: `packed.unbind(-3)`.

    >>> query, key, value = unpack(torch.randn(1, 7, 7, 3, 4, 8))
    >>> query.shape
    torch.Size([1, 7, 7, 4, 8])
    """
    is_recorded = torch.is_grad_enabled() and packed.requires_grad
    if torch.compiler.is_compiling() or not is_recorded or not is_plain(packed) or _are_transforms_active():
        return packed.unbind(-3)
    parts: tuple[torch.Tensor, ...] = _unpack(packed)
    return parts


_are_transforms_active = torch._C._are_functorch_transforms_active


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what it seems: no subclass, no transform's wrapper, nobody watching the operations."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A function's `apply` without what torch does before it for transforms (torch.func), which must not be active."""
    found: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return found


def empty_beside(tensors: Sequence[torch.Tensor], empty: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """Room for the gradients of tensors: side by side if the tensors are all the parts of one, contiguous otherwise.

    `empty(shape, dtype)` makes a contiguous tensor.

    >>> parts = torch.randn(2, 5, 3, 4, 8).unbind(-3)
    >>> [room.stride() for room in empty_beside(parts, lambda shape, dtype: torch.empty(shape, dtype=dtype))] == [
    ...     part.stride() for part in parts
    ... ]
    True
    """
    # parts that are contiguous themselves have nothing beside them but in grids of one token
    whole = None if tensors[0].is_contiguous() else whole_of(tensors)
    if whole is None:
        return [empty(tensor.shape, tensor.dtype) for tensor in tensors]
    return list(empty(whole.shape, whole.dtype).unbind(-3))


def whole_of(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The contiguous `[..., parts, heads, head_dim]` that parts, in their order, fill; None if there is none such.

    >>> whole = torch.randn(2, 5, 3, 4, 8)
    >>> torch.equal(whole_of(whole.unbind(-3)), whole), whole_of([whole[:, :, 0], whole[:, :, 2]])
    (True, None)
    """
    first = parts[0]
    if first.dim() < 3 or len(parts) < 2:
        return None
    *grid, heads, dim = first.shape
    shape = (*grid, len(parts), heads, dim)
    expected = strides_beside(first.shape, len(parts))
    address, size = first.data_ptr(), heads * dim * first.element_size()
    storage = first.untyped_storage().data_ptr()
    for place, part in enumerate(parts):
        if part.shape != first.shape or part.dtype != first.dtype or part.stride() != expected:
            return None
        if part.data_ptr() != address + place * size or part.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided(shape, _contiguous(shape))


def strides_beside(shape: Sequence[int], parts: int) -> tuple[int, ...]:
    """Strides of one of so many parts of that shape that lie side by side.

    >>> strides_beside((1, 7, 4, 8), parts=3)
    (672, 96, 8, 1)
    """
    *grid, heads, dim = shape
    strides = _contiguous((*grid, parts, heads, dim))
    return (*strides[:-3], *strides[-2:])


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * max(length, 1))
    return tuple(reversed(strides))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return packed.unbind(-3)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        is_certain = not torch.is_grad_enabled() and all(is_plain(grad) for grad in grads)
        whole = whole_of(grads) if is_certain else None
        return torch.stack(grads, -3) if whole is None else whole


_unpack = apply_of(_Unpack)
