"""What turns pictures into the features that distances are taken of, and what every such network needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import interpolate


class Extractor(Protocol):
    """Pictures uint8 `[batch, 1 or 3, height, width]` to features `[batch, features]`.

    `name` goes with every figure: distances by different extractors say nothing about each other.
    """

    @property
    def name(self) -> str:
        """The network, its weights, and the size it looks at."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


class Network:
    """An extractor around a network that takes colors `[batch, 3, size, size]`.

    Gray pictures become three equal colors, and every picture is stretched to `size` by plain bilinear interpolation
    without a filter against aliasing, as the published distances are. The network then gets `(pixels - zero) / one`.
    """

    def __init__(self, name: str, net: nn.Module, size: int, zero: float, one: float) -> None:
        self.net = net.eval().requires_grad_(False)
        self.size, self.zero, self.one = size, zero, one
        self.weights = name

    @property
    def name(self) -> str:
        """Which weights, at which size."""
        return f"{self.weights} at {self.size}x{self.size}"

    def to(self, device: torch.device | str) -> Network:
        """The same on another device."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        check_pictures(images)
        colors = images.to(next(self.net.parameters()).device).float().expand(-1, 3, -1, -1)
        colors = (colors - self.zero) / self.one
        if colors.shape[-2:] != (self.size, self.size):
            colors = interpolate(colors, (self.size, self.size), mode="bilinear", align_corners=False)
        features: torch.Tensor = self.net(colors)
        return features


def check_pictures(images: torch.Tensor) -> None:
    """Refuse what is no batch of 8-bit pictures."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "images must be uint8, as they are when a file of them is read, [batch, 1 or 3, height, width], got "
            f"{images.dtype} {list(images.shape)}"
        )


def fill(net: nn.Module, state: Mapping[str, torch.Tensor], what: str, left_out: tuple[str, ...]) -> None:
    """Load a published state into `net`; every key has to fit but `left_out`, the classifier that nobody needs here.

    Counters of batches, which old files do not have, are ignored.
    """
    given = {
        name: tensor
        for name, tensor in state.items()
        if name not in left_out and not name.endswith("num_batches_tracked")
    }
    wanted = {
        name: tensor.shape for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unknown": [name for name in given if name not in wanted],
        "of another shape": [name for name in wanted if name in given and given[name].shape != wanted[name]],
    }
    found = [f"{len(names)} {kind} (such as {names[0]})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"these are not the weights of {what}: {', '.join(found)}")
    net.load_state_dict(given, strict=False)
