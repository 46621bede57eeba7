"""The portable backward: scores are computed again, chunk by chunk, and gradients summed where rows came from."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from vicinal.ops.backend import Gradients, Inputs
from vicinal.ops.tiled.forward import FLASH_BACKWARD, can_fuse
from vicinal.ops.tiled.parts import (
    Part,
    added_to_scores,
    all_chunks,
    as_rows,
    key_heads,
    key_rows,
    parts,
    pick,
    query_rows,
    remember,
    split,
    take_queries,
    tile_inputs,
)
from vicinal.ops.tiled.plan import Chunk, MemberPlan, RowPlan, TileSet


def backward(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of everything asked for, chunk by chunk, recomputing the scores."""
    totals = _Totals(inputs, needs)
    if inputs.query.shape[0] and (grad_out is not None or grad_lse is not None):
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        for samples, plan, extra_length in split(inputs, bounded=True):
            results = (out, grad_out, lse.unsqueeze(-1), None if grad_lse is None else grad_lse.unsqueeze(-1))
            _backward_samples(inputs, results, totals, samples, plan, extra_length)
    return totals.finished()


def _backward_samples(
    inputs: Inputs,
    results: tuple[torch.Tensor | None, ...],
    totals: _Totals,
    samples: list[int] | None,
    plan: RowPlan,
    extra_length: int | None,
) -> None:
    shared = inputs.query.shape[-2] // inputs.key.shape[-2]
    bias_at = list(itertools.accumulate(inputs.layout.bias_sizes, initial=0))
    for number, (heads, part) in enumerate(parts(inputs, samples, plan, extra_length)):
        rows = _Rows.of(
            *(None if given is None else as_rows(pick(given, samples, plan.grid), heads) for given in results)
        )
        sinks = _Sinks.for_part(part, plan.groups[number], totals.needs)
        for position, member in enumerate(plan.groups[number]):
            mine = part if position == 0 else dataclasses.replace(part, extra_key=None, extra_value=None)
            for tiles, chunk in all_chunks(mine, member):
                _backward_tiles(mine, chunk, tiles, rows, sinks)
        kv_heads, _ = key_heads(heads, shared)
        for place, sink, group_heads, grid in (
            (0, sinks.query, heads, plan.grid),
            (1, sinks.key, kv_heads, plan.key_grid),
            (2, sinks.value, kv_heads, plan.key_grid),
        ):
            if sink is not None:
                width = part.heads if place == 0 else part.kv_heads
                totals.add(place, samples, grid, group_heads, sink.view(part.samples, *grid, width, -1))
        for place, sink in ((4, sinks.extra_key), (5, sinks.extra_value)):
            if sink is not None:
                totals.add(place, samples, sink.shape[1:2], kv_heads, sink)
        if sinks.bias is not None:
            totals.add_bias(bias_at[number], sinks.bias.flatten())


