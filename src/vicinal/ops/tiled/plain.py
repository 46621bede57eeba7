"""Plain calls: one pattern for all heads and nothing besides it but a bias, in as few operations as can be.

On a small grid a call's operations take less time than what Python does between them. So whatever does not depend on
the tensors is worked out once for a problem. And what a backward would have to compute again is kept for it where it is
small.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from vicinal.ops.backend import Gradients, Inputs
from vicinal.ops.tiled.backward import add_bias_gradient
from vicinal.ops.tiled.forward import LOG2_E, can_fuse, fused_tiles, may_be_blind, tile_weights
from vicinal.ops.tiled.forward import forward as general_forward
from vicinal.ops.tiled.parts import (
    Part,
    added_to_scores,
    as_rows,
    chunks,
    host_rows,
    tile_inputs,
    tile_keys,
    tile_queries,
)
from vicinal.ops.tiled.plan import plan_row
from vicinal.ops.tiled.rows import GroupHeads, RowSums, group_heads
from vicinal.ops.tiled.tiles import TileSet

MOST_KEPT_BYTES = 32 << 20
"""What a call may keep for its backward: weights and copies of all tiles, or else the weights, or else nothing."""

MOST_BY_PRODUCTS = 6000
"""Scores of a tile up to which, if nothing is added to them, products take less time than torch's fused kernel."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """What there is to know of a plain problem before its tensors come.

    Of each chunk's weights, queries, keys and values the first `keeps` are kept for the backward: all, one or none.
    """

    samples: int
    heads: GroupHeads
    tiles: TileSet
    keeps: int


def find(inputs: Inputs, *, bounded: bool) -> Plain | None:
    """What is known of a problem; None where it is not plain."""
    query = inputs.query
    if query.dtype not in (torch.float32, torch.float64) or len(inputs.tables) != 1:
        return None
    if inputs.extra_key is not None or len(inputs.layout.groups) != 1:
        return None
    row = host_rows(inputs.tables).tobytes()
    sizes = (query.shape, inputs.key.shape, inputs.value.shape[-1])
    return _find(row, inputs.layout.packed, *sizes, query.dtype, query.device, inputs.bias is not None, bounded)


@functools.lru_cache(maxsize=64)
def _find(
    row: bytes,
    layout: tuple[int, ...],
    shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    biased: bool,
    bounded: bool,
) -> Plain | None:
    plan = plan_row(row, layout, shape[1:-2], bounded=bounded, biased=biased)
    (members,) = plan.groups
    is_whole = plan.grid == shape[1:-2] and plan.key_grid == key_shape[1:-2]
    if not shape[0] or not is_whole or len(members) > 1 or len(members[0].sets) > 1:
        return None
    (tiles,) = members[0].sets
    (heads,) = group_heads((shape[-2],), key_shape[-2])
    if tiles.has_padding:
        return None
    tile_heads = shape[0] * tiles.num_tiles * len(heads.key) * dtype.itemsize
    queries = heads.shared * tiles.queries
    weights = tile_heads * queries * tiles.keys
    copies = tile_heads * (queries * shape[-1] + tiles.keys * (shape[-1] + value_dim))
    keeps = 4 if weights + copies <= MOST_KEPT_BYTES else int(weights <= MOST_KEPT_BYTES)
    return Plain(shape[0], heads, tiles, keeps)


def _part(inputs: Inputs, plain: Plain) -> Part:
    bias = inputs.bias
    if bias is not None:
        bias = bias.view(plain.heads.num_query, *(inputs.layout.groups[0].bias_shape or ()))
    rows = as_rows(inputs.query), as_rows(inputs.key), as_rows(inputs.value)
    return Part(*rows, plain.samples, plain.heads, bias, None, None, inputs.scale)


def _attend(
    inputs: Inputs, plain: Plain, kept: list[torch.Tensor] | None = None, *, wants_lse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp (anything if not wanted); what the backward wants is put in `kept`, if that is a list."""
    part, tiles = _part(inputs, plain), plain.tiles
    out = RowSums(part.query, (len(part.query), part.value_dim), part.compute_dtype, come_once=True)
    lse = RowSums(part.query, (len(part.query),), part.compute_dtype, come_once=True)
    by_products = tiles.queries * tiles.keys <= MOST_BY_PRODUCTS and not tiles.needs_mask and part.bias is None
    is_fused = kept is None and not by_products and can_fuse(part)
    tile_lse: torch.Tensor | None
    for chunk in chunks(part, tiles):
        query = tile_queries(part.query, part, tiles, chunk)
        key = tile_keys(part.key, None, part, tiles, chunk)
        added = added_to_scores(part, tiles, chunk, unit=1.0 if is_fused else LOG2_E)
        if is_fused:
            value = tile_keys(part.value, None, part, tiles, chunk)
            tile_out, tile_lse = fused_tiles(part, query, key, value, added, may_be_blind=may_be_blind(part, tiles))
        else:
            is_blind = may_be_blind(part, tiles)
            weights, tile_lse = tile_weights(part, query, key, added, may_be_blind=is_blind, wants_lse=wants_lse)
            value = tile_keys(part.value, None, part, tiles, chunk)  # only now: it is still in cache when it is read
            tile_out = torch.bmm(weights, value)
            if kept is not None:
                kept += (weights, query, key, value)[: plain.keeps]
        out.add(chunk.query, tile_out.reshape(-1, part.value_dim))
        if wants_lse and tile_lse is not None:
            lse.add(chunk.query, tile_lse.reshape(-1))
    shape = inputs.query.shape[:-1]
    return out.finished().view(*shape, part.value_dim), lse.finished().view(shape)


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of any call, the quick way where it is plain."""
    plain = find(inputs, bounded=False)
    return general_forward(inputs) if plain is None else _attend(inputs, plain)


def output_alone(inputs: Inputs) -> torch.Tensor:
    """The output of any call; without the log-sum-exp where the call is plain."""
    plain = find(inputs, bounded=False)
    return (general_forward(inputs) if plain is None else _attend(inputs, plain, wants_lse=False))[0]


def forward_keeping(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output, log-sum-exp, and what `backward_from_kept` wants; nothing where that would be too large."""
    plain = find(inputs, bounded=True)
    if plain is None or not plain.keeps:
        return (*forward(inputs), ())
    kept: list[torch.Tensor] = []
    return (*_attend(inputs, plain, kept), tuple(kept))


