"""The portable back end: tiles of queries against the keys they need, in plain torch operations.

Every tile gathers its queries and the interval of keys that covers what they see, in batches ("chunks") small
enough to stay in cache, so memory grows with tokens times window and no copy of the whole input is made. On CPU a
chunk goes through torch's own fused attention where that can take it; otherwise through batched matrix products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from vicinal.ops.backend import Backend, Capability, Gradients, Inputs, Problem, register
from vicinal.ops.merge import merge_pair
from vicinal.ops.packing import Layout, pack_tables
from vicinal.ops.plan import (
    MOST_REMEMBERED_BYTES,
    Chunk,
    MemberPlan,
    RowPlan,
    TileSet,
    ordinary_tensors,
    plan_row,
)

CHUNK_BYTES = 6 << 20
"""What a chunk's copies and scores may take; about what stays in the caches of a CPU."""

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


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


def _as_rows(tensor: torch.Tensor, heads: slice) -> torch.Tensor:
    """`[samples, *grid, heads, dim]` as rows `[samples * tokens, heads * dim]`, of some heads."""
    part = tensor[..., heads, :]
    return part.reshape(-1, part.shape[-2] * part.shape[-1]).contiguous()


def take_queries(rows: torch.Tensor, index: torch.Tensor, part: Part) -> torch.Tensor:
    """Query-sided rows of some tiles, `[tiles, kv_heads, shared * queries, dim]`."""
    tiles, queries = index.shape
    picked = rows.index_select(0, index.reshape(-1))
    picked = picked.view(tiles, queries, part.kv_heads, part.shared, -1).permute(0, 2, 3, 1, 4)
    return picked.reshape(tiles, part.kv_heads, part.shared * queries, -1)


def query_rows(tiles: torch.Tensor, part: Part) -> torch.Tensor:
    """The inverse of `take_queries`: `[tiles * queries, heads * dim]`."""
    count, _, rows, dim = tiles.shape
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
        mask = _remember(chunk, key, lambda: _mask(part, tiles, chunk, extra))
    if part.bias is None:
        return mask
    index = _remember(chunk, ("bias",), lambda: tiles.bias_index(chunk.shapes).to(part.query.device))
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


