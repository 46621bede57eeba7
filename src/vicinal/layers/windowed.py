"""Convolutions that stay inside windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vicinal.layers.attention import crop_grid, pad_grid
from vicinal.layers.channels import channels_first, channels_last


class WindowedDepthwise(nn.Module):
    """A depthwise convolution that sees nothing beyond its window: CSWin's position term on the values.

    `windows` are the lengths of a window along (height, width); None is the whole axis.

    >>> WindowedDepthwise(8, windows=(None, 2))(torch.randn(1, 5, 7, 8)).shape
    torch.Size([1, 5, 7, 8])
    """

    def __init__(self, dim: int, windows: Sequence[int | None], kernel_size: int = 3) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, dim]` to the same shape."""
        batch, height, width, dim = inputs.shape
        rows, columns = (size or length for size, length in zip(self.windows, (height, width), strict=True))
        # zeros beyond the map are what the convolution would see beyond a cut window
        whole = pad_grid(inputs, (-(-height // rows) * rows, -(-width // columns) * columns))
        down, across = whole.shape[1] // rows, whole.shape[2] // columns
        windows = whole.reshape(batch, down, rows, across, columns, dim).transpose(2, 3).flatten(0, 2)
        windows = channels_last(self.conv(channels_first(windows)))
        whole = windows.reshape(batch, down, across, rows, columns, dim).transpose(2, 3).reshape(whole.shape)
        return crop_grid(whole, (height, width))
