"""The portable backward: scores are computed again, chunk by chunk, and gradients summed where rows came from."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from vicinal.ops.backend import Gradients, Inputs
from vicinal.ops.tiled.forward import FLASH_BACKWARD, LOG2_E, can_fuse, may_be_blind
from vicinal.ops.tiled.parts import (
    Groups,
    Part,
    added_to_scores,
    all_chunks,
    as_rows,
    parts,
    pick,
    remember,
    split,
    tile_inputs,
    tile_queries,
)
from vicinal.ops.tiled.plan import RowPlan
from vicinal.ops.tiled.rows import RowSums
from vicinal.ops.tiled.tiles import Chunk, TileSet


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
            groups = parts(inputs, samples, plan, extra_length)
            own = (
                None if tensor is None else pick(tensor, samples, plan.grid)
                for tensor in (out, grad_out, lse, grad_lse)
            )
            results = _Results.of(groups, *own, needs_scores=totals.needs[3])
            _backward_samples(inputs, groups, results, totals, samples, plan)
    return totals.finished()


def _backward_samples(
    inputs: Inputs, groups: Groups, results: _Results, totals: _Totals, samples: list[int] | None, plan: RowPlan
) -> None:
    bias_at = itertools.accumulate(inputs.layout.bias_sizes, initial=0)
    sinks = _Sinks.of(groups, totals.needs)
    for (part, members), begin in zip(groups, bias_at, strict=False):
        bias = totals.bias(begin, part) if totals.needs[3] else None
        for position, member in enumerate(members):
            own = part if position == 0 else part.without_extras()
            for tiles, chunk in all_chunks(own, member):
                _backward_tiles(own, chunk, tiles, results, sinks, bias)
    first = groups[0][0]
    for place, sink, grid, heads in (
        (0, sinks.query, plan.grid, first.heads.num_query),
        (1, sinks.key, plan.key_grid, first.heads.num_key),
        (2, sinks.value, plan.key_grid, first.heads.num_key),
    ):
        if sink is not None:
            rows = sink.finished()
            if place == 0 and results.offset is not None:
                rows.mul_(inputs.scale)
            totals.add(place, samples, grid, rows.view(first.samples, *grid, heads, -1))
    for place, extra in ((4, sinks.extra_key), (5, sinks.extra_value)):
        if extra is not None:
            totals.add(place, samples, extra.shape[1:2], extra)


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

    def add(self, place: int, samples: list[int] | None, grid: Sequence[int], own: torch.Tensor) -> None:
        """Add the gradient of some samples and their own grid where it belongs."""
        tensor = self.tensors[place]
        if samples is None and tensor is not None and own.shape == tensor.shape:
            self._grads[place] = own  # all there is
            return
        view = self._grad(place)[(slice(None), *map(slice, grid))]
        if samples is None:
            view += own
        else:
            view.index_add_(0, torch.tensor(samples, device=own.device), own)

    def bias(self, begin: int, part: Part) -> torch.Tensor:
        """Where to add the gradient of a group's bias tables, `[heads, entries]`."""
        assert part.bias is not None
        own: torch.Tensor = self._grad(3)[begin : begin + part.bias.numel()]
        return own.view(len(part.bias), -1)

    def finished(self) -> Gradients:
        """All gradients in the precision of their tensors; None where not asked for."""
        return tuple(
            self._grad(place).to(tensor.dtype) if need and tensor is not None else None
            for place, (tensor, need) in enumerate(zip(self.tensors, self.needs, strict=True))
        )


@dataclasses.dataclass(slots=True)
class _Results:
    """What the backward needs of the forward's results and their gradients, as rows.

    `shift` is minus the log-sum-exp, in powers of 2 where matrix products follow, and `offset` minus what softmax takes
    off the gradient of every weight. The fused kernel works the offset out itself, from `out`.
    """

    grad_out: torch.Tensor
    shift: torch.Tensor
    offset: torch.Tensor | None
    out: torch.Tensor | None

    @staticmethod
    def of(
        groups: Groups,
        out: torch.Tensor | None,
        grad_out: torch.Tensor | None,
        lse: torch.Tensor | None,
        grad_lse: torch.Tensor | None,
        *,
        needs_scores: bool,
    ) -> _Results:
        assert out is not None
        assert grad_out is not None
        assert lse is not None
        part = groups[0][0]
        shift = lse.reshape(-1).neg()
        if any(may_be_blind(own, tiles) for own, members in groups for member in members for tiles in member.sets):
            # a query that sees nothing has lse -inf; any finite number keeps its weights, exp(-inf - lse), at 0
            shift.masked_fill_(shift == math.inf, 0.0)
        if can_fuse(part) and part.query.dtype != part.compute_dtype and grad_lse is None and not needs_scores:
            return _Results(as_rows(grad_out), shift, None, as_rows(out))
        offset = (grad_out.to(part.compute_dtype) * out).sum(-1).neg_()
        if grad_lse is not None:
            offset += grad_lse
        return _Results(as_rows(grad_out), shift, offset.reshape(-1), None)


