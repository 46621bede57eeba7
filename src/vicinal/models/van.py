"""VAN: a gate from a large kernel as mixer, batch norm in the blocks, a layer norm at the end of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from vicinal.layers.block import Block, drop_rates
from vicinal.layers.convolution import Depthwise, LargeKernelAttention
from vicinal.layers.initialization import fan_out, initialize
from vicinal.layers.mlp import Mlp
from vicinal.layers.norm import GridBatchNorm
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, reshaped, rule


@dataclass(frozen=True)
class VanConfig:
    """A VAN."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    drop_path_rate: float
    layer_scale: float = 1e-2
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"van_b0": VanConfig((32, 64, 160, 256), (3, 3, 5, 2), (8, 8, 4, 4), 0.1)}


def build(config: VanConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    rates = drop_rates(config.depths, config.drop_path_rate)
    patches = partial(ConvPatches, norm_after=GridBatchNorm)
    for level, (dim, ratio) in enumerate(zip(config.dims, config.mlp_ratios, strict=True)):
        blocks = [
            Block(
                dim,
                LargeKernelAttention(dim),
                Mlp(dim, ratio * dim, between=Depthwise(ratio * dim)),
                norm=GridBatchNorm,
                layer_scale=config.layer_scale,
                drop_rate=rate,
            )
            for rate in rates[level]
        ]
        down = patches(config.dims[level - 1], dim, kernel_size=3, stride=2, padding=1) if level else None
        stages.append(Stage(blocks, dim=dim, downsample=down, norm=nn.LayerNorm(dim, eps=1e-6)))
    stem = patches(config.in_channels, config.dims[0], kernel_size=7, stride=4, padding=3)
    head = Head(config.dims[-1], config.num_classes, nn.Identity())  # the last stage's norm is the final one
    model = Pyramid(stem, stages, head, in_channels=config.in_channels)
    initialize(model, linear=fan_out, convolution=fan_out)  # the linear layers of blocks are 1x1 convolutions there
    head.reset(config.num_classes)
    return model


_BLOCK, _THERE = "stages.{i}.blocks.{j}.", "block{i+1}.{j}."
_GATE = _THERE + "attn.spatial_gating_unit."
_POINT = reshaped(-1, -1)

PUBLISHED_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "patch_embed1.proj.{rest}"),
        rule("stem.norm_after.{rest}", "patch_embed1.norm.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "patch_embed{i+1}.proj.{rest}"),
        rule("stages.{i}.downsample.norm_after.{rest}", "patch_embed{i+1}.norm.{rest}"),
        rule("stages.{i}.norm.{rest}", "norm{i+1}.{rest}"),
        rule(_BLOCK + "mixer.proj_in.weight", _THERE + "attn.proj_1.weight", _POINT),
        rule(_BLOCK + "mixer.proj_in.bias", _THERE + "attn.proj_1.bias"),
        rule(_BLOCK + "mixer.near.conv.{rest}", _GATE + "conv0.{rest}"),
        rule(_BLOCK + "mixer.far.conv.{rest}", _GATE + "conv_spatial.{rest}"),
        rule(_BLOCK + "mixer.point.weight", _GATE + "conv1.weight", _POINT),
        rule(_BLOCK + "mixer.point.bias", _GATE + "conv1.bias"),
        rule(_BLOCK + "mixer.proj_out.weight", _THERE + "attn.proj_2.weight", _POINT),
        rule(_BLOCK + "mixer.proj_out.bias", _THERE + "attn.proj_2.bias"),
        rule(_BLOCK + "mlp.fc1.weight", _THERE + "mlp.fc1.weight", _POINT),
        rule(_BLOCK + "mlp.fc2.weight", _THERE + "mlp.fc2.weight", _POINT),
        rule(_BLOCK + "mlp.between.conv.{rest}", _THERE + "mlp.dwconv.dwconv.{rest}"),
        rule(_BLOCK + "gamma1", _THERE + "layer_scale_1"),
        rule(_BLOCK + "gamma2", _THERE + "layer_scale_2"),
        rule(_BLOCK + "{rest}", _THERE + "{rest}"),
        rule("head.classifier.{rest}", "head.{rest}"),
        rule("norms.{i}.{rest}", "feature_norm{i+1}.{rest}"),
    )
)

_HUB = "https://huggingface.co/Visual-Attention-Network/VAN-Tiny-original/resolve/main/van_tiny_754.pth.tar"

FAMILY = Family(VARIANTS, build, {"published": PUBLISHED_LAYOUT}, {"van_b0": (Published(_HUB),)})
