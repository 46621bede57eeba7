"""Attention in two steps: scores in window order, and a weighted sum of values.

Three operators do it, each linear in each of its tensors, and each one's gradients are the other two: `scores`
(query against key), `apply` (weights against value) and `spread` (weights against what stands at the queries, summed
at the keys). So everything here can be differentiated any number of times.

Window order: for each query the keys of the first union member, then those of the next; within a member as nested
loops over the axes, each from its first key. Where a query has fewer keys than the widest, scores are -inf and weights
are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch

from vicinal.ops import checks, operator, resolve
from vicinal.ops.packing import Layout
from vicinal.ops.tiled import bilinear
from vicinal.pattern.bounds import AnyPattern

_library = operator.library
_library.define("scores(Tensor query, Tensor key, Tensor tables, int[] layout, float scale) -> Tensor")
_library.define("apply(Tensor weights, Tensor value, Tensor tables, int[] layout) -> Tensor")
_library.define(
    "spread(Tensor weights, Tensor query, Tensor tables, int[] layout, int kv_heads, int[] key_grid) -> Tensor"
)


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: AnyPattern,
    *,
    bias: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    extra_key: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Scores before the softmax, `[batch, *grid, heads, window]`, with scale and bias, -inf where there is no key.

    Scores against `extra_key` `[batch, tokens, kv_heads, head_dim]` follow those of the window.

    >>> query, key, value = torch.randn(3, 1, 8, 8, 2, 16).unbind(0)
    >>> scores = attention_scores(query, key, Near(3))
    >>> scores.shape
    torch.Size([1, 8, 8, 2, 9])
    >>> out = apply_scores(scores.softmax(-1), value, Near(3))
    >>> torch.allclose(out, vicinal.attention(query, key, value, Near(3)), atol=1e-5)
    True
    """
    pattern_key, rank = resolve.key_of(pattern)
    grid, key_grid = checks.check_qkv(query, key, key, rank)
    number = checks.check_scale(scale, query.shape[-1])
    layout = resolve.packed_layout(pattern_key, grid, key_grid, index(query.shape[-2]))
    if extra_key is not None:
        checks.check_tokens("extra_key", extra_key, key, query)
    vector = None
    if bias is not None:
        shapes, heads = resolve.bias_shapes(layout)
        vector = checks.flatten_bias(bias, shapes, heads, query)
    tables = resolve.tables(pattern_key, grid, key_grid, query)
    scores = torch.ops.vicinal.scores(query, key, tables, layout, number)
    if vector is not None:
        places = resolve.bias_index(pattern_key, grid, key_grid, index(query.shape[-2]), query)
        scores = scores + vector.to(scores.dtype)[places]
    if extra_key is not None:
        shared = query.shape[-2] // key.shape[-2]
        split_query = query.flatten(1, -3).unflatten(2, (-1, shared))
        extra = torch.einsum("bnghd,btgd->bnght", split_query * number, extra_key)
        scores = torch.cat([scores, extra.flatten(2, 3).unflatten(1, grid)], -1)
    return scores


