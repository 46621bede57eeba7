"""One call as the portable back end sees it: samples of one size, one head group, as rows; and moving rows by tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.packing import ordinary_tensors
from vicinal.ops.tiled.plan import MOST_REMEMBERED_BYTES, Chunk, MemberPlan, RowPlan, TileSet, plan_row

CHUNK_BYTES = 6 << 20
"""What a chunk's copies and scores may take; about what stays in the caches of a CPU."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Samples of one size, one head group: contiguous rows `[samples * tokens, heads * dim]` and what they mean."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    samples: int
    kv_heads: int
    shared: int
    bias: torch.Tensor | None
    extra_key: torch.Tensor | None
    extra_value: torch.Tensor | None
    scale: float

    @property
    def heads(self) -> int:
        return self.kv_heads * self.shared

    @property
    def head_dim(self) -> int:
        return self.query.shape[1] // self.heads

    @property
    def value_dim(self) -> int:
        return self.value.shape[1] // self.kv_heads

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


def as_rows(tensor: torch.Tensor, heads: slice) -> torch.Tensor:
    """`[samples, *grid, heads, dim]` as rows `[samples * tokens, heads * dim]`, of some heads."""
    part = tensor if heads.start in (None, 0) and heads.stop in (None, tensor.shape[-2]) else tensor[..., heads, :]
    return part.reshape(-1, part.shape[-2] * part.shape[-1]).contiguous()


def take_queries(rows: torch.Tensor, index: torch.Tensor, part: Part) -> torch.Tensor:
    """Query-sided rows of some tiles, `[tiles, kv_heads, shared * queries, dim]`."""
    tiles, queries = index.shape
    picked = rows.index_select(0, index.reshape(-1))
    if part.shared == 1:
        return picked.view(tiles, queries, part.kv_heads, -1).transpose(1, 2)
    picked = picked.view(tiles, queries, part.kv_heads, part.shared, -1).permute(0, 2, 3, 1, 4)
    return picked.reshape(tiles, part.kv_heads, part.shared * queries, -1)


def query_rows(tiles: torch.Tensor, part: Part) -> torch.Tensor:
    """The inverse of `take_queries`: `[tiles * queries, heads * dim]`."""
    count, _, rows, dim = tiles.shape
    if part.shared == 1:
        return tiles.transpose(1, 2).reshape(count * rows, part.heads * dim)
    queries = rows // part.shared
    back = tiles.view(count, part.kv_heads, part.shared, queries, dim).permute(0, 3, 1, 2, 4)
    return back.reshape(count * queries, part.heads * dim)


def take_keys(rows: torch.Tensor, index: torch.Tensor, part: Part) -> torch.Tensor:
    """Key-sided rows of some tiles, `[tiles, kv_heads, keys, dim]`."""
    tiles, keys = index.shape
    return rows.index_select(0, index.reshape(-1)).view(tiles, keys, part.kv_heads, -1).transpose(1, 2)


def key_rows(tiles: torch.Tensor) -> torch.Tensor:
    """The inverse of `take_keys`: `[tiles * keys, kv_heads * dim]`."""
    return tiles.transpose(1, 2).reshape(tiles.shape[0] * tiles.shape[2], -1)


