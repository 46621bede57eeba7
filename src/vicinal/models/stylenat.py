"""StyleNAT: a style-based generator whose heads look through different neighborhoods in the same layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block
from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.norm import GridInstanceNorm, Modulated
from vicinal.layers.tags import Tag, tag
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, State, reshaped, rule, split
from vicinal.pattern import Full, Heads, Near, heads

FIRST = 4
"""Tokens along each side of the learned constant that every image grows from."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5,), (0.5,))
"""Pixels in 0..1 become -1..1."""


@dataclass(frozen=True)
class StyleNatConfig:
    """A generator of square images. Lists by level begin at 4x4; what lies beyond `image_size` is not used.

    `kernel_sizes` and `dilations` give each level its head groups, a list of one is repeated for the other's groups;
    the 4x4 level attends to all of itself and ignores them. `normalization` is the mean and the deviation that were
    taken out of the pixels (0..1) it learned from, each one number or one per channel.
    """

    image_size: int = 256
    widths: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128, 64, 32)
    kernel_sizes: tuple[tuple[int, ...], ...] = ((3,), (7,), (7,), (7,), (7,), (7,), (7,), (7,), (7,))
    dilations: tuple[tuple[int, ...], ...] = ((1,), (1,), (1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128))
    head_dim: int = 32
    min_heads: int = 4
    depth: int = 2
    mlp_ratio: float = 4
    latent_size: int = 512
    mapping_depth: int = 8
    mapping_rate: float = 0.01
    channels: int = 3
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    def __post_init__(self) -> None:
        levels = check_image_size(self.image_size)
        for name in ("widths", "kernel_sizes", "dilations"):
            if len(getattr(self, name)) < levels:
                raise ValueError(
                    f"{name} must have an entry for each of {levels} levels (4x4 to {self.image_size}x"
                    f"{self.image_size}), got {len(getattr(self, name))}"
                )
        for width in self.widths[:levels]:
            if width < 8 or width % 8 or width % self.heads(width):
                raise ValueError(
                    f"widths must be multiples of 8 that their {self.heads(width)} heads divide, got {width}"
                )
        for name in ("depth", "latent_size", "mapping_depth", "channels", "min_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mlp_ratio", "mapping_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if len(self.normalization) != 2 or any(len(part) not in (1, self.channels) for part in self.normalization):
            raise ValueError(
                f"normalization must be a mean and a deviation, each one number or {self.channels} (one per channel), "
                f"got {self.normalization}"
            )
        if not all(deviation > 0 for deviation in self.normalization[1]):
            raise ValueError(f"normalization's deviations must be above 0, got {self.normalization[1]}")
        for level in range(1, levels):
            self.pattern(level)

    @property
    def levels(self) -> int:
        """How many resolutions, 4x4 among them."""
        return check_image_size(self.image_size)

    def heads(self, width: int) -> int:
        """Heads of a level so wide."""
        return max(width // self.head_dim, self.min_heads)

    def pattern(self, level: int) -> Heads:
        """Who sees whom at a level above 4x4: groups of heads, in order, larger ones last.

        >>> StyleNatConfig().pattern(3)
        heads(Near(7), Near(7, dilation=4), sizes=(8, 8))
        """
        size, count = FIRST * 2**level, self.heads(self.widths[level])
        kernels, dilations = (
            group * max(len(self.kernel_sizes[level]), len(self.dilations[level])) if len(group) == 1 else group
            for group in (self.kernel_sizes[level], self.dilations[level])
        )
        where = f"at level {level} ({size}x{size})"
        if not kernels or len(kernels) != len(dilations):
            raise ValueError(
                f"kernel_sizes and dilations must have as many groups {where}, or one of them a single one, got "
                f"{self.kernel_sizes[level]} and {self.dilations[level]}"
            )
        if len(kernels) > count:
            raise ValueError(
                f"kernel_sizes and dilations give {len(kernels)} head groups {where}, but it has {count} heads"
            )
        for kernel, dilation in zip(kernels, dilations, strict=True):
            if kernel * dilation > size:
                raise ValueError(f"kernel_sizes times dilations must fit the map {where}, got {kernel} x {dilation}")
        groups = len(kernels)
        sizes = tuple(count // groups + (group >= groups - count % groups) for group in range(groups))
        return heads(*(Near(k, dilation=d) for k, d in zip(kernels, dilations, strict=True)), sizes=sizes)


def check_image_size(size: int) -> int:
    """How many levels an image has, or `ValueError` for a size that is no power of two.

    >>> check_image_size(256)
    7
    """
    if not isinstance(size, int) or size < 2 * FIRST or size & (size - 1):
        raise ValueError(f"image_size must be a power of two from {2 * FIRST} on, got {size}")
    return size.bit_length() - FIRST.bit_length() + 1


class PixelNorm(nn.Module):
    """Vectors `[batch, dim]` to length sqrt(dim).

    >>> PixelNorm()(torch.full((1, 4), 5.0)).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return inputs * (inputs.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class EqualLinear(nn.Module):
    """A linear layer whose weights are scaled when used, so that all learn at the same rate, times `rate`.

    With `is_activated` a leaky ReLU of slope 0.2 follows, times sqrt(2), which keeps the variance.

    >>> EqualLinear(8, 4, rate=0.01, is_activated=True)(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(self, dim: int, out_dim: int, *, rate: float = 1.0, is_activated: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, dim) / rate)
        self.bias = nn.Parameter(torch.zeros(out_dim))
        self.rate, self.is_activated = rate, is_activated

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` to `[..., out_dim]`."""
        scale = self.rate / math.sqrt(self.weight.shape[1])
        out = functional.linear(inputs, self.weight * scale, self.bias * self.rate)
        return functional.leaky_relu(out, 0.2) * math.sqrt(2) if self.is_activated else out


class Grow(nn.Module):
    """From one level to the next: twice the grid, other channels, and a learned amount of where each token is.

    >>> Grow(16, 8, size=8)(torch.randn(1, 4, 4, 16)).shape
    torch.Size([1, 8, 8, 8])
    """

    def __init__(self, dim: int, out_dim: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduction = nn.Linear(dim, out_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.positions: torch.Tensor
        self.register_buffer("positions", sines(size, out_dim // 2), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, dim]` to `[batch, 2 * height, 2 * width, out_dim]`."""
        grown = functional.interpolate(channels_first(inputs), scale_factor=2.0, mode="bilinear")
        out: torch.Tensor = self.reduction(self.norm(channels_last(grown)))
        size = len(self.positions)
        across, down = self.positions.expand(size, -1, -1), self.positions[:, None].expand(-1, size, -1)
        return out + (self.alpha * torch.cat((across, down), -1)).to(out.dtype)


def sines(length: int, dim: int) -> torch.Tensor:
    """Sines, then cosines, of the places 1, 2, ... at `dim / 2` wavelengths from 2 pi to 20000 pi: `[length, dim]`.

    >>> sines(8, 4).shape
    torch.Size([8, 4])
    """
    half = dim // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
    angles = torch.arange(1, length + 1)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)


class ToPixels(nn.Module):
    """A level's share of the image, added to that of the levels below.

    >>> ToPixels(16, 3)(torch.randn(1, 8, 8, 16), torch.randn(1, 3, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, channels)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: torch.Tensor, below: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, height, width, dim]` to `[batch, channels, height, width]`, over an image as large or half of it."""
        image = channels_first(self.linear(inputs) + self.bias)
        if below is None:
            return image
        return image + (below if below.shape[2:] == image.shape[2:] else doubled(below))


def doubled(image: torch.Tensor) -> torch.Tensor:
    """Twice as large, by the filter (1, 3, 3, 1) / 4 along each axis, with black around it.

    >>> doubled(torch.tensor([[[[4.0]]]])).flatten().tolist()
    [2.25, 2.25, 2.25, 2.25]
    """
    # inside a black frame that is what bilinear interpolation does
    framed = functional.pad(image, (1, 1, 1, 1))
    return functional.interpolate(framed, scale_factor=2.0, mode="bilinear")[:, :, 2:-2, 2:-2]


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next where there is one."""

    def __init__(self, config: StyleNatConfig, level: int) -> None:
        super().__init__()
        dim, size = config.widths[level], FIRST * 2**level
        self.blocks = nn.ModuleList(self._block(config, level, dim) for _ in range(config.depth))
        is_last = level == config.levels - 1
        self.grow = None if is_last else Grow(dim, config.widths[level + 1], 2 * size)

    @staticmethod
    def _block(config: StyleNatConfig, level: int, dim: int) -> Block:
        pattern = config.pattern(level) if level else Full()
        mixer = PatternAttention(
            dim, config.heads(dim), pattern, rel_pos_bias=True, table_grid=None if level else (FIRST, FIRST)
        )

        def norm(dim: int) -> Modulated:
            affine = EqualLinear(config.latent_size, 2 * dim)
            return Modulated(GridInstanceNorm(), dim, config.latent_size, offset=0.0, affine=affine)

        return Block(dim, mixer, Mlp(dim, int(dim * config.mlp_ratio)), norm=norm)

    def forward(self, inputs: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, dim]` and a latent per block `[batch, depth, latent]` to the next level's input."""
        for block, latent in zip(self.blocks, latents.unbind(1), strict=True):
            inputs = block(inputs, latent)
        return inputs if self.grow is None else self.grow(inputs)


class StyleNAT(nn.Module):
    """A generator: latents `[batch, latent_size]` to images `[batch, channels, height, width]`, normalized.

    >>> model = vicinal.create_model("stylenat_fashion32")
    >>> model(torch.randn(2, model.latent_size)).shape
    torch.Size([2, 1, 32, 32])
    """

    def __init__(self, config: StyleNatConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_size, self.image_size, self.channels = config.latent_size, config.image_size, config.channels
        self.latents = config.levels * config.depth
        sizes = (config.latent_size, config.latent_size)
        layers = [EqualLinear(*sizes, rate=config.mapping_rate, is_activated=True) for _ in range(config.mapping_depth)]
        self.norm, self.mapper = PixelNorm(), nn.Sequential(*layers)
        self.constant = nn.Parameter(torch.randn(1, config.widths[0], FIRST, FIRST))
        tag(self, constant=Tag(weight_decay=False, role="constant"))
        self.levels = nn.ModuleList(Level(config, level) for level in range(config.levels))
        # a level is drawn after it has grown, so with the width of the next
        widths = (*config.widths[1 : config.levels], config.widths[config.levels - 1])
        self.to_pixels = nn.ModuleList(ToPixels(width, config.channels) for width in widths)
        initialize(self, linear=truncated(0.02), position_bias=truncated(0.02))
        for part in self.to_pixels:
            assert isinstance(part, ToPixels)
            nn.init.xavier_normal_(part.linear.weight, gain=0.02)

    def mapping(self, z: torch.Tensor) -> torch.Tensor:
        """Latents as drawn to latents that styles are linear in: `[batch, latent]` both."""
        if z.dim() != 2 or z.shape[1] != self.latent_size:
            raise ValueError(f"z must be [batch, {self.latent_size}], got {tuple(z.shape)}")
        result: torch.Tensor = self.mapper(self.norm(z))
        return result

    def synthesis(self, w: torch.Tensor) -> torch.Tensor:
        """Mapped latents, `[batch, latent]` or one for each block `[batch, latents, latent]`, to images."""
        if w.dim() == 2:
            w = w[:, None].expand(-1, self.latents, -1)
        if w.dim() != 3 or w.shape[1:] != (self.latents, self.latent_size):
            size, found = self.latent_size, tuple(w.shape)
            raise ValueError(f"w must be [batch, {size}] or [batch, {self.latents}, {size}], got {found}")
        maps = channels_last(self.constant).expand(w.shape[0], -1, -1, -1)
        image: torch.Tensor | None = None
        for level, to_pixels, latents in zip(self.levels, self.to_pixels, w.split(self.config.depth, 1), strict=True):
            maps = level(maps, latents)
            image = to_pixels(maps, image)
        assert image is not None
        return image

    def forward(
        self, z: torch.Tensor, *, truncation: float = 1.0, mean_latent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images of latents. `truncation` below 1 pulls them towards the mean: less variety, fewer failures."""
        w = self.mapping(z)
        if truncation != 1.0:
            mean = self.mean_latent() if mean_latent is None else mean_latent
            w = mean + truncation * (w - mean)
        return self.synthesis(w)

    @torch.no_grad()
    def mean_latent(self, count: int = 4096, seed: int = 0) -> torch.Tensor:
        """The mean of `count` mapped latents, `[1, latent]`, the same for a seed."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(count, self.latent_size, generator=generator).to(self.constant)
        return self.mapping(z).mean(0, keepdim=True)

    def to_bytes(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images as uint8 of the same shape."""
        mean, std = (images.new_tensor(part).view(-1, 1, 1) for part in self.config.normalization)
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def from_bytes(self, images: torch.Tensor) -> torch.Tensor:
        """Bytes `[batch, channels, height, width]` as the normalized images that it learns from."""
        mean, std = (self.constant.new_tensor(part).view(-1, 1, 1) for part in self.config.normalization)
        return (images.to(self.constant) / 255 - mean) / std


def build(config: StyleNatConfig) -> StyleNAT:
    """The generator of a configuration, with fresh weights."""
    return StyleNAT(config)


_FASHION = StyleNatConfig(
    image_size=32,
    widths=(96, 96, 48, 16),
    kernel_sizes=((3,), (7,), (5,), (5,)),
    dilations=((1,), (1,), (1, 3), (1, 6)),
    min_heads=2,
    depth=1,
    mlp_ratio=2,
    latent_size=64,
    mapping_depth=4,
    channels=1,
    normalization=HALVES,
)

VARIANTS = {
    "stylenat_ffhq256": StyleNatConfig(256),
    "stylenat_ffhq1024": StyleNatConfig(1024),
    "stylenat_fashion32": _FASHION,
}

_BLOCK, _THEIRS = "levels.{i}.blocks.{j}.", "layers.{i}.blocks.{j}."
_RULES = (
    rule("mapper.{i}.{rest}", "style.{i+1}.{rest}"),
    rule("constant", "input.input"),
    rule(_BLOCK + "norm1.affine.{rest}", _THEIRS + "norm1.style.{rest}"),
    rule(_BLOCK + "norm2.affine.{rest}", _THEIRS + "norm2.style.{rest}"),
    rule(_BLOCK + "mixer.{rest}", _THEIRS + "attn.{rest}"),
    rule(_BLOCK + "mlp.{rest}", _THEIRS + "mlp.{rest}"),
    rule("levels.{i}.grow.{rest}", "layers.{i}.upsample.{rest}"),
    rule("to_pixels.{i}.linear.weight", "to_rgbs.{i}.conv.weight", reshaped(2, 3)),
    rule("to_pixels.{i}.linear.bias", "to_rgbs.{i}.conv.bias"),
    rule("to_pixels.{i}.bias", "to_rgbs.{i}.bias", reshaped(0, 2, 3)),
)
_RPB = _BLOCK + "mixer.rpb."
_SPLIT_RULES = (
    rule((_RPB + "0", _RPB + "1"), (_THEIRS + "attn.rpb0", _THEIRS + "attn.rpb1")),
    rule(_RPB + "0", (_THEIRS + "attn.rpb0", _THEIRS + "attn.rpb1"), split(1, 1)),
)
_IGNORED = r"relative_position_index$|_float_tensor$|to_rgbs\.\d+\.upsample\.kernel$"


def _buffers(state: Mapping[str, torch.Tensor]) -> State:
    """Tensors that a strict load over there wants, and that hold nothing learned."""
    made: State = {}
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    for name in state:
        if name.endswith("attn.rpb"):
            made[name.removesuffix("rpb") + "relative_position_index"] = _relative_index()
        elif name.endswith("upsample.alpha"):
            made[name.removesuffix("alpha") + "sin_pos_embed._float_tensor"] = torch.zeros(1)
            level = name.split(".")[1]
            made[f"to_rgbs.{level}.upsample.kernel"] = taps[:, None] * taps / 16
    return made


def _relative_index() -> torch.Tensor:
    """Where in a flattened table each (query, key) of the 4x4 map reads: by key minus query, as in our own table."""
    places = torch.cartesian_prod(torch.arange(FIRST), torch.arange(FIRST))
    apart = places[None] - places[:, None] + FIRST - 1
    return apart[..., 0] * (2 * FIRST - 1) + apart[..., 1]


def _hint(state: Mapping[str, torch.Tensor], model: nn.Module) -> str:
    """What size a checkpoint makes, where it is another than the model's."""
    assert isinstance(model, StyleNAT)
    found = [re.match(r"(?:layers|levels)\.(\d+)\.blocks", name) for name in state]
    levels = max((int(match[1]) + 1 for match in found if match is not None), default=0)
    size = FIRST * 2 ** (levels - 1)
    if not levels or size == model.image_size:
        return ""
    return f"it is of a generator of {size}x{size} images, this one makes {model.image_size}x{model.image_size}; "


_SITE = "https://shi-labs.com/projects/stylenat/checkpoints/"

FAMILY = Family(
    VARIANTS,
    build,
    {
        "published": Layout(_RULES, ignored=_IGNORED, derived=_buffers),
        "published split-head": Layout((*_SPLIT_RULES, *_RULES), ignored=_IGNORED, derived=_buffers),
    },
    {
        "stylenat_ffhq256": (Published(f"{_SITE}FFHQ256_940k_flip.pt", "published split-head"),),
        "stylenat_ffhq1024": (Published(f"{_SITE}FFHQ1024_700k.pt", "published split-head"),),
    },
    kind="generator",
    hint=_hint,
)
