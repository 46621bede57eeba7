"""Layers that run in tile order: tokens are permuted before the first and back after the last, positions included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from vicinal.layers.attention import PatternAttention
from vicinal.layers.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from vicinal.layers.norm import GridGroupNorm
from vicinal.layers.tile_place import TilePlace
from vicinal.ops.tile_order import TileOrder

_NEED_THE_GRID = (
    nn.modules.conv._ConvNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    GridGroupNorm,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)


class TileOrdered(nn.Module):
    """Runs layers one after another on tokens in tile order; equal to running them on the grid.

    A kernel that works on sequences needs every tile of the grid in one piece of memory. Permuting query, key, value
    and output in every layer costs time each; here tokens are permuted twice in all. Between attention layers a
    transformer treats tokens one by one, so it does not matter in which order they are. It pays where FlexAttention
    compiled does the attention (`backend="flex"` on CUDA); other back ends are given the grid in every layer.

    >>> from vicinal.layers.block import Block
    >>> from vicinal.layers.mlp import Mlp
    >>> video = (Near(3), Near(5), Near(5))
    >>> blocks = [Block(32, PatternAttention(32, 2, video, rank=3, rotary=True), Mlp(32, 64)) for _ in range(2)]
    >>> inputs = torch.randn(1, 4, 6, 10, 32)
    >>> ordered = TileOrdered(blocks, tile=(2, 4, 4))
    >>> torch.allclose(ordered(inputs), blocks[1](blocks[0](inputs)), atol=1e-5)
    True

    Args:
        layers: modules from `[batch, *grid, dim]` to the same shape whose attention is `PatternAttention` and which
            treat tokens one by one elsewhere. They stay usable on their own.
        tile: the sides of a tile. For FlexAttention compiled it holds a multiple of 128 tokens.
    """

    def __init__(self, layers: Iterable[nn.Module], tile: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.tile = tuple(tile)
        if not self.tile or min(self.tile) < 1:
            raise ValueError(f"tile must be 1 to 3 sides of at least 1, got {tile!r}")
        wrong = sorted({type(module).__name__ for module in _outside_value_mixers(self.layers) if _is_refused(module)})
        if wrong:
            names = ", ".join(wrong)
            raise ValueError(
                f"layers must treat tokens one by one but in PatternAttention; these need the grid: {names}"
            )

    def forward(self, inputs: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape.

        `others` are handed to every layer. Those that have an entry for each token, `[batch, *grid, ...]` or
        `[*grid, ...]` (rotary tables, say), are permuted along; others (a condition per sample) are left alone.
        """
        grid = tuple(inputs.shape[1:-1])
        if len(grid) != len(self.tile):
            raise ValueError(f"inputs must have {len(self.tile)} axes like tile, got {tuple(inputs.shape)}")
        order = TileOrder(grid, self.tile, (1,) * len(grid))
        ordered = [_entered(tensor, order) for tensor in others]
        hidden = order.enter(inputs)
        place = TilePlace(order)
        mixers = [module for module in self.layers.modules() if isinstance(module, PatternAttention)]
        before = [mixer.place for mixer in mixers]
        try:
            for mixer in mixers:
                mixer.place = place
            for layer in self.layers:
                hidden = layer(hidden, *ordered)
        finally:
            for mixer, own in zip(mixers, before, strict=True):
                mixer.place = own
        return order.leave(hidden)

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"tile={self.tile}"


def _entered(tensor: torch.Tensor | None, order: TileOrder) -> torch.Tensor | None:
    """A tensor with an entry for each token in order; any other as it is."""
    if tensor is None:
        return None
    rank = len(order.grid)
    for axis in (1, 0):
        if tensor.dim() >= rank + axis and tuple(tensor.shape[axis : axis + rank]) == order.grid:
            return order.enter(tensor, axis)
    return tensor


def _outside_value_mixers(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those in it, but for value mixers, which are given the grid."""
    yield module
    for name, child in module.named_children():
        if not (isinstance(module, PatternAttention) and name == "value_mixer"):
            yield from _outside_value_mixers(child)


def _is_refused(module: nn.Module) -> bool:
    return isinstance(module, _NEED_THE_GRID)
