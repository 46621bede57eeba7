"""DiNAT_s: Swin's pyramid (patches, merging, MLP 4) with dilated neighborhood attention in place of windows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vicinal.layers.attention import PadMode, PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import PatchMerging
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, rule
from vicinal.models.nat import Dilations, dilated
from vicinal.models.swin import patches

PRESETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((1,), (1,), (1,), (1,)),
    "cls224": ((1, 8), (1, 4), (1, 2), (1,)),
    "cls384": ((1, 13), (1, 6), (1, 3), (1,)),
    "detection": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "seg512": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
}
"""Dilations per level by the use they were published for; a level's list repeats over its layers."""


@dataclass(frozen=True)
class DinatSConfig:
    """A DiNAT_s. `dilations`: a name in `PRESETS`, `"max"`, or a list per level, repeated over its layers."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path_rate: float
    dilations: Dilations = "cls224"
    kernel_size: int = 7
    mlp_ratio: float = 4.0
    pad_mode: PadMode = "legacy"
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {
    "dinat_s_tiny": DinatSConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "dinat_s_small": DinatSConfig(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "dinat_s_base": DinatSConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
    "dinat_s_large": DinatSConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 0.35),
}


def build(config: DinatSConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    words = dilated(config.kernel_size, config.dilations, config.depths, PRESETS)
    rates = drop_rates(config.depths, config.drop_path_rate)
    stages = []
    for level, heads in enumerate(config.num_heads):
        dim = config.dim * 2**level
        mixer = partial(PatternAttention, dim, heads, rel_pos_bias=True, pad_mode=config.pad_mode)
        blocks = [
            Block(dim, mixer(word), Mlp(dim, int(dim * config.mlp_ratio)), drop_rate=rate)
            for word, rate in zip(words[level], rates[level], strict=True)
        ]
        stages.append(Stage(blocks, dim=dim, downsample=PatchMerging(dim // 2, dim) if level else None))
    stem = patches(config.in_channels, config.dim)
    model = Pyramid(stem, stages, Head(stages[-1].dim, config.num_classes), in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02), position_bias=truncated(0.02))  # convolutions keep torch's draw
    return model


PUBLISHED_LAYOUT = Layout(
    (
        rule("stem.conv.{rest}", "patch_embed.proj.{rest}"),
        rule("stem.norm_after.{rest}", "patch_embed.norm.{rest}"),
        rule("stages.{i}.downsample.{rest}", "layers.{i-1}.downsample.{rest}"),
        rule("stages.{i}.blocks.{j}.mixer.{rest}", "layers.{i}.blocks.{j}.attn.{rest}"),
        rule("stages.{i}.blocks.{j}.{rest}", "layers.{i}.blocks.{j}.{rest}"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", "head.{rest}"),
        rule("norms.{i}.{rest}", "norm{i}.{rest}"),
    )
)

_FILES = "https://shi-labs.com/projects/dinat/checkpoints/"

FAMILY = Family(
    VARIANTS,
    build,
    {"published": PUBLISHED_LAYOUT},
    {
        **{name: (Published(f"{_FILES}imagenet1k/{name}_in1k_224.pth"),) for name in VARIANTS},
        "dinat_s_large": (
            Published(f"{_FILES}imagenet1k/dinat_s_large_in1k_224.pth"),
            Published(f"{_FILES}imagenet1k/dinat_s_large_in1k_384.pth", changes={"dilations": "cls384"}),
            Published(f"{_FILES}imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
        ),
    },
)
