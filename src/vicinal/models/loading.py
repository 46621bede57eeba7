"""Putting a checkpoint into a model: which layout it has, whether it fits, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from vicinal.layers.pyramid import Features
from vicinal.layers.tags import parameter_tags
from vicinal.models.family import Family
from vicinal.models.layout import Fit, Layout, State, rule, to_ours

NATIVE = Layout((rule("{rest}", "{rest}"),))
"""Our own names, as `model.state_dict()` gives them."""


class CheckpointMismatch(ValueError):
    """A checkpoint that does not fit a model; `fit` says which keys are missing, extra or misshapen."""

    def __init__(self, message: str, fit: Fit) -> None:
        super().__init__(message)
        self.fit = fit


def layouts_of(family: Family) -> dict[str, Layout]:
    """The layouts a family's checkpoints may have, our own among them."""
    return {**family.layouts, "vicinal": family.layouts.get("vicinal", NATIVE)}


def match(
    state: Mapping[str, torch.Tensor], model: nn.Module, family: Family, *, use_classifier: bool = True
) -> tuple[str, State, Fit]:
    """The layout that fits best: its name, the tensors under our names, and how well it fits."""
    found: list[tuple[int, int, str, State, Fit]] = []
    for name, layout in layouts_of(family).items():
        ours, fit = _match(state, model, layout, None if use_classifier else family.classifier)
        found.append((len(fit.missing) + len(fit.extra) + len(fit.misshapen), len(found), name, ours, fit))
    _, _, best, ours, fit = min(found, key=lambda entry: entry[:2])
    return best, ours, fit


def _match(
    state: Mapping[str, torch.Tensor], model: nn.Module, layout: Layout, without: str | None
) -> tuple[State, Fit]:
    """How a state fits in one layout; what begins with `without` is not wanted."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    left_out = list(model.left_out) if isinstance(model, Features) else []
    if without is not None:
        left_out += [name for name in shapes if name.startswith(without)] or [without + "weight", without + "bias"]
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(without)}
    given = {layout.bare_name(name) for name in state}
    norms = [name for name in shapes if name.startswith("norms.")]
    if norms and not any(theirs in given for pair in layout.pairs(norms) for theirs in pair.theirs):
        shapes = {name: shape for name, shape in shapes.items() if name not in norms}  # fresh by design
    ours, fit = to_ours(layout, state, shapes)
    unwanted = {layout.name(theirs) for pair in layout.pairs(left_out) for theirs in pair.theirs}
    return ours, replace(fit, extra=tuple(name for name in fit.extra if name not in unwanted))


def load(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    family: Family,
    *,
    use_classifier: bool = True,
    resize_bias: bool = False,
) -> str:
    """Fill `model` from a checkpoint of any of its family's layouts; returns the layout's name.

    Every key must have its place, but what a `Features` leaves out and, without `use_classifier`, the classifier.
    With `resize_bias` position biases of another size are interpolated.
    """
    if resize_bias:
        state = _resized(state, model, family, use_classifier)
    layout, ours, fit = match(state, model, family, use_classifier=use_classifier)
    if not fit.is_exact:
        raise CheckpointMismatch(f"the checkpoint (read as {layout!r}) does not fit: {fit}", fit)
    incompatible = model.load_state_dict(ours, strict=False)
    assert not incompatible.unexpected_keys
    return layout


def _resized(
    state: Mapping[str, torch.Tensor], model: nn.Module, family: Family, use_classifier: bool
) -> Mapping[str, torch.Tensor]:
    """The checkpoint under our names, with its position biases as large as the model's."""
    _, ours, fit = match(state, model, family, use_classifier=use_classifier)
    if fit.missing or fit.extra:
        return state  # the error will say so
    own = model.state_dict()
    for name, tag in parameter_tags(model).items():
        if tag.role == "position_bias" and name in ours:
            ours[name] = resize_table(ours[name], tuple(own[name].shape[1:]))
    return ours


def resize_table(table: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """A position bias `[heads, height, width]` for another window, interpolated bicubically.

    >>> resize_table(torch.ones(2, 13, 13), (21, 21)).shape
    torch.Size([2, 21, 21])
    """
    if tuple(table.shape[1:]) == sizes or table.dim() != 3:
        return table
    return nn.functional.interpolate(table[None].float(), size=sizes, mode="bicubic")[0].to(table.dtype)
