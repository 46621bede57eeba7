"""A linear layer on the CPU together with what stands beside it, in fewer passes over memory.

A large map is read and written again for a bias, for an activation and for a shortcut. Whoever watches or has replaced
a layer (hooks, adapters, quantization, compilers) meets the plain calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from vicinal.ops.side_by_side import is_plain


class AddsTo(nn.Module):
    """A module that can add its result to a shortcut itself: `forward(inputs, shortcut)`."""

    def forward(self, inputs: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        """What it makes of the inputs; with a shortcut, the sum of both."""
        raise NotImplementedError


def add_linear(
    shortcut: torch.Tensor, inputs: torch.Tensor, layer: nn.Module, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`shortcut + layer(inputs)`; without gradients written to `out`, if that is given.

    >>> layer = torch.nn.Linear(8, 4)
    >>> add_linear(torch.randn(2, 5, 4), torch.randn(2, 5, 8), layer).shape
    torch.Size([2, 5, 4])
    """
    if not _is_addable(shortcut, inputs, layer):
        return torch.add(shortcut, layer(inputs), out=out)
    weight, bias = _parameters(layer)
    total = torch.add(shortcut.flatten(0, -2), bias, out=None if out is None else out.flatten(0, -2))
    return total.addmm_(inputs.flatten(0, -2), weight.t()).view(shortcut.shape)


def linear_gelu(inputs: torch.Tensor, layer: nn.Module, act: nn.Module) -> torch.Tensor:
    """`act(layer(inputs))`; where no gradient is wanted and `act` is the exact GELU, in one pass by oneDNN.

    >>> with torch.no_grad():
    ...     linear_gelu(torch.randn(2, 5, 8), torch.nn.Linear(8, 4), torch.nn.GELU()).shape
    torch.Size([2, 5, 4])
    """
    if not is_exact_gelu(act) or not _is_plain_linear(layer, inputs):
        result: torch.Tensor = act(layer(inputs))
        return result
    return gelu_product(inputs, layer.weight, layer.bias)


def gelu_product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The exact GELU of a linear layer of plain tensors on the CPU, by oneDNN in one pass where no gradient is wanted.

    >>> gelu_product(torch.zeros(2, 8), torch.ones(4, 8), torch.zeros(4)).sum().item()
    0.0
    """
    product = None if torch.is_grad_enabled() or inputs.dtype != torch.float32 or not inputs.numel() else _onednn()
    if product is None:
        return nn.functional.gelu(nn.functional.linear(inputs, weight, bias))
    result: torch.Tensor = product(inputs, weight, bias, "gelu", [], "none")
    return result


def is_exact_gelu(act: nn.Module | None) -> bool:
    """Whether an activation is torch's GELU without approximation, and nobody watches it.

    >>> is_exact_gelu(torch.nn.GELU()), is_exact_gelu(torch.nn.GELU("tanh")), is_exact_gelu(torch.nn.SiLU())
    (True, False, False)
    """
    return type(act) is nn.GELU and act.approximate == "none" and is_bare(act)


def linear_gelu_linear(
    shortcut: torch.Tensor, inputs: torch.Tensor, first: nn.Module, act: nn.Module, second: nn.Module
) -> torch.Tensor:
    """`shortcut + second(act(first(inputs)))`, with less fresh memory where what lies between is large.

    >>> first, second = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
    >>> inputs = torch.randn(2, 5, 8)
    >>> linear_gelu_linear(inputs, inputs, first, torch.nn.GELU(), second).shape
    torch.Size([2, 5, 8])
    """
    if not _is_large(inputs, first, act) or not _is_addable(shortcut, inputs, second):
        return add_linear(shortcut, linear_gelu(inputs, first, act), second)
    if torch.is_grad_enabled():
        return add_linear(shortcut, _FrugalGelu.apply(first(inputs)), second)
    out = torch.empty(shortcut.shape, dtype=shortcut.dtype)
    tensors = (inputs.flatten(0, -2), shortcut.flatten(0, -2), out.flatten(0, -2))
    pieces = -(-_bytes_after(inputs, first) // PIECE)
    for part, beside, room in zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True):
        add_linear(beside, linear_gelu(part, first, act), second, out=room)
    return out


LARGE = 32 << 20
"""Bytes. Larger pieces of memory glibc asks the system for, page by page, and gives back, in every call."""

PIECE = 8 << 20
"""Bytes of what lies between two linear layers that are worked on at once, where all would be large."""


class _FrugalGelu(torch.autograd.Function):
    """GELU whose result goes to a linear layer and nowhere else: its gradient is ours to write over."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        return nn.functional.gelu(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,), (inputs,) = grads, ctx.saved_tensors
        result: torch.Tensor
        if torch.is_grad_enabled() or not is_plain(grad) or not grad.is_contiguous():
            result = torch.ops.aten.gelu_backward(grad, inputs)
        else:
            result = torch.ops.aten.gelu_backward.grad_input(grad, inputs, grad_input=grad)
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


def _is_addable(shortcut: torch.Tensor, inputs: torch.Tensor, layer: nn.Module) -> bool:
    is_like = shortcut.shape[:-1] == inputs.shape[:-1] and shortcut.dtype == inputs.dtype
    # compilers cannot look into `is_plain`, and it is not asked while they look on
    return is_like and _is_plain_linear(layer, inputs) and layer.bias is not None and is_plain(shortcut)


def _is_large(inputs: torch.Tensor, first: nn.Module, act: nn.Module) -> bool:
    """Whether what a linear layer and the exact GELU make is large."""
    if inputs.numel() * inputs.element_size() <= LARGE // 64:  # quick for the many that are not
        return False
    is_gelu = is_exact_gelu(act) and forward_ad._current_level < 0
    return is_gelu and _is_plain_linear(first, inputs) and _bytes_after(inputs, first) > LARGE


def _bytes_after(inputs: torch.Tensor, layer: nn.Module) -> int:
    """What a linear layer makes of the inputs takes so many bytes."""
    weight, _ = _parameters(layer)
    return math.prod(inputs.shape[:-1]) * weight.shape[0] * inputs.element_size()


def _parameters(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias


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
