"""Rotary position embedding on a grid of any rank: each axis turns its own share of the channels."""

from __future__ import annotations

import torch
from torch import nn


class Rotary(nn.Module):
    """Turns pairs of channels of `[batch, *grid, heads, head_dim]` by angles that grow with the coordinate.

    The channels are shared out among the axes, in pairs, the first axes taking what does not divide.

    >>> Rotary(32, rank=3)(torch.ones(1, 2, 3, 4, 1, 32)).shape
    torch.Size([1, 2, 3, 4, 1, 32])
    """

    def __init__(self, head_dim: int, rank: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2 or head_dim // 2 < rank:
            raise ValueError(f"head_dim must be even and hold a pair per axis ({rank}), got {head_dim}")
        pairs = head_dim // 2
        self.shares = [pairs // rank + (axis < pairs % rank) for axis in range(rank)]
        self.base = base

    def angles(self, grid: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """The angle of every pair at every place, `[*grid, head_dim / 2]`."""
        parts = []
        for axis, (length, share) in enumerate(zip(grid, self.shares, strict=True)):
            exponents = torch.arange(share, device=like.device, dtype=torch.float32) / share
            places = torch.arange(length, device=like.device, dtype=torch.float32)
            turned = places[:, None] * self.base**-exponents
            shape = [1] * len(grid) + [share]
            shape[axis] = length
            parts.append(turned.reshape(shape).expand(*grid, share))
        return torch.cat(parts, -1)

    def forward(self, inputs: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
        """The same shape, turned; by these angles `[*grid, head_dim / 2]` where tokens are not in the grid's order."""
        if angles is None:
            angles = self.angles(tuple(inputs.shape[1:-2]), inputs)
        angles = angles.unsqueeze(-2)
        cosine, sine = angles.cos().to(inputs.dtype), angles.sin().to(inputs.dtype)
        first, second = inputs.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
