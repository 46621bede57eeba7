"""PoolFormer: the mixer is an average over 3x3 places, minus the place itself."""

from __future__ import annotations

from dataclasses import dataclass

from vicinal.layers.block import Block, drop_rates
from vicinal.layers.convolution import PoolingDifference
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.norm import GridGroupNorm
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, reshaped, rule


@dataclass(frozen=True)
class PoolFormerConfig:
    """A PoolFormer."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    drop_path_rate: float
    kernel_size: int = 3
    layer_scale: float = 1e-5
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"poolformer_s12": PoolFormerConfig((64, 128, 320, 512), (2, 2, 6, 2), 0.1)}


def build(config: PoolFormerConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    for level, (dim, rates) in enumerate(
        zip(config.dims, drop_rates(config.depths, config.drop_path_rate), strict=True)
    ):
        down = ConvPatches(config.dims[level - 1], dim, kernel_size=3, stride=2, padding=1) if level else None
        blocks = [
            Block(
                dim,
                PoolingDifference(config.kernel_size),
                Mlp(dim, 4 * dim),
                norm=GridGroupNorm,
                layer_scale=config.layer_scale,
                drop_rate=rate,
            )
            for rate in rates
        ]
        stages.append(Stage(blocks, dim=dim, downsample=down))
    stem = ConvPatches(config.in_channels, config.dims[0], kernel_size=7, stride=4, padding=2)
    head = Head(config.dims[-1], config.num_classes, GridGroupNorm(config.dims[-1]))
    model = Pyramid(stem, stages, head, in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02))  # convolutions keep torch's draw
    return model


_BLOCK = "stages.{i}.blocks.{j}."
_THERE = "network.{i*2}.{j}."
_LAYER = "encoder.block.{i}.{j}."
_POINT = reshaped(-1, -1)

PUBLISHED_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "patch_embed.proj.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "network.{i*2-1}.proj.{rest}"),
        rule(_BLOCK + "mlp.fc1.weight", _THERE + "mlp.fc1.weight", _POINT),
        rule(_BLOCK + "mlp.fc2.weight", _THERE + "mlp.fc2.weight", _POINT),
        rule(_BLOCK + "gamma1", _THERE + "layer_scale_1"),
        rule(_BLOCK + "gamma2", _THERE + "layer_scale_2"),
        rule(_BLOCK + "{rest}", _THERE + "{rest}"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", "head.{rest}"),
        rule("norms.{i}.{rest}", "norm{i*2}.{rest}"),
    )
)

TRANSFORMERS_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "encoder.patch_embeddings.0.projection.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "encoder.patch_embeddings.{i}.projection.{rest}"),
        rule(_BLOCK + "norm1.{rest}", _LAYER + "before_norm.{rest}"),
        rule(_BLOCK + "norm2.{rest}", _LAYER + "after_norm.{rest}"),
        rule(_BLOCK + "mlp.fc1.weight", _LAYER + "output.conv1.weight", _POINT),
        rule(_BLOCK + "mlp.fc2.weight", _LAYER + "output.conv2.weight", _POINT),
        rule(_BLOCK + "mlp.fc1.{rest}", _LAYER + "output.conv1.{rest}"),
        rule(_BLOCK + "mlp.fc2.{rest}", _LAYER + "output.conv2.{rest}"),
        rule(_BLOCK + "gamma1", _LAYER + "layer_scale_1"),
        rule(_BLOCK + "gamma2", _LAYER + "layer_scale_2"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", "classifier.{rest}"),
        rule("norms.{i}.{rest}", "norms.{i}.{rest}"),
    ),
    prefix="poolformer.",
    bare=("classifier.", "norm."),
)

FAMILY = Family(
    VARIANTS,
    build,
    {"published": PUBLISHED_LAYOUT, "transformers": TRANSFORMERS_LAYOUT},
    {
        "poolformer_s12": (
            Published("https://github.com/sail-sg/poolformer/releases/download/v1.0/poolformer_s12.pth.tar"),
            Published("sail/poolformer_s12", "transformers"),
        )
    },
)
