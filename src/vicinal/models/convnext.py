"""ConvNeXt: a pyramid whose mixer is a 7x7 depthwise convolution in front of the channel mixer, one branch a block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from vicinal.layers.block import Block, drop_rates
from vicinal.layers.convolution import Depthwise
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import PoolFirstHead, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, rule

norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class ConvNextConfig:
    """A ConvNeXt."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path_rate: float
    layer_scale: float = 1e-6
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {
    "convnext_tiny": ConvNextConfig((96, 192, 384, 768), (3, 3, 9, 3), 0.1),
    "convnext_large": ConvNextConfig((192, 384, 768, 1536), (3, 3, 27, 3), 0.5),
}


def build(config: ConvNextConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    rates = drop_rates(config.depths, config.drop_path_rate)
    for level, dim in enumerate(config.dims):
        blocks = [
            Block(dim, mixer(dim), None, norm=nn.Identity, layer_scale=config.layer_scale, drop_rate=rate)
            for rate in rates[level]
        ]
        stages.append(Stage(blocks, dim=dim, downsample=halving(config.dims[level - 1], dim) if level else None))
    stem = ConvPatches(config.in_channels, config.dims[0], kernel_size=4, stride=4, norm_after=norm)
    head = PoolFirstHead(config.dims[-1], config.num_classes, norm(config.dims[-1]))
    model = Pyramid(stem, stages, head, in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02), convolution=truncated(0.02))
    return model


def mixer(dim: int) -> nn.Module:
    """Depthwise convolution, norm, channel mixer."""
    return nn.Sequential(Depthwise(dim, 7), norm(dim), Mlp(dim, 4 * dim))


def halving(in_dim: int, dim: int) -> ConvPatches:
    """The downsampler: a norm, then patches of 2x2."""
    return ConvPatches(in_dim, dim, kernel_size=2, stride=2, norm_before=norm)


_BLOCK = "stages.{i}.blocks.{j}."

PATCH_RULES = (
    rule("stem.conv.{rest}", "downsample_layers.0.0.{rest}"),
    rule("stem.norm_after.{rest}", "downsample_layers.0.1.{rest}"),
    rule("stages.{i}.downsample.norm_before.{rest}", "downsample_layers.{i}.0.{rest}"),
    rule("stages.{i}.downsample.conv.{rest}", "downsample_layers.{i}.1.{rest}"),
    rule("head.norm.{rest}", "norm.{rest}"),
    rule("head.classifier.{rest}", "head.{rest}"),
    rule("norms.{i}.{rest}", "norm{i}.{rest}"),
)

PUBLISHED_LAYOUT = Layout(
    (
        *PATCH_RULES,
        rule(_BLOCK + "mixer.0.conv.{rest}", "stages.{i}.{j}.dwconv.{rest}"),
        rule(_BLOCK + "mixer.1.{rest}", "stages.{i}.{j}.norm.{rest}"),
        rule(_BLOCK + "mixer.2.fc1.{rest}", "stages.{i}.{j}.pwconv1.{rest}"),
        rule(_BLOCK + "mixer.2.fc2.{rest}", "stages.{i}.{j}.pwconv2.{rest}"),
        rule(_BLOCK + "gamma1", "stages.{i}.{j}.gamma"),
    )
)

_LAYER = "encoder.stages.{i}.layers.{j}."

TRANSFORMERS_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "embeddings.patch_embeddings.{rest}"),
        rule("stem.norm_after.{rest}", "embeddings.layernorm.{rest}"),
        rule("stages.{i}.downsample.norm_before.{rest}", "encoder.stages.{i}.downsampling_layer.0.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "encoder.stages.{i}.downsampling_layer.1.{rest}"),
        rule(_BLOCK + "mixer.0.conv.{rest}", _LAYER + "dwconv.{rest}"),
        rule(_BLOCK + "mixer.1.{rest}", _LAYER + "layernorm.{rest}"),
        rule(_BLOCK + "mixer.2.fc1.{rest}", _LAYER + "pwconv1.{rest}"),
        rule(_BLOCK + "mixer.2.fc2.{rest}", _LAYER + "pwconv2.{rest}"),
        rule(_BLOCK + "gamma1", _LAYER + "layer_scale_parameter"),
        rule("head.norm.{rest}", "layernorm.{rest}"),
        rule("head.classifier.{rest}", "classifier.{rest}"),
        rule("norms.{i}.{rest}", "hidden_states_norms.stage{i+1}.{rest}"),
    ),
    prefix="convnext.",
    bare=("classifier.",),
)

FAMILY = Family(
    VARIANTS,
    build,
    {"published": PUBLISHED_LAYOUT, "transformers": TRANSFORMERS_LAYOUT},
    {
        "convnext_tiny": (
            Published("https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth"),
            Published("facebook/convnext-tiny-224", "transformers"),
        ),
        "convnext_large": (
            Published("https://dl.fbaipublicfiles.com/convnext/convnext_large_1k_224_ema.pth"),
            Published("facebook/convnext-large-224", "transformers"),
        ),
    },
)
