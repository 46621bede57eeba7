"""Compact pyramids for small images, alike but for the token mixer: what mixers are compared on.

They are no published models and so have no name in `list_models`; a recipe describes one as a `CompactConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.convolution import Depthwise, PoolingDifference
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.norm import GridBatchNorm
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.layers.words import near, window
from vicinal.models.litv2 import hilo

Mixer = Literal["nat", "dinat", "swin", "hilo", "pooling", "convolution"]


@dataclass(frozen=True)
class CompactConfig:
    """A pyramid whose first map has half the image's sides, and each further one half of those before.

    `kernel_size` is the neighborhood, the window or the convolution; HiLo's windows are always 2 wide, pooling's
    always 3. Heads have 16 channels. `value_kernel` adds a depthwise convolution of the values to what neighborhood and
    window attention give, as CSWin does; 0 adds none. `conv_stem` makes the first map by three convolutions with batch
    norm and ReLU instead of two with a layer norm, and batch norm for the halvings: it learns faster from few epochs.
    """

    mixer: Mixer = "dinat"
    dim: int = 32
    depths: tuple[int, ...] = (2, 3)
    kernel_size: int = 7
    value_kernel: int = 0
    conv_stem: bool = False
    mlp_ratio: float = 2.0
    drop_path_rate: float = 0.0
    num_classes: int = 10
    in_channels: int = 1


def build(config: CompactConfig) -> Pyramid:
    """The model of a configuration, with fresh weights.

    >>> build(CompactConfig("swin"))(torch.randn(1, 1, 28, 28)).shape
    torch.Size([1, 10])
    """
    if config.mixer not in get_args(Mixer):
        raise ValueError(f"mixer must be one of {', '.join(get_args(Mixer))}, got {config.mixer!r}")
    if config.dim % 16 or config.dim < 16:
        raise ValueError(f"dim must be a multiple of 16, the width of a head, got {config.dim}")
    rates = drop_rates(config.depths, config.drop_path_rate)
    stages = []
    for level, depth in enumerate(config.depths):
        dim = config.dim * 2**level
        blocks = [
            Block(
                dim,
                _mixer(config, dim, layer),
                Mlp(dim, round(dim * config.mlp_ratio)),
                layer_scale=None,
                drop_rate=rates[level][layer],
            )
            for layer in range(depth)
        ]
        half = _normed if config.conv_stem else _half
        stages.append(Stage(blocks, dim=dim, downsample=half(dim // 2, dim) if level else None))
    stem = _stem(config)
    head = Head(stages[-1].dim, config.num_classes)
    model = Pyramid(stem, stages, head, stem_stride=2, in_channels=config.in_channels)
    # linear layers keep torch's draw: the usual deviation of 0.02 is for wide models, and starves ones this narrow
    initialize(model, position_bias=truncated(0.02))
    return model


def _stem(config: CompactConfig) -> nn.Module:
    dim, channels = config.dim, config.in_channels
    if config.conv_stem:
        return nn.Sequential(_normed(channels, dim, stride=1), _normed(dim, 2 * dim), _normed(2 * dim, dim, stride=1))
    whole = ConvPatches(channels, dim // 2, kernel_size=3, stride=1, padding=1)
    return nn.Sequential(whole, nn.GELU(), _half(dim // 2, dim))


def _half(in_dim: int, dim: int) -> ConvPatches:
    return ConvPatches(in_dim, dim, kernel_size=3, stride=2, padding=1, bias=False, norm_after=nn.LayerNorm)


def _normed(in_dim: int, dim: int, stride: int = 2) -> nn.Module:
    conv = ConvPatches(in_dim, dim, kernel_size=3, stride=stride, padding=1, bias=False, norm_after=GridBatchNorm)
    return nn.Sequential(conv, nn.ReLU())


def _mixer(config: CompactConfig, dim: int, layer: int) -> nn.Module:
    size, heads, is_odd = config.kernel_size, dim // 16, bool(layer % 2)

    def attend(pattern: object) -> nn.Module:
        values = Depthwise(dim, config.value_kernel) if config.value_kernel else None
        return PatternAttention(dim, heads, pattern, rel_pos_bias=True, value_mixer=values)  # type: ignore[arg-type]

    kinds: dict[str, Callable[[], nn.Module]] = {
        "nat": lambda: attend(near(size)),
        "dinat": lambda: attend(near(size, "max" if is_odd else 1)),
        "swin": lambda: attend(window(size, shift=size // 2 if is_odd else 0)),
        "hilo": lambda: hilo(dim, heads, 2, 0.5),
        "pooling": lambda: PoolingDifference(3),
        "convolution": lambda: nn.Sequential(Depthwise(dim, size), nn.Linear(dim, dim)),
    }
    return kinds[config.mixer]()


def of_equal_cost(config: CompactConfig, image_size: int, multiply_adds: int) -> CompactConfig:
    """The configuration with the `mlp_ratio` with which an image costs nearest to `multiply_adds`.

    A mixer that costs less gets a wider channel mixer. Every window is counted whole, as papers do.

    >>> goal = build(CompactConfig("nat")).cost(28).nominal
    >>> chosen = of_equal_cost(CompactConfig("pooling"), 28, goal)
    >>> chosen.mlp_ratio > 2, abs(build(chosen).cost(28).nominal / goal - 1) < 0.02
    (True, True)
    """
    one, two = (build(replace(config, mlp_ratio=ratio)).cost(image_size).nominal for ratio in (1.0, 2.0))
    ratio = 1.0 + (multiply_adds - one) / (two - one)  # the cost is linear in the width
    if ratio <= 0:
        raise ValueError(f"{config.mixer} costs {one} multiply-adds at mlp_ratio 1, too much for {multiply_adds}")
    return replace(config, mlp_ratio=math.ceil(ratio * config.dim) / config.dim)
