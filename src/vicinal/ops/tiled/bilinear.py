"""Scores, weighted sums and their gradients, in window order, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.packing import Layout
from vicinal.ops.tiled.parts import Part, chunks, parts, split, tile_keys, tile_queries
from vicinal.ops.tiled.tiles import Chunk, TileSet


def _bundle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: torch.Tensor,
    layout: Sequence[int],
    scale: float = 1.0,
) -> Inputs:
    return Inputs(query, key, value, tables, None, None, None, None, Layout.unpack(layout), scale)


_Piece = tuple[Part, Chunk, TileSet, torch.Tensor, torch.Tensor, slice]


def _pieces(inputs: Inputs) -> Iterator[_Piece]:
    """Every chunk of every member: its part, chunk, tiles, window index and validity, window columns."""
    for samples, plan, length in split(inputs, bounded=True):
        groups = parts(inputs, samples, plan, length)
        for (part, members), layout in zip(groups, inputs.layout.groups, strict=True):
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
                        yield part, chunk, tiles, index, valid, columns


def _for_tiles(shapes: torch.Tensor, part: Part, chunk: Chunk) -> torch.Tensor:
    """`[shapes, queries, window]` as `[items * kv_heads, shared * queries, window]`."""
    shapes = shapes.to(part.query.device)
    items = (chunk.samples.stop - chunk.samples.start) * chunk.tiles
    own = shapes.expand(items, -1, -1) if chunk.which is None else shapes[chunk.which]
    return own[:, None, None].expand(-1, part.kv_heads, part.shared, -1, -1).flatten(2, 3).flatten(0, 1)


def scores(
    query: torch.Tensor, key: torch.Tensor, tables: torch.Tensor, layout: Sequence[int], scale: float
) -> torch.Tensor:
    """Queries against the keys they see: `[batch, *grid, heads, window]`, -inf where there is no key."""
    inputs = _bundle(query, key, key, tables, layout)
    out = query.new_full((*query.shape[:-1], inputs.layout.window), -math.inf)
    if not out.numel():
        return out
    rows = out.view(-1, inputs.layout.window)
    for part, chunk, tiles, index, valid, columns in _pieces(inputs):
        tile = tile_queries(part.query, part, tiles, chunk).to(part.compute_dtype)
        keys = tile_keys(part.key, None, part, tiles, chunk).to(part.compute_dtype)
        picked = torch.matmul(tile, keys.transpose(-1, -2)).mul_(scale).gather(-1, index)
        found, where = chunk.query.unsorted(picked.masked_fill_(~valid, -math.inf).view(-1, index.shape[-1]))
        rows[where, columns] = found.to(out.dtype)
    return out


def _dense_weights(
    weights: torch.Tensor, part: Part, chunk: Chunk, tiles: TileSet, index: torch.Tensor, valid: torch.Tensor,
    columns: slice,
) -> torch.Tensor:  # fmt: skip
    """Weights in window order as `[items * kv_heads, shared * queries, keys]` of their tiles."""
    rows = weights.reshape(-1, weights.shape[-1])[:, columns].to(part.compute_dtype)
    own = torch.where(valid, tile_queries(rows, part, tiles, chunk), 0.0)
    if chunk.padding is not None:
        part.by_head(own).masked_fill_(chunk.padding, 0.0)
    return own.new_zeros(*own.shape[:-1], tiles.keys).scatter_add_(-1, index, own)


def apply(weights: torch.Tensor, value: torch.Tensor, tables: torch.Tensor, layout: Sequence[int]) -> torch.Tensor:
    """Values summed with the weights of the queries that see them: `[batch, *grid, heads, value_dim]`."""
    out = weights.new_zeros(*weights.shape[:-1], value.shape[-1])
    if not weights.numel():
        return out
    rows = out.view(-1, value.shape[-1])
    for part, chunk, tiles, index, valid, columns in _pieces(_bundle(weights, value, value, tables, layout)):
        dense = _dense_weights(weights, part, chunk, tiles, index, valid, columns)
        values = tile_keys(part.value, None, part, tiles, chunk).to(part.compute_dtype)
        found, where = chunk.query.unsorted(torch.matmul(dense, values).view(-1, part.value_dim))
        rows[where] += found.to(out.dtype)
    return out


def spread(
    weights: torch.Tensor, query: torch.Tensor, tables: torch.Tensor, layout: Sequence[int], kv_heads: int,
    key_grid: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """Tensors of the queries summed, with weights, at the keys they see: `[batch, *key_grid, kv_heads, dim]`."""
    out = query.new_zeros(query.shape[0], *key_grid, kv_heads, query.shape[-1])
    if not weights.numel():
        return out
    total = torch.zeros(out.shape, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
    rows = total.view(-1, query.shape[-1])
    for part, chunk, tiles, index, valid, columns in _pieces(_bundle(query, out, out, tables, layout)):
        dense = _dense_weights(weights, part, chunk, tiles, index, valid, columns)
        own = tile_queries(part.query, part, tiles, chunk).to(part.compute_dtype)
        found, where = chunk.key.unsorted(torch.matmul(dense.transpose(-1, -2), own).view(-1, query.shape[-1]))
        rows.index_add_(0, where, found)
    return total.to(query.dtype)
