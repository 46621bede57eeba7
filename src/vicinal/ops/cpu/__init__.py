"""The CPU back end: C++ kernels behind a plain C interface (csrc/), called on the tensors as they lie in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from vicinal.ops.backend import Backend, Capability, Gradients, Inputs, Problem, register
from vicinal.ops.cpu import library, memory, record
from vicinal.ops.cpu.prepared import prepare
from vicinal.ops.packing import Layout, pack_tables
from vicinal.ops.side_by_side import empty_beside
from vicinal.ops.tiled.forward import differentiable


def _bias(inputs: Inputs) -> torch.Tensor | None:
    return None if inputs.bias is None else inputs.bias.to(record.wide(inputs.query)).contiguous()


def _lengths(inputs: Inputs) -> torch.Tensor | None:
    return None if inputs.extra_lengths is None else inputs.extra_lengths.to(torch.int64).contiguous()


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    query = inputs.query
    shape = query.shape
    out = memory.empty((*shape[:-1], inputs.value.shape[-1]), query.dtype)
    lse = memory.empty(shape[:-1], record.wide(query))
    bias, extra_lengths = _bias(inputs), _lengths(inputs)  # held here: the record has only their addresses
    library.call(library.load().attend, record.of(inputs, bias, extra_lengths, out, lse))
    return out, lse


def _check_saved(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor | None) -> None:
    """Sizes and types fit together: hooks may bring back others than were saved, and kernels read by the query's."""
    query, key, value = inputs.query, inputs.key, inputs.value
    rows, results = query.shape[:-1], (*query.shape[:-1], value.shape[-1])
    tokens = (key.shape[0], *key.shape[-2:]), (value.shape[0], *value.shape[-2:])
    extra = [
        (tensor is None or (tensor.shape[0], *tensor.shape[2:]) == size)
        and (tensor is None or tensor.dtype == query.dtype)
        for tensor, size in zip((inputs.extra_key, inputs.extra_value), tokens, strict=True)
    ]
    fits = {
        "key": (key.shape[0], key.shape[-1], key.dtype) == (query.shape[0], query.shape[-1], query.dtype),
        "value": value.shape[:-1] == key.shape[:-1] and value.dtype == query.dtype,
        "extra_key": extra[0],
        "extra_value": extra[1],
        "out": out.shape == results and out.dtype == query.dtype,
        "lse": lse.shape == rows and lse.dtype == record.wide(query),
        "the gradient of out": grad_out is None or (grad_out.shape == results and grad_out.dtype == query.dtype),
    }
    for name, does in fits.items():
        if not does:
            raise RuntimeError(
                f"{name} no longer has the size and type that go with query, {tuple(query.shape)} in {query.dtype}: "
                "a saved tensor was exchanged between forward and backward"
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
    _check_saved(inputs, out, lse, grad_out)
    bias, extra_lengths = _bias(inputs), _lengths(inputs)
    given = (inputs.query, inputs.key, inputs.value, bias, inputs.extra_key, inputs.extra_value)
    wanted = [tensor for tensor, need in zip(given[:3], needs, strict=False) if need]
    beside = iter(empty_beside(wanted, memory.empty) if wanted else ())
    grads = [next(beside) if need else None for need in needs[:3]]
    grads += [
        torch.empty(tensor.shape, dtype=tensor.dtype) if need and tensor is not None else None
        for tensor, need in zip(given[3:], needs[3:], strict=True)
    ]
    packed = record.of(inputs, bias, extra_lengths, out, lse, grad_out, grad_lse, *grads)
    library.call(library.load().attend_backward, packed)
    if grads[3] is not None and inputs.bias is not None:
        grads[3] = grads[3].to(inputs.bias.dtype)
    return tuple(grads)


def _describe(problem: Problem, bounds: Any, layout: Layout) -> dict[str, Any]:
    tables = pack_tables(bounds)
    packed = record.pack(
        (1, *problem.grid, problem.heads, problem.head_dim),
        (1, *problem.key_grid, problem.kv_heads, problem.head_dim),
        problem.value_dim,
        0,
        problem.dtype,
        (tables.ctypes.data, 1, tables.size),
        layout,
        sum(layout.bias_sizes) if problem.has_bias else 0,
        1.0,
        (),
    )
    room = ctypes.create_string_buffer(record.GROUP.size * len(layout.groups))
    library.call(library.load().describe, packed, room, len(layout.groups))
    groups = [dict(zip(record.GROUP_FIELDS, fields, strict=True)) for fields in record.GROUP.iter_unpack(room)]
    for group in groups:
        computed = group.pop("computed")
        group["waste"] = round(computed / max(group["pairs"], 1), 3)
        group["strategy"] = library.STRATEGIES[group["strategy"]]
        group["isa"] = library.ISAS[group["isa"]]
    return {"method": "compiled kernels, one strategy for each head group", "groups": groups}


register(
    Backend(
        name="cpu",
        # meta tensors are on no device; what is explained for them is what a CPU would do
        capability=Capability(devices=("cpu", "meta"), dtypes=tuple(record.DTYPES)),
        forward=forward,
        backward=backward,
        differentiable=differentiable,
        describe=_describe,
        reason_missing=library.reason_missing,
        prepare=prepare,
    )
)
