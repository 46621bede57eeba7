"""Calls like one before, on the CPU: the record of the call is there, and only addresses are put beside it.

Between kernels the caches are full of tensors, so what a call costs is how much Python and torch it touches: there is
as little here as autograd allows. Whatever is unlike the first call (somebody watches, gradients of gradients, tensors
that hooks have exchanged meanwhile) goes the operator's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vicinal.ops import operator
from vicinal.ops.backend import Call, Inputs
from vicinal.ops.cpu import library, memory, record
from vicinal.ops.operator import PLAIN_KEYS, is_watched, keys_of
from vicinal.ops.side_by_side import apply_of, strides_beside

# names of this module are found sooner than those in torch
is_grad_enabled, dispatch_modes = torch.is_grad_enabled, torch._C._len_torch_dispatch_stack

MOST_PLANS = 64
"""Backward plans to remember for a call."""

Tensors = tuple[torch.Tensor | None, ...]
"""Of query, key, value and bias."""


def prepare(inputs: Inputs, otherwise: Call) -> Call | None:
    """The way for calls like this one; None where the bias must be converted first."""
    bias = inputs.bias
    if bias is not None and not (bias.dtype == record.wide(inputs.query) and bias.is_contiguous()):
        return None
    return _Prepared(inputs, otherwise)


class _Beside(NamedTuple):
    """A backward of inputs that lie side by side, so many bytes apart, as their gradients shall too."""

    record: bytes
    places: tuple[int, ...]
    step: int
    shelf: memory.Shelf

    def fits(self, addresses: Sequence[int]) -> bool:
        """Whether the inputs lie so. Their strides are those of parts, so that what lies between them is their own."""
        first = addresses[self.places[0]]
        return all(addresses[place] == first + self.step * number for number, place in enumerate(self.places))


class _Plan(NamedTuple):
    """A backward: its record, and what makes room for gradients of query, key and value, None where not needed."""

    record: bytes
    empty: tuple[Callable[[], torch.Tensor] | None, ...]
    beside: _Beside | None

    def rooms(self, addresses: Sequence[int]) -> tuple[bytes, Tensors]:
        """The record, and room for the gradients of inputs at these addresses."""
        beside = self.beside
        if beside is None or not beside.fits(addresses):
            query, key, value = self.empty
            return self.record, (query and query(), key and key(), value and value())
        rooms: list[torch.Tensor | None] = [None, None, None]
        for place, part in zip(beside.places, beside.shelf.empty_parts(), strict=True):
            rooms[place] = part
        return beside.record, tuple(rooms)


class _Prepared:
    """All that calls of the same sizes, types and strides share. It keeps none of their tensors but the tables."""

    def __init__(self, inputs: Inputs, otherwise: Call) -> None:
        query, bias = inputs.query, inputs.bias
        loaded = library.load()
        self.attend, self.attend_backward = loaded.attend_at, loaded.attend_backward_at
        self.otherwise = otherwise
        self.may_record = operator.may_record()
        self.tables, self.layout, self.scale = inputs.tables, inputs.layout, inputs.scale
        out = memory.shelf((*query.shape[:-1], inputs.value.shape[-1]), query.dtype)
        # where one of them comes from memory that is kept, the quicker way is in the caches for the other too
        least = 0 if out.is_kept else memory.LEAST_BYTES
        lse = memory.shelf(query.shape[:-1], record.wide(query), least=least)
        self.empty_out, self.empty_lse = out.empty, lse.empty
        self.results = (out.like, lse.like)
        self.lie = _lie(query, inputs.key, inputs.value, bias, *self.results)
        lasting = (query, inputs.key, inputs.value, None, *self.results)  # a bias may change its type
        self.sizes = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in lasting)
        vector = None if bias is None else bias.detach().view(-1)
        self.record = record.of(inputs, vector, None, *self.results)
        self.plans: dict[Any, _Plan] = {}

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        wants_lse: bool,
    ) -> Any:
        if is_watched():
            return self.otherwise(query, key, value, bias, wants_lse)
        if (
            self.may_record
            and is_grad_enabled()
            and (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (bias is not None and bias.requires_grad)
            )
        ):
            return _apply(self, wants_lse, query, key, value, bias)
        out = self.empty_out()
        lse = self.empty_lse() if wants_lse else None
        self.run(query, key, value, bias, out, lse)
        return (out, lse) if wants_lse else out

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Write the output, and the log-sum-exp if there is room for it."""
        places = record.PLACES_FORWARD.pack(
            library.Process.num_threads(),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
        )
        if self.attend(self.record, places, None, 0):
            library.call(self.attend, self.record, places)  # again, to hear why

    def gradients(
        self,
        saved: tuple[Any, ...],
        grad_out: torch.Tensor | None,
        grad_lse: torch.Tensor | None,
        needs: tuple[bool, ...],
    ) -> Tensors:
        """The gradients that are needed."""
        query, key, value, bias, out, lse = saved
        if (
            grad_out is None
            or not _is_plain(grad_out)
            or not (grad_lse is None or _is_plain(grad_lse))
            or is_grad_enabled()
            or dispatch_modes()
            or _lie(*saved) != self.lie
        ):
            return self._other_gradients(saved, grad_out, grad_lse, needs)
        which = (grad_out.stride(), needs, None if grad_lse is None else grad_lse.stride())
        plan = self.plans.get(which)
        if plan is None:
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            plan = self.plans[which] = self._plan(saved[:4], grad_out, grad_lse, needs)
        addresses = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        packed, (grad_query, grad_key, grad_value) = plan.rooms(addresses)
        grad_bias = torch.empty_like(bias) if needs[3] else None
        places = record.PLACES.pack(
            library.Process.num_threads(),
            *addresses,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            grad_out.data_ptr(),
            0 if grad_lse is None else grad_lse.data_ptr(),
            0 if grad_query is None else grad_query.data_ptr(),
            0 if grad_key is None else grad_key.data_ptr(),
            0 if grad_value is None else grad_value.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
        )
        if self.attend_backward(packed, places, None, 0):
            library.call(self.attend_backward, packed, places)
        return grad_query, grad_key, grad_value, grad_bias

    def _other_gradients(
        self,
        saved: tuple[Any, ...],
        grad_out: torch.Tensor | None,
        grad_lse: torch.Tensor | None,
        needs: tuple[bool, ...],
    ) -> Tensors:
        query, key, value, bias, out, lse = saved
        self._check_saved(saved)
        vector = None if bias is None else bias.reshape(-1)
        tensors = (query, key, value, self.tables, vector, None, None, None)
        arguments = (*tensors, self.layout.packed, self.scale, "cpu")
        grads = operator.differentiate(arguments, (out, lse), (), (grad_out, grad_lse), (*needs, False, False))
        return (*grads[:3], None if grads[3] is None else grads[3].view(bias.shape))

    def _check_saved(self, saved: tuple[Any, ...]) -> None:
        """Sizes and types are those of the forward: by these the kernels read, and write, all tensors together."""
        for name, tensor, was in zip(("query", "key", "value", "", "out", "lse"), saved, self.sizes, strict=True):
            if was is not None and (tensor.shape, tensor.dtype) != was:
                shape, dtype = was
                raise RuntimeError(
                    f"{name} was {tuple(shape)} of {dtype} in the forward and is {tuple(tensor.shape)} of "
                    f"{tensor.dtype} in the backward: a saved tensor's data or a hook on it must keep both"
                )

    def _plan(
        self, given: tuple[Any, ...], grad_out: torch.Tensor, grad_lse: torch.Tensor | None, needs: tuple[bool, ...]
    ) -> _Plan:
        query, key, value, bias = given
        vector = None if bias is None else bias.detach().view(-1)
        inputs = Inputs(query, key, value, self.tables, vector, None, None, None, self.layout, self.scale)

        def packed(strides: Sequence[tuple[int, ...]]) -> bytes:
            grads: list[torch.Tensor | None] = [
                torch.empty_strided(tensor.shape, own, device="meta") if need else None
                for tensor, own, need in zip(given, strides, needs, strict=False)
            ]
            grads.append(vector if needs[3] else None)
            return record.of(inputs, vector, None, *self.results, grad_out, grad_lse, *grads)

        beside, shared = None, _strides_beside([tensor for tensor, need in zip(given[:3], needs, strict=False) if need])
        if shared is not None:
            places = tuple(place for place in range(3) if needs[place])
            first = given[places[0]]
            step = first.shape[-2] * first.shape[-1] * first.element_size()
            shelf = memory.shelf(first.shape, first.dtype, parts=len(places))
            beside = _Beside(packed([shared] * 3), places, step, shelf)
        shelves = [memory.shelf(tensor.shape, tensor.dtype) for tensor in given[:3]]
        empty = tuple(shelf.empty if need else None for shelf, need in zip(shelves, needs, strict=False))
        return _Plan(packed([shelf.like.stride() for shelf in shelves]), empty, beside)


