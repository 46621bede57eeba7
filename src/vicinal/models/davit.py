"""DaViT: blocks that alternate windows of tokens and groups of channels, with convolutions for positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from vicinal.layers.attention import PadMode, PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.channel_attention import ChannelAttention
from vicinal.layers.convolution import Depthwise
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import PoolFirstHead, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, Rule, rule
from vicinal.pattern.axis import Window


@dataclass(frozen=True)
class DavitConfig:
    """A DaViT; each of the `depths` counts a window block and a channel block."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path_rate: float
    window_size: int = 7
    pad_mode: PadMode = "legacy"
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"davit_tiny": DavitConfig((96, 192, 384, 768), (1, 1, 3, 1), (3, 6, 12, 24), 0.1)}


def build(config: DavitConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    rates = drop_rates(config.depths, config.drop_path_rate)
    patches = partial(ConvPatches, use_whole_patches=True)
    for level, (dim, heads) in enumerate(zip(config.dims, config.num_heads, strict=True)):
        windows = partial(PatternAttention, dim, heads, Window(config.window_size), pad_mode=config.pad_mode)
        blocks = [
            Block(dim, mixer(), Mlp(dim, 4 * dim), drop_rate=rate, positions=(Depthwise(dim), Depthwise(dim)))
            for rate in rates[level]
            for mixer in (windows, partial(ChannelAttention, dim, heads))
        ]
        into = config.dims[level - 1]
        down = patches(into, dim, kernel_size=2, stride=2, norm_before=nn.LayerNorm) if level else None
        stages.append(Stage(blocks, dim=dim, downsample=down))
    stem = patches(config.in_channels, config.dims[0], kernel_size=7, stride=4, padding=3, norm_after=nn.LayerNorm)
    head = PoolFirstHead(config.dims[-1], config.num_classes)
    model = Pyramid(stem, stages, head, in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02))  # convolutions keep torch's draw
    return model


MOST_PAIRS = 9
"""Pairs of blocks in the longest stage of any DaViT."""


def _rules() -> tuple[Rule, ...]:
    """Their blocks hold a pair of ours each: `blocks.0` ours is `blocks.0.0` theirs, `blocks.1` is `blocks.0.1`."""
    inner = (
        ("position1.conv.", "cpe1.proj."),
        ("position2.conv.", "cpe2.proj."),
        ("mixer.", "attn."),
        ("", ""),
    )
    return tuple(
        rule(
            f"stages.{{i}}.blocks.{block}.{ours}{{rest}}",
            f"stages.{{i}}.blocks.{block // 2}.{block % 2}.{theirs}{{rest}}",
        )
        for block in range(2 * MOST_PAIRS)
        for ours, theirs in inner
    )


TIMM_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "stem.conv.{rest}"),
        rule("stem.norm_after.{rest}", "stem.norm.{rest}"),
        rule("stages.{i}.downsample.norm_before.{rest}", "stages.{i}.downsample.norm.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "stages.{i}.downsample.conv.{rest}"),
        *_rules(),
        rule("head.norm.{rest}", "head.norm.{rest}"),
        rule("head.classifier.{rest}", "head.fc.{rest}"),
        rule("norms.{i}.{rest}", "norms.{i}.{rest}"),
    )
)

FAMILY = Family(
    VARIANTS, build, {"timm": TIMM_LAYOUT}, {"davit_tiny": (Published("timm/davit_tiny.msft_in1k", "timm"),)}
)
