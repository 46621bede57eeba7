"""One grid from end to end, 16 pixels a token: NAT, DiNAT, and a vision transformer with position bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from vicinal.layers.attention import PadMode, PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.words import AnyPattern
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, rule
from vicinal.models.swin import patches, position_index
from vicinal.pattern.axis import Full, Near


@dataclass(frozen=True)
class IsotropicConfig:
    """An isotropic model; its layers take the `patterns` in turn.

    The position bias of a `Full` axis is made for `image_size`; smaller images use a part of it, larger ones need
    it made larger.
    """

    dim: int
    num_heads: int
    drop_path_rate: float
    patterns: tuple[AnyPattern, ...]
    depth: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int = 224
    pad_mode: PadMode = "legacy"
    num_classes: int = 1000
    in_channels: int = 3


_NEAR, _APART = Near(7), Near(7, dilation=2)

VARIANTS = {
    "nat_isotropic_small": IsotropicConfig(384, 12, 0.1, (_NEAR,)),
    "nat_isotropic_base": IsotropicConfig(768, 24, 0.4, (_NEAR,)),
    "dinat_isotropic_small": IsotropicConfig(384, 12, 0.1, (_NEAR, _APART)),
    "dinat_isotropic_base": IsotropicConfig(768, 24, 0.4, (_NEAR, _APART)),
    "vitrpb_small": IsotropicConfig(384, 12, 0.1, (Full(),)),
    "vitrpb_base": IsotropicConfig(768, 24, 0.4, (Full(),)),
}


def build(config: IsotropicConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    dim, side = config.dim, config.image_size // config.patch_size
    if side < 1 or not config.patterns:
        raise ValueError(
            f"image_size must hold a patch of {config.patch_size} and patterns one pattern at least, "
            f"got image_size={config.image_size}, patterns={config.patterns}"
        )
    mixer = partial(PatternAttention, dim, config.num_heads, rel_pos_bias=True, table_grid=(side, side))
    blocks = [
        Block(
            dim,
            mixer(config.patterns[layer % len(config.patterns)], pad_mode=config.pad_mode),
            Mlp(dim, int(dim * config.mlp_ratio)),
            drop_rate=rate,
        )
        for layer, rate in enumerate(drop_rates((config.depth,), config.drop_path_rate)[0])
    ]
    stem = patches(config.in_channels, dim, config.patch_size)
    head = Head(dim, config.num_classes)
    stage = Stage(blocks, dim=dim)
    model = Pyramid(stem, [stage], head, stem_stride=config.patch_size, in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02), position_bias=truncated(0.02))  # convolutions keep torch's draw
    return model


def _index_buffers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The index that vitrpb keeps beside each table: Swin's, turned round, because its table is by key minus query."""
    buffers = {}
    for name, table in state.items():
        if name.endswith("attn.rpb"):
            index = position_index(table.flatten(1).t()).flip(0, 1)
            buffers[name.removesuffix("rpb") + "relative_position_index"] = index
    return buffers


_RULES = (
    rule("stem.conv.{rest}", "patch_embed.proj.{rest}"),
    rule("stem.norm_after.{rest}", "patch_embed.norm.{rest}"),
    rule("stages.0.blocks.{j}.mixer.{rest}", "layers.{j}.attn.{rest}"),
    rule("stages.0.blocks.{j}.{rest}", "layers.{j}.{rest}"),
    rule("head.norm.{rest}", "norm.{rest}"),
    rule("head.classifier.{rest}", "head.{rest}"),
    rule("norms.{i}.{rest}", "norm{i}.{rest}"),
)

LAYOUTS = {
    "published": Layout(_RULES, ignored=r"relative_position_index$"),
    "published vitrpb": Layout(_RULES, ignored=r"relative_position_index$", derived=_index_buffers),
}

_FILES = "https://shi-labs.com/projects/dinat/checkpoints/isotropic/"

FAMILY = Family(
    VARIANTS,
    build,
    LAYOUTS,
    {
        name: (Published(f"{_FILES}{name}_in1k_224.pth", "published vitrpb" if "vit" in name else "published"),)
        for name in VARIANTS
    },
)
