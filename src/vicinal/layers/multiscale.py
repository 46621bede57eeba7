"""Multi-scale deformable attention: every query reads a few places of every map, places and weights both learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

Grids = Sequence[tuple[int, int]]
"""Rows and columns of each map."""


class MultiScaleDeformableAttention(nn.Module):
    """Each query looks at `num_points` places of each map around its own, per head.

    The maps' tokens stand one after the other on the second axis, map by map, row by row.

    >>> layer = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2)
    >>> grids = [(2, 3), (4, 6)]
    >>> tokens = torch.randn(1, 30, 16)
    >>> layer(tokens, tokens, centers(grids), grids).shape
    torch.Size([1, 30, 16])
    """

    def __init__(self, dim: int, *, num_heads: int = 8, num_levels: int = 3, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.reset()

    def reset(self) -> None:
        """The published start: each head looks its own way, each point one pixel further, all equally weighted."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        ways = torch.stack([angles.cos(), angles.sin()], -1)
        ways = ways / ways.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        starts = ways[:, None, None] * steps[:, None]
        with torch.no_grad():
            nn.init.zeros_(self.offsets.weight)
            self.offsets.bias.copy_(starts.expand(-1, self.num_levels, -1, -1).flatten())
            for layer in (self.weights, self.value, self.proj):
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(self.weights.weight)
            nn.init.xavier_uniform_(self.value.weight)
            nn.init.xavier_uniform_(self.proj.weight)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Queries `[batch, queries, dim]`, tokens `[batch, tokens, dim]`, places `[queries, 2]` to queries' shape.

        Places are (column, row) as parts of the whole map, as `centers` gives them; offsets count a map's own pixels.
        """
        if len(grids) != self.num_levels:
            raise ValueError(f"grids must have {self.num_levels} maps, one per level, got {len(grids)}")
        shape = (self.num_heads, self.num_levels, self.num_points)
        # places need more digits than half precision has
        precise = torch.promote_types(queries.dtype, torch.float32)
        offsets = self.offsets(queries).unflatten(-1, (*shape, 2)).to(precise)
        weights = self.weights(queries).unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        sizes = torch.tensor([(columns, rows) for rows, columns in grids], dtype=precise, device=queries.device)
        where = places.to(precise)[:, None, None, None] + offsets / sizes[:, None]
        value = self.value(tokens).unflatten(-1, (self.num_heads, -1))
        result: torch.Tensor = self.proj(sum_of_samples(value, grids, where, weights))
        return result


def centers(grids: Grids, device: torch.device | None = None) -> torch.Tensor:
    """The middle of every pixel of every map, (column, row) as parts of the whole: `[tokens, 2]`.

    >>> centers([(1, 2)])
    tensor([[0.2500, 0.5000],
            [0.7500, 0.5000]])
    """
    parts = []
    for rows, columns in grids:
        down = (torch.arange(rows, device=device) + 0.5) / rows
        across = (torch.arange(columns, device=device) + 0.5) / columns
        parts.append(torch.stack([across.expand(rows, -1), down[:, None].expand(-1, columns)], -1).flatten(0, 1))
    return torch.cat(parts)


def sum_of_samples(value: torch.Tensor, grids: Grids, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What places hold, interpolated and summed with weights: `[batch, queries, heads * head_dim]`.

    Outside of a map is zero. The same as `grid_sample` with `align_corners=False` and zero padding, level by level.

    >>> value = torch.arange(6.0).reshape(1, 6, 1, 1)
    >>> sum_of_samples(value, [(2, 3)], torch.tensor([0.5, 0.5]).expand(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))
    tensor([[[2.5000]]])

    Args:
        value: `[batch, tokens, heads, head_dim]`.
        grids: rows and columns of each map.
        places: `[batch, queries, heads, levels, points, 2]`, (column, row) as parts of the map.
        weights: `[batch, queries, heads, levels, points]`.
    """
    on_cpu = value.device.type == "cpu" and not torch.compiler.is_compiling()
    return (_by_rows if on_cpu else _by_level)(value, grids, places, weights)