def _strides_beside(tensors: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
    """The strides of tensors that may be all the parts of one, by these; None where they are not."""
    if not tensors or tensors[0].is_contiguous():  # such have nothing beside them but in grids of one token
        return None
    shape, strides = tensors[0].shape, strides_beside(tensors[0].shape, len(tensors))
    return strides if all(tensor.shape == shape and tensor.stride() == strides for tensor in tensors) else None


def _lie(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Any:
    """How tensors lie in memory: hooks may bring back others than were saved, and owners exchange what theirs hold."""
    return (
        query.shape,
        query.stride(),
        query.dtype,
        key.shape,
        key.stride(),
        key.dtype,
        value.shape,
        value.stride(),
        value.dtype,
        out.shape,
        out.stride(),
        out.dtype,
        lse.shape,
        lse.stride(),
        lse.dtype,
        None if bias is None else (bias.shape, bias.stride(), bias.dtype),
    )


def _is_plain(tensor: Any) -> bool:
    return type(tensor) is torch.Tensor and keys_of(tensor).raw_repr() == PLAIN_KEYS


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepared: _Prepared,
        wants_lse: bool,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Any:
        out, lse = prepared.empty_out(), prepared.empty_lse()
        prepared.run(query, key, value, bias, out, lse)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        ctx.set_materialize_grads(False)
        ctx.prepared = prepared
        return (out, lse) if wants_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None = None) -> Any:
        prepared: _Prepared = ctx.prepared
        return (None, None, *prepared.gradients(ctx.saved_tensors, grad_out, grad_lse, ctx.needs_input_grad[2:]))


_apply = apply_of(_Attention)  # what dispatch keys tell of transforms is in the signature
