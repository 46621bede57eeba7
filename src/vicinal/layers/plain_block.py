"""The commonest block, attention and an MLP over shortcuts, as a dozen calls of torch.

Thirty blocks of small maps spend more time between operations than a few blocks of large ones: in the calls of modules,
in reading their attributes, in asking layer by layer whether anybody watches. Here that is asked once for a block.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as hooks

from vicinal.layers import one_pass
from vicinal.layers.attention import PatternAttention
from vicinal.layers.mlp import Mlp
from vicinal.ops.side_by_side import is_plain

Weights = tuple[torch.Tensor, torch.Tensor]


def run(block: nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
    """What a pre-norm block of exactly these layers makes of the inputs; None where it or the moment is another.

    >>> from vicinal.layers.block import Block
    >>> block, inputs = Block(32, PatternAttention(32, 2, Near(3)), Mlp(32, 64)), torch.randn(1, 6, 6, 32)
    >>> run(block, inputs).shape
    torch.Size([1, 6, 6, 32])
    >>> handle = block.mlp.register_forward_hook(lambda module, inputs, output: None)
    >>> run(block, inputs) is None
    True
    """
    if not _is_unwatched(inputs) or not _is_whole(block):
        return None
    inner = block._modules
    norm1, mixer, norm2, mlp = inner.get("norm1"), inner.get("mixer"), inner.get("norm2"), inner.get("mlp")
    if type(mixer) is not PatternAttention or type(mlp) is not Mlp or not (_is_bare(mixer) and _is_bare(mlp)):
        return None
    if mlp.__dict__.get("between", block) is not None or mixer.place.order is not None:
        return None
    first, second = _weights(norm1, nn.LayerNorm, inputs), _weights(norm2, nn.LayerNorm, inputs)
    proj = _weights(mixer._modules["proj"], nn.Linear, inputs)
    fc1, fc2 = (_weights(mlp._modules[name], nn.Linear, inputs) for name in ("fc1", "fc2"))
    if first is None or second is None or first[0].dim() != 1 or second[0].dim() != 1:
        return None
    if proj is None or fc1 is None or fc2 is None:
        return None
    if not one_pass.is_exact_gelu(mlp._modules["act"]) or _is_large(inputs, fc1[0]):
        return None
    assert isinstance(norm1, nn.LayerNorm)
    assert isinstance(norm2, nn.LayerNorm)
    width = list(inputs.shape[-1:])
    tokens = inputs.flatten(0, -2)
    normed = torch.layer_norm(inputs, width, *first, norm1.eps)
    attended = mixer._on_grid(normed).flatten(0, -2)
    tokens = torch.add(tokens, proj[1]).addmm_(attended, proj[0].t())
    normed = torch.layer_norm(tokens, width, *second, norm2.eps)
    hidden = one_pass.gelu_product(normed, *fc1)
    return torch.add(tokens, fc2[1]).addmm_(hidden, fc2[0].t()).view(inputs.shape)


def _is_unwatched(inputs: torch.Tensor) -> bool:
    return (
        not one_pass.is_traced()
        and not torch._C._is_any_autocast_enabled()
        and not hooks._has_any_global_hook()
        and is_plain(inputs)
        and inputs.device.type == "cpu"
        and inputs.dim() > 1
    )


def _is_whole(block: nn.Module) -> bool:
    """Whether the block has nothing beside its two branches, and drops none."""
    own = block.__dict__
    drop_path = own["_modules"]["drop_path"]
    return (
        own["norm_place"] == "pre"
        and own.get("position1", block) is None
        and own.get("position2", block) is None
        and own.get("gamma1", block) is None
        and own.get("gamma2", block) is None
        and (type(drop_path) is nn.Identity or not own["training"])
        and _is_bare(drop_path)
    )


def _is_bare(module: nn.Module) -> bool:
    """As `one_pass.is_bare`, without what holds for all modules at once."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _weights(layer: nn.Module | None, kind: type[nn.Module], inputs: torch.Tensor) -> Weights | None:
    """Weight and bias of a layer that is what it seems; None for any other."""
    if type(layer) is not kind or not _is_bare(layer):
        return None
    own = layer._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if type(weight) is not nn.Parameter or type(bias) is not nn.Parameter or weight.dtype != inputs.dtype:
        return None
    return weight, bias


def _is_large(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the hidden map is one that goes through in pieces."""
    return inputs.numel() * inputs.element_size() * weight.shape[0] > one_pass.LARGE * weight.shape[1]
