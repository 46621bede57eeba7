"""Packing a call into the record of csrc/vicinal.h.

One `struct` for each combination of rank and tensors that are there, absent ones being zero bytes.
"""

from __future__ import annotations

import functools
import struct

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.cpu import library
from vicinal.ops.packing import Layout

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
GROUP = struct.Struct("8q")
"""One `vicinal_description`."""

GROUP_FIELDS = ("strategy", "isa", "lanes", "rows_per_vector", "tiles", "pairs", "computed", "blocks")

Tensors = tuple[torch.Tensor | None, ...]
"""In the order of the record: query, key, value, bias, extra_key, extra_value, extra_lengths, out, lse; for the
backward also grad_out, grad_lse, and the gradients of the first six."""

PLACES = struct.Struct("=13q")
"""`vicinal_places`: threads, query, key, value, bias, out, lse, grad_out, grad_lse, the gradients of the first four."""

PLACES_FORWARD = struct.Struct("=7q48x")
"""The same where no gradients are taken."""

_STRIDES = 6
_NUM_TENSORS = 17


@functools.lru_cache(maxsize=1024)
def _struct(ranks: tuple[int, ...]) -> struct.Struct:
    """The record where the tensors have so many axes; -1 where there is none."""
    parts = ["=24qd"]
    for rank in ranks:
        parts.append(f"{1 + rank}q{8 * (_STRIDES - rank)}x" if rank >= 0 else f"{8 * (1 + _STRIDES)}x")
    parts.append(f"{8 * (1 + _STRIDES) * (_NUM_TENSORS - len(ranks))}x")
    return struct.Struct("".join(parts))


def wide(query: torch.Tensor) -> torch.dtype:
    """The type of log-sum-exps and biases."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def of(
    inputs: Inputs, bias: torch.Tensor | None, extra_lengths: torch.Tensor | None, *more: torch.Tensor | None
) -> bytes:
    """The record of a call; `bias` and `extra_lengths` as the kernels take them, `more` from the output on."""
    query, tables, extra_key = inputs.query, inputs.tables, inputs.extra_key
    value = inputs.value
    extra_tokens = 0 if extra_key is None else extra_key.shape[1]
    rows, words = tables.shape
    return pack(
        query.shape,
        inputs.key.shape,
        value.shape[-1],
        extra_tokens,
        query.dtype,
        (tables.data_ptr(), rows, words),
        inputs.layout,
        0 if bias is None else bias.numel(),
        inputs.scale,
        (query, inputs.key, value, bias, extra_key, inputs.extra_value, extra_lengths, *more),
    )


_PADDING = {1: (0, 0), 2: (0,), 3: ()}


def pack(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_dim: int,
    extra_tokens: int,
    dtype: torch.dtype,
    tables: tuple[int, int, int],
    layout: Layout,
    bias_words: int,
    scale: float,
    tensors: Tensors,
) -> bytes:
    """The record of a call. `tables` is their address, rows and words; `tensors` may be empty for a description."""
    loaded = library.load()
    rank = len(query_shape) - 3
    padding = _PADDING[rank]
    values = [
        library.ABI,
        DTYPES[dtype],
        rank,
        query_shape[0],
        query_shape[-2],
        key_shape[-2],
        query_shape[-1],
        value_dim,
        extra_tokens,
        *query_shape[1:-2],
        *padding,
        *key_shape[1:-2],
        *padding,
        *tables,
        *layout.address,
        bias_words,
        library.Process.num_threads(),
        loaded.strategy,
        loaded.isa,
        scale,
    ]
    ranks = []
    for tensor in tensors:
        if tensor is None:
            ranks.append(-1)
        else:
            strides = tensor.stride()
            ranks.append(len(strides))
            values.append(tensor.data_ptr())
            values += strides
    return _struct(tuple(ranks)).pack(*values)