def apply_scores(
    weights: torch.Tensor, value: torch.Tensor, pattern: AnyPattern, *, extra_value: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the values of each query's keys with the given weights: `[batch, *grid, heads, value_dim]`.

    `weights` are `[batch, *grid, heads, window (+ tokens)]`, in the order of `attention_scores`; any weights, not
    just those of a softmax.

    >>> weights, value = torch.ones(1, 5, 1, 3), torch.arange(5.0).reshape(1, 5, 1, 1)
    >>> apply_scores(weights, value, Near(3)).flatten().tolist()
    [3.0, 3.0, 6.0, 9.0, 9.0]
    """
    pattern_key, rank = resolve.key_of(pattern)
    grid, key_grid, tokens = checks.check_weights(weights, value, extra_value, rank)
    layout = resolve.packed_layout(pattern_key, grid, key_grid, index(weights.shape[-2]))
    window = resolve.window(layout)
    if weights.shape[-1] != window + tokens:
        raise ValueError(
            f"weights must have {window} entries in the last axis for this pattern"
            f"{f' and {tokens} for extra_value' if tokens else ''}, got {weights.shape[-1]}"
        )
    tables = resolve.tables(pattern_key, grid, key_grid, weights)
    out: torch.Tensor = torch.ops.vicinal.apply(weights[..., :window], value, tables, layout)
    if extra_value is not None:
        shared = weights.shape[-2] // value.shape[-2]
        own = weights[..., window:].flatten(1, -3).unflatten(2, (-1, shared))
        out = out + torch.einsum("bnght,btgd->bnghd", own, extra_value).flatten(2, 3).unflatten(1, grid)
    return out


def _scores_fake(
    query: torch.Tensor, key: torch.Tensor, tables: torch.Tensor, layout: Sequence[int], scale: float
) -> torch.Tensor:
    del key, tables, scale
    return query.new_empty(*query.shape[:-1], Layout.unpack(layout).window)


def _apply_fake(
    weights: torch.Tensor, value: torch.Tensor, tables: torch.Tensor, layout: Sequence[int]
) -> torch.Tensor:
    del tables, layout
    return weights.new_empty(*weights.shape[:-1], value.shape[-1])


def _spread_fake(
    weights: torch.Tensor, query: torch.Tensor, tables: torch.Tensor, layout: Sequence[int], kv_heads: int,
    key_grid: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    del weights, tables, layout
    return query.new_empty(query.shape[0], *key_grid, kv_heads, query.shape[-1])


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    query, key, tables, ctx.layout, ctx.scale = inputs
    ctx.save_for_backward(query, key, tables)


def _differentiate_scores(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    query, key, tables = ctx.saved_tensors
    ops = torch.ops.vicinal
    grad = grad * ctx.scale
    grad_query = ops.apply(grad, key, tables, ctx.layout) if ctx.needs_input_grad[0] else None
    grad_key = None
    if ctx.needs_input_grad[1]:
        grad_key = ops.spread(grad, query, tables, ctx.layout, key.shape[-2], key.shape[1:-2])
    return grad_query, grad_key, None, None, None


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    weights, value, tables, ctx.layout = inputs
    ctx.save_for_backward(weights, value, tables)


def _differentiate_apply(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    weights, value, tables = ctx.saved_tensors
    ops = torch.ops.vicinal
    grad_weights = grad_value = None
    if ctx.needs_input_grad[0]:
        grad_weights = _cut_window(ops.scores(grad, value, tables, ctx.layout, 1.0))
    if ctx.needs_input_grad[1]:
        grad_value = ops.spread(weights, grad, tables, ctx.layout, value.shape[-2], value.shape[1:-2])
    return grad_weights, grad_value, None, None


def _save_spread(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    weights, query, tables, ctx.layout, _, _ = inputs
    ctx.save_for_backward(weights, query, tables)


def _differentiate_spread(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    weights, query, tables = ctx.saved_tensors
    ops = torch.ops.vicinal
    grad_weights = grad_query = None
    if ctx.needs_input_grad[0]:
        grad_weights = _cut_window(ops.scores(query, grad, tables, ctx.layout, 1.0))
    if ctx.needs_input_grad[1]:
        grad_query = ops.apply(weights, grad, tables, ctx.layout)
    return grad_weights, grad_query, None, None, None, None


def _cut_window(scores: torch.Tensor) -> torch.Tensor:
    """Scores as a gradient of weights: 0, not -inf, where there is no key."""
    return torch.where(scores == -math.inf, 0.0, scores)


def _below_autocast(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*arguments: Any) -> torch.Tensor:
        with operator.below_autocast():
            return kernel(*arguments)

    return run


for _name, _run, _fake, _backward, _setup in (
    ("scores", bilinear.scores, _scores_fake, _differentiate_scores, _save_scores),
    ("apply", bilinear.apply, _apply_fake, _differentiate_apply, _save_apply),
    ("spread", bilinear.spread, _spread_fake, _differentiate_spread, _save_spread),
):
    _library.impl(_name, _below_autocast(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"vicinal::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"vicinal::{_name}", _backward, setup_context=_setup, lib=_library)
