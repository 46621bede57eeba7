"""One call as the portable back end sees it: samples of one size, one head group, as rows; and what its tiles take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.packing import ordinary_tensors
from vicinal.ops.tiled.plan import MemberPlan, RowPlan, plan_row
from vicinal.ops.tiled.rows import GroupHeads, group_heads
from vicinal.ops.tiled.tiles import MOST_REMEMBERED_BYTES, Chunk, TileSet

CHUNK_BYTES = 12 << 20
"""What a chunk's copies and scores may take."""

WHOLE_BYTES = 24 << 20
"""Up to this size a call is one chunk: whole tensors are put back faster than parts of them."""


@dataclasses.dataclass(slots=True)  # frozen ones take twice as long to make, at every call
class Part:
    """Samples of one size, one head group: rows `[samples * tokens * heads, dim]` of all heads, and what they mean."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    samples: int
    heads: GroupHeads
    bias: torch.Tensor | None
    extra_key: torch.Tensor | None
    extra_value: torch.Tensor | None
    scale: float

    @property
    def head_dim(self) -> int:
        return self.query.shape[1]

    @property
    def value_dim(self) -> int:
        return self.value.shape[1]

    @property
    def kv_heads(self) -> int:
        return len(self.heads.key)

    @property
    def shared(self) -> int:
        return self.heads.shared

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def by_head(self, tiles: torch.Tensor) -> torch.Tensor:
        """`[items * kv_heads, tokens, dim]` as `[items, kv_heads, tokens, dim]`."""
        return tiles.view(-1, len(self.heads.key), *tiles.shape[1:])

    def without_extras(self) -> Part:
        """The same without extra tokens, which only the first member of a union reads."""
        return dataclasses.replace(self, extra_key=None, extra_value=None)


Groups: TypeAlias = Sequence[tuple[Part, tuple[MemberPlan, ...]]]
"""All head groups of some samples, and the union members of each."""


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[samples, *grid, heads, dim]` as rows `[samples * tokens * heads, dim]`."""
    return tensor.reshape(-1, tensor.shape[-1])


def chunks(part: Part, tiles: TileSet, *, whole: bool = False) -> Iterable[Chunk]:
    """A set's tiles in pieces that stay in cache, or with `whole` in one piece."""
    if whole:
        return [tiles.whole(part.samples, part.query.device, part.heads)]
    scores, tokens = tiles.queries * tiles.keys, tiles.queries + tiles.keys
    tile_bytes = 4 * part.heads.count * (scores + tokens * (part.head_dim + part.value_dim))
    is_one = tile_bytes * tiles.num_tiles * part.samples <= WHOLE_BYTES
    capacity = tiles.num_tiles * part.samples if is_one else max(1, CHUNK_BYTES // tile_bytes)
    return tiles.chunks(capacity, part.samples, part.query.device, part.heads)


def added_to_scores(part: Part, tiles: TileSet, chunk: Chunk, *, unit: float = 1.0) -> torch.Tensor | None:
    """Mask and bias to add to scores times `unit`, `[1 or items, 1 or kv_heads, shared * queries, keys (+ extra)]`."""
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
    table = table if unit == 1.0 else table * unit
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


def tile_queries(rows: torch.Tensor, part: Part, tiles: TileSet, chunk: Chunk, step: str | None = None) -> torch.Tensor:
    """Query-sided rows of a chunk's tiles, `[items * kv_heads, shared * queries, dim]`."""
    return chunk.query.take(rows).view(-1, part.shared * tiles.queries, rows.shape[1])


def tile_keys(rows: torch.Tensor, extra: torch.Tensor | None, part: Part, tiles: TileSet, chunk: Chunk) -> torch.Tensor:
    """Key-sided rows of a chunk's tiles, `[items * kv_heads, keys, dim]`, and after those of the grid extra tokens."""
    own = chunk.key.take(rows).view(-1, tiles.keys, rows.shape[1])
    if extra is None:
        return own
    tokens = extra[chunk.samples, :, list(part.heads.key)].transpose(1, 2)
    return torch.cat([own, tokens[:, None].expand(-1, chunk.tiles, -1, -1, -1).flatten(0, 2)], 1)


def tile_inputs(part: Part, tiles: TileSet, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a chunk's tiles, `[items * kv_heads, tokens, dim]`."""
    return (
        tile_queries(part.query, part, tiles, chunk),
        tile_keys(part.key, part.extra_key, part, tiles, chunk),
        tile_keys(part.value, part.extra_value, part, tiles, chunk),
    )


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


def parts(inputs: Inputs, samples: list[int] | None, plan: RowPlan, extra_length: int | None) -> Groups:
    """The head groups of some samples, as rows."""
    query = pick(inputs.query, samples, plan.grid)
    key, value = pick(inputs.key, samples, plan.key_grid), pick(inputs.value, samples, plan.key_grid)
    extras: list[torch.Tensor | None] = []
    for extra in (inputs.extra_key, inputs.extra_value):
        own = None if extra is None else pick(extra, samples, None)[:, :extra_length]
        extras.append(own if own is not None and own.shape[1] else None)
    groups = inputs.layout.groups
    biases: list[torch.Tensor | None] = [None] * len(groups)
    if inputs.bias is not None:
        tables = zip(inputs.bias.split(list(inputs.layout.bias_sizes)), groups, strict=True)
        biases = [own.view(group.heads, *(group.bias_shape or ())) for own, group in tables]
    heads = group_heads(tuple(group.heads for group in groups), key.shape[-2])
    rows = as_rows(query), as_rows(key), as_rows(value)
    return [
        (Part(*rows, query.shape[0], own, bias, extras[0], extras[1], inputs.scale), members)
        for own, bias, members in zip(heads, biases, plan.groups, strict=True)
    ]