def _remember(chunk: Chunk, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
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


def _tile_inputs(part: Part, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = take_queries(part.query, chunk.query_index, part)
    key, value = take_keys(part.key, chunk.key_index, part), take_keys(part.value, chunk.key_index, part)
    if part.extra_key is not None and part.extra_value is not None:
        key = torch.cat([key, _extra_tokens(part.extra_key, chunk)], 2)
        value = torch.cat([value, _extra_tokens(part.extra_value, chunk)], 2)
    return query, key, value


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


def _can_fuse(part: Part) -> bool:
    return (
        _FLASH is not None
        and _FLASH_BACKWARD is not None
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
    assert _FLASH is not None
    if added is None:
        out, lse = _FLASH(query, key, value, scale=scale)
        return out, lse
    mask = added.expand(query.shape[0], query.shape[1], -1, -1)
    out, lse = _FLASH(query, key, value, attn_mask=mask, scale=scale)
    if not may_be_blind:
        return out, lse
    # for a query that sees nothing the kernel's lse is not specified
    blind = (added == -math.inf).all(-1)
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -math.inf)


def _all_chunks(part: Part, plan: MemberPlan, *, whole: bool = False) -> Iterator[tuple[TileSet, Chunk]]:
    for tiles in plan.sets:
        for chunk in chunks(part, tiles, whole=whole):
            yield tiles, chunk


def _member(
    part: Part, plan: MemberPlan, num_queries: int, *, differentiable: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output rows `[samples * queries, heads * value_dim]` and lse rows `[samples * queries, heads]`."""
    fused = not differentiable and _can_fuse(part)
    rows = part.samples * num_queries
    dtype = part.query.dtype if fused else part.compute_dtype
    out = part.query.new_empty(rows, part.heads * part.value_dim, dtype=dtype)
    lse = part.query.new_empty(rows, part.heads, dtype=part.compute_dtype)
    for tiles, chunk in _all_chunks(part, plan, whole=differentiable):
        query, key, value = _tile_inputs(part, chunk)
        added = added_to_scores(part, tiles, chunk)
        if fused:
            may_be_blind = tiles.may_be_blind and part.extra_key is None
            tile_out, tile_lse = _fused_tiles(query, key, value, added, part.scale, may_be_blind=may_be_blind)
        else:
            wide = (tensor.to(part.compute_dtype) for tensor in (query, key, value))
            tile_out, tile_lse = _softmax_tiles(*wide, added, part.scale)
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


def _pick(tensor: torch.Tensor, samples: list[int] | None, grid: tuple[int, ...] | None) -> torch.Tensor:
    """Some samples of a padded tensor `[batch, *grid, ...]`, cut to their own grid."""
    if samples is not None and samples != list(range(tensor.shape[0])):
        tensor = tensor[torch.tensor(samples, device=tensor.device)]
    if grid is None:
        return tensor
    return tensor[(slice(None), *(slice(length) for length in grid))]


def parts(
    inputs: Inputs, samples: list[int] | None, plan: RowPlan, extra_length: int | None
) -> Iterator[tuple[slice, Part]]:
    """The head groups of some samples, each as rows; with the heads it stands for."""
    query = _pick(inputs.query, samples, plan.grid)
    key, value = _pick(inputs.key, samples, plan.key_grid), _pick(inputs.value, samples, plan.key_grid)
    extras: list[torch.Tensor | None] = []
    for extra in (inputs.extra_key, inputs.extra_value):
        own = None if extra is None else _pick(extra, samples, None)[:, :extra_length]
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
                query=_as_rows(query, heads),
                key=_as_rows(key, kv_heads)
                if isinstance(kv_heads, slice)
                else _as_rows(key[..., kv_heads, :], slice(None)),
                value=_as_rows(value, kv_heads)
                if isinstance(kv_heads, slice)
                else _as_rows(value[..., kv_heads, :], slice(None)),
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


def _run(inputs: Inputs, *, differentiable: bool) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    batch, grid, heads = inputs.query.shape[0], inputs.grid, inputs.query.shape[-2]
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
        where = (chosen.to(out.device), *(slice(length) for length in plan.grid))
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


def backward(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of everything asked for, chunk by chunk, recomputing the scores."""
    compute = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    grads: list[torch.Tensor | None] = [
        tensor.new_zeros(tensor.shape, dtype=compute) if tensor is not None and need else None
        for tensor, need in zip(inputs.tensors(), needs, strict=True)
    ]
    if inputs.query.shape[0] and (grad_out is not None or grad_lse is not None):
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        for samples, plan, extra_length in split(inputs, bounded=True):
            _backward_samples(inputs, out, lse, grad_out, grad_lse, grads, samples, plan, extra_length)
    return tuple(
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, inputs.tensors(), strict=True)
    )


def _backward_samples(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    grads: list[torch.Tensor | None],
    samples: list[int] | None,
    plan: RowPlan,
    extra_length: int | None,
) -> None:
    shared = inputs.query.shape[-2] // inputs.key.shape[-2]
    own = {
        "out": _pick(out, samples, plan.grid),
        "grad_out": _pick(grad_out, samples, plan.grid),
        "lse": _pick(lse, samples, plan.grid).unsqueeze(-1),
        "grad_lse": None if grad_lse is None else _pick(grad_lse, samples, plan.grid).unsqueeze(-1),
    }
    bias_at = [0, *torch.tensor(inputs.layout.bias_sizes).cumsum(0).tolist()]
    for number, (heads, part) in enumerate(parts(inputs, samples, plan, extra_length)):
        rows = {name: None if tensor is None else _as_rows(tensor, heads) for name, tensor in own.items()}
        # a query that sees nothing has lse -inf; any finite number keeps its weights, exp(-inf - lse), at 0
        rows["lse"] = rows["lse"].masked_fill(rows["lse"] == -math.inf, 0.0)  # type: ignore[union-attr]
        sinks = _Sinks.for_part(part, grads)
        for position, member in enumerate(plan.groups[number]):
            mine = part if position == 0 else dataclasses.replace(part, extra_key=None, extra_value=None)
            for tiles, chunk in _all_chunks(mine, member):
                _backward_tiles(mine, chunk, tiles, rows, sinks)
        kv_heads, _ = key_heads(heads, shared)
        for place, sink, group_heads, grid in (
            (0, sinks.query, heads, plan.grid),
            (1, sinks.key, kv_heads, plan.key_grid),
            (2, sinks.value, kv_heads, plan.key_grid),
        ):
            if sink is not None:
                width = part.heads if place == 0 else part.kv_heads
                _add(grads[place], samples, grid, group_heads, sink.view(part.samples, *grid, width, -1))
        for place, sink in ((4, sinks.extra_key), (5, sinks.extra_value)):
            if sink is not None:
                _add(grads[place], samples, sink.shape[1:2], kv_heads, sink)
        bias_grad = grads[3]
        if sinks.bias is not None and bias_grad is not None:
            bias_grad[bias_at[number] : bias_at[number + 1]] += sinks.bias.flatten()


def _add(
    whole: torch.Tensor | None,
    samples: list[int] | None,
    grid: Sequence[int],
    heads: slice | list[int],
    part: torch.Tensor,
) -> None:
    """Add the gradient of some samples and heads where it belongs."""
    assert whole is not None
    view = whole[(slice(None), *(slice(length) for length in grid))]
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


@dataclasses.dataclass(frozen=True)
class _Sinks:
    """Where a part's gradients are summed; None where not asked for."""

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    bias: torch.Tensor | None
    extra_key: torch.Tensor | None
    extra_value: torch.Tensor | None

    @staticmethod
    def for_part(part: Part, grads: Sequence[torch.Tensor | None]) -> _Sinks:
        sources = (part.query, part.key, part.value, part.bias, part.extra_key, part.extra_value)
        return _Sinks(
            *(
                None if grad is None or source is None else source.new_zeros(source.shape, dtype=part.compute_dtype)
                for grad, source in zip(grads, sources, strict=True)
            )
        )


def _backward_tiles(
    part: Part, chunk: Chunk, tiles: TileSet, rows: dict[str, torch.Tensor | None], sinks: _Sinks
) -> None:
    query, key, value = _tile_inputs(part, chunk)
    added = added_to_scores(part, tiles, chunk)
    out, grad_out, lse, grad_lse = (
        None if rows[name] is None else take_queries(rows[name], chunk.query_index, part)  # type: ignore[arg-type]
        for name in ("out", "grad_out", "lse", "grad_lse")
    )
    assert out is not None
    assert grad_out is not None
    assert lse is not None
    if chunk.keep is not None:
        keep = chunk.keep[:, None, None, :].expand(-1, 1, part.shared, -1).flatten(2)[..., None]
        grad_out = grad_out * keep
        grad_lse = None if grad_lse is None else grad_lse * keep
    if sinks.bias is None and grad_lse is None and _can_fuse(part):
        assert _FLASH_BACKWARD is not None
        mask = None if added is None else added.expand(query.shape[0], query.shape[1], -1, -1)
        grad_query, grad_key, grad_value = _FLASH_BACKWARD(
            grad_out, query, key, value, out, lse.squeeze(-1), 0.0, False, attn_mask=mask, scale=part.scale
        )
    else:
        wide = [tensor.to(part.compute_dtype) for tensor in (query, key, value, out, grad_out)]
        grad_query, grad_key, grad_value, grad_scores = _matmul_backward(*wide, lse, grad_lse, added, part.scale)
        if sinks.bias is not None:
            _add_bias_gradient(sinks.bias, part, chunk, tiles, grad_scores)
    if sinks.query is not None:
        sinks.query.index_add_(0, chunk.query_index.reshape(-1), query_rows(grad_query, part).to(part.compute_dtype))
    own = tiles.keys
    for sink, extra_sink, grad in (
        (sinks.key, sinks.extra_key, grad_key),
        (sinks.value, sinks.extra_value, grad_value),
    ):
        if sink is not None:
            sink.index_add_(0, chunk.key_index.reshape(-1), key_rows(grad[:, :, :own]).to(part.compute_dtype))
        if extra_sink is not None and part.extra_key is not None:
            summed = grad[:, :, own:].unflatten(0, (-1, chunk.tiles)).sum(1, dtype=part.compute_dtype)
            extra_sink[chunk.samples] += summed.transpose(1, 2)


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
    index = _remember(chunk, ("bias",), lambda: tiles.bias_index(chunk.shapes).to(grad.device))
    if chunk.which is None:
        summed = grad.sum(0, keepdim=True)
    else:
        summed = grad.new_zeros(len(index), *grad.shape[1:]).index_add_(0, chunk.which, grad)
    flat = summed.transpose(0, 1).flatten(1)
    sink.flatten(1).scatter_add_(1, index.reshape(1, -1).expand(len(flat), -1), flat)


def _describe(problem: Problem, bounds: Any, layout: Layout) -> dict[str, Any]:
    row = pack_tables(bounds)[0].tobytes()
    plan = plan_row(row, layout.packed, problem.grid, bounded=False, biased=problem.has_bias)
    groups = []
    for members in plan.groups:
        for member in members:
            groups.append([_describe_set(tiles) for tiles in member.sets])
    return {"method": "query tiles against the keys they need", "members": groups}


def _describe_set(tiles: TileSet) -> dict[str, Any]:
    needed = sum(int((axis.high - axis.low)[axis.is_query].sum()) for axis in tiles.axes[:1])
    for axis in tiles.axes[1:]:
        needed *= int((axis.high - axis.low)[axis.is_query].sum())
    computed = tiles.num_tiles * tiles.queries * tiles.keys
    return {
        "tiles": tiles.num_tiles,
        "query_tile": [axis.queries for axis in tiles.axes],
        "key_tile": [axis.keys for axis in tiles.axes],
        "masked": tiles.needs_mask,
        "waste": round(computed / max(needed, 1), 3),
    }


register(
    Backend(
        name="tiled",
        capability=Capability(),
        forward=forward,
        backward=backward,
        differentiable=differentiable,
        describe=_describe,
    )
)
