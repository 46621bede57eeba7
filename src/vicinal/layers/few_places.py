"""Strided convolutions with few places to go to: the gradient of their weight as one matrix product.

For a weight of many channels and a map of some hundred tokens oneDNN takes far longer (docs/decisions.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.one_pass import is_bare, is_traced
from vicinal.ops.side_by_side import is_plain

MOST_PLACES = 1024
"""In the whole batch; from there on oneDNN is as quick."""

LEAST_CHANNELS = 64
"""Below, rows of patches are too short to be copied quickly."""


def convolve(inputs: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """A convolution over `[batch, height, width, channels]`.

    >>> convolve(torch.randn(1, 14, 14, 64), torch.nn.Conv2d(64, 8, 3, stride=2, padding=1)).shape
    torch.Size([1, 7, 7, 8])
    """
    out: torch.Tensor
    if _is_plain_convolution(layer, inputs) and _places(inputs, layer) <= MOST_PLACES:
        out = _FewPlaces.apply(channels_first(inputs), layer.weight, layer.bias, layer.stride, layer.padding)
    else:
        out = layer(channels_first(inputs))
    return channels_last(out)


def _is_plain_convolution(layer: nn.Conv2d, inputs: torch.Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and type(layer) is nn.Conv2d
        and layer.in_channels >= LEAST_CHANNELS
        and (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
        and not isinstance(layer.padding, str)
        and inputs.device.type == "cpu"
        and inputs.dim() == 4
        and not is_traced()
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
        and is_plain(inputs)
        and type(weight := layer.weight) is nn.Parameter
        and weight.requires_grad
        and weight.dtype == inputs.dtype == torch.float32
        and is_bare(layer)
    )


def _places(inputs: torch.Tensor, layer: nn.Conv2d) -> int:
    """How many tokens come out, of all samples."""
    height, width = _grid_after(inputs.shape[1:3], layer.weight.shape[2:], layer.stride, layer.padding)
    return inputs.shape[0] * height * width


def _grid_after(grid: Any, kernel_size: Any, stride: Any, padding: Any) -> tuple[int, ...]:
    return tuple(
        (length + 2 * pad - size) // step + 1
        for length, size, step, pad in zip(grid, kernel_size, stride, padding, strict=True)
    )


def _patches(inputs: torch.Tensor, kernel_size: Any, stride: Any, padding: Any) -> torch.Tensor:
    """What every place of `[batch, channels, height, width]` sees: `[places, kernel height * width * channels]`."""
    whole = nn.functional.pad(
        channels_last(inputs), (0, 0, padding[1], padding[1], padding[0], padding[0])
    ).contiguous()
    batch, *grid, channels = whole.shape
    across = _grid_after(grid, kernel_size, stride, (0, 0))
    steps = whole.stride()
    # a row of a patch is one piece of memory
    rows = whole.as_strided(
        (batch, *across, kernel_size[0], kernel_size[1] * channels),
        (steps[0], stride[0] * steps[1], stride[1] * steps[2], steps[1], 1),
    )
    return rows.reshape(-1, kernel_size[0] * kernel_size[1] * channels)


class _FewPlaces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(inputs, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        inputs, weight = ctx.saved_tensors
        is_product = not torch.is_grad_enabled() and is_plain(grad)  # who differentiates again gets torch's own
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not is_product, ctx.needs_input_grad[2]]
        found: list[torch.Tensor | None] = [None, None, None]
        if any(needs):
            places = (ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
            found = list(torch.ops.aten.convolution_backward(grad, inputs, weight, weight.shape[:1], *places, needs))
        if is_product and ctx.needs_input_grad[1]:
            rows = channels_last(grad).reshape(-1, grad.shape[1])
            product = rows.t() @ _patches(inputs, weight.shape[2:], ctx.stride, ctx.padding)
            found[1] = product.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
        return *found, None, None