def backward_from_kept(
    inputs: Inputs,
    kept: Sequence[torch.Tensor],
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of everything asked for, from what `forward_keeping` kept."""
    plain = find(inputs, bounded=True)
    assert plain is not None
    part, tiles = _part(inputs, plain), plain.tiles
    if grad_out is None:
        grad_out = part.query.new_zeros(len(part.query), part.value_dim)
    grad_rows, blank = as_rows(grad_out), part.query.new_empty(())
    sums = [
        RowSums(rows, tuple(rows.shape), rows.dtype, come_once=place == 0) if needs[place] else None
        for place, rows in enumerate((part.query, part.key, part.value))
    ]
    bias = None if part.bias is None or not needs[3] else torch.zeros_like(part.bias).flatten(1)
    for number, chunk in enumerate(chunks(part, tiles)):
        weights, *copies = kept[number * plain.keeps : (number + 1) * plain.keeps]
        query, key, value = copies or tile_inputs(part, tiles, chunk)
        grad = tile_queries(grad_rows, part, tiles, chunk)
        if sums[2] is not None:
            sums[2].add(chunk.key, torch.bmm(weights.transpose(1, 2), grad).view(-1, part.value_dim))
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        if grad_lse is not None:
            grad_scores.addcmul_(weights, chunk.query.take(grad_lse.reshape(-1)).view(*weights.shape[:2], 1))
        if bias is not None:
            add_bias_gradient(bias, part, chunk, tiles, part.by_head(grad_scores))
        for own, where, left, right in (
            (sums[0], chunk.query, grad_scores, key),
            (sums[1], chunk.key, grad_scores.transpose(1, 2), query),
        ):
            if own is not None:
                found = torch.baddbmm(blank, left, right, beta=0, alpha=part.scale)
                own.add(where, found.view(-1, part.head_dim))
    tensors = (inputs.query, inputs.key, inputs.value)
    grads = [None if own is None else own.finished().view(of.shape) for own, of in zip(sums, tensors, strict=True)]
    return (*grads, None if bias is None else bias.view(-1), None, None)
