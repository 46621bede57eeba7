"""Parameters and multiply-adds of any module, counted on shapes alone: nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds of one call.

    `nominal` counts as papers do: linear layers, convolutions, and attention with every window whole. `exact` counts
    the keys each query sees. Norms, softmax, activations and biases are in neither.
    """

    parameters: int
    nominal: int
    exact: int


def cost(module: nn.Module, *input_shape: int) -> Cost:
    """What a call of `module` on an input of this shape costs.

    Modules that compute besides their children say so in `own_multiply_adds(grid) -> (nominal, exact)`, per sample.

    >>> from vicinal.layers.attention import PatternAttention
    >>> cost(PatternAttention(32, 1, Window(4, shift=2)), 1, 8, 8, 32)
    Cost(parameters=4224, nominal=327680, exact=299008)
    """
    parameters = {id(parameter): parameter.numel() for parameter in module.parameters()}
    shadow = _on_meta(module).eval()
    total = [0, 0]
    handles = [
        child.register_forward_hook(hook) for child in shadow.modules() if (hook := _hook(child, total)) is not None
    ]
    with torch.no_grad():
        shadow(torch.empty(input_shape, device="meta", dtype=next((p.dtype for p in module.parameters()), None)))
    for handle in handles:
        handle.remove()
    return Cost(sum(parameters.values()), *total)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without data; the tensors are exchanged before the copy, so that it takes no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def _hook(module: nn.Module, total: list[int]) -> Callable[..., None] | None:
    def add(amount: int, exact: int | None = None) -> None:
        total[0] += amount
        total[1] += amount if exact is None else exact

    def linear(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        add(output.numel() * layer.in_features)

    def convolution(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        add(output.numel() * layer.weight[0].numel())

    def own(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        batch, *grid, _ = inputs[0].shape
        nominal, exact = layer.own_multiply_adds(tuple(grid))  # type: ignore[operator]
        add(batch * nominal, batch * exact)

    if isinstance(module, nn.Linear):
        return linear
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return convolution
    return own if hasattr(module, "own_multiply_adds") else None
