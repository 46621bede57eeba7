"""Attention between channels instead of tokens."""

from __future__ import annotations

import torch
from torch import nn


class ChannelAttention(nn.Module):
    """DaViT's channel groups: the channels of a head attend to each other, with the whole grid as features.

    >>> ChannelAttention(32, num_heads=4)(torch.randn(1, 6, 7, 32)).shape
    torch.Size([1, 6, 7, 32])
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide {dim} channels, got {num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape."""
        qkv = self.qkv(inputs).flatten(1, -2).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.movedim(1, -1).unbind(1)  # each [batch, heads, head_dim, tokens]
        weights = (key * self.head_dim**-0.5 @ value.transpose(-1, -2)).softmax(-1)
        out = (weights @ query).flatten(1, 2).transpose(1, 2).unflatten(1, tuple(inputs.shape[1:-1]))
        result: torch.Tensor = self.proj(out)
        return result

    def own_multiply_adds(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Multiply-adds of the two products on one sample, nominal and exact."""
        tokens = 1
        for length in grid:
            tokens *= length
        cost = 2 * tokens * self.num_heads * self.head_dim**2
        return cost, cost
