"""The backward: each gradient by a pass of its own, summed in a fixed order, so that it is always deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vicinal.ops.backend import Gradients, Inputs
from vicinal.ops.packing import HEADER
from vicinal.ops.triton.launch import (
    LOG2_E,
    Call,
    Part,
    as_rows,
    earlier_wraps,
    is_spread,
    power,
    precision,
    start,
    start_query_pass,
    strides,
    tile_names,
)

_ROWS = 64
_MOST_PARTIALS = 256
"""Partial sums that a gradient over all queries is made of, at most."""


class Given:
    """What the backward is given besides the inputs, as kernels take it."""

    def __init__(
        self,
        call: Call,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor | None,
        grad_lse: torch.Tensor | None,
    ) -> None:
        from vicinal.ops.triton.kernels.watchers import row_sums_kernel

        grad = as_rows(torch.zeros_like(out) if grad_out is None else grad_out, call.rank)
        # a gradient may lie anywhere, as part of something much larger, say
        self.grad = grad if call.is_wide or not is_spread(grad) else grad.contiguous()
        self.lse = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
        self.delta = torch.empty_like(self.lse)
        rows, block = lse.numel(), power(call.value_dim)
        size = max(16, 4096 // block)
        start(
            row_sums_kernel,
            (-(-rows // size),),
            out,
            p_out=out.contiguous(),
            p_grad=self.grad,
            p_lse=lse.contiguous(),
            p_grad_lse=None if grad_lse is None else grad_lse.contiguous(),
            p_lse_2=self.lse,
            p_delta=self.delta,
            rows=rows,
            tokens=call.tokens,
            heads=call.heads,
            DV=call.value_dim,
            BLOCK_DV=block,
            BLOCK=size,
            HAS_GRAD=grad_out is not None,
            HAS_GRAD_LSE=grad_lse is not None,
            **strides("grad", self.grad),
        )


def backward(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients that are needed."""
    call = Call(inputs)
    found: list[torch.Tensor | None] = [None] * 6
    if not math.prod(lse.shape):
        tensors = inputs.tensors()
        return tuple(
            torch.zeros_like(tensor) if need and tensor is not None else None
            for tensor, need in zip(tensors, needs, strict=True)
        )
    given = Given(call, out, lse, grad_out, grad_lse)
    if needs[0]:
        found[0] = query_gradient(call, given)
    if needs[1] or needs[2]:
        found[1:3] = key_gradients(call, given)
    if needs[3] and inputs.bias is not None:
        found[3] = bias_gradient(call, given)
    if needs[4] or needs[5]:
        found[4:6] = extra_gradients(call, given)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def query_gradient(call: Call, given: Given) -> torch.Tensor:
    """The gradient of the query."""
    query = call.inputs.query
    grad = call.zeros_or_empty(query.shape, query.dtype, zeros=call.is_padded)
    several = any(len(group.members) > 1 for group in call.inputs.layout.groups)
    work = grad
    if several and grad.dtype != torch.float32:
        work = call.zeros_or_empty(query.shape, torch.float32, zeros=False)
    for part in call.parts():
        last = grad if part.is_last else work
        start_query_pass(call, part, last, work if part.number else None, given.lse, given.grad, given.delta)
    return grad