class _Totals:
    """The gradients of the whole call, in the precision they are summed in."""

    def __init__(self, inputs: Inputs, needs: Sequence[bool]) -> None:
        self.tensors = inputs.tensors()
        self.needs = tuple(need and tensor is not None for tensor, need in zip(self.tensors, needs, strict=True))
        self.compute_dtype = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
        self._grads: list[torch.Tensor | None] = [None] * len(self.tensors)

    def _grad(self, place: int) -> torch.Tensor:
        tensor, grad = self.tensors[place], self._grads[place]
        if grad is None:
            assert tensor is not None
            grad = tensor.new_zeros(tensor.shape, dtype=self.compute_dtype)
            self._grads[place] = grad
        return grad

    def add(
        self, place: int, samples: list[int] | None, grid: Sequence[int], heads: slice | list[int], part: torch.Tensor
    ) -> None:
        """Add the gradient of some samples, their own grid and some heads where it belongs."""
        tensor = self.tensors[place]
        if samples is None and isinstance(heads, slice) and tensor is not None and part.shape == tensor.shape:
            self._grads[place] = part  # all there is
            return
        view = self._grad(place)[(slice(None), *map(slice, grid))]
        if isinstance(heads, slice):
            view = view[..., heads, :]
        else:
            part = part.new_zeros(*part.shape[:-2], view.shape[-2], part.shape[-1]).index_add_(
                -2, torch.tensor(heads, device=part.device), part
            )
        if samples is None:
            view += part
        else:
            view.index_add_(0, torch.tensor(samples, device=part.device), part)

    def add_bias(self, begin: int, part: torch.Tensor) -> None:
        """Add the gradient of a group's bias tables."""
        self._grad(3)[begin : begin + len(part)] += part

    def finished(self) -> Gradients:
        """All gradients in the precision of their tensors; None where not asked for."""
        return tuple(
            self._grad(place).to(tensor.dtype) if need and tensor is not None else None
            for place, (tensor, need) in enumerate(zip(self.tensors, self.needs, strict=True))
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The results of the forward and their gradients, as rows of a head group."""

    out: torch.Tensor
    grad_out: torch.Tensor
    lse: torch.Tensor
    grad_lse: torch.Tensor | None

    @staticmethod
    def of(
        out: torch.Tensor | None, grad_out: torch.Tensor | None, lse: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> _Rows:
        assert out is not None
        assert grad_out is not None
        assert lse is not None
        # a query that sees nothing has lse -inf; any finite number keeps its weights, exp(-inf - lse), at 0
        return _Rows(out, grad_out, torch.where(lse == -math.inf, 0.0, lse), grad_lse)

    def take(self, chunk: Chunk, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Those of a chunk's items, `[items, kv_heads, shared * queries, dim]`."""
        out, grad_out, lse = (
            take_queries(rows, chunk.query_index, part) for rows in (self.out, self.grad_out, self.lse)
        )
        grad_lse = None if self.grad_lse is None else take_queries(self.grad_lse, chunk.query_index, part)
        return out, grad_out, lse, grad_lse


@dataclasses.dataclass(frozen=True)
class _Sinks:
    """Where a part's gradients are summed; None where not asked for."""

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    bias: torch.Tensor | None
    extra_key: torch.Tensor | None
    extra_value: torch.Tensor | None
    queries_come_once: bool
    keys_come_once: bool

    @staticmethod
    def for_part(part: Part, members: Sequence[MemberPlan], needs: Sequence[bool]) -> _Sinks:
        queries_come_once = len(members) == 1
        keys_come_once = queries_come_once and members[0].keys_come_once
        once = (queries_come_once, keys_come_once, keys_come_once, False, False, False)
        sources = (part.query, part.key, part.value, part.bias, part.extra_key, part.extra_value)
        sinks: list[torch.Tensor | None] = []
        for source, need, written in zip(sources, needs, once, strict=True):
            if source is None or not need:
                sinks.append(None)
            else:
                make = source.new_empty if written else source.new_zeros
                sinks.append(make(source.shape, dtype=part.compute_dtype))
        query, key, value, bias, extra_key, extra_value = sinks
        return _Sinks(query, key, value, bias, extra_key, extra_value, queries_come_once, keys_come_once)


def _backward_tiles(part: Part, chunk: Chunk, tiles: TileSet, rows: _Rows, sinks: _Sinks) -> None:
    query, key, value = tile_inputs(part, chunk)
    added = added_to_scores(part, tiles, chunk)
    out, grad_out, lse, grad_lse = rows.take(chunk, part)
    if chunk.keep is not None:
        keep = chunk.keep[:, None, None, :].expand(-1, 1, part.shared, -1).flatten(2)[..., None]
        grad_out = grad_out * keep
        grad_lse = None if grad_lse is None else grad_lse * keep
    if sinks.bias is None and grad_lse is None and can_fuse(part):
        assert FLASH_BACKWARD is not None
        mask = None if added is None else added.expand(query.shape[0], query.shape[1], -1, -1)
        grad_query, grad_key, grad_value = FLASH_BACKWARD(
            grad_out, query, key, value, out, lse.squeeze(-1), 0.0, False, attn_mask=mask, scale=part.scale
        )
    else:
        query, key, value, out, grad_out = (
            tensor.to(part.compute_dtype) for tensor in (query, key, value, out, grad_out)
        )
        grad_query, grad_key, grad_value, grad_scores = _matmul_backward(
            query, key, value, out, grad_out, lse, grad_lse, added, part.scale
        )
        if sinks.bias is not None:
            _add_bias_gradient(sinks.bias, part, chunk, tiles, grad_scores)
    if sinks.query is not None:
        rows_of_query = query_rows(grad_query, part).to(part.compute_dtype)
        _sum(sinks.query, chunk.query_index, rows_of_query, chunk.keep, come_once=sinks.queries_come_once)
    own = tiles.keys
    for sink, extra_sink, grad in (
        (sinks.key, sinks.extra_key, grad_key),
        (sinks.value, sinks.extra_value, grad_value),
    ):
        if sink is not None:
            rows_of_key = key_rows(grad[:, :, :own]).to(part.compute_dtype)
            _sum(sink, chunk.key_index, rows_of_key, None, come_once=sinks.keys_come_once)
        if extra_sink is not None and part.extra_key is not None:
            summed = grad[:, :, own:].unflatten(0, (-1, chunk.tiles)).sum(1, dtype=part.compute_dtype)
            extra_sink[chunk.samples] += summed.transpose(1, 2)


def _sum(
    sink: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor | None, *, come_once: bool
) -> None:
    """Add rows to the rows of `sink` they came from; where every row comes just once, write it."""
    index = index.reshape(-1)
    if not come_once:
        sink.index_add_(0, index, rows)
        return
    if keep is not None:
        keep = keep.reshape(-1)
        index, rows = index[keep], rows[keep]
    sink.index_copy_(0, index, rows)


def _matmul_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    added: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and scores of each tile; `lse` is that of the whole softmax."""
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if added is not None:
        scores += added
    weights = scores.sub_(lse).exp_()
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse
    grad_value = torch.matmul(weights.transpose(-1, -2), grad_out)
    grad_scores = torch.matmul(grad_out, value.transpose(-1, -2)).sub_(delta).mul_(weights)
    grad_query = torch.matmul(grad_scores, key).mul_(scale)
    grad_key = torch.matmul(grad_scores.transpose(-1, -2), query).mul_(scale)
    return grad_query, grad_key, grad_value, grad_scores


def _add_bias_gradient(sink: torch.Tensor, part: Part, chunk: Chunk, tiles: TileSet, grad_scores: torch.Tensor) -> None:
    """Sum the gradients of scores into the bias entries they read."""
    grad = grad_scores[..., : tiles.keys].unflatten(2, (part.shared, tiles.queries)).flatten(1, 2)
    index = remember(chunk, ("bias",), lambda: tiles.bias_index(chunk.shapes).to(grad.device))
    if chunk.which is None:
        summed = grad.sum(0, keepdim=True)
    else:
        summed = grad.new_zeros(len(index), *grad.shape[1:]).index_add_(0, chunk.which, grad)
    flat = summed.transpose(0, 1).flatten(1)
    sink.flatten(1).scatter_add_(1, index.reshape(1, -1).expand(len(flat), -1), flat)
