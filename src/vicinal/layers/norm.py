"""Norms over `[batch, *grid, channels]` that torch has for channels-first only, and norms with a condition."""

from __future__ import annotations

import torch
from torch import nn

from vicinal.layers.channels import channels_first, channels_last


class GridGroupNorm(nn.GroupNorm):
    """One mean and variance per sample over the whole grid and all channels (PoolFormer's norm).

    >>> GridGroupNorm(8)(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(1, dim, eps=eps)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        # one group is a layer norm over everything; torch 2.13's own group norm ends the process in the backward pass
        # on the CPU where the channels are last and the input (of a frozen stem) needs no gradient
        whole = nn.functional.layer_norm(inputs, inputs.shape[1:], eps=self.eps)
        return whole * self.weight + self.bias


class GridBatchNorm(nn.BatchNorm2d):
    """Batch norm with the channels last, on a grid of any rank.

    >>> GridBatchNorm(8)(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Torch's check would refuse all but two axes."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return channels_last(super().forward(channels_first(inputs)))


class GridInstanceNorm(nn.Module):
    """One mean and variance per sample and channel over the whole grid, channels last, without parameters.

    >>> out = GridInstanceNorm()(torch.randn(2, 5, 6, 8) + 3)
    >>> out.shape, bool(out.mean((1, 2)).abs().max() < 1e-5)
    (torch.Size([2, 5, 6, 8]), True)
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same shape; the statistics in single precision at least."""
        axes = tuple(range(1, inputs.dim() - 1))
        exact = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        centered = exact - exact.mean(axes, keepdim=True)
        variance = centered.square().mean(axes, keepdim=True)
        return (centered * (variance + self.eps).rsqrt()).to(inputs.dtype)

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"eps={self.eps}"


class Modulated(nn.Module):
    """A norm whose output a condition scales and shifts: `norm(x) * (offset + gain) + shift`.

    `offset` 1 is FiLM and adaLN, 0 is StyleNAT's AdaIN. The condition is `[batch, condition_dim]`; `affine` maps it to
    gains and shifts `[batch, 2 * dim]`, a linear layer where none is given.

    >>> norm = Modulated(torch.nn.LayerNorm(8, elementwise_affine=False), 8, condition_dim=4)
    >>> norm(torch.randn(2, 5, 6, 8), torch.randn(2, 4)).shape
    torch.Size([2, 5, 6, 8])
    """

    def __init__(
        self,
        norm: nn.Module,
        dim: int,
        condition_dim: int,
        *,
        offset: float = 1.0,
        affine: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.affine = nn.Linear(condition_dim, 2 * dim) if affine is None else affine
        self.offset = offset

    def forward(self, inputs: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The same shape as `inputs`."""
        shape = (inputs.shape[0], *(1,) * (inputs.dim() - 2), inputs.shape[-1])
        gain, shift = (part.reshape(shape) for part in self.affine(condition).chunk(2, -1))
        result: torch.Tensor = self.norm(inputs) * (self.offset + gain) + shift
        return result
