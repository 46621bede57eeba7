"""What an optimizer should know of a parameter, said where the parameter is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Tag:
    """Whether a parameter decays, what it is, and which learning-rate group it is in."""

    weight_decay: bool = True
    role: str = "weight"
    group: str = "body"


POSITION_BIAS = Tag(weight_decay=False, role="position_bias")
LAYER_SCALE = Tag(weight_decay=False, role="layer_scale")


def tag(module: nn.Module, **tags: Tag) -> None:
    """Tag parameters of `module` by name. Kept on the module, so that a copy of it keeps them.

    >>> layer = torch.nn.Linear(2, 2)
    >>> tag(layer, weight=Tag(weight_decay=False))
    >>> parameter_tags(layer)["weight"].weight_decay
    False
    """
    module.__dict__.setdefault("_parameter_tags", {}).update(tags)


def set_group(module: nn.Module, group: str) -> None:
    """Put all parameters of `module` into a learning-rate group; a group set further in wins."""
    module.__dict__["_parameter_group"] = group


def parameter_tags(model: nn.Module) -> dict[str, Tag]:
    """The tag of every parameter; what nobody tagged decays unless it is a vector (a bias, a norm).

    >>> sorted(name for name, tag in parameter_tags(torch.nn.LayerNorm(2)).items() if tag.weight_decay)
    []
    """
    found: dict[str, Tag] = {}
    _collect(model, "", "body", found)
    return found


def _collect(module: nn.Module, prefix: str, group: str, found: dict[str, Tag]) -> None:
    group = module.__dict__.get("_parameter_group", group)
    own: Mapping[str, Tag] = module.__dict__.get("_parameter_tags", {})
    for name, parameter in module.named_parameters(recurse=False):
        given = own.get(name)
        if given is None:
            given = Tag(weight_decay=parameter.dim() > 1, role="weight" if parameter.dim() > 1 else "vector")
        found[prefix + name] = given if given.group != "body" else replace(given, group=group)
    for name, child in module.named_children():
        _collect(child, f"{prefix}{name}.", group, found)


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer; `scales` multiplies the learning rate of named groups.

    >>> groups = parameter_groups(torch.nn.Linear(2, 2), 1e-3, 0.05)
    >>> [(group["name"], group["weight_decay"]) for group in groups]
    [('body', 0.05), ('body, no decay', 0.0)]
    """
    tags = parameter_tags(model)
    unknown = set(scales or {}) - {given.group for given in tags.values()}
    if unknown:
        raise ValueError(
            f"scales names groups that the model lacks: {sorted(unknown)}; "
            f"it has {sorted({given.group for given in tags.values()})}"
        )
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        given = tags[name]
        key = (given.group, given.weight_decay)
        if key not in groups:
            groups[key] = {
                "name": given.group if given.weight_decay else f"{given.group}, no decay",
                "params": [],
                "lr": learning_rate * (scales or {}).get(given.group, 1.0),
                "weight_decay": weight_decay if given.weight_decay else 0.0,
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())
