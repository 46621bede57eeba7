"""The door of a convolution: channels first on one side, last on the other. Both ways are views."""

from __future__ import annotations

import torch


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
