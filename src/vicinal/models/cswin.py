"""CSWin: half of the heads see a stripe down the map, half a stripe across it; a windowed convolution marks places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.combine import SplitChannels
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.layers.windowed import WindowedDepthwise
from vicinal.models.family import Family
from vicinal.models.layout import Layout, rule
from vicinal.pattern.axis import Full, Window
from vicinal.pattern.compose import heads


@dataclass(frozen=True)
class CswinConfig:
    """A CSWin; `stripes` are the stripes' widths, None where every token sees all."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path_rate: float
    stripes: tuple[int | None, ...] = (1, 2, 7, None)
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"cswin_tiny": CswinConfig(64, (1, 2, 21, 1), (2, 4, 8, 16), 0.2)}


def build(config: CswinConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    rates = drop_rates(config.depths, config.drop_path_rate)
    for level, (stripe, num_heads) in enumerate(zip(config.stripes, config.num_heads, strict=True)):
        dim = config.dim * 2**level
        blocks = [
            Block(dim, stripes(dim, num_heads, stripe), Mlp(dim, 4 * dim), drop_rate=rate) for rate in rates[level]
        ]
        down = ConvPatches(dim // 2, dim, kernel_size=3, stride=2, padding=1, norm_after=nn.LayerNorm)
        stages.append(Stage(blocks, dim=dim, downsample=down if level else None))
    stem = ConvPatches(config.in_channels, config.dim, kernel_size=7, stride=4, padding=2, norm_after=nn.LayerNorm)
    model = Pyramid(stem, stages, Head(stages[-1].dim, config.num_classes), in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02))  # convolutions keep torch's draw
    return model


def stripes(dim: int, num_heads: int, width: int | None) -> PatternAttention:
    """The mixer: two crossing stripes, or everything, with the position term on the values of each half."""
    if width is None:
        return PatternAttention(dim, num_heads, Full(), value_mixer=WindowedDepthwise(dim, (None, None)))
    down, across = (WindowedDepthwise(dim // 2, windows) for windows in ((None, width), (width, None)))
    pattern = heads((Full(), Window(width)), (Window(width), Full()))
    positions = SplitChannels((down, dim // 2), (across, dim // 2))
    return PatternAttention(dim, num_heads, pattern, value_mixer=positions)


_BLOCK, _THERE = "stages.{i}.blocks.{j}.", "stage{i+1}.{j}."

PUBLISHED_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "stage1_conv_embed.0.{rest}"),
        rule("stem.norm_after.{rest}", "stage1_conv_embed.2.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "merge{i}.conv.{rest}"),
        rule("stages.{i}.downsample.norm_after.{rest}", "merge{i}.norm.{rest}"),
        rule(_BLOCK + "mixer.value_mixer.conv.{rest}", _THERE + "attns.0.get_v.{rest}"),
        rule(_BLOCK + "mixer.value_mixer.mixers.0.conv.{rest}", _THERE + "attns.0.get_v.{rest}"),
        rule(_BLOCK + "mixer.value_mixer.mixers.1.conv.{rest}", _THERE + "attns.1.get_v.{rest}"),
        rule(_BLOCK + "mixer.{rest}", _THERE + "{rest}"),
        rule(_BLOCK + "{rest}", _THERE + "{rest}"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", "head.{rest}"),
        rule("norms.{i}.{rest}", "norm{i+1}.{rest}"),
    )
)

FAMILY = Family(VARIANTS, build, {"published": PUBLISHED_LAYOUT})
