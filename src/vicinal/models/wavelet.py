"""The discriminator of StyleSwin and StyleNAT: convolutions on Haar wavelets, each with its spectral norm at one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from vicinal.models import loading
from vicinal.models.family import Family
from vicinal.models.layout import Layout, Rule, State, rule
from vicinal.models.stylenat import check_image_size

GROUP = 4
"""Samples that are compared with each other, where a batch divides into so many."""

_TAPS = (1.0, 3.0, 3.0, 1.0)


@dataclass(frozen=True)
class WaveletConfig:
    """A discriminator of square images; `widths` by resolution from 4x4 on, as in `StyleNatConfig`."""

    image_size: int = 256
    widths: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128, 64, 32)
    channels: int = 3

    def __post_init__(self) -> None:
        levels = check_image_size(self.image_size)
        if levels < 3:
            raise ValueError(f"image_size of a discriminator must be at least 16, got {self.image_size}")
        if len(self.widths) < levels or min(self.widths[:levels]) < 1:
            raise ValueError(f"widths must be {levels} positive numbers (4x4 to the image), got {self.widths}")
        if self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")


def to_wavelets(image: torch.Tensor) -> torch.Tensor:
    """Haar's wavelets: `[batch, c, height, width]` to `[batch, 4 * c, height / 2, width / 2]`.

    The parts are in order: means, differences down, differences across, differences of both.

    >>> to_wavelets(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().tolist()
    [5.0, -2.0, -1.0, 0.0]
    """
    upper, lower = image[:, :, ::2], image[:, :, 1::2]
    low, high = (upper + lower) / 2, (upper - lower) / 2
    parts = [part[..., ::2] + sign * part[..., 1::2] for sign in (1, -1) for part in (low, high)]
    return torch.cat(parts, 1)


def from_wavelets(parts: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_wavelets`.

    >>> image = torch.randn(1, 3, 4, 6)
    >>> bool((from_wavelets(to_wavelets(image)) - image).abs().max() < 1e-6)
    True
    """
    low, down, across, both = parts.chunk(4, 1)
    rows = []
    for sign in (1, -1):
        left, right = low + sign * down, across + sign * both
        rows.append(torch.stack(((left + right) / 2, (left - right) / 2), -1).flatten(-2))
    return torch.stack(rows, -2).flatten(-3, -2)


def blurred(image: torch.Tensor, padding: int, stride: int = 1) -> torch.Tensor:
    """The filter (1, 3, 3, 1) / 8 along both axes of `[batch, c, height, width]`, with black around.

    >>> blurred(torch.ones(1, 2, 8, 8), padding=1, stride=2).shape
    torch.Size([1, 2, 4, 4])
    """
    taps = image.new_tensor(_TAPS) / sum(_TAPS)
    channels = image.shape[1]
    kernel = (taps[:, None] * taps).expand(channels, 1, -1, -1)
    return functional.conv2d(image, kernel, stride=stride, padding=padding, groups=channels)


class SpectralConv(nn.Module):
    """A convolution with its spectral norm at one, a bias, a leaky ReLU of slope 0.2 times sqrt(2).

    With `halves` the map is blurred and halved.

    >>> SpectralConv(8, 16, 3, halves=True)(torch.randn(1, 8, 12, 12)).shape
    torch.Size([1, 16, 6, 6])
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int, *, halves: bool = False) -> None:
        super().__init__()
        stride, padding = (2, 0) if halves else (1, kernel_size // 2)
        self.halves, self.kernel_size = halves, kernel_size
        self.conv = spectral_norm(nn.Conv2d(dim, out_dim, kernel_size, stride, padding, bias=False))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, dim, height, width]` to `[batch, out_dim, ...]`."""
        if self.halves:
            inputs = blurred(inputs, (len(_TAPS) - 2 + self.kernel_size) // 2)
        return activated(self.conv(inputs), self.bias.view(-1, 1, 1))


def activated(inputs: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A leaky ReLU after a bias; the factor keeps the variance.

    >>> activated(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 1.0])).tolist()
    [2.8284270763397217, -0.5656854510307312]
    """
    return functional.leaky_relu(inputs + bias, 0.2) * math.sqrt(2)


class WaveletBlock(nn.Module):
    """Two convolutions; the second halves the map."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = SpectralConv(dim, dim, 3)
        self.conv2 = SpectralConv(dim, out_dim, 3, halves=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, dim, height, width]` to `[batch, out_dim, height / 2, width / 2]`."""
        result: torch.Tensor = self.conv2(self.conv1(inputs))
        return result


class WaveletDiscriminator(nn.Module):
    """How real images look: `[batch, channels, height, width]` to scores `[batch, 1]`.

    Groups of a batch are compared, so that it can tell when a generator makes always the same.

    >>> model = WaveletDiscriminator(WaveletConfig(16, (8, 8, 8)))
    >>> model(torch.randn(4, 3, 16, 16)).shape
    torch.Size([4, 1])
    """

    def __init__(self, config: WaveletConfig) -> None:
        super().__init__()
        self.config = config
        levels, wavelets = check_image_size(config.image_size), 4 * config.channels
        # the largest map is half the image; it has the width of the whole one, all others that of their size
        dims = [config.widths[levels - 1], *reversed(config.widths[: levels - 2])]
        self.enters = nn.ModuleList(SpectralConv(wavelets, dim, 1) for dim in dims)
        self.blocks = nn.ModuleList(WaveletBlock(dim, after) for dim, after in itertools.pairwise(dims))
        dim = dims[-1]
        self.last = SpectralConv(dim + 1, dim, 3)
        self.hidden = spectral_norm(nn.Linear(16 * dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.score = spectral_norm(nn.Linear(dim, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores, above zero for images that look real."""
        size = self.config.image_size
        if images.shape[1:] != (self.config.channels, size, size):
            raise ValueError(
                f"images must be [batch, {self.config.channels}, {size}, {size}], got {tuple(images.shape)}"
            )
        wavelets = to_wavelets(images)
        maps = self.enters[0](wavelets)
        for block, enter in zip(self.blocks, list(self.enters)[1:], strict=True):
            wavelets = to_wavelets(blurred(from_wavelets(wavelets), padding=1, stride=2))
            maps = enter(wavelets) + block(maps)
        maps = self.last(torch.cat((maps, variety(maps)), 1))
        hidden = activated(self.hidden(maps.flatten(1)), self.bias)
        result: torch.Tensor = self.score(hidden)
        return result


def variety(maps: torch.Tensor) -> torch.Tensor:
    """How much samples of a group differ, as a channel: `[batch, c, height, width]` to `[batch, 1, height, width]`.

    >>> variety(torch.ones(4, 2, 3, 3)).amax() < 1e-3
    tensor(True)
    """
    batch, _, height, width = maps.shape
    group = next(size for size in range(min(batch, GROUP), 0, -1) if batch % size == 0)
    spread = maps.unflatten(0, (group, -1)).var(0, correction=0)
    return (spread + 1e-8).sqrt().mean((1, 2, 3)).repeat(group)[:, None, None, None].expand(-1, 1, height, width)


def _spectral(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        rule(f"{ours}.parametrizations.weight.original", f"{theirs}.weight_orig"),
        rule(f"{ours}.parametrizations.weight.0._u", f"{theirs}.weight_u"),
        rule(f"{ours}.parametrizations.weight.0._v", f"{theirs}.weight_v"),
        rule(f"{ours}.bias", f"{theirs}.bias"),
    )


_RULES = (
    *_spectral("enters.{i}.conv", "from_rgbs.{i}.conv.0"),
    rule("enters.{i}.bias", "from_rgbs.{i}.conv.1.bias"),
    *_spectral("blocks.{i}.conv1.conv", "convs.{i}.conv1.0"),
    rule("blocks.{i}.conv1.bias", "convs.{i}.conv1.1.bias"),
    *_spectral("blocks.{i}.conv2.conv", "convs.{i}.conv2.1"),
    rule("blocks.{i}.conv2.bias", "convs.{i}.conv2.2.bias"),
    *_spectral("last.conv", "final_conv.0"),
    rule("last.bias", "final_conv.1.bias"),
    *_spectral("hidden", "final_linear.0"),
    rule("bias", "final_linear.1.bias"),
    *_spectral("score", "final_linear.2"),
)


def _filters(state: Mapping[str, torch.Tensor]) -> State:
    """The fixed filters that the published class keeps among its weights."""
    low, high = torch.tensor([1.0, 1.0]) / math.sqrt(2), torch.tensor([-1.0, 1.0]) / math.sqrt(2)
    haar = {"ll": low[:, None] * low, "lh": high[:, None] * low, "hl": low[:, None] * high, "hh": high[:, None] * high}
    inverse = {name: -part if name in ("lh", "hl") else part for name, part in haar.items()}
    taps = torch.tensor(_TAPS) / sum(_TAPS)
    made = {f"dwt.{name}": part for name, part in haar.items()}
    for name in state:
        kind, level, *_ = name.split(".")
        if name.endswith("conv2.1.weight_orig"):
            made[f"convs.{level}.conv2.0.kernel"] = taps[:, None] * taps
        elif kind == "from_rgbs" and level != "0" and name.endswith("weight_orig"):
            made |= {f"from_rgbs.{level}.dwt.{part}": tensor for part, tensor in haar.items()}
            made |= {f"from_rgbs.{level}.iwt.{part}": tensor for part, tensor in inverse.items()}
            made[f"from_rgbs.{level}.downsample.kernel"] = taps[:, None] * taps
    return made


FAMILY = Family(
    {"stylenat_ffhq256": WaveletConfig(256), "stylenat_ffhq1024": WaveletConfig(1024)},
    WaveletDiscriminator,
    {"published": Layout(_RULES, ignored=r"(^|\.)(dwt|iwt)\.\w\w$|\.kernel$", derived=_filters)},
    kind="generator",
)
"""Not among `create_model`'s names: what it is for is training, and going on with it."""


def load(model: WaveletDiscriminator, state: Mapping[str, torch.Tensor]) -> str:
    """Fill a discriminator from our own or the published names (`checkpoint.read(file, "d")`); tells which."""
    return loading.load(model, state, FAMILY)