def chunks(part: Part, tiles: TileSet, *, whole: bool = False) -> Iterable[Chunk]:
    """A set's tiles in pieces that stay in cache, or with `whole` in one piece."""
    if whole:
        return [tiles.whole(part.samples, part.query.device)]
    per_tile = part.heads * (
        tiles.queries * tiles.keys + (tiles.queries + tiles.keys) * (part.head_dim + part.value_dim)
    )
    return tiles.chunks(max(1, CHUNK_BYTES // (per_tile * 4)), part.samples, part.query.device)


def added_to_scores(part: Part, tiles: TileSet, chunk: Chunk) -> torch.Tensor | None:
    """Mask and bias to add to scores: `[1 or items, 1 or kv_heads, shared * queries, keys (+ extra)]`, or None."""
    if part.bias is None and not tiles.needs_mask:
        return None
    extra = 0 if part.extra_key is None else part.extra_key.shape[1]
    key = ("mask", part.compute_dtype, part.shared, extra)
    mask = None
    if tiles.needs_mask:
        mask = remember(chunk, key, lambda: _mask(part, tiles, chunk, extra))
    if part.bias is None:
        return mask
    index = remember(chunk, ("bias",), lambda: tiles.bias_index(chunk.shapes).to(part.query.device))
    table = part.bias.flatten(1).to(part.compute_dtype)
    bias = table.index_select(1, index.flatten()).view(
        part.kv_heads, part.shared, len(index), tiles.queries, tiles.keys
    )
    bias = bias.permute(2, 0, 1, 3, 4).flatten(2, 3)
    if extra:
        bias = torch.nn.functional.pad(bias, (0, extra))
    if chunk.which is not None:
        bias = bias.index_select(0, chunk.which)
    return bias if mask is None else bias + mask


def _mask(part: Part, tiles: TileSet, chunk: Chunk, extra: int) -> torch.Tensor:
    seen = tiles.mask(chunk.shapes).to(part.query.device)[:, None]
    mask = torch.zeros(seen.shape, dtype=part.compute_dtype, device=seen.device).masked_fill(~seen, -math.inf)
    if extra:
        mask = torch.nn.functional.pad(mask, (0, extra))
    mask = mask.repeat(1, 1, part.shared, 1)
    return mask if chunk.which is None else mask.index_select(0, chunk.which)


def remember(chunk: Chunk, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` makes, kept with the chunk where the chunk itself is kept and it is small."""
    if chunk.masks is None:
        return make()
    if key not in chunk.masks:
        with ordinary_tensors():
            made = make()
        if made.numel() * made.element_size() > MOST_REMEMBERED_BYTES // 4:
            return made
        chunk.masks[key] = made
    return chunk.masks[key]


def _extra_tokens(tensor: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Extra tokens of the chunk's samples for every item, `[items, kv_heads, tokens, dim]`."""
    own = tensor[chunk.samples].transpose(1, 2)
    return own[:, None].expand(-1, chunk.tiles, -1, -1, -1).flatten(0, 1)


def tile_inputs(part: Part, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a chunk's items; extra tokens stand after the keys of the grid."""
    query = take_queries(part.query, chunk.query_index, part)
    key, value = take_keys(part.key, chunk.key_index, part), take_keys(part.value, chunk.key_index, part)
    if part.extra_key is not None and part.extra_value is not None:
        key = torch.cat([key, _extra_tokens(part.extra_key, chunk)], 2)
        value = torch.cat([value, _extra_tokens(part.extra_value, chunk)], 2)
    return query, key, value


def all_chunks(part: Part, plan: MemberPlan, *, whole: bool = False) -> Iterator[tuple[TileSet, Chunk]]:
    """Every chunk of every set of tiles of a member."""
    for tiles in plan.sets:
        for chunk in chunks(part, tiles, whole=whole):
            yield tiles, chunk


def split(inputs: Inputs, *, bounded: bool) -> Iterator[tuple[list[int] | None, RowPlan, int | None]]:
    """Samples that can be computed together: their numbers (None for all), the plan, and their extra length."""
    layout = inputs.layout.packed
    biased = inputs.bias is not None
    if not inputs.query.shape[0]:
        return
    rows = host_rows(inputs.tables)
    lengths = None if inputs.extra_lengths is None else inputs.extra_lengths.tolist()
    if len(rows) == 1 and lengths is None:
        yield None, plan_row(rows[0].tobytes(), layout, inputs.grid, bounded=bounded, biased=biased), None
        return
    alike: dict[tuple[bytes, int | None], list[int]] = {}
    for sample in range(inputs.query.shape[0]):
        row = rows[sample % len(rows)].tobytes()
        alike.setdefault((row, None if lengths is None else lengths[sample]), []).append(sample)
    for (row, length), samples in alike.items():
        yield samples, plan_row(row, layout, inputs.grid, bounded=bounded, biased=biased), length


def host_rows(tables: torch.Tensor) -> Any:
    """Packed tables as a NumPy array, also while a tracer or a fake mode watches (they are constants to it)."""
    if not torch.compiler.is_exporting():
        return tables.cpu().numpy()
    with ordinary_tensors():
        return tables.cpu().numpy()


def pick(tensor: torch.Tensor, samples: list[int] | None, grid: tuple[int, ...] | None) -> torch.Tensor:
    """Some samples of a padded tensor `[batch, *grid, ...]`, cut to their own grid."""
    if samples is not None and samples != list(range(tensor.shape[0])):
        tensor = tensor[torch.tensor(samples, device=tensor.device)]
    if grid is None or tensor.shape[1 : len(grid) + 1] == grid:
        return tensor
    return tensor[(slice(None), *(slice(length) for length in grid))]


def parts(
    inputs: Inputs, samples: list[int] | None, plan: RowPlan, extra_length: int | None
) -> Iterator[tuple[slice, Part]]:
    """The head groups of some samples, each as rows; with the heads it stands for."""
    query = pick(inputs.query, samples, plan.grid)
    key, value = pick(inputs.key, samples, plan.key_grid), pick(inputs.value, samples, plan.key_grid)
    extras: list[torch.Tensor | None] = []
    for extra in (inputs.extra_key, inputs.extra_value):
        own = None if extra is None else pick(extra, samples, None)[:, :extra_length]
        extras.append(own if own is not None and own.shape[1] else None)
    biases = None if inputs.bias is None else inputs.bias.split(list(inputs.layout.bias_sizes))
    shared = query.shape[-2] // key.shape[-2]
    begin = 0
    for number, group in enumerate(inputs.layout.groups):
        heads = slice(begin, begin + group.heads)
        begin = heads.stop
        kv_heads, own_shared = key_heads(heads, shared)
        bias = None
        if biases is not None:
            bias = biases[number].view(group.heads, *(group.bias_shape or ()))
        yield (
            heads,
            Part(
                query=as_rows(query, heads),
                key=as_rows(key, kv_heads)
                if isinstance(kv_heads, slice)
                else as_rows(key[..., kv_heads, :], slice(None)),
                value=as_rows(value, kv_heads)
                if isinstance(kv_heads, slice)
                else as_rows(value[..., kv_heads, :], slice(None)),
                samples=query.shape[0],
                kv_heads=group.heads // own_shared,
                shared=own_shared,
                bias=bias,
                extra_key=None if extras[0] is None else extras[0][:, :, kv_heads],
                extra_value=None if extras[1] is None else extras[1][:, :, kv_heads],
                scale=inputs.scale,
            ),
        )


def key_heads(heads: slice, shared: int) -> tuple[slice | list[int], int]:
    """The key heads that query heads share, and by how many each; a list where a group splits a shared one.

    >>> key_heads(slice(4, 8), 2), key_heads(slice(1, 4), 2)
    ((slice(2, 4, None), 2), ([0, 1, 1], 1))
    """
    if heads.start % shared == 0 and heads.stop % shared == 0:
        return slice(heads.start // shared, heads.stop // shared), shared
    return [head // shared for head in range(heads.start, heads.stop)], 1
