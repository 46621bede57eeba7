"""Optimizers from recipes and from the tags that layers put on their parameters."""

from __future__ import annotations

import torch
from torch import nn

from vicinal.layers.tags import parameter_groups
from vicinal.training.recipe import AdamW, Sgd


def make_optimizer(module: nn.Module, config: AdamW | Sgd) -> torch.optim.Optimizer:
    """The optimizer of what requires gradients in a module; each group keeps its full rate as `base_lr`.

    >>> optimizer = make_optimizer(torch.nn.Linear(2, 2), AdamW(weight_decay=0.1))
    >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    [('body', 0.1), ('body, no decay', 0.0)]
    """
    groups = parameter_groups(module, config.learning_rate, config.weight_decay, config.scales)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        group["base_lr"] = group["lr"]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"nothing in {type(module).__name__} requires gradients, so there is nothing to optimize")
    if isinstance(config, AdamW):
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon)
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.use_nesterov and config.momentum > 0
    )


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to `factor` of its full rate; returns the largest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)
