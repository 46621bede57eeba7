"""Inception-v3 as the published Fréchet distances use it: the weights of 2015 and their three oddities.

Mean pooling leaves the frame out of the mean, the last block pools by maximum, and pictures are scaled to -1..1. Names
are those of the file `pt_inception-2015-12-05-6726825d.pth` of the pytorch-fid project, which is not fetched here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from vicinal.metrics.extractor import Network, fill

SIZE = 299
"""Pixels a side, whatever the pictures were."""


@dataclass(frozen=True)
class Convolution:
    """A convolution with norm and rectifier. With stride 1 it keeps the size, with stride 2 it has no frame."""

    name: str
    kernel_size: int | tuple[int, int]
    width: int
    stride: int = 1
    is_framed: bool = True

    def build(self, channels: int) -> nn.Module:
        """The module for so many input channels."""
        size = (self.kernel_size, self.kernel_size) if isinstance(self.kernel_size, int) else self.kernel_size
        padding = (size[0] // 2, size[1] // 2) if self.is_framed and self.stride == 1 else (0, 0)
        unit = nn.Sequential()
        unit.add_module("conv", nn.Conv2d(channels, self.width, size, self.stride, padding, bias=False))
        unit.add_module("bn", nn.BatchNorm2d(self.width, eps=0.001))
        unit.add_module("relu", nn.ReLU())
        return unit


@dataclass(frozen=True)
class Pool:
    """Pooling over 3x3 by `kind` `"mean"` or `"max"`; with stride 1 it keeps the size."""

    kind: str
    stride: int = 1

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        frame = 1 if self.stride == 1 else 0
        if self.kind == "max":
            return functional.max_pool2d(maps, 3, self.stride, frame)
        return functional.avg_pool2d(maps, 3, self.stride, frame, count_include_pad=False)


Link = Convolution | Pool | tuple[Convolution, Convolution]
"""A step of a branch; a pair looks at the same maps and is put side by side."""

Branch = tuple[Link, ...]


class Mixed(nn.Module):
    """Branches over the same maps, side by side: `[batch, channels, height, width]` to wider, perhaps smaller maps."""

    def __init__(self, channels: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            width = channels
            for link in branch:
                pair = link if isinstance(link, tuple) else (link,)
                made = [one for one in pair if isinstance(one, Convolution)]
                for one in made:
                    self.add_module(one.name, one.build(width))
                width = sum(one.width for one in made) or width
            self.width += width

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """All branches, concatenated along channels."""
        found = []
        for branch in self.branches:
            inner = maps
            for link in branch:
                inner = self._step(link, inner)
            found.append(inner)
        return torch.cat(found, 1)

    def _step(self, link: Link, maps: torch.Tensor) -> torch.Tensor:
        if isinstance(link, Pool):
            return link(maps)
        pair = link if isinstance(link, tuple) else (link,)
        found = [self.get_submodule(one.name)(maps) for one in pair]
        return found[0] if len(found) == 1 else torch.cat(found, 1)


def _c(name: str, kernel_size: int | tuple[int, int], width: int, stride: int = 1) -> Convolution:
    return Convolution(f"branch{name}", kernel_size, width, stride)


def _fine(pooled: int) -> tuple[Branch, ...]:
    """Blocks at 35x35."""
    return (
        (_c("1x1", 1, 64),),
        (_c("5x5_1", 1, 48), _c("5x5_2", 5, 64)),
        (_c("3x3dbl_1", 1, 64), _c("3x3dbl_2", 3, 96), _c("3x3dbl_3", 3, 96)),
        (Pool("mean"), _c("_pool", 1, pooled)),
    )


def _middle(width: int) -> tuple[Branch, ...]:
    """Blocks at 17x17, whose 7x7 convolutions are cut into rows and columns."""
    row, column = (1, 7), (7, 1)
    double = (
        _c("7x7dbl_1", 1, width),
        _c("7x7dbl_2", column, width),
        _c("7x7dbl_3", row, width),
        _c("7x7dbl_4", column, width),
        _c("7x7dbl_5", row, 192),
    )
    return (
        (_c("1x1", 1, 192),),
        (_c("7x7_1", 1, width), _c("7x7_2", row, width), _c("7x7_3", column, 192)),
        double,
        (Pool("mean"), _c("_pool", 1, 192)),
    )


def _coarse(pool: Pool) -> tuple[Branch, ...]:
    """Blocks at 8x8."""
    row, column = (1, 3), (3, 1)
    return (
        (_c("1x1", 1, 320),),
        (_c("3x3_1", 1, 384), (_c("3x3_2a", row, 384), _c("3x3_2b", column, 384))),
        (
            _c("3x3dbl_1", 1, 448),
            _c("3x3dbl_2", 3, 384),
            (_c("3x3dbl_3a", row, 384), _c("3x3dbl_3b", column, 384)),
        ),
        (pool, _c("_pool", 1, 192)),
    )


STEM: tuple[Convolution | Pool, ...] = (
    Convolution("Conv2d_1a_3x3", 3, 32, stride=2),
    Convolution("Conv2d_2a_3x3", 3, 32, is_framed=False),
    Convolution("Conv2d_2b_3x3", 3, 64),
    Pool("max", 2),
    Convolution("Conv2d_3b_1x1", 1, 80),
    Convolution("Conv2d_4a_3x3", 3, 192, is_framed=False),
    Pool("max", 2),
)

BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _fine(32),
    "Mixed_5c": _fine(64),
    "Mixed_5d": _fine(64),
    "Mixed_6a": (
        (_c("3x3", 3, 384, 2),),
        (_c("3x3dbl_1", 1, 64), _c("3x3dbl_2", 3, 96), _c("3x3dbl_3", 3, 96, 2)),
        (Pool("max", 2),),
    ),
    "Mixed_6b": _middle(128),
    "Mixed_6c": _middle(160),
    "Mixed_6d": _middle(160),
    "Mixed_6e": _middle(192),
    "Mixed_7a": (
        (_c("3x3_1", 1, 192), _c("3x3_2", 3, 320, 2)),
        (
            _c("7x7x3_1", 1, 192),
            _c("7x7x3_2", (1, 7), 192),
            _c("7x7x3_3", (7, 1), 192),
            _c("7x7x3_4", 3, 192, 2),
        ),
        (Pool("max", 2),),
    ),
    "Mixed_7b": _coarse(Pool("mean")),
    "Mixed_7c": _coarse(Pool("max")),
}


class Inception(nn.Module):
    """Colors `[batch, 3, 299, 299]` in -1..1 to the features `[batch, 2048]` before the classifier.

    >>> sum(parameter.numel() for parameter in Inception().parameters())
    21785568
    """

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for part in STEM:
            if isinstance(part, Convolution):
                self.add_module(part.name, part.build(width))
                width = part.width
        for name, branches in BLOCKS.items():
            block = Mixed(width, branches)
            self.add_module(name, block)
            width = block.width

    def forward(self, colors: torch.Tensor) -> torch.Tensor:
        """The last block's maps, averaged."""
        maps = colors
        for part in STEM:
            maps = part(maps) if isinstance(part, Pool) else self.get_submodule(part.name)(maps)
        for name in BLOCKS:
            maps = self.get_submodule(name)(maps)
        return maps.mean((2, 3))


def inception(state: Mapping[str, torch.Tensor]) -> Network:
    """The extractor of the published protocol, from the weights of pytorch-fid's file.

    >>> inception({name: tensor for name, tensor in Inception().state_dict().items()}).name
    'Inception-v3 (pytorch-fid) at 299x299'
    """
    net = Inception()
    fill(net, state, "pytorch-fid's Inception-v3", ("fc.weight", "fc.bias"))
    return Network("Inception-v3 (pytorch-fid)", net, SIZE, zero=127.5, one=127.5)
