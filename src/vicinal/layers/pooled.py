"""Attention to a reduced map: queries at every token, keys and values from a pooled copy of the grid."""

from __future__ import annotations

import torch
from torch import nn

from vicinal.layers.channels import average_pool, channels_first, channels_last
from vicinal.layers.words import AnyPattern, at
from vicinal.ops.api import attention
from vicinal.ops.side_by_side import unpack
from vicinal.pattern.axis import Full
from vicinal.pattern.counting import count


class PooledAttention(nn.Module):
    """Attention of `[batch, *grid, dim]` to what `pool` makes of it: PVT's reduced keys, HiLo's low half.

    >>> pool = Reduce(32, size=4)
    >>> PooledAttention(32, num_heads=2, pool=pool)(torch.randn(1, 12, 16, 32)).shape
    torch.Size([1, 12, 16, 32])

    Args:
        dim: channels in.
        num_heads: heads; they divide `out_dim`.
        pool: a module from `[batch, *grid, dim]` to `[batch, *key_grid, dim]`, which it tells in `key_grid(grid)`.
        pattern: who sees whom between the two grids; everybody by default.
        out_dim: channels out, where they differ.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pool: nn.Module,
        *,
        pattern: AnyPattern | None = None,
        qkv_bias: bool = True,
        out_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if num_heads < 1 or out_dim % num_heads:
            raise ValueError(f"num_heads must divide {out_dim} channels, got {num_heads}")
        self.num_heads, self.head_dim = num_heads, out_dim // num_heads
        self.pattern: AnyPattern = Full() if pattern is None else pattern
        self.backend = backend
        self.q = nn.Linear(dim, out_dim, bias=qkv_bias)
        self.pool = pool
        self.kv = nn.Linear(dim, 2 * out_dim, bias=qkv_bias)
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to `[batch, *grid, out_dim]`."""
        query = self.q(inputs).unflatten(-1, (self.num_heads, self.head_dim))
        pooled = self.pool(inputs)
        key, value = unpack(self.kv(pooled).unflatten(-1, (2, self.num_heads, self.head_dim)))
        pattern = at(self.pattern, inputs.shape[1:-1])
        result: torch.Tensor = self.proj(attention(query, key, value, pattern, backend=self.backend).flatten(-2))
        return result

    def own_multiply_adds(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Multiply-adds of the attention itself on one sample, nominal and exact (the same: nothing is cut)."""
        key_grid: tuple[int, ...] = self.pool.key_grid(grid)  # type: ignore[operator]
        pairs = count(at(self.pattern, grid), grid, key_grid) * 2 * self.num_heads * self.head_dim
        return pairs, pairs


class Reduce(nn.Module):
    """A convolution with stride = kernel = `size`, then a norm: PVT's spatial reduction, for any rank.

    >>> Reduce(8, size=2)(torch.randn(1, 6, 6, 8)).shape
    torch.Size([1, 3, 3, 8])
    """

    def __init__(self, dim: int, size: int, *, rank: int = 2, norm: nn.Module | None = None) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.size = size
        self.conv = kind(dim, dim, size, size)
        self.norm = nn.LayerNorm(dim) if norm is None else norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to `[batch, *(grid / size), dim]`."""
        result: torch.Tensor = self.norm(channels_last(self.conv(channels_first(inputs))))
        return result

    def key_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The grid that is left of `grid`."""
        return tuple(length // self.size for length in grid)

    def least_length(self, tokens: int) -> int:
        """The shortest axis that gives so many tokens."""
        return tokens * self.size


class AveragePool(nn.Module):
    """The mean of each block of `size`; blocks cut at the edge are means of what is there.

    >>> AveragePool(2)(torch.ones(1, 5, 6, 8)).shape
    torch.Size([1, 3, 3, 8])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the means of blocks."""
        return average_pool(inputs, self.size, stride=self.size, ceil_mode=True)

    def key_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The grid that is left of `grid`."""
        return tuple(-(-length // self.size) for length in grid)

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"size={self.size}"
