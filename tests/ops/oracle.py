"""The tests' own attention: dense, in plain torch, straight from masks and from formulas for relative positions.

It is written a second time, beside the library's `reference`, so that a misreading shared by that one and the
kernels would show. In float64 it is the truth; in the precision under test it is what "eager" means in the
tolerance; and with absolute values in place of the real ones it says how large the summed terms are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vicinal.pattern import AxisKind, Grid, Heads, Near, Same, Union, bounds, mask

from .problems import Problem, Tensors

Core = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(query, key, value `[heads, tokens, dim]`, added and seen `[heads, queries, keys]`, scale) to output and lse."""


def eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention in the precision of its inputs; like ours, its lse is never narrower than float32."""
    blind = ~seen.any(-1, keepdim=True)
    scores = (scale * (query @ key.transpose(-1, -2)) + added).masked_fill(~seen & ~blind, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen, 0.0)
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return weights @ value, lse.masked_fill(blind[..., 0], -torch.inf)


class Magnitudes(torch.autograd.Function):
    """The sizes of the terms that attention and its gradients add up, in place of the sums.

    A rounding error is a few eps of what was added, not of the result: where everything cancels the result is 0.
    The relative error of a weight is the absolute error of its score, that of their sum the absolute error of the lse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        added: torch.Tensor,
        seen: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        score = abs(scale) * (query.abs() @ key.abs().transpose(-1, -2)) + added.abs()
        _, lse = eager(query, key, value, added, seen, scale)
        scores = (scale * (query @ key.transpose(-1, -2)) + added).masked_fill(~seen, -torch.inf)
        weights = torch.where(seen, (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp(), 0.0)
        ctx.save_for_backward(query, key, value, weights * (1 + score))
        ctx.scale = abs(scale)
        lse_size = (weights * (1 + score)).sum(-1) + lse.abs().masked_fill(lse.isinf(), 0.0)
        return (weights * (1 + score)) @ value.abs(), lse_size

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, weights = (tensor.abs() for tensor in ctx.saved_tensors)
        grad_out, grad_lse = (grad.abs() for grad in grads)
        each = grad_out @ value.transpose(-1, -2)
        scores = weights * (each + (weights * each).sum(-1, keepdim=True) + grad_lse.unsqueeze(-1))
        grad_value = weights.transpose(-1, -2) @ grad_out
        return ctx.scale * scores @ key, ctx.scale * scores.transpose(-1, -2) @ query, grad_value, scores, None, None


def dense(problem: Problem, tensors: Tensors, core: Core = eager) -> Tensors:
    """The outputs of the problem: `out` and `lse`, and those of the extra queries where there are any."""
    samples = [_sample(problem, tensors, number, core) for number in range(problem.batch)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _sample(problem: Problem, tensors: Tensors, number: int, core: Core) -> Tensors:
    own = None if problem.grids is None else problem.grids[number]
    inside = tuple(map(slice, own or problem.grid))
    inside_keys = tuple(map(slice, own or problem.keys))
    query = _heads_first(tensors["query"][number][inside])
    key, value = (_heads_first(tensors[name][number][inside_keys]) for name in ("key", "value"))
    num_keys, shared = key.shape[1], problem.heads // key.shape[0]
    if "extra_key" in tensors:
        tokens = problem.extra_tokens if problem.extra_lengths is None else problem.extra_lengths[number]
        key = torch.cat([key, _heads_first(tensors["extra_key"][number, :tokens])], 1)
        value = torch.cat([value, _heads_first(tensors["extra_value"][number, :tokens])], 1)
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    grid, key_grid = own or problem.grid, own or problem.keys
    seen = torch.ones(problem.heads, query.shape[1], key.shape[1], dtype=torch.bool)
    seen[:, :, :num_keys] = head_masks(problem, grid, key_grid)
    added = torch.zeros(seen.shape, dtype=query.dtype)
    if problem.has_bias:
        added = torch.cat([_bias(problem, tensors, grid, key_grid), added[:, :, num_keys:]], 2)
    out, lse = core(query, key, value, added, seen, problem.number)
    found = {
        "out": _padded(out.transpose(0, 1), problem.grid, inside, 0.0),
        "lse": _padded(lse.transpose(0, 1), problem.grid, inside, -torch.inf if core is eager else 0.0),
    }
    if "extra_query" in tensors:
        query = _heads_first(tensors["extra_query"][number])
        sees_all = torch.ones(problem.heads, query.shape[1], key.shape[1], dtype=torch.bool)
        added = torch.zeros(sees_all.shape, dtype=query.dtype)
        out, lse = core(query, key, value, added, sees_all, problem.number)
        found |= {"extra_out": out.transpose(0, 1), "extra_lse": lse.transpose(0, 1)}
    return found


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[*grid, heads, dim]` as `[heads, tokens, dim]`."""
    return tensor.flatten(0, -3).transpose(0, 1)


def _padded(rows: torch.Tensor, grid: tuple[int, ...], inside: tuple[slice, ...], filling: float) -> torch.Tensor:
    """`[tokens, ...]` at its place in a grid that is larger."""
    whole = rows.new_full((*grid, *rows.shape[1:]), filling)
    whole[inside] = rows.reshape(whole[inside].shape)
    return whole


def head_masks(problem: Problem, grid: tuple[int, ...], key_grid: tuple[int, ...]) -> torch.Tensor:
    """Who sees whom, for every head: bool `[heads, queries, keys]`."""
    table = bounds(problem.pattern, grid, key_grid)
    groups = mask(table).reshape(len(table.groups), int(np.prod(grid)), int(np.prod(key_grid)))
    return groups.repeat_interleave(torch.tensor(table.split(problem.heads)), 0)


def _bias(problem: Problem, tensors: Tensors, grid: tuple[int, ...], key_grid: tuple[int, ...]) -> torch.Tensor:
    """The bias of every (query, key) pair: `[heads, queries, keys]`; pairs that nobody sees may hold anything."""
    pattern = problem.pattern
    products = pattern.groups if isinstance(pattern, Heads) else (pattern,)
    parts = []
    for number, product in enumerate(products):
        assert not isinstance(product, Union)
        table = tensors["bias" if len(products) == 1 else f"bias{number}"]
        kinds = product if isinstance(product, tuple) else (product,) * len(grid)
        index = torch.zeros(1, 1, dtype=torch.int64)
        for axis, kind in enumerate(kinds):
            length = table.shape[1 + axis]
            place = (relative_position(kind, grid[axis], key_grid[axis]) + length // 2).clamp(0, length - 1)
            queries, keys = index.shape[0] * place.shape[0], index.shape[1] * place.shape[1]
            index = (index[:, None, :, None] * length + place[None, :, None, :]).reshape(queries, keys)
        parts.append(table.flatten(1)[:, index])
    return torch.cat(parts)


def relative_position(kind: AxisKind, num_queries: int, num_keys: int) -> torch.Tensor:
    """How many steps a key lies behind the query's center, along one axis: int64 `[queries, keys]`."""
    query, key = torch.arange(num_queries), torch.arange(num_keys)
    center = query if num_queries == num_keys else (2 * query + 1) * num_keys // (2 * num_queries)
    distance = key - center[:, None]
    if isinstance(kind, Same):
        return distance * 0
    if isinstance(kind, Grid):
        return distance // (num_keys // kind.size)
    if isinstance(kind, Near):
        if kind.wraps:
            farthest = kind.dilation * (min(kind.kernel_size, num_keys // kind.dilation) // 2)
            distance = (distance + farthest) % num_keys - farthest
        return distance // kind.dilation
    return distance
