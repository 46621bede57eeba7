"""The portable forward, chunk by chunk, and the same in one piece for autograd and export."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.merge import merge_pair
from vicinal.ops.tiled.parts import Part, added_to_scores, all_chunks, parts, query_rows, split, tile_inputs
from vicinal.ops.tiled.plan import MemberPlan, RowPlan

FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _softmax_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each tile by matrix products, differentiable any number of times."""
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if added is not None:
        scores = scores + added
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    safe = torch.where(blind, 1.0, total)
    lse = torch.where(blind, -math.inf, top + torch.log(safe))
    return torch.matmul(weights / safe, value), lse.squeeze(-1)


def can_fuse(part: Part) -> bool:
    """Whether torch's fused CPU attention takes this part."""
    return (
        FLASH is not None
        and FLASH_BACKWARD is not None
        and part.query.device.type == "cpu"
        and part.head_dim == part.value_dim
    )


def _fused_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor | None,
    scale: float,
    *,
    may_be_blind: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each tile by torch's fused CPU kernel."""
    assert FLASH is not None
    if added is None:
        out, lse = FLASH(query, key, value, scale=scale)
        return out, lse
    mask = added.expand(query.shape[0], query.shape[1], -1, -1)
    out, lse = FLASH(query, key, value, attn_mask=mask, scale=scale)
    if not may_be_blind:
        return out, lse
    # for a query that sees nothing the kernel's lse is not specified
    blind = (added == -math.inf).all(-1)
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -math.inf)


def _member(
    part: Part, plan: MemberPlan, num_queries: int, *, differentiable: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output rows `[samples * queries, heads * value_dim]` and lse rows `[samples * queries, heads]`."""
    fused = not differentiable and can_fuse(part)
    rows = part.samples * num_queries
    dtype = part.query.dtype if fused else part.compute_dtype
    out = part.query.new_empty(rows, part.heads * part.value_dim, dtype=dtype)
    lse = part.query.new_empty(rows, part.heads, dtype=part.compute_dtype)
    for tiles, chunk in all_chunks(part, plan, whole=differentiable):
        query, key, value = tile_inputs(part, chunk)
        added = added_to_scores(part, tiles, chunk)
        if fused:
            may_be_blind = tiles.may_be_blind and part.extra_key is None
            tile_out, tile_lse = _fused_tiles(query, key, value, added, part.scale, may_be_blind=may_be_blind)
        else:
            query, key, value = (tensor.to(part.compute_dtype) for tensor in (query, key, value))
            tile_out, tile_lse = _softmax_tiles(query, key, value, added, part.scale)
        out_rows = query_rows(tile_out, part)
        lse_rows = query_rows(tile_lse.unsqueeze(-1), part)
        index = chunk.query_index.reshape(-1)
        if chunk.keep is not None:
            keep = chunk.keep.reshape(-1)
            index, out_rows, lse_rows = index[keep], out_rows[keep], lse_rows[keep]
        if differentiable:
            out, lse = out.index_copy(0, index, out_rows), lse.index_copy(0, index, lse_rows)
        else:
            out.index_copy_(0, index, out_rows)
            lse.index_copy_(0, index, lse_rows)
    return out, lse


def _run(inputs: Inputs, *, differentiable: bool) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    batch, grid = inputs.query.shape[0], inputs.grid
    whole: tuple[torch.Tensor, torch.Tensor] | None = None
    for samples, plan, extra_length in split(inputs, bounded=differentiable):
        outs, lses = [], []
        for (_, part), members in zip(parts(inputs, samples, plan, extra_length), plan.groups, strict=True):
            out, lse = _group(part, members, plan, differentiable=differentiable)
            outs.append(out.view(part.samples, *plan.grid, part.heads, part.value_dim).to(inputs.query.dtype))
            lses.append(lse.view(part.samples, *plan.grid, part.heads).to(lse_dtype))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -2)
        lse = lses[0] if len(lses) == 1 else torch.cat(lses, -1)
        if samples is None and plan.grid == grid:
            return out, lse
        if whole is None:
            whole = _blank(inputs, lse_dtype)
        chosen = torch.arange(batch) if samples is None else torch.tensor(samples)
        where: tuple[torch.Tensor | slice, ...] = (chosen.to(out.device), *map(slice, plan.grid))
        if differentiable:
            whole = whole[0].clone(), whole[1].clone()
        whole[0][where] = out
        whole[1][where] = lse
    return _blank(inputs, lse_dtype) if whole is None else whole


def _blank(inputs: Inputs, lse_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of queries that see nothing."""
    shape = inputs.query.shape[:-1]
    return (
        inputs.query.new_zeros(*shape, inputs.value.shape[-1]),
        inputs.query.new_full(shape, -math.inf, dtype=lse_dtype),
    )


def _group(
    part: Part, members: Sequence[MemberPlan], plan: RowPlan, *, differentiable: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    num_queries = math.prod(plan.grid)
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    for number, member in enumerate(members):
        own = part if number == 0 else dataclasses.replace(part, extra_key=None, extra_value=None)
        out, lse = _member(own, member, num_queries, differentiable=differentiable)
        if result is None:
            result = (out, lse)
            continue
        shape = (part.heads, part.value_dim)
        merged, lse = merge_pair(result[0].unflatten(1, shape), result[1], out.unflatten(1, shape), lse)
        result = (merged.flatten(1), lse)
    assert result is not None
    return result


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, chunk by chunk."""
    return _run(inputs, differentiable=False)


def differentiable(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain ATen operations on all tiles at once: for export and for double backward."""
    return _run(inputs, differentiable=True)
