"""LITv2: convolution in the channel mixer alone in the early stages, HiLo attention in the late ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.combine import SplitHeads
from vicinal.layers.convolution import Depthwise
from vicinal.layers.deformable import DeformableMerging
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pooled import AveragePool, PooledAttention
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.models.family import Family
from vicinal.models.layout import Layout, rule, split
from vicinal.models.swin import patches
from vicinal.pattern.axis import Full, Window


@dataclass(frozen=True)
class LitConfig:
    """A LITv2; `windows` per stage: 0 no attention, 1 plain attention, else HiLo with `alpha` of the heads low."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path_rate: float
    windows: tuple[int, ...] = (0, 0, 2, 1)
    alpha: float = 0.9
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"litv2_small": LitConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2)}


def build(config: LitConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    rates = drop_rates(config.depths, config.drop_path_rate)
    for level, (heads, window) in enumerate(zip(config.num_heads, config.windows, strict=True)):
        dim = config.dim * 2**level
        blocks = [
            Block(
                dim,
                hilo(dim, heads, window, config.alpha) if window else None,
                Mlp(dim, 4 * dim, between=Depthwise(4 * dim)),
                drop_rate=rate,
            )
            for rate in rates[level]
        ]
        stages.append(Stage(blocks, dim=dim, downsample=DeformableMerging(dim // 2, dim) if level else None))
    stem = patches(config.in_channels, config.dim)
    model = Pyramid(stem, stages, Head(stages[-1].dim, config.num_classes), in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02))  # convolutions keep torch's draw, offsets their zeros
    return model


def hilo(dim: int, num_heads: int, window: int, alpha: float) -> nn.Module:
    """High heads in small windows beside low heads on an averaged map; plain attention where the window is 1."""
    low = int(num_heads * alpha)
    if window == 1 or low == 0:
        return PatternAttention(dim, num_heads, Full() if window == 1 else Window(window))
    width = dim // num_heads
    high = PatternAttention(dim, num_heads - low, Window(window), out_dim=(num_heads - low) * width)
    return SplitHeads(high, PooledAttention(dim, low, AveragePool(window), out_dim=low * width))


_BLOCK, _THERE = "stages.{i}.blocks.{j}.", "layers.{i}.blocks.{j}."
_HIGH, _LOW = _BLOCK + "mixer.mixers.0.", _BLOCK + "mixer.mixers.1."

PUBLISHED_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "patch_embed.proj.{rest}"),
        rule("stem.norm_after.{rest}", "patch_embed.norm.{rest}"),
        rule("stages.{i}.downsample.norm.{rest}", "layers.{i-1}.downsample.norm_layer.{rest}"),
        rule("stages.{i}.downsample.offset.{rest}", "layers.{i-1}.downsample.dconv.conv_offset.{rest}"),
        rule("stages.{i}.downsample.{rest}", "layers.{i-1}.downsample.dconv.{rest}"),
        rule(_HIGH + "qkv.{rest}", _THERE + "attn.h_qkv.{rest}"),
        rule(_HIGH + "proj.{rest}", _THERE + "attn.h_proj.{rest}"),
        rule(_LOW + "q.{rest}", _THERE + "attn.l_q.{rest}"),
        rule(_LOW + "kv.{rest}", _THERE + "attn.l_kv.{rest}"),
        rule(_LOW + "proj.{rest}", _THERE + "attn.l_proj.{rest}"),
        rule(_BLOCK + "mixer.qkv.{rest}", (_THERE + "attn.l_q.{rest}", _THERE + "attn.l_kv.{rest}"), split(1, 2)),
        rule(_BLOCK + "mixer.proj.{rest}", _THERE + "attn.l_proj.{rest}"),
        rule(_BLOCK + "mlp.between.conv.{rest}", _THERE + "mlp.dwconv.dwconv.{rest}"),
        rule(_BLOCK + "{rest}", _THERE + "{rest}"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", "head.{rest}"),
        rule("norms.{i}.{rest}", "norm{i}.{rest}"),
    )
)

FAMILY = Family(VARIANTS, build, {"published": PUBLISHED_LAYOUT})
