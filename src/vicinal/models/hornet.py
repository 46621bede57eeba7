"""HorNet: ConvNeXt's pyramid with a recursive gated convolution as mixer, of higher order the coarser the stage."""

from __future__ import annotations

from dataclasses import dataclass

from vicinal.layers.block import Block, drop_rates
from vicinal.layers.convolution import RecursiveGate
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import PoolFirstHead, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches
from vicinal.models.convnext import PATCH_RULES, halving, norm
from vicinal.models.family import Family
from vicinal.models.layout import Layout, reshaped, rule


@dataclass(frozen=True)
class HorNetConfig:
    """A HorNet with 7x7 convolutions; `orders` are those of the gates, stage by stage."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    orders: tuple[int, ...]
    drop_path_rate: float
    layer_scale: float = 1e-6
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"hornet_tiny": HorNetConfig((64, 128, 256, 512), (2, 3, 18, 2), (2, 3, 4, 5), 0.2)}


def build(config: HorNetConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages = []
    rates = drop_rates(config.depths, config.drop_path_rate)
    for level, (dim, order) in enumerate(zip(config.dims, config.orders, strict=True)):
        blocks = [
            Block(
                dim,
                RecursiveGate(dim, order, scale=1 / 3),
                Mlp(dim, 4 * dim),
                norm=norm,
                layer_scale=config.layer_scale,
                drop_rate=rate,
            )
            for rate in rates[level]
        ]
        stages.append(Stage(blocks, dim=dim, downsample=halving(config.dims[level - 1], dim) if level else None))
    stem = ConvPatches(config.in_channels, config.dims[0], kernel_size=4, stride=4, norm_after=norm)
    head = PoolFirstHead(config.dims[-1], config.num_classes, norm(config.dims[-1]))
    model = Pyramid(stem, stages, head, in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02), convolution=truncated(0.02))
    return model


_BLOCK, _THERE = "stages.{i}.blocks.{j}.", "stages.{i}.{j}."
_POINT = reshaped(-1, -1)

# there is only one `{j}` a template can count by: the gates of a block are told one by one
_GATES = tuple(
    rule(_BLOCK + f"mixer.widen.{gate}.{ending}", _THERE + f"gnconv.pws.{gate}.{ending}", how)
    for gate in range(4)
    for ending, how in (("weight", _POINT), ("bias", reshaped()))
)

PUBLISHED_LAYOUT = Layout(
    (
        *PATCH_RULES,
        *_GATES,
        rule(_BLOCK + "mixer.proj_in.weight", _THERE + "gnconv.proj_in.weight", _POINT),
        rule(_BLOCK + "mixer.proj_out.weight", _THERE + "gnconv.proj_out.weight", _POINT),
        rule(_BLOCK + "mixer.depthwise.conv.{rest}", _THERE + "gnconv.dwconv.{rest}"),
        rule(_BLOCK + "mixer.{rest}", _THERE + "gnconv.{rest}"),
        rule(_BLOCK + "mlp.fc1.{rest}", _THERE + "pwconv1.{rest}"),
        rule(_BLOCK + "mlp.fc2.{rest}", _THERE + "pwconv2.{rest}"),
        rule(_BLOCK + "{rest}", _THERE + "{rest}"),
    )
)

FAMILY = Family(VARIANTS, build, {"published": PUBLISHED_LAYOUT})
