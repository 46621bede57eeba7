"""What the tests of models share: hosts that can be imported, and random weights that are not too tame."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn


def _mend_torchvision() -> None:
    """Declare the operators without which torchvision, and with it every host, cannot be imported.

    The wheel on PyPI is built for CUDA; beside a CPU build of torch its own library does not load.
    """
    found = importlib.util.find_spec("torchvision")
    library = None if found is None or found.origin is None else Path(found.origin).parent / "_C.so"
    if library is None or not library.is_file() or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        ctypes.CDLL(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_mend_torchvision()


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