def key_gradients(call: Call, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of key and value."""
    key, value = call.inputs.key, call.inputs.value
    parts = list(call.parts())
    taken: set[int] = set()
    adds = False  # whether a key head gets gradients from more than one pass
    for part in parts:
        own = set(_kv_heads(call, part))
        adds = adds or bool(taken & own)
        taken |= own
    dtype = torch.float32 if adds else key.dtype
    zeros = adds or call.is_padded
    grad_key = call.zeros_or_empty(key.shape, dtype, zeros=zeros)
    grad_value = call.zeros_or_empty(value.shape, dtype, zeros=zeros)
    for part in parts:
        _start_key_pass(call, part, given, grad_key, grad_value, adds)
    return grad_key.to(key.dtype), grad_value.to(value.dtype)


def _shared(call: Call, given: Given) -> dict[str, Any]:
    """What the passes over keys, bias entries and extra tokens all take."""
    return {
        "p_query": call.query,
        "p_lse": given.lse,
        "p_grad": given.grad,
        "p_delta": given.delta,
        "scale": call.inputs.scale * LOG2_E,
        "row_words": call.tables.shape[1] if call.has_rows else 0,
        "heads": call.heads,
        "shared": call.shared,
        **strides("query", call.query),
        **strides("grad", given.grad),
        **call.sizes(),
    }


def _kv_heads(call: Call, part: Part) -> range:
    last = part.first_head + part.layout.heads - 1
    return range(part.first_head // call.shared, last // call.shared + 1)


def _watchers(call: Call, part: Part) -> tuple[torch.Tensor, int, int]:
    """The transposed tables of a member `[rows, words]`, and where the second and third axis stand in a row."""
    from vicinal.ops.triton.kernels.watchers import TURNS, watchers_kernel

    rows = call.tables.shape[0]
    turns = TURNS.value if part.has_turns else 1
    n, m = call.grid, call.key_grid
    words = [(1 + 2 * turns) * length if axis >= 3 - call.rank else 0 for axis, length in enumerate(m)]
    watchers = torch.empty((rows, sum(words)), dtype=torch.int32, device=call.tables.device)
    base = part.o_group + part.number * part.member_words
    records = [0, 0, 0]
    for axis in range(3 - call.rank, 3):
        records[axis] = base
        base += HEADER + 3 * n[axis]
    block = 128
    start(
        watchers_kernel,
        (-(-max(m) // block), call.rank, rows),
        call.tables,
        p_tables=call.tables,
        p_watchers=watchers,
        row_words=call.tables.shape[1],
        watcher_words=sum(words),
        o_0=records[0],
        o_1=records[1],
        o_2=records[2],
        o_watchers_1=words[0],
        o_watchers_2=words[0] + words[1],
        bits=max(n).bit_length() + 1,
        RANK=call.rank,
        HAS_TURNS=part.has_turns,
        BLOCK=block,
        **call.grids("n0 n1 n2 m0 m1 m2"),
    )
    return watchers, words[0], words[0] + words[1]


def _start_key_pass(
    call: Call, part: Part, given: Given, grad_key: torch.Tensor, grad_value: torch.Tensor, adds: bool
) -> None:
    from vicinal.ops.triton.kernels.key_pass import key_pass

    watchers, o_watch_1, o_watch_2 = _watchers(call, part)
    tiles = part.choice[2]
    kv_heads = _kv_heads(call, part)
    programs = call.programs(tiles.key, tiles.phase, call.key_grid, part.member)
    start(
        key_pass,
        (programs * len(kv_heads) * call.samples,),
        call.query,
        p_key=call.key,
        p_value=call.value,
        p_grad_key=grad_key,
        p_grad_value=grad_value,
        p_tables=call.tables,
        p_watchers=watchers,
        programs=programs,
        watcher_words=watchers.shape[1] if call.has_rows else 0,
        o_group=part.o_group,
        member_words=part.member_words,
        o_watch_1=o_watch_1,
        o_watch_2=o_watch_2,
        kv_heads=call.kv_heads,
        first_head=part.first_head,
        group_heads=part.layout.heads,
        first_kv_head=kv_heads.start,
        group_kv_heads=len(kv_heads),
        HAS_TURNS=part.has_turns,
        EARLIER=part.number,
        EARLIER_WRAPS=earlier_wraps(part),
        HAS_BIAS=part.bias is not None,
        HAS_ROWS=call.has_rows or call.is_padded,
        ADDS=adds,
        PRECISION=precision(call.query.dtype),
        **call.bias_of(part),
        **_shared(call, given),
        **call.grids("n0 n1 n2 m0 m1 m2"),
        **strides("key", call.key),
        **strides("value", call.value),
        **part.wraps,
        **tile_names(tiles),
    )


def bias_gradient(call: Call, given: Given) -> torch.Tensor:
    """The gradient of the position bias, entry by entry."""
    from vicinal.ops.triton.kernels.sums import bias_pass

    bias = call.inputs.bias
    assert bias is not None
    grads = []
    for part in call.parts():
        shape = part.layout.bias_shape
        if shape is None:
            continue
        entries, heads = math.prod(shape), part.layout.heads
        splits = _splits(call.tokens, entries * heads)
        partial = torch.empty((splits, heads * entries), dtype=torch.float32, device=bias.device)
        start(
            bias_pass,
            (entries, heads, splits),
            call.query,
            p_key=call.key,
            p_value=call.value,
            p_grad_bias=partial,
            p_tables=call.tables,
            samples=call.samples,
            splits=splits,
            o_group=part.o_group,
            first_head=part.first_head,
            group_heads=heads,
            BLOCK_M=_ROWS,
            HAS_ROWS=call.has_rows,
            **call.bias_of(part),
            **_shared(call, given),
            **call.grids("n0 n1 n2 m1 m2"),
            **strides("key", call.key),
            **strides("value", call.value),
        )
        grads.append(partial.sum(0))
    return torch.cat(grads).to(bias.dtype)


def _splits(tokens: int, others: int) -> int:
    """Shares of the queries: enough programs to fill a device, but none without work. A function of sizes only."""
    return max(1, min(-(-tokens // _ROWS), -(-2048 // max(others, 1)), _MOST_PARTIALS))


def extra_gradients(call: Call, given: Given) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of extra keys and values."""
    from vicinal.ops.triton.kernels.sums import extra_pass

    extra_key, extra_value = call.inputs.extra_key, call.inputs.extra_value
    if extra_key is None or extra_value is None:
        return None, None
    if call.extra_key is None:  # there are none
        return torch.zeros_like(extra_key), torch.zeros_like(extra_value)
    tokens = extra_key.shape[1]
    width = power(max(call.head_dim, call.value_dim))
    is_wide = call.query.dtype == torch.float32  # as compiled, larger blocks spill, in float32 sooner
    block = min(32 if width > 128 or is_wide else 64, 16 if is_wide and width > 64 else 64, power(tokens))
    blocks = -(-tokens // block)
    splits = _splits(call.tokens, blocks * call.samples * call.kv_heads)
    grad_key = torch.empty((splits, *extra_key.shape), dtype=torch.float32, device=extra_key.device)
    grad_value = torch.empty((splits, *extra_value.shape), dtype=torch.float32, device=extra_value.device)
    start(
        extra_pass,
        (call.samples * call.kv_heads, splits, blocks),
        call.query,
        p_extra_key=call.extra_key,
        p_extra_value=call.extra_value,
        p_grad_key=grad_key,
        p_grad_value=grad_value,
        p_tables=call.tables,
        p_extra_lengths=call.extra_lengths,
        extra_tokens=tokens,
        splits=splits,
        samples=call.samples,
        kv_heads=call.kv_heads,
        BLOCK_M=16 if is_wide and width > 64 else 32,
        BLOCK_N=block,
        HAS_LENGTHS=call.extra_lengths is not None,
        HAS_ROWS=call.has_rows,
        PRECISION=precision(call.query.dtype),
        num_warps=4,
        num_stages=1,
        **_shared(call, given),
        **call.grids("n0 n1 n2"),
        **strides("extra_key", call.extra_key),
        **strides("extra_value", call.extra_value),
    )
    return grad_key.sum(0).to(extra_key.dtype), grad_value.sum(0).to(extra_value.dtype)
