"""Putting together attention over disjoint sets of keys, by their log-sum-exps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vicinal.ops.checks import check_tensor


def merge_pair(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs `[..., heads, dim]` and their lses `[..., heads]`, as if softmax had run over both sets."""
    top = torch.maximum(lse, other_lse).detach()
    top = torch.where(top == -math.inf, 0.0, top)
    weight, other_weight = torch.exp(lse - top), torch.exp(other_lse - top)
    total = weight + other_weight
    blind = total == 0
    safe = torch.where(blind, 1.0, total)
    merged = (weight / safe).unsqueeze(-1) * out + (other_weight / safe).unsqueeze(-1) * other_out
    return merged, torch.where(blind, -math.inf, top + torch.log(safe))


def merge_attentions(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention outputs over disjoint sets of keys into the attention over all of them.

    `outputs` are `[..., heads, value_dim]` and `lses` `[..., heads]` (natural logarithm). Gradients flow through
    both; a query that no part can see gives 0 and -inf.

    >>> query, key, value = torch.randn(3, 2, 10, 4, 8).unbind(0)
    >>> parts = [
    ...     vicinal.attention(query, k, v, Full(), return_lse=True) for k, v in zip(key.split(5, 1), value.split(5, 1))
    ... ]
    >>> merged, lse = merge_attentions(*zip(*parts))
    >>> torch.allclose(merged, vicinal.attention(query, key, value, Full()), atol=1e-6)
    True
    """
    if not len(outputs) or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attentions: outputs and lses must be lists of one length >= 1, got {len(outputs)} and {len(lses)}"
        )
    for number, (out, lse) in enumerate(zip(outputs, lses, strict=True)):
        check_tensor(f"merge_attentions: outputs[{number}]", out)
        check_tensor(f"merge_attentions: lses[{number}]", lse)
        if out.dtype != outputs[0].dtype:
            raise ValueError(
                f"merge_attentions: outputs[{number}] must have the dtype of outputs[0] ({outputs[0].dtype}), "
                f"got {out.dtype}"
            )
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"merge_attentions: outputs[{number}] must have shape {tuple(outputs[0].shape)} and lses[{number}] "
                f"{tuple(outputs[0].shape[:-1])}, got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    wide = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    merged, lse = outputs[0].to(wide), lses[0].to(wide)
    for out, other in zip(outputs[1:], lses[1:], strict=True):
        merged, lse = merge_pair(merged, lse, out.to(wide), other.to(wide))
    return merged.to(outputs[0].dtype), lse
