"""The same numbers, differently in memory. Every gap is filled with NaN."""

from __future__ import annotations

import torch


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous()


def heads_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(-2, 1).contiguous().movedim(1, -2)


def channels_first(tensor: torch.Tensor) -> torch.Tensor:
    """Channels before the grid, as convolutions leave them: strided channels."""
    return tensor.movedim(-1, 1).contiguous().movedim(1, -1)


def packed_in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """The second of two, as slices of one projection are."""
    return torch.cat([torch.full_like(tensor, torch.nan), tensor], -1)[..., tensor.shape[-1] :]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """From an odd address, counted in elements."""
    found = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)[1:].view(tensor.shape)
    return found.copy_(tensor)


def spaced(tensor: torch.Tensor) -> torch.Tensor:
    found = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)[..., ::2]
    return found.copy_(tensor)


LAYOUTS = (contiguous, heads_first, channels_first, packed_in_a_row, shifted, spaced)
