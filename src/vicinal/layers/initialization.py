"""How fresh weights are drawn: a family says in one call what its linear layers, convolutions and tables get."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from vicinal.layers.tags import parameter_tags

Draw = Callable[[torch.Tensor], object]


def truncated(std: float = 0.02) -> Draw:
    """Normal, cut at plus and minus 2: the draw of most vision transformers.

    >>> weight = torch.empty(8, 8)
    >>> truncated(0.02)(weight).shape
    torch.Size([8, 8])
    """
    return lambda weight: nn.init.trunc_normal_(weight, std=std, a=-2.0, b=2.0)


def fan_out(weight: torch.Tensor) -> None:
    """Normal, with the variance that keeps a gradient's size through a convolution (depthwise ones too).

    >>> fan_out(torch.empty(8, 1, 3, 3))
    """
    kernel = math.prod(weight.shape[2:])
    groups = weight.shape[0] if weight.shape[1] == 1 else 1
    nn.init.normal_(weight, std=math.sqrt(2.0 / (kernel * weight.shape[0] // groups)))


def initialize(
    model: nn.Module,
    *,
    linear: Draw | None = None,
    convolution: Draw | None = None,
    position_bias: Draw | None = None,
) -> None:
    """Draw the weights of every linear layer, convolution and position bias; None leaves torch's own draw.

    What is drawn here loses its bias. Norms start as the identity, as torch makes them.

    >>> layer = torch.nn.Linear(4, 4)
    >>> initialize(layer, linear=truncated(0.02))
    >>> layer.bias.abs().sum().item()
    0.0
    """
    draws = ((nn.Linear, linear), ((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution))
    with torch.no_grad():
        for module in model.modules():
            for kinds, draw in draws:
                if draw is not None and isinstance(module, kinds):
                    draw(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if position_bias is not None:
            tags = parameter_tags(model)
            for name, parameter in model.named_parameters():
                if tags[name].role == "position_bias":
                    position_bias(parameter)
