"""Combinators of mixers: side by side in the heads, in the channels, or added up.

To alternate mixers, give the layers of a stage different ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class SplitHeads(nn.Module):
    """Mixers that all read every channel and each write their own share of the heads, for example HiLo.

    Each maps `[batch, *grid, dim]` to its own width; the widths are put side by side, first mixer first.

    >>> from vicinal.layers.attention import PatternAttention
    >>> near, whole = PatternAttention(32, 1, Near(3), out_dim=8), PatternAttention(32, 3, Full(), out_dim=24)
    >>> SplitHeads(near, whole)(torch.randn(1, 6, 6, 32)).shape
    torch.Size([1, 6, 6, 32])
    """

    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to `[batch, *grid, the sum of the mixers' widths]`."""
        return torch.cat([mixer(inputs) for mixer in self.mixers], -1)


class SplitChannels(nn.Module):
    """Each mixer reads and writes its own `sizes` channels; None leaves them as they are.

    >>> from vicinal.layers.convolution import Depthwise
    >>> SplitChannels((None, 8), (Depthwise(24), 24))(torch.randn(1, 6, 6, 32)).shape
    torch.Size([1, 6, 6, 32])
    """

    def __init__(self, *parts: tuple[nn.Module | None, int]) -> None:
        super().__init__()
        self.sizes = [size for _, size in parts]
        self.mixers = nn.ModuleList(nn.Identity() if mixer is None else mixer for mixer, _ in parts)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape."""
        if sum(self.sizes) != inputs.shape[-1]:
            raise ValueError(f"the parts take {sum(self.sizes)} channels, the input has {inputs.shape[-1]}")
        pieces = inputs.split(self.sizes, -1)
        return torch.cat([mixer(piece) for mixer, piece in zip(self.mixers, pieces, strict=True)], -1)


class Parallel(nn.Module):
    """The sum of what several mixers make of the same input; `weights` are learned where asked for.

    >>> from vicinal.layers.convolution import Depthwise, PoolingDifference
    >>> Parallel(Depthwise(8), PoolingDifference(3))(torch.randn(1, 6, 6, 8)).shape
    torch.Size([1, 6, 6, 8])
    """

    def __init__(self, *mixers: nn.Module, use_weights: bool = False) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.weights = nn.Parameter(torch.ones(len(mixers))) if use_weights else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape."""
        outputs: Sequence[torch.Tensor] = [mixer(inputs) for mixer in self.mixers]
        if self.weights is not None:
            outputs = [weight * output for weight, output in zip(self.weights, outputs, strict=True)]
        return torch.stack(list(outputs)).sum(0)
