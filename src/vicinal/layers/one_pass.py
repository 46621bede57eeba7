"""A linear layer on the CPU together with what stands beside it, in fewer passes over memory.

A large map is read and written again for a bias, for an activation and for a shortcut. Whoever watches or has replaced
a layer (hooks, adapters, quantization, compilers) meets the plain calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules import module as hooks

from vicinal.ops.side_by_side import is_plain


class AddsTo(nn.Module):
    """A module that can add its result to a shortcut itself: `forward(inputs, shortcut)`."""

    def forward(self, inputs: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        """What it makes of the inputs; with a shortcut, the sum of both."""
        raise NotImplementedError


def add_linear(shortcut: torch.Tensor, inputs: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """`shortcut + layer(inputs)`.

    >>> layer = torch.nn.Linear(8, 4)
    >>> add_linear(torch.randn(2, 5, 4), torch.randn(2, 5, 8), layer).shape
    torch.Size([2, 5, 4])
    """
    is_addable = shortcut.shape[:-1] == inputs.shape[:-1] and is_plain(shortcut) and shortcut.dtype == inputs.dtype
    if not is_addable or not _is_plain_linear(layer, inputs) or layer.bias is None:
        result: torch.Tensor = shortcut + layer(inputs)
        return result
    total: torch.Tensor = shortcut.flatten(0, -2) + layer.bias
    return total.addmm_(inputs.flatten(0, -2), layer.weight.t()).view(shortcut.shape)


def linear_gelu(inputs: torch.Tensor, layer: nn.Module, act: nn.Module) -> torch.Tensor:
    """`act(layer(inputs))`; where no gradient is wanted and `act` is the exact GELU, in one pass by oneDNN.

    >>> with torch.no_grad():
    ...     linear_gelu(torch.randn(2, 5, 8), torch.nn.Linear(8, 4), torch.nn.GELU()).shape
    torch.Size([2, 5, 4])
    """
    result: torch.Tensor
    product = None if torch.is_grad_enabled() or inputs.dtype != torch.float32 or not inputs.numel() else _onednn()
    is_exact = type(act) is nn.GELU and act.approximate == "none" and is_bare(act)
    if product is None or not is_exact or not _is_plain_linear(layer, inputs):
        result = act(layer(inputs))
    else:
        result = product(inputs, layer.weight, layer.bias, "gelu", [], "none")
    return result


def is_bare(module: nn.Module) -> bool:
    """Whether nobody watches the calls of a module, or answers them in its place.

    >>> layer = torch.nn.Linear(2, 2)
    >>> handle = layer.register_forward_hook(lambda module, inputs, output: None)
    >>> is_bare(layer), is_bare(torch.nn.Linear(2, 2))
    (False, True)
    """
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(own) and "forward" not in vars(module) and not hooks._has_any_global_hook()


def is_traced() -> bool:
    """Whether a compiler, an exporter or a tracer is looking.

    >>> is_traced()
    False
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _is_plain_linear(layer: nn.Module, inputs: torch.Tensor) -> TypeGuard[nn.Linear]:
    return (
        type(layer) is nn.Linear
        and inputs.device.type == "cpu"
        and not is_traced()
        and not torch._C._is_any_autocast_enabled()
        and is_plain(inputs)
        and type(weight := layer.weight) is nn.Parameter
        and weight.dtype == inputs.dtype
        and is_bare(layer)
    )


def _onednn() -> Callable[..., Any] | None:
    """A linear layer with an activation by oneDNN, an operator that torch's own compiler calls; None without it."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default
