"""The oracle: attention written from its definition, dense and in float64.

It writes the mask out key by key from the tables, masks the full matrix of scores, and leaves every gradient to
autograd. It shares no tiling and no interval arithmetic with the kernels, costs queries times keys, and is meant to
be read and to be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vicinal.ops.backend import Backend, Capability, Gradients, Inputs, Problem, gradients_through, register
from vicinal.ops.packing import Layout, unpack_row
from vicinal.pattern.bounds import Group
from vicinal.pattern.counting import group_mask


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, differentiable any number of times."""
    rows = inputs.tables.cpu().numpy()
    lse_dtype = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    outputs, lses = [], []
    for sample in range(inputs.query.shape[0]):
        out, lse = _sample(inputs, rows[sample % len(rows)], sample)
        outputs.append(out.to(inputs.query.dtype))
        lses.append(lse.to(lse_dtype))
    if not outputs:
        shape = (*inputs.query.shape[:-1], inputs.value.shape[-1])
        empty = inputs.query.new_zeros(shape) + 0 * (inputs.query.sum() + inputs.key.sum() + inputs.value.sum())
        return empty, empty.sum(-1).to(lse_dtype)
    return torch.stack(outputs), torch.stack(lses)


def _sample(inputs: Inputs, row: Any, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample: `[*grid, heads, value_dim]` and `[*grid, heads]`, zero and -inf outside its own grid."""
    groups = unpack_row(row, inputs.layout, inputs.grid)
    own_grid = tuple(slice(len(table)) for table in groups[0][0])
    own_keys = tuple(slice(table.length) for table in groups[0][0])
    device = inputs.query.device
    query = inputs.query[sample][own_grid].flatten(0, -3).double()
    key = inputs.key[sample][own_keys].flatten(0, -3).double()
    value = inputs.value[sample][own_keys].flatten(0, -3).double()
    num_keys, shared = len(key), query.shape[1] // key.shape[1]
    if inputs.extra_key is not None and inputs.extra_value is not None:
        length = inputs.extra_key.shape[1] if inputs.extra_lengths is None else int(inputs.extra_lengths[sample])
        key = torch.cat([key, inputs.extra_key[sample, :length].double()])
        value = torch.cat([value, inputs.extra_value[sample, :length].double()])
    bias_parts = [] if inputs.bias is None else inputs.bias.split(list(inputs.layout.bias_sizes))
    heads: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, members in enumerate(groups):
        seen = torch.ones(len(query), len(key), dtype=torch.bool, device=device)
        seen[:, :num_keys] = torch.from_numpy(group_mask(Group(members))).to(device)
        bias = None
        if bias_parts:
            shape = (inputs.layout.groups[number].heads, *(inputs.layout.groups[number].bias_shape or ()))
            bias = bias_parts[number].reshape(shape).double().flatten(1)[:, _bias_index(members[0]).to(device)]
        for place in range(inputs.layout.groups[number].heads):
            head = len(heads)
            scores = inputs.scale * (query[:, head] @ key[:, head // shared].T)
            if bias is not None:
                scores = torch.cat([scores[:, :num_keys] + bias[place], scores[:, num_keys:]], 1)
            heads.append(_softmax(scores, seen, value[:, head // shared]))
    sizes = [len(table) for table in groups[0][0]]
    out = torch.stack([head[0] for head in heads], 1).unflatten(0, sizes)
    lse = torch.stack([head[1] for head in heads], 1).unflatten(0, sizes)
    missing = [whole - own for whole, own in zip(inputs.grid, sizes, strict=True)]
    return _padded(out, missing, 0.0), _padded(lse.unsqueeze(-1), missing, -torch.inf).squeeze(-1)


def _padded(part: torch.Tensor, missing: Sequence[int], filling: float) -> torch.Tensor:
    """`[*own grid, heads, dim]` with so many tokens more at the end of each axis of the grid."""
    pads = [0, 0, 0, 0]
    for amount in reversed(missing):
        pads += [0, amount]
    return torch.nn.functional.pad(part, pads, value=filling)


def _softmax(scores: torch.Tensor, seen: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the seen keys and its mean of the values; a query that sees none gives 0 and -inf."""
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.detach().amax(1, keepdim=True) if scores.shape[1] else scores.new_zeros(len(scores), 1)
    top = torch.where(top.isinf(), 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(1, keepdim=True)
    blind = total == 0
    lse = torch.where(blind, -torch.inf, top + torch.log(torch.where(blind, 1.0, total)))
    return weights @ value / torch.where(blind, 1.0, total), lse[:, 0]


def _bias_index(member: Sequence[Any]) -> torch.Tensor:
    """Where in a flattened bias table each (query, key) pair reads: int64 `[queries, keys]`, 0 for unseen pairs."""
    index = np.zeros((1, 1), dtype=np.int64)
    for table in member:
        axis = np.zeros((len(table), table.length), dtype=np.int64)
        for query in range(len(table)):
            key = table.start[query] + table.step * np.arange(table.count[query])
            axis[query, key % table.length] = (key - table.center[query]) // table.step + table.bias_length // 2
        queries, keys = index.shape[0] * axis.shape[0], index.shape[1] * axis.shape[1]
        index = (index[:, None, :, None] * table.bias_length + axis[None, :, None, :]).reshape(queries, keys)
    return torch.from_numpy(index)


def backward(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients by autograd through `forward`."""
    del out, lse
    return gradients_through(forward, inputs, grad_out, grad_lse, needs, create_graph=False)


def _describe(problem: Problem, bounds: Any, layout: Layout) -> dict[str, Any]:
    del bounds, layout
    return {"method": "dense mask in float64", "queries": problem.grid, "keys": problem.key_grid}


register(
    Backend(
        name="reference",
        capability=Capability(max_tokens=16384),
        forward=forward,
        backward=backward,
        differentiable=forward,
        describe=_describe,
    )
)
