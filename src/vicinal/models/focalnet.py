"""FocalNet: Swin's pyramid with focal modulation in place of attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from vicinal.layers.block import Block, drop_rates
from vicinal.layers.convolution import FocalModulation
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, reshaped, rule


@dataclass(frozen=True)
class FocalNetConfig:
    """A FocalNet; contexts grow over `levels` kernels, from `window` on by 2 each."""

    dim: int
    depths: tuple[int, ...]
    drop_path_rate: float
    levels: int
    window: int = 3
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"focalnet_tiny": FocalNetConfig(96, (2, 2, 6, 2), 0.2, levels=2)}


def build(config: FocalNetConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    patches = partial(ConvPatches, norm_after=nn.LayerNorm, use_whole_patches=True)
    for level, rates in enumerate(drop_rates(config.depths, config.drop_path_rate)):
        dim = config.dim * 2**level
        blocks = [
            Block(dim, FocalModulation(dim, config.levels, config.window), Mlp(dim, 4 * dim), drop_rate=rate)
            for rate in rates
        ]
        down = patches(dim // 2, dim, kernel_size=2, stride=2) if level else None
        stages.append(Stage(blocks, dim=dim, downsample=down))
    stem = patches(config.in_channels, config.dim, kernel_size=4, stride=4)
    model = Pyramid(stem, stages, Head(stages[-1].dim, config.num_classes), in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02))  # convolutions keep torch's draw
    return model


_BLOCK, _LAYER = "stages.{i}.blocks.{j}.", "encoder.stages.{i}.layers.{j}."

TRANSFORMERS_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
        rule("stem.norm_after.{rest}", "embeddings.norm.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "encoder.stages.{i-1}.downsample.projection.{rest}"),
        rule("stages.{i}.downsample.norm_after.{rest}", "encoder.stages.{i-1}.downsample.norm.{rest}"),
        *(
            rule(f"{_BLOCK}mixer.contexts.{level}.conv.{{rest}}", f"{_LAYER}modulation.focal_layers.{level}.0.{{rest}}")
            for level in range(4)
        ),
        rule(_BLOCK + "mixer.proj_in.{rest}", _LAYER + "modulation.projection_in.{rest}"),
        rule(_BLOCK + "mixer.modulator.weight", _LAYER + "modulation.projection_context.weight", reshaped(-1, -1)),
        rule(_BLOCK + "mixer.modulator.bias", _LAYER + "modulation.projection_context.bias"),
        rule(_BLOCK + "mixer.proj.{rest}", _LAYER + "modulation.projection_out.{rest}"),
        rule(_BLOCK + "{rest}", _LAYER + "{rest}"),
        rule("head.norm.{rest}", "layernorm.{rest}"),
        rule("head.classifier.{rest}", "classifier.{rest}"),
        rule("norms.{i}.{rest}", "hidden_states_norms.stage{i+1}.{rest}"),
    ),
    prefix="focalnet.",
    bare=("classifier.",),
)

FAMILY = Family(
    VARIANTS,
    build,
    {"transformers": TRANSFORMERS_LAYOUT},
    {"focalnet_tiny": (Published("microsoft/focalnet-tiny", "transformers"),)},
)
