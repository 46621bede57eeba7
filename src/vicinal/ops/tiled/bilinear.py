"""Scores, weighted sums and their gradients, in window order, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.packing import Layout
from vicinal.ops.tiled.parts import Part, chunks, key_rows, parts, query_rows, split, take_keys, take_queries
from vicinal.ops.tiled.plan import Chunk, TileSet


def _bundle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: torch.Tensor,
    layout: Sequence[int],
    scale: float = 1.0,
) -> Inputs:
    return Inputs(query, key, value, tables, None, None, None, None, Layout.unpack(layout), scale)


_Piece = tuple[slice, Part, Chunk, TileSet, torch.Tensor, torch.Tensor, slice]


def _pieces(inputs: Inputs) -> Iterator[_Piece]:
    """Every chunk of every member: its heads, part, chunk, tiles, window index and validity, window columns."""
    for samples, plan, length in split(inputs, bounded=True):
        for (heads, part), members, layout in zip(
            parts(inputs, samples, plan, length), plan.groups, inputs.layout.groups, strict=True
        ):
            begin = 0
            for member, axes in zip(members, layout.members, strict=True):
                most = tuple(axis.most for axis in axes)
                columns = slice(begin, begin + math.prod(most))
                begin = columns.stop
                if not math.prod(most):  # a member of which no query sees anything
                    continue
                for tiles in member.sets:
                    for chunk in chunks(part, tiles):
                        index, valid = tiles.window(chunk.shapes, most)
                        index, valid = _for_tiles(index, part, chunk), _for_tiles(valid, part, chunk)
                        yield heads, part, chunk, tiles, index, valid, columns


def _for_tiles(shapes: torch.Tensor, part: Part, chunk: Chunk) -> torch.Tensor:
    """`[shapes, queries, window]` as `[tiles, kv_heads, shared * queries, window]`."""
    shapes = shapes.to(part.query.device)
    own = shapes.expand(len(chunk.query_index), -1, -1) if chunk.which is None else shapes[chunk.which]
    return own[:, None, None].expand(-1, part.kv_heads, part.shared, -1, -1).flatten(2, 3)


def scores(
    query: torch.Tensor, key: torch.Tensor, tables: torch.Tensor, layout: Sequence[int], scale: float
) -> torch.Tensor:
    """Queries against the keys they see: `[batch, *grid, heads, window]`, -inf where there is no key."""
    inputs = _bundle(query, key, key, tables, layout)
    out = query.new_full((*query.shape[:-1], inputs.layout.window), -math.inf)
    if not out.numel():
        return out
    rows = out.view(-1, query.shape[-2], inputs.layout.window)
    for heads, part, chunk, _, index, valid, columns in _pieces(inputs):
        tile = take_queries(part.query, chunk.query_index, part).to(part.compute_dtype)
        keys = take_keys(part.key, chunk.key_index, part).to(part.compute_dtype)
        picked = torch.matmul(tile, keys.transpose(-1, -2)).mul_(scale).gather(-1, index)
        found = query_rows(picked.masked_fill_(~valid, -math.inf), part).view(-1, part.heads, index.shape[-1])
        where = chunk.query_index.reshape(-1)
        if chunk.keep is not None:
            where, found = where[chunk.keep.reshape(-1)], found[chunk.keep.reshape(-1)]
        rows[where, heads, columns] = found.to(out.dtype)
    return out


def _dense_weights(
    weights: torch.Tensor, heads: slice, part: Part, chunk: Chunk, tiles: TileSet, index: torch.Tensor,
    valid: torch.Tensor, columns: slice,
) -> torch.Tensor:  # fmt: skip
    """Weights in window order as `[tiles, kv_heads, shared * queries, keys]` of their tiles."""
    rows = weights.reshape(-1, *weights.shape[-2:])[:, heads, columns].to(part.compute_dtype)
    own = take_queries(rows.reshape(len(rows), -1), chunk.query_index, part)
    own = torch.where(valid, own, 0.0)
    if chunk.keep is not None:
        keep = chunk.keep[:, None, None, :].expand(-1, 1, part.shared, -1).flatten(2)[..., None]
        own = torch.where(keep, own, 0.0)
    return own.new_zeros(*own.shape[:-1], tiles.keys).scatter_add_(-1, index, own)


def apply(weights: torch.Tensor, value: torch.Tensor, tables: torch.Tensor, layout: Sequence[int]) -> torch.Tensor:
    """Values summed with the weights of the queries that see them: `[batch, *grid, heads, value_dim]`."""
    shape = (*weights.shape[:-1], value.shape[-1])
    out = weights.new_zeros(shape)
    if not weights.numel():
        return out
    inputs = _bundle(weights, value, value, tables, layout)
    rows = out.view(-1, *shape[-2:])
    for heads, part, chunk, tiles, index, valid, columns in _pieces(inputs):
        dense = _dense_weights(weights, heads, part, chunk, tiles, index, valid, columns)
        values = take_keys(part.value, chunk.key_index, part).to(part.compute_dtype)
        found = query_rows(torch.matmul(dense, values), part).view(-1, part.heads, part.value_dim)
        where = chunk.query_index.reshape(-1)
        if chunk.keep is not None:
            where, found = where[chunk.keep.reshape(-1)], found[chunk.keep.reshape(-1)]
        rows[where, heads] += found.to(out.dtype)
    return out


def spread(
    weights: torch.Tensor, query: torch.Tensor, tables: torch.Tensor, layout: Sequence[int], kv_heads: int,
    key_grid: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """Tensors of the queries summed, with weights, at the keys they see: `[batch, *key_grid, kv_heads, dim]`."""
    batch_size, head_dim = query.shape[0], query.shape[-1]
    out = query.new_zeros(batch_size, *key_grid, kv_heads, head_dim)
    if not weights.numel():
        return out
    inputs = _bundle(query, out, out, tables, layout)
    shared = query.shape[-2] // kv_heads
    total = torch.zeros(out.shape, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
    rows = total.view(-1, kv_heads, head_dim)
    for heads, part, chunk, tiles, index, valid, columns in _pieces(inputs):
        dense = _dense_weights(weights, heads, part, chunk, tiles, index, valid, columns)
        own = take_queries(part.query, chunk.query_index, part).to(part.compute_dtype)
        found = key_rows(torch.matmul(dense.transpose(-1, -2), own)).view(-1, part.kv_heads, head_dim)
        where = chunk.key_index.reshape(-1)
        if part.shared == shared:
            rows[:, heads.start // shared : heads.stop // shared].index_add_(0, where, found)
        else:  # a group that splits key heads
            for place, head in enumerate(range(heads.start, heads.stop)):
                rows[:, head // shared].index_add_(0, where, found[:, place])
    return total.to(query.dtype)
