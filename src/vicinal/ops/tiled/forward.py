"""The portable forward, chunk by chunk, and the same in one piece for autograd and export."""

from __future__ import annotations

import math

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.merge import merge_pair
from vicinal.ops.tiled.parts import Groups, Part, added_to_scores, all_chunks, parts, split, tile_inputs
from vicinal.ops.tiled.plan import MemberPlan
from vicinal.ops.tiled.rows import GroupHeads, RowSums
from vicinal.ops.tiled.tiles import TileSet

FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

LOG2_E = math.log2(math.e)
"""Scores in powers of 2: torch's `exp` takes forty times as long where scores are -inf, its `exp2` does not."""

LEAST_TOTAL = 2.0**-64
"""Where powers of 2 of a row's scores sum to less than this, or more than its inverse, its largest is taken off."""


def can_fuse(part: Part) -> bool:
    """Whether torch's fused CPU attention takes this part."""
    return (
        FLASH is not None
        and FLASH_BACKWARD is not None
        and part.query.device.type == "cpu"
        and part.head_dim == part.value_dim
    )


def fused_tiles(
    part: Part,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor | None,
    *,
    may_be_blind: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each tile by torch's fused CPU kernel."""
    assert FLASH is not None
    if added is None:
        # one head each, so that the output comes in the order of the tiles' rows
        out, lse = FLASH(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), scale=part.scale)
        return out, lse
    query, key, value = (part.by_head(tensor) for tensor in (query, key, value))
    out, lse = FLASH(query, key, value, attn_mask=added.expand(*query.shape[:2], -1, -1), scale=part.scale)
    if not may_be_blind:
        return out, lse
    # for a query that sees nothing the kernel's lse is not specified
    blind = (added == -math.inf).all(-1)
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -math.inf)


def may_be_blind(part: Part, tiles: TileSet) -> bool:
    """Whether some query may see nothing."""
    return part.bias is not None or (tiles.may_be_blind and part.extra_key is None)


