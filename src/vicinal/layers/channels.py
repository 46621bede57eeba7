"""The door of a convolution: channels first on one side, last on the other. Both ways are views."""

from __future__ import annotations

import torch
from torch.nn import functional


def channels_first(inputs: torch.Tensor) -> torch.Tensor:
    """`[batch, *grid, channels]` as `[batch, channels, *grid]`, in the memory order convolutions call channels-last.

    >>> channels_first(torch.ones(1, 2, 3, 4)).shape
    torch.Size([1, 4, 2, 3])
    """
    return inputs.movedim(-1, 1)


def channels_last(inputs: torch.Tensor) -> torch.Tensor:
    """`[batch, channels, *grid]` as `[batch, *grid, channels]`.

    >>> channels_last(torch.ones(1, 4, 2, 3)).shape
    torch.Size([1, 2, 3, 4])
    """
    return inputs.movedim(1, -1)


def average_pool(
    inputs: torch.Tensor, size: int, *, stride: int, padding: int = 0, ceil_mode: bool = False
) -> torch.Tensor:
    """Means of blocks of `[batch, *grid, channels]`, of what of them is on the grid; for any rank.

    >>> average_pool(torch.ones(1, 1, 5, 4, 8), 2, stride=2, ceil_mode=True).shape
    torch.Size([1, 1, 3, 2, 8])
    """
    rank = inputs.dim() - 2
    if rank == 2:
        pads = (padding, padding)
        return _pool(inputs, (size, size), (stride, stride), pads, ceil_mode)
    # one axis at a time: torch's pooling of three axes refuses an axis shorter than the block
    rows = inputs.flatten(2, -2) if rank == 3 else inputs[:, :, None]
    rows = _pool(rows, (size, 1), (stride, 1), (padding, 0), ceil_mode)
    if rank == 1:
        return rows.squeeze(2)
    frames = rows.unflatten(2, tuple(inputs.shape[2:4])).flatten(0, 1)
    frames = average_pool(frames, size, stride=stride, padding=padding, ceil_mode=ceil_mode)
    return frames.unflatten(0, tuple(rows.shape[:2]))


def _pool(
    inputs: torch.Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], ceil_mode: bool
) -> torch.Tensor:
    maps = channels_first(inputs)
    return channels_last(functional.avg_pool2d(maps, size, stride, padding, ceil_mode, count_include_pad=False))
