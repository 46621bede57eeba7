"""Attention among queries and pixels as DETR has it, and the layers around it: every one adds, then normalizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class PlacedAttention(nn.Module):
    """Dense attention whose queries and keys, but not whose values, come with positions added.

    >>> layer = PlacedAttention(16, 2)
    >>> layer(torch.randn(1, 3, 16), torch.randn(1, 5, 16), torch.randn(1, 5, 16)).shape
    torch.Size([1, 3, 16])
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_seen: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Tokens `[batch, tokens, dim]` to the query's shape; `is_seen` is `[batch, 1, queries, keys]`."""
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (
            nn.functional.linear(tokens, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=is_seen, is_causal=is_causal, dropout_p=self.dropout if self.training else 0.0
        )
        result: torch.Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, added, then normalized.

    >>> FeedForward(8, 16)(torch.randn(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.xavier_uniform_(self.fc2.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        hidden = self.drop(nn.functional.relu(self.fc1(tokens)))
        result: torch.Tensor = self.norm(tokens + self.drop(self.fc2(hidden)))
        return result


class QueryLayer(nn.Module):
    """Queries attend to a memory and to each other, then a feed-forward.

    `is_memory_first` is the masked-attention decoder's order; the class transformer has the other.

    >>> layer = QueryLayer(16, 2, 32, is_memory_first=True)
    >>> layer(torch.randn(1, 3, 16), torch.randn(3, 16), torch.randn(1, 5, 16), torch.randn(5, 16)).shape
    torch.Size([1, 3, 16])
    """

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, *, is_memory_first: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.is_memory_first = is_memory_first
        self.cross = PlacedAttention(dim, num_heads, dropout)
        self.cross_norm = nn.LayerNorm(dim)
        self.own = PlacedAttention(dim, num_heads, dropout)
        self.own_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden_dim, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        memory: torch.Tensor,
        memory_positions: torch.Tensor,
        is_seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries and memory `[batch, tokens, dim]`, positions of each; `is_seen` is `[batch, 1, queries, keys]`."""
        if not self.is_memory_first:
            queries = self._own(queries, positions)
        found = self.cross(queries + positions, memory + memory_positions, memory, is_seen=is_seen)
        queries = self.cross_norm(queries + self.drop(found))
        if self.is_memory_first:
            queries = self._own(queries, positions)
        result: torch.Tensor = self.feed_forward(queries)
        return result

    def _own(self, queries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        placed = queries + positions
        result: torch.Tensor = self.own_norm(queries + self.drop(self.own(placed, placed, queries)))
        return result


class Perceptron(nn.Module):
    """Linear layers with ReLU between them.

    >>> Perceptron([4, 8, 8, 2])(torch.randn(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(one, two) for one, two in pairwise(dims))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., dims[0]]` to `[..., dims[-1]]`."""
        for index, layer in enumerate(self.layers):
            inputs = layer(inputs if index == 0 else nn.functional.relu(inputs))
        return inputs


def sine_positions(rows: int, columns: int, dim: int, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of each pixel's place: half of the channels for the row, half for the column.

    A map's sides are one whole turn long, whatever their lengths.

    >>> sine_positions(2, 3, 8, torch.zeros(()))[..., 0].shape
    torch.Size([2, 3])
    """
    half = dim // 2
    steps = torch.arange(half, device=like.device)
    slowness = 10000.0 ** (2 * torch.div(steps, 2, rounding_mode="floor") / half)
    parts = []
    for length in (rows, columns):
        turns = torch.arange(1, length + 1, device=like.device, dtype=torch.float32) / (length + 1e-6) * 2 * math.pi
        angles = turns[:, None] / slowness
        parts.append(torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], -1).flatten(1))
    down, across = parts
    both = torch.cat([down[:, None].expand(-1, columns, -1), across.expand(rows, -1, -1)], -1)
    return both.to(like.dtype)
