"""Multi-scale deformable attention: every query reads a few places of every map, places and weights both learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

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
    batch, tokens, heads, head_dim = value.shape
    rows, corner_weights = _corners(grids, places, weights, tokens)
    table = value.reshape(batch * tokens * heads, head_dim)
    out = nn.functional.embedding_bag(
        rows.reshape(batch * places.shape[1] * heads, -1),
        table,
        per_sample_weights=corner_weights.reshape(batch * places.shape[1] * heads, -1).to(table.dtype),
        mode="sum",
    )
    return out.view(batch, places.shape[1], heads * head_dim)


def _corners(
    grids: Grids, places: torch.Tensor, weights: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The four pixels around each place: their rows in the table, and their weights, 0 outside of the map."""
    batch, _, heads = places.shape[:3]
    sizes = torch.tensor([(columns, rows) for rows, columns in grids], dtype=torch.int32, device=places.device)
    positions = places * sizes[:, None] - 0.5
    lower = positions.detach().floor()
    part = positions - lower
    ends = lower.to(torch.int32)[..., None] + torch.arange(2, dtype=torch.int32, device=places.device)
    last = sizes[:, None, :, None] - 1
    kept = ends.clamp(min=torch.zeros_like(last), max=last)
    shares = torch.stack([1 - part, part], -1) * (ends == kept)  # [..., points, (column, row), (lower, upper)]
    starts = [0]
    for rows, columns in grids:
        starts.append(starts[-1] + rows * columns)
    first = torch.tensor(starts[:-1], dtype=torch.int32, device=places.device)[:, None, None, None]
    number = kept[..., 1, :, None] * sizes[:, None, None, None, 0] + kept[..., 0, None, :] + first
    head = torch.arange(heads, dtype=torch.int32, device=places.device)[:, None, None, None, None]
    image = torch.arange(batch, dtype=torch.int32, device=places.device).view(-1, 1, 1, 1, 1, 1, 1)
    corner_weights = shares[..., 1, :, None] * shares[..., 0, None, :] * weights[..., None, None]
    return (number + image * tokens) * heads + head, corner_weights


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
