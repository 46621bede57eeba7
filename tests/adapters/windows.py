"""NATTEN's rule written out query by query, apart from the package: who is in a window, and dense attention by it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

AXES = ("kernel_size", "stride", "dilation", "is_causal")


def keys(query: int, length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> list[int]:
    """What a query sees along one axis, first to last; defined where kernel_size * dilation <= length."""
    group, place = query % dilation, query // dilation
    members = len(range(group, length, dilation))
    if is_causal:
        leader = min((place // stride) * stride + stride - 1, members - 1)
        first, end = max(leader - kernel_size + 1, 0), place + 1
    else:
        leader = min((place // stride) * stride + stride // 2, members - 1)
        first = min(max(leader - kernel_size // 2, 0), members - kernel_size)
        end = first + kernel_size
    return [group + dilation * at for at in range(first, end)]


def axes_of(rank: int, window: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(kernel_size, stride, dilation, is_causal) of each axis."""
    full = {"stride": 1, "dilation": 1, "is_causal": False, **window}
    spread = [full[name] if isinstance(full[name], tuple | list) else [full[name]] * rank for name in AXES]
    return list(zip(*spread, strict=True))


def neighbors(grid: tuple[int, ...], window: dict[str, Any]) -> list[list[int]]:
    """The tokens in each token's window, in row-major order."""
    axes = axes_of(len(grid), window)
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    found = []
    for place in itertools.product(*map(range, grid)):
        seen = [keys(at, length, *axis) for at, length, axis in zip(place, grid, axes, strict=True)]
        found.append([sum(map(lambda a, b: a * b, key, strides)) for key in itertools.product(*seen)])
    return found


def bias_of(rpb: torch.Tensor, grid: tuple[int, ...], window: dict[str, Any]) -> torch.Tensor:
    """What a bias table says about every pair of tokens, `[heads, tokens, tokens]`: (key - query) / dilation + k - 1.

    Pairs outside the window hold whatever is nearest in the table.
    """
    axes = axes_of(len(grid), window)
    places = torch.tensor(list(itertools.product(*map(range, grid))))
    index: list[torch.Tensor] = []
    for axis, (kernel_size, _, dilation, _) in enumerate(axes):
        distance = (places[None, :, axis] - places[:, None, axis]).div(dilation, rounding_mode="floor")
        index.append((distance + kernel_size - 1).clamp(0, 2 * kernel_size - 2))
    return rpb[(slice(None), *index)]


def dense_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: tuple[int, ...],
    window: dict[str, Any],
    rpb: torch.Tensor | None = None,
) -> torch.Tensor:
    """All scores `[batch, heads, tokens, tokens]` of flat `[batch, heads, tokens, dim]`, -inf outside the windows."""
    scores = query @ key.transpose(-1, -2)
    if rpb is not None:
        scores = scores + bias_of(rpb, grid, window)
    seen = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    for token, inside in enumerate(neighbors(grid, window)):
        seen[token, inside] = True
    return scores.masked_fill(~seen, -math.inf)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: dict[str, Any],
    rpb: torch.Tensor | None = None,
    extra: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, heads last: `[batch, *grid, heads, dim]` in, `extra` `[batch, tokens, kv_heads, dim]`."""
    grid, shared = tuple(query.shape[1:-2]), query.shape[-2] // key.shape[-2]

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.flatten(1, -3).transpose(1, 2)
        return tensor.repeat_interleave(query.shape[-2] // tensor.shape[1], 1)

    assert shared * key.shape[-2] == query.shape[-2]
    number = query.shape[-1] ** -0.5 if scale is None else scale
    scores, values = dense_scores(flat(query) * number, flat(key), grid, window, rpb), flat(value)
    if extra is not None:
        scores = torch.cat([scores, flat(query) * number @ flat(extra[0]).transpose(-1, -2)], -1)
        values = torch.cat([values, flat(extra[1])], 2)
    out, lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)
