"""Neighborhood attention as a module, with NATTEN's parameter names and the bias it dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from vicinal.layers.attention import crop_grid, pad_grid
from vicinal.layers.tags import POSITION_BIAS, tag
from vicinal.layers.words import padded
from vicinal.ops.api import attention
from vicinal.ops.na import neighborhood, on_each_axis
from vicinal.ops.side_by_side import unpack


class _NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention over `[batch, *grid, embed_dim]`.

    Parameters are named as in NATTEN and in the published NAT and DiNAT checkpoints: `qkv`, `proj`, and `rpb`
    `[heads, 2 * kernel_size - 1, ...]` where `rel_pos_bias` asks for the relative position bias.

    `pad_mode="legacy"` does what NATTEN up to 0.15 did with an input smaller than `kernel_size * dilation`: zeros
    are appended to the *input*, become tokens like any other (with the projection's bias), and are cut off at the
    end. Published detection and segmentation weights were trained so. The default cuts the window to the axis.
    """

    rank: ClassVar[int]

    def __init__(  # noqa: PLR0913 - NATTEN's arguments, in NATTEN's order
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
        pad_mode: Literal["none", "legacy"] = "none",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim ({embed_dim}), got {num_heads}")
        if not 0.0 <= proj_drop < 1.0:
            raise ValueError(f"proj_drop must be a probability in 0 <= p < 1, got {proj_drop}")
        if pad_mode not in ("none", "legacy"):
            raise ValueError(f'pad_mode must be "none" or "legacy", got {pad_mode!r}')
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.pattern = neighborhood(self.rank, kernel_size, stride, dilation, is_causal)
        self.kernel_size = on_each_axis("kernel_size", kernel_size, self.rank)
        self.dilation = on_each_axis("dilation", dilation, self.rank)
        self.scale = qk_scale
        self.pad_mode = pad_mode
        self.backend = backend
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * size - 1 for size in self.kernel_size)))
            tag(self, rpb=POSITION_BIAS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: the bias table from a normal distribution of deviation 0.02, cut at 2."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, embed_dim]` to the same shape."""
        if inputs.dim() != self.rank + 2 or inputs.shape[-1] != self.embed_dim:
            axes = ("length", "height, width", "time, height, width")[self.rank - 1]
            raise ValueError(f"inputs must be [batch, {axes}, {self.embed_dim}], got {tuple(inputs.shape)}")
        grid = inputs.shape[1:-1]
        if self.pad_mode == "legacy":
            inputs = pad_grid(inputs, padded(self.pattern, grid))
        qkv = self.qkv(inputs).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = unpack(qkv)
        out = crop_grid(self._attend(query, key, value).flatten(-2), grid)
        result: torch.Tensor = self.proj_drop(self.proj(out))
        return result

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """From `[batch, *grid, heads, head_dim]` each to one like them."""
        out: torch.Tensor = attention(
            query, key, value, self.pattern, bias=self.rpb, scale=self.scale, backend=self.backend
        )
        return out

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        bias = ", rel_pos_bias=True" if self.rpb is not None else ""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, pattern={self.pattern}{bias}"


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over sequences `[batch, length, embed_dim]`.

    >>> NeighborhoodAttention1D(64, num_heads=2, kernel_size=7, dilation=2)(torch.randn(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over feature maps `[batch, height, width, embed_dim]`.

    >>> module = NeighborhoodAttention2D(64, num_heads=2, kernel_size=7, rel_pos_bias=True)
    >>> module(torch.randn(1, 14, 14, 64)).shape, sorted(module.state_dict())
    (torch.Size([1, 14, 14, 64]), ['proj.bias', 'proj.weight', 'qkv.bias', 'qkv.weight', 'rpb'])
    """

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over videos `[batch, time, height, width, embed_dim]`.

    >>> module = NeighborhoodAttention3D(32, 2, kernel_size=(3, 5, 5), is_causal=(True, False, False))
    >>> module(torch.randn(1, 4, 6, 6, 32)).shape
    torch.Size([1, 4, 6, 6, 32])
    """

    rank = 3