def tile_weights(
    part: Part,
    query: torch.Tensor,
    key: torch.Tensor,
    added: torch.Tensor | None,
    *,
    may_be_blind: bool,
    wants_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of each tile, its rows summing to one, and the log-sum-exp of its scores if wanted, in few passes.

    On a CPU finding every row's largest score and taking it off takes a third of the time, and ordinary scores need
    neither: whether the sums came out in range tells.
    """
    if part.query.device.type == "cpu" and (part.bias is not None or not may_be_blind):
        weights = _tile_scores(part, query, key, added).exp2_()
        total = weights.sum(-1, keepdim=True)
        low, high = total.aminmax()
        if float(low) > LEAST_TOTAL and float(high) < 1 / LEAST_TOTAL:
            return weights.mul_(total.reciprocal()), total.log_() if wants_lse else None
    scores = _tile_scores(part, query, key, added)
    top = scores.amax(-1, keepdim=True)
    if may_be_blind:
        top.masked_fill_(top == -math.inf, 0.0)
    weights = scores.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    lse = total.log().add_(top, alpha=1 / LOG2_E)
    if may_be_blind:
        total.masked_fill_(total == 0, 1.0)
    return weights.mul_(total.reciprocal_()), lse


def _tile_scores(part: Part, query: torch.Tensor, key: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    """Scores of each tile in powers of 2, in which `added` is too."""
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=part.scale * LOG2_E)
    if added is not None:
        part.by_head(scores).add_(added)
    return scores


def _softmax_tiles(
    part: Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, differentiable any number of times."""
    scores = part.by_head(torch.matmul(query * part.scale, key.transpose(-1, -2)))
    if added is not None:
        scores = scores + added
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    safe = torch.where(blind, 1.0, total)
    lse = torch.where(blind, -math.inf, top + torch.log(safe))
    return torch.matmul(weights / safe, part.by_head(value)), lse


def _by_chunks(part: Part, plan: MemberPlan, out: RowSums, lse: RowSums) -> None:
    """One union member's output rows `[rows, value_dim]` and lse rows `[rows]`, written chunk by chunk."""
    is_fused, is_exact = can_fuse(part), part.query.dtype == part.compute_dtype
    for tiles, chunk in all_chunks(part, plan):
        inputs = tile_inputs(part, tiles, chunk)
        added = added_to_scores(part, tiles, chunk, unit=1.0 if is_fused else LOG2_E)
        blind = may_be_blind(part, tiles)
        if is_fused:
            tile_out, tile_lse = fused_tiles(part, *inputs, added, may_be_blind=blind)
        else:
            query, key, value = inputs if is_exact else (tensor.to(part.compute_dtype) for tensor in inputs)
            weights, found_lse = tile_weights(part, query, key, added, may_be_blind=blind)
            assert found_lse is not None
            tile_lse = found_lse
            tile_out = torch.bmm(weights, value)
        out.add(chunk.query, tile_out.reshape(-1, part.value_dim))
        lse.add(chunk.query, tile_lse.reshape(-1))


def _in_one_piece(part: Part, plan: MemberPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain operations that can be differentiated; rows of other heads hold anything."""
    out = part.query.new_empty(part.query.shape[0], part.value_dim, dtype=part.compute_dtype)
    lse = part.query.new_empty(part.query.shape[0], dtype=part.compute_dtype)
    for tiles, chunk in all_chunks(part, plan, whole=True):
        query, key, value = (tensor.to(part.compute_dtype) for tensor in tile_inputs(part, tiles, chunk))
        tile_out, tile_lse = _softmax_tiles(part, query, key, value, added_to_scores(part, tiles, chunk))
        found, rows = chunk.query.unsorted(tile_out.reshape(-1, part.value_dim))
        out = out.index_copy(0, rows, found)
        lse = lse.index_copy(0, rows, chunk.query.unsorted(tile_lse.reshape(-1))[0])
    return out, lse


def _run(inputs: Inputs, *, differentiable: bool) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    batch, grid = inputs.query.shape[0], inputs.grid
    whole: tuple[torch.Tensor, torch.Tensor] | None = None
    for samples, plan, extra_length in split(inputs, bounded=differentiable):
        groups = parts(inputs, samples, plan, extra_length)
        out, lse = (_groups_in_one_piece if differentiable else _groups)(groups)
        shape = (groups[0][0].samples, *plan.grid, inputs.query.shape[-2])
        out, lse = out.view(*shape, inputs.value.shape[-1]).to(inputs.query.dtype), lse.view(shape)
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


def _groups(groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse rows of all head groups, chunk by chunk."""
    first = _blank_sums(groups[0][0])
    for part, members in groups:
        _by_chunks(part, members[0], *first)
    out, lse = first[0].finished(), first[1].finished()
    for part, members in groups:
        for member in members[1:]:
            own_out, own_lse = _of_group(out, lse, part.heads)
            further = _blank_sums(part)
            _by_chunks(part.without_extras(), member, *further)
            more = _of_group(further[0].finished(), further[1].finished(), part.heads)
            merged, merged_lse = merge_pair(own_out, own_lse, *more)
            own_out.copy_(merged)
            own_lse.copy_(merged_lse)
    return out, lse


def _blank_sums(part: Part) -> tuple[RowSums, RowSums]:
    rows = part.query.shape[0]
    dtype = part.query.dtype if can_fuse(part) else part.compute_dtype
    return (
        RowSums(part.query, (rows, part.value_dim), dtype, come_once=True),
        RowSums(part.query, (rows,), part.compute_dtype, come_once=True),
    )


def _of_group(out: torch.Tensor, lse: torch.Tensor, heads: GroupHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse rows of some heads, as views `[samples * tokens, heads, ...]`."""
    return out.view(-1, heads.num_query, out.shape[1])[:, heads.span], lse.view(-1, heads.num_query)[:, heads.span]


def _groups_in_one_piece(groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain operations that can be differentiated."""
    outs, lses = [], []
    for part, members in groups:
        out, lse = _of_group(*_in_one_piece(part, members[0]), part.heads)
        for member in members[1:]:
            more = _of_group(*_in_one_piece(part.without_extras(), member), part.heads)
            out, lse = merge_pair(out, lse, *more)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, chunk by chunk."""
    return _run(inputs, differentiable=False)


def differentiable(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain ATen operations on all tiles at once: for export and for double backward."""
    return _run(inputs, differentiable=True)