@dataclasses.dataclass(slots=True)
class _Sinks:
    """Where gradients are summed; None where not asked for."""

    query: RowSums | None
    key: RowSums | None
    value: RowSums | None
    extra_key: torch.Tensor | None
    extra_value: torch.Tensor | None

    @staticmethod
    def of(groups: Groups, needs: Sequence[bool]) -> _Sinks:
        part = groups[0][0]
        is_union = any(len(members) > 1 for _, members in groups)
        rows = [
            RowSums(source, tuple(source.shape), part.compute_dtype, come_once=come_once) if need else None
            for source, need, come_once in zip(
                (part.query, part.key, part.value), needs[:3], (not is_union, False, False), strict=True
            )
        ]
        extras = [
            source.new_zeros(source.shape, dtype=part.compute_dtype) if need and source is not None else None
            for source, need in zip((part.extra_key, part.extra_value), needs[4:], strict=True)
        ]
        return _Sinks(rows[0], rows[1], rows[2], extras[0], extras[1])


def _backward_tiles(
    part: Part, chunk: Chunk, tiles: TileSet, results: _Results, sinks: _Sinks, bias: torch.Tensor | None
) -> None:
    inputs = tile_inputs(part, tiles, chunk)
    added = added_to_scores(part, tiles, chunk)
    if results.offset is None:
        grads = _fused_backward(part, tiles, chunk, results, inputs, added)
    else:
        *grads, grad_scores = _multiplied_backward(part, tiles, chunk, results, inputs, added)
        if bias is not None:
            add_bias_gradient(bias, part, chunk, tiles, part.by_head(grad_scores))
    grad_query, grad_key, grad_value = grads
    if sinks.query is not None:
        sinks.query.add(chunk.query, grad_query.reshape(-1, part.head_dim))
    for sink, extra_sink, grad in (
        (sinks.key, sinks.extra_key, grad_key),
        (sinks.value, sinks.extra_value, grad_value),
    ):
        if sink is not None:
            sink.add(chunk.key, grad[:, : tiles.keys].reshape(-1, grad.shape[-1]))
        if extra_sink is not None and part.extra_key is not None:
            _add_extra_gradient(extra_sink[chunk.samples], part, chunk, grad[:, tiles.keys :])


def _fused_backward(
    part: Part,
    tiles: TileSet,
    chunk: Chunk,
    results: _Results,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    added: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of query, key and value of each tile by torch's fused CPU kernel.

    In the half precisions that kernel takes up to nine times as long as in float32, so tiles are widened.
    """
    assert FLASH_BACKWARD is not None
    assert results.out is not None
    query, key, value = (part.by_head(tensor.to(part.compute_dtype)) for tensor in inputs)
    out, grad_out = (
        part.by_head(tile_queries(rows, part, tiles, chunk).to(part.compute_dtype))
        for rows in (results.out, results.grad_out)
    )
    if chunk.padding is not None:
        grad_out.masked_fill_(chunk.padding, 0.0)
    lse = part.by_head(tile_queries(results.shift[:, None], part, tiles, chunk)).squeeze(-1).neg_()
    mask = None if added is None else added.to(part.compute_dtype).expand(*query.shape[:2], -1, -1)
    grads = FLASH_BACKWARD(grad_out, query, key, value, out, lse, 0.0, False, attn_mask=mask, scale=part.scale)
    return [grad.flatten(0, 1) for grad in grads]


def _multiplied_backward(
    part: Part,
    tiles: TileSet,
    chunk: Chunk,
    results: _Results,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    added: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of each tile by matrix products: of query / scale, of key, value and scores."""
    assert results.offset is not None
    grad_out = tile_queries(results.grad_out, part, tiles, chunk)
    query, key, value = inputs
    if query.dtype != part.compute_dtype:
        query, key, value, grad_out = (tensor.to(part.compute_dtype) for tensor in (*inputs, grad_out))
    shift, offset = (chunk.query.take(rows).view(*query.shape[:2], 1) for rows in (results.shift, results.offset))
    if chunk.padding is not None:
        part.by_head(shift).masked_fill_(chunk.padding, -math.inf)  # weights of 0
    scores = torch.bmm(query.mul_(part.scale), key.transpose(1, 2))
    if added is not None:
        part.by_head(scores).add_(added)
    # the shift before the factor: small differences are rounded less than what they are differences of
    weights = scores.add_(shift).mul_(LOG2_E).exp2_()
    grad_value = torch.bmm(weights.transpose(1, 2), grad_out)
    grad_scores = torch.bmm(grad_out, value.transpose(1, 2)).add_(offset).mul_(weights)
    grad_query = torch.bmm(grad_scores, key)
    grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
    return [grad_query, grad_key, grad_value, grad_scores]


def _add_extra_gradient(sink: torch.Tensor, part: Part, chunk: Chunk, grad: torch.Tensor) -> None:
    """Sum the gradients of a chunk's copies of extra tokens into `[samples, tokens, kv_heads, dim]`."""
    summed = grad.unflatten(0, (-1, chunk.tiles, part.kv_heads)).sum(1).transpose(1, 2)
    sink.index_add_(2, torch.tensor(part.heads.key, device=grad.device), summed)


def add_bias_gradient(sink: torch.Tensor, part: Part, chunk: Chunk, tiles: TileSet, grad_scores: torch.Tensor) -> None:
    """Sum the gradients of scores into the bias entries they read, `[heads, entries]`."""
    grad = grad_scores[..., : tiles.keys].unflatten(2, (part.shared, tiles.queries)).flatten(1, 2)
    index = remember(chunk, ("bias",), lambda: tiles.bias_index(chunk.shapes).to(grad.device))
    if chunk.which is None:
        summed = grad.sum(0, keepdim=True)
    else:
        summed = grad.new_zeros(len(index), *grad.shape[1:]).index_add_(0, chunk.which, grad)
    flat = summed.transpose(0, 1).flatten(1)
    sink.scatter_add_(1, index.reshape(1, -1).expand(len(flat), -1), flat)
