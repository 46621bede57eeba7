"""The channel mixer: two linear layers, with a depthwise convolution between them where asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vicinal.layers.one_pass import AddsTo, add_linear, linear_gelu, linear_gelu_linear


class Mlp(AddsTo):
    """`dim -> hidden_dim -> dim` on the last axis; `between` sees the hidden grid before the activation.

    >>> Mlp(8, 32)(torch.randn(1, 5, 6, 8)).shape
    torch.Size([1, 5, 6, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        between: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.between = between
        self.act = act()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, inputs: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        """The same shape; with a shortcut, the sum of both."""
        if self.between is None:
            if shortcut is not None:
                return linear_gelu_linear(shortcut, inputs, self.fc1, self.act, self.fc2)
            hidden = linear_gelu(inputs, self.fc1, self.act)
        else:
            hidden = self.act(self.between(self.fc1(inputs)))
        if shortcut is not None:
            return add_linear(shortcut, hidden, self.fc2)
        result: torch.Tensor = self.fc2(hidden)
        return result
