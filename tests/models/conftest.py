"""What the tests of models share: random weights that are not too tame."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def lively():
    """Draws every parameter of a module so that each one matters to the output, norms and biases too."""

    def draw(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    fan_in = parameter[0].numel()
                    parameter.normal_(std=fan_in**-0.5 if fan_in > 8 else 0.5)
                else:
                    parameter.uniform_(0.5, 1.5)
            for name, buffer in module.named_buffers():
                if name.endswith("running_mean"):
                    buffer.uniform_(-0.5, 0.5)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return module.eval()

    return draw
