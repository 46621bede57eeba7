"""Attention over a pattern as a token mixer: projections, position bias, norms of queries and keys, rotation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from vicinal.layers.one_pass import AddsTo, add_linear, is_traced
from vicinal.layers.rotary import Rotary
from vicinal.layers.tags import POSITION_BIAS, tag
from vicinal.layers.tile_place import TilePlace
from vicinal.layers.words import AnyPattern, at, padded, table_shapes, window_area
from vicinal.ops.api import attention
from vicinal.ops.ordered import attention_in_order
from vicinal.ops.side_by_side import unpack
from vicinal.ops.tile_order import TileOrder
from vicinal.pattern.compose import Heads, Pattern, pattern_parts, split_heads
from vicinal.pattern.counting import count

PadMode = Literal["none", "legacy"]

Shapes = tuple[tuple[int, ...], ...]
"""Of the position bias, for each head group, without the heads."""

_LONG = 1 << 16


class PatternAttention(AddsTo):
    """Multi-head attention over `[batch, *grid, dim]` by any pattern, on a grid of any rank.

    >>> mixer = PatternAttention(64, num_heads=2, pattern=Near(7, dilation=2), rel_pos_bias=True)
    >>> mixer(torch.randn(1, 14, 20, 64)).shape
    torch.Size([1, 14, 20, 64])

    Args:
        dim: channels in.
        num_heads: heads; they divide `out_dim`.
        pattern: a pattern, or a word such as `near(7, dilation="max")`.
        rank: axes of the grid; it matters only to the shape of the bias.
        rel_pos_bias: a table `rpb` `[heads, 2k-1, ...]`; a `ParameterList` of them where heads differ in pattern.
        table_grid: the grid the table is made for, where the pattern has a `Full` axis; smaller grids use a part.
        qk_norm: makes the norm of queries and of keys from head_dim, for example `nn.RMSNorm`.
        rotary: rotate queries and keys by their coordinates.
        value_mixer: a module whose output on the values, `[batch, *grid, out_dim]`, is added to the attention's.
        out_dim: channels out, where they differ (a mixer that fills a part of the channels).
        pad_mode: `"legacy"` appends zeros to the input as the published code does (up to whole windows, up to
            kernel_size * dilation); they become tokens like any other and are cut off at the end.
    """

    def __init__(  # noqa: PLR0913 - every option is a keyword, and each stands alone
        self,
        dim: int,
        num_heads: int,
        pattern: AnyPattern,
        *,
        rank: int = 2,
        rel_pos_bias: bool = False,
        table_grid: Sequence[int] | None = None,
        qkv_bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        rotary: bool = False,
        value_mixer: nn.Module | None = None,
        out_dim: int | None = None,
        pad_mode: PadMode = "none",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if num_heads < 1 or out_dim % num_heads:
            raise ValueError(f"num_heads must divide {out_dim} channels, got {num_heads}")
        if pad_mode not in ("none", "legacy"):
            raise ValueError(f'pad_mode must be "none" or "legacy", got {pad_mode!r}')
        self.dim, self.num_heads, self.head_dim = dim, num_heads, out_dim // num_heads
        self.pattern, self.pad_mode, self.backend = pattern, pad_mode, backend
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias)
        self.norm_q = None if qk_norm is None else qk_norm(self.head_dim)
        self.norm_k = None if qk_norm is None else qk_norm(self.head_dim)
        self.rotary = Rotary(self.head_dim, rank) if rotary else None
        self.value_mixer = value_mixer
        self.proj = nn.Linear(out_dim, out_dim)
        self.place = TilePlace()
        self.rpb: nn.Parameter | nn.ParameterList | None = None
        if rel_pos_bias:
            self.rpb = self._tables(rank, table_grid)

    def _tables(self, rank: int, table_grid: Sequence[int] | None) -> nn.Parameter | nn.ParameterList:
        # on a grid that long no window is cut, and a table that is made for the grid stands out
        grid = (_LONG,) * rank if table_grid is None else tuple(table_grid)
        pattern = at(self.pattern, grid)
        groups, sizes = pattern_parts(pattern, rank)
        sizes = split_heads(self.num_heads, len(groups), sizes)
        shapes = table_shapes(self.pattern, grid)
        if any(size > _LONG for shape in shapes for size in shape):
            raise ValueError(f"the position bias of {self.pattern!r} depends on the grid: give table_grid")
        tables = [torch.empty(heads, *shape) for heads, shape in zip(sizes, shapes, strict=True)]
        for table in tables:
            nn.init.trunc_normal_(table, std=0.02)
        if not isinstance(pattern, Heads):
            tag(self, rpb=POSITION_BIAS)
            return nn.Parameter(tables[0])
        several = nn.ParameterList(tables)
        tag(several, **{str(index): POSITION_BIAS for index in range(len(tables))})
        return several

    def forward(self, inputs: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, *grid, dim]` to `[batch, *grid, out_dim]`; in `TileOrdered` the grid is one axis of positions.

        With a shortcut `[batch, *grid, out_dim]`, the sum of both.
        """
        order = self.place.order
        out = self._on_grid(inputs) if order is None else self._in_order(inputs, order)
        if shortcut is not None:
            return add_linear(shortcut, out, self.proj)
        result: torch.Tensor = self.proj(out)
        return result

    def _on_grid(self, inputs: torch.Tensor) -> torch.Tensor:
        """What every token gets, heads side by side, before the last projection."""
        grid = tuple(inputs.shape[1:-1])
        pattern, whole, shapes = _settled(self.pattern, grid, self.pad_mode, self.rpb is not None)
        is_padded = whole != grid
        query, key, value = self._project(pad_grid(inputs, whole) if is_padded else inputs, None)
        bias = self._bias(shapes)
        out = attention(query, key, value, pattern, bias=bias, backend=self.backend).flatten(-2)
        if self.value_mixer is not None:
            out = out + self.value_mixer(value.flatten(-2))
        return crop_grid(out, grid) if is_padded else out

    def _project(
        self, inputs: torch.Tensor, angles: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, `[..., heads, head_dim]` each, normed and turned."""
        query, key, value = unpack(self.qkv(inputs).unflatten(-1, (3, self.num_heads, self.head_dim)))
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        if self.rotary is not None:
            query, key = self.rotary(query, angles), self.rotary(key, angles)
        return query, key, value

    def _in_order(self, inputs: torch.Tensor, order: TileOrder) -> torch.Tensor:
        """The same for tokens in tile order, `[batch, positions, dim]`."""
        pattern, whole, shapes = _settled(self.pattern, order.grid, self.pad_mode, self.rpb is not None)
        if whole != order.grid:
            raise ValueError(f'pad_mode="legacy" would pad the grid {order.grid}, which tokens in tile order cannot be')
        query, key, value = self._project(inputs, self.place.angles(self.rotary, inputs))
        bias = self._bias(shapes)
        out = attention_in_order(query, key, value, pattern, order, bias=bias, backend=self.backend).flatten(-2)
        if self.value_mixer is not None:
            out = out + order.enter(self.value_mixer(order.leave(value.flatten(-2))))
        return out

    def _bias(self, shapes: Shapes) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        rpb = self.rpb
        if rpb is None:
            return None
        if isinstance(rpb, torch.Tensor):
            (shape,) = shapes
            return _part(rpb, shape)
        return tuple(_part(table, shape) for table, shape in zip(rpb, shapes, strict=True))

    def own_multiply_adds(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Multiply-adds of the attention itself on one sample: nominal (whole windows) and exact (keys seen)."""
        pattern = at(self.pattern, grid)
        grid = padded(pattern, grid) if self.pad_mode == "legacy" else grid
        nominal = math.prod(grid) * window_area(pattern, grid) * 2 * self.num_heads * self.head_dim
        return round(nominal), count(pattern, grid, heads=self.num_heads) * 2 * self.head_dim

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"dim={self.dim}, num_heads={self.num_heads}, pattern={self.pattern}, pad_mode={self.pad_mode!r}"


def _settled(
    pattern: AnyPattern, grid: tuple[int, ...], pad_mode: PadMode, has_bias: bool
) -> tuple[Pattern, tuple[int, ...], Shapes]:
    """The pattern on a grid, the grid that is padded to, and the shapes of the bias on that; remembered."""
    if not is_traced():  # there sizes are symbols, and compilers do not look into caches
        try:
            return _remembered(pattern, grid, pad_mode, has_bias)  # type: ignore[arg-type]  # most hash
        except TypeError:  # a word of a user's that does not
            pass
    return _settle(pattern, grid, pad_mode, has_bias)


def _settle(
    pattern: AnyPattern, grid: tuple[int, ...], pad_mode: PadMode, has_bias: bool
) -> tuple[Pattern, tuple[int, ...], Shapes]:
    pattern = at(pattern, grid)
    whole = padded(pattern, grid) if pad_mode == "legacy" else grid
    return pattern, whole, table_shapes(pattern, whole) if has_bias else ()


_remembered = functools.lru_cache(maxsize=1024)(_settle)


def _part(table: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The middle of a bias table, where a shorter axis has fewer distances than it was made for."""
    own = table.shape[1:]
    if own == shape:
        return table
    if any(has < needs for has, needs in zip(own, shape, strict=True)):
        grid, made_for = (tuple((size + 1) // 2 for size in sizes) for sizes in (shape, own))
        raise ValueError(
            f"the position bias is made for grids of up to {made_for}, got {grid}; "
            "make it for larger ones (table_grid of a mixer, image_size of a model)"
        )
    cuts = [slice((has - needs) // 2, (has + needs) // 2) for has, needs in zip(own, shape, strict=True)]
    return table[(slice(None), *cuts)]


def pad_grid(inputs: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Zeros after each axis of `[batch, *grid, channels]`, up to a larger grid.

    >>> pad_grid(torch.ones(1, 5, 6, 2), (7, 6)).shape
    torch.Size([1, 7, 6, 2])
    """
    missing = [length - have for length, have in zip(grid, inputs.shape[1:-1], strict=True)]
    if not any(missing):
        return inputs
    pads = [0, 0]
    for amount in reversed(missing):
        pads += [0, amount]
    return nn.functional.pad(inputs, pads)


def crop_grid(inputs: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The first part of each axis of `[batch, *grid, channels]`, down to a smaller grid.

    >>> crop_grid(torch.ones(1, 7, 6, 2), (5, 6)).shape
    torch.Size([1, 5, 6, 2])
    """
    if tuple(inputs.shape[1:-1]) == tuple(grid):
        return inputs
    return inputs[(slice(None), *(slice(length) for length in grid))]
