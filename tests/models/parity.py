"""Comparing one of our models with another library's, under the same weights."""

from __future__ import annotations

import torch
from torch import nn

from vicinal.models.layout import Layout, to_ours, to_theirs

TOLERANCE = 1e-5
"""Of the largest difference, in units of the largest value."""


def take_over(layout: Layout, ours: nn.Module, theirs: nn.Module) -> None:
    """Give our model their weights; both ways through the layout must be strict."""
    state, fit = to_ours(layout, theirs.state_dict(), {name: t.shape for name, t in ours.state_dict().items()})
    assert fit.is_exact, str(fit)
    ours.load_state_dict(state, strict=True)
    back = to_theirs(layout, ours.state_dict())
    theirs.load_state_dict(back, strict=True)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Our output equals theirs, and neither is trivial."""
    assert ours.shape == theirs.shape
    scale = theirs.abs().max().item()
    assert theirs.std() > 1e-3 * scale > 0
    assert (ours - theirs).abs().max().item() <= TOLERANCE * scale


def assert_gradients_close(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> None:
    """The gradient of the squared logits with respect to the images is the same through both models."""
    gradients = []
    for model in (ours, theirs):
        given = images.clone().requires_grad_()
        out = model(given)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), given)
        gradients.append(gradient)
    scale = gradients[1].abs().max().item()
    assert scale > 0
    assert (gradients[0] - gradients[1]).abs().max().item() <= 10 * TOLERANCE * scale