def _by_rows(value: torch.Tensor, grids: Grids, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All levels at once: a weighted sum of rows of one table, which never holds the samples themselves."""
    batch, queries, heads = places.shape[:3]
    table, starts = _bordered(value, grids)
    sizes = torch.tensor([(columns, rows) for rows, columns in grids], dtype=places.dtype, device=places.device)
    # from half a pixel outside of the border on there is nothing
    positions = torch.minimum((places * sizes[:, None] + 0.5).clamp(min=0), (sizes + 1)[:, None])
    lower = positions.detach().floor().nan_to_num_(0.0)  # a place that is no number gives no number, and no crash
    across, down = (positions - lower).unbind(-1)
    widths = (sizes[:, :1] + 3).to(torch.int32)
    column, row = lower.to(torch.int32).unbind(-1)
    image = torch.arange(batch, dtype=torch.int32, device=places.device)[:, None, None, None, None]
    first = row * widths + column + starts[:, None] + image * table.shape[1]
    steps = torch.stack([torch.zeros_like(widths), torch.ones_like(widths), widths, widths + 1], -1)
    head = torch.arange(heads, dtype=torch.int32, device=places.device)[:, None, None]
    lower_row = weights * (1 - down)
    upper_row = weights * down
    corners = (lower_row * (1 - across), lower_row * across, upper_row * (1 - across), upper_row * across)
    out: torch.Tensor = _SumOfCorners.apply(
        table.reshape(-1, value.shape[-1]),
        torch.stack(corners, -1).flatten(0, 2).to(table.dtype),
        (first * heads + head).flatten(0, 2),
        (steps * heads).squeeze(1),
        [table.shape[1] * heads, *(int(start) * heads for start in starts)],
    )
    return out.view(batch, queries, -1)


class _SumOfCorners(torch.autograd.Function):
    """Rows of a table, weighted and summed; each place reads four, at fixed steps from its first.

    The table is `[rows, dim]`, the weights `[sums, levels, points, 4]`, the firsts `[sums, levels, points]`, the steps
    `[levels, 4]`; `layout` has the rows of one image and the first of each level in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        table: torch.Tensor,
        weights: torch.Tensor,
        first: torch.Tensor,
        steps: torch.Tensor,
        layout: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(table, weights, first, steps)
        ctx.layout = layout
        return _weighted(table, weights, first, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        table, weights, first, steps = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        for_table = for_weights = None
        if ctx.needs_input_grad[0]:
            for_table = _spread(gradient, len(table), weights, first, steps, ctx.layout)
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                again = weights.detach().requires_grad_()
                (for_weights,) = torch.autograd.grad(_weighted(table, again, first, steps), again, gradient)
        return for_table, for_weights, None, None, None


def _weighted(table: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    rows = (first[..., None] + steps[:, None]).flatten(1)
    return nn.functional.embedding_bag(rows, table.detach(), per_sample_weights=weights.flatten(1), mode="sum")


def _spread(
    gradient: torch.Tensor,
    length: int,
    weights: torch.Tensor,
    first: torch.Tensor,
    steps: torch.Tensor,
    layout: list[int],
) -> torch.Tensor:
    """The gradient of the table: what its rows were read for, gathered place by place.

    torch's own sorts every corner; here places are sorted once by their first row, and corners moved as a whole.
    """
    flat = first.flatten()
    order = flat.argsort()
    counts = torch.bincount(flat, minlength=length)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    sums = torch.div(order, first[0].numel(), rounding_mode="floor")
    shares = weights.view(-1, 4)[order]
    total = gradient.new_zeros(length, gradient.shape[1])
    image, *starts = layout
    whole = total.view(-1, image, gradient.shape[1])
    for corner in range(4):
        part = nn.functional.embedding_bag(
            sums, gradient, offsets, per_sample_weights=shares[:, corner].contiguous(), mode="sum"
        ).view_as(whole)
        for start, end, step in zip(starts, [*starts[1:], image], steps[:, corner].tolist(), strict=True):
            whole[:, start + step : end] += part[:, start : end - step]
    return total


def _bordered(value: torch.Tensor, grids: Grids) -> tuple[torch.Tensor, torch.Tensor]:
    """Every map with one row of zeros before it and two behind, and where each map starts."""
    maps = value.flatten(2).split([rows * columns for rows, columns in grids], 1)
    padded = [
        nn.functional.pad(one.unflatten(1, grid), (0, 0, 1, 2, 1, 2)).flatten(1, 2)
        for one, grid in zip(maps, grids, strict=True)
    ]
    starts = [0]
    for one in padded:
        starts.append(starts[-1] + one.shape[1])
    return torch.cat(padded, 1), torch.tensor(starts[:-1], dtype=torch.int32, device=value.device)


def _by_level(value: torch.Tensor, grids: Grids, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`grid_sample` on each level, which every device has."""
    batch, _, heads, _ = value.shape
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([rows * columns for rows, columns in grids], -1)
    spots = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    shares = weights.transpose(1, 2).flatten(0, 1)
    out = value.new_zeros(())
    for level, grid in enumerate(grids):
        found = nn.functional.grid_sample(
            maps[level].unflatten(-1, grid).to(spots.dtype), spots[:, :, level], align_corners=False
        )
        out = out + (found.to(value.dtype) * shares[:, None, :, level].to(value.dtype)).sum(-1)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)
