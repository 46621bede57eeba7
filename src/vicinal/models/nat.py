"""NAT and DiNAT: a pyramid of neighborhood attention, dilated on every second layer in DiNAT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from vicinal.layers.attention import PadMode, PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches, OverlappingStem
from vicinal.layers.words import AnyPattern, near
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, rule, split, stacked

Dilations = str | Sequence[Sequence[int]]

PRESETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((1,), (1,), (1,), (1,)),
    "cls224": ((1, 8), (1, 4), (1, 2), (1,)),
    "cls384": ((1, 13), (1, 6), (1, 3), (1,)),
    "detection": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "seg512": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "seg640": ((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2)),
    "mask2former": ((1, 14), (1, 4, 1, 7), (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3), (1,)),
    "oneformer1280": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 5, 1, 7, 1, 3, 1, 5, 1, 5, 1, 7, 1, 7), (1, 3)),
    "cityscapes": ((1, 18), (1, 5, 1, 9), (1, 2, 1, 3, 1, 4), (1, 2)),
}
"""Dilations per level by the use they were published for; a level's list repeats over its layers. The image sizes are
in the names; "cls224" is also what 384 pixels with kernel 11 take, "seg640" what OneFormer takes on ADE20K and COCO."""


@dataclass(frozen=True)
class NatConfig:
    """A NAT or DiNAT. `dilations`: a name in `PRESETS`, `"max"`, or a list per level, repeated over its layers."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    layer_scale: float | None
    drop_path_rate: float
    dilations: Dilations = "none"
    kernel_size: int = 7
    pad_mode: PadMode = "legacy"
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {
    "nat_mini": NatConfig(64, (3, 4, 6, 5), (2, 4, 8, 16), 3, None, 0.2),
    "nat_tiny": NatConfig(64, (3, 4, 18, 5), (2, 4, 8, 16), 3, None, 0.2),
    "nat_small": NatConfig(96, (3, 4, 18, 5), (3, 6, 12, 24), 2, 1e-5, 0.3),
    "nat_base": NatConfig(128, (3, 4, 18, 5), (4, 8, 16, 32), 2, 1e-5, 0.5),
    "dinat_mini": NatConfig(64, (3, 4, 6, 5), (2, 4, 8, 16), 3, None, 0.2, "cls224"),
    "dinat_tiny": NatConfig(64, (3, 4, 18, 5), (2, 4, 8, 16), 3, None, 0.2, "cls224"),
    "dinat_small": NatConfig(96, (3, 4, 18, 5), (3, 6, 12, 24), 2, None, 0.3, "cls224"),
    "dinat_base": NatConfig(128, (3, 4, 18, 5), (4, 8, 16, 32), 2, 1e-5, 0.5, "cls224"),
    "dinat_large": NatConfig(192, (3, 4, 18, 5), (6, 12, 24, 48), 2, None, 0.35, "cls224"),
}


def build(config: NatConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    words = dilated(config.kernel_size, config.dilations, config.depths, PRESETS)
    rates = drop_rates(config.depths, config.drop_path_rate)
    stages = []
    for level, heads in enumerate(config.num_heads):
        dim = config.dim * 2**level
        mixer = partial(PatternAttention, dim, heads, rel_pos_bias=True, pad_mode=config.pad_mode)
        mlp = partial(Mlp, dim, int(dim * config.mlp_ratio))
        down = partial(ConvPatches, dim // 2, dim, kernel_size=3, stride=2, padding=1, bias=False)
        blocks = [
            Block(dim, mixer(word), mlp(), layer_scale=config.layer_scale, drop_rate=rate)
            for word, rate in zip(words[level], rates[level], strict=True)
        ]
        stages.append(Stage(blocks, dim=dim, downsample=down(norm_after=nn.LayerNorm) if level else None))
    stem = OverlappingStem(config.in_channels, config.dim)
    model = Pyramid(stem, stages, Head(stages[-1].dim, config.num_classes), in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02), position_bias=truncated(0.02))  # convolutions keep torch's draw
    return model


def dilated(
    kernel_size: int, dilations: Dilations, depths: Sequence[int], presets: dict[str, tuple[tuple[int, ...], ...]]
) -> list[list[AnyPattern]]:
    """A pattern per layer of each level, from a preset's name, "max", or lists.

    >>> dilated(7, "cls224", (2, 2, 3, 2), PRESETS)[2]
    [NearWord(kernel_size=7, dilation=1), NearWord(kernel_size=7, dilation=2), NearWord(kernel_size=7, dilation=1)]
    """
    if dilations == "max":
        return [[near(kernel_size, "max" if layer % 2 else 1) for layer in range(depth)] for depth in depths]
    if isinstance(dilations, str) and dilations not in presets:
        raise ValueError(
            f'dilations must be one of {", ".join(presets)}, "max", or a list per level, got {dilations!r}'
        )
    levels = presets[dilations] if isinstance(dilations, str) else dilations
    are_lists = isinstance(levels, Sequence) and all(isinstance(level, Sequence) and level for level in levels)
    if not are_lists or len(levels) != len(depths):
        raise ValueError(f"dilations must be {len(depths)} lists, one per level, got {dilations!r}")
    return [
        [near(kernel_size, level[layer % len(level)]) for layer in range(depth)]
        for level, depth in zip(levels, depths, strict=True)
    ]


PUBLISHED_LAYOUT = Layout(
    (
        rule("stem.conv1.{rest}", "patch_embed.proj.0.{rest}"),
        rule("stem.conv2.{rest}", "patch_embed.proj.1.{rest}"),
        rule("stem.norm.{rest}", "patch_embed.norm.{rest}"),
        rule("stages.{i}.downsample.conv.{rest}", "levels.{i-1}.downsample.reduction.{rest}"),
        rule("stages.{i}.downsample.norm_after.{rest}", "levels.{i-1}.downsample.norm.{rest}"),
        rule("stages.{i}.blocks.{j}.mixer.{rest}", "levels.{i}.blocks.{j}.attn.{rest}"),
        rule("stages.{i}.blocks.{j}.{rest}", "levels.{i}.blocks.{j}.{rest}"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", "head.{rest}"),
        rule("norms.{i}.{rest}", "norm{i}.{rest}"),
    )
)

_LAYER, _BLOCK = "encoder.levels.{i}.layers.{j}.", "stages.{i}.blocks.{j}."
_QKV = tuple(f"{_LAYER}attention.self.{part}.{{rest}}" for part in ("query", "key", "value"))

_TRANSFORMERS_RULES = (
    rule("stem.conv1.{rest}", "embeddings.patch_embeddings.projection.0.{rest}"),
    rule("stem.conv2.{rest}", "embeddings.patch_embeddings.projection.1.{rest}"),
    rule("stem.norm.{rest}", "embeddings.norm.{rest}"),
    rule("stages.{i}.downsample.conv.{rest}", "encoder.levels.{i-1}.downsample.reduction.{rest}"),
    rule("stages.{i}.downsample.norm_after.{rest}", "encoder.levels.{i-1}.downsample.norm.{rest}"),
    rule(_BLOCK + "norm1.{rest}", _LAYER + "layernorm_before.{rest}"),
    rule(_BLOCK + "norm2.{rest}", _LAYER + "layernorm_after.{rest}"),
    rule(_BLOCK + "mixer.rpb", _LAYER + "attention.self.rpb"),
    rule(_BLOCK + "mixer.qkv.{rest}", _QKV, split(1, 1, 1)),
    rule(_BLOCK + "mixer.proj.{rest}", _LAYER + "attention.output.dense.{rest}"),
    rule(_BLOCK + "mlp.fc1.{rest}", _LAYER + "intermediate.dense.{rest}"),
    rule(_BLOCK + "mlp.fc2.{rest}", _LAYER + "output.dense.{rest}"),
    rule((_BLOCK + "gamma1", _BLOCK + "gamma2"), _LAYER + "layer_scale_parameters", stacked()),
    rule("head.norm.{rest}", "layernorm.{rest}"),
    rule("head.classifier.{rest}", "classifier.{rest}"),
    rule("norms.{i}.{rest}", "hidden_states_norms.stage{i+1}.{rest}"),
)

TRANSFORMERS_LAYOUT = Layout(_TRANSFORMERS_RULES, prefix="dinat.", bare=("classifier.",))

# transformers 4 had NAT too; files of it are on the hub
TRANSFORMERS_NAT_LAYOUT = Layout(_TRANSFORMERS_RULES, prefix="nat.", bare=("classifier.",))

_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
_DINAT = "https://shi-labs.com/projects/dinat/checkpoints/"
_LARGE = _DINAT + "imagenet1k/dinat_large_in22k_in1k_"
_K11 = {"kernel_size": 11, "dilations": "cls224"}

FAMILY = Family(
    VARIANTS,
    build,
    {
        "published": PUBLISHED_LAYOUT,
        "transformers": TRANSFORMERS_LAYOUT,
        "transformers nat": TRANSFORMERS_NAT_LAYOUT,
    },
    {
        **{name: (Published(f"{_NAT}{name}.pth"),) for name in VARIANTS if name.startswith("nat_")},
        "nat_mini": (
            Published(f"{_NAT}nat_mini.pth"),
            Published("shi-labs/nat-mini-in1k-224", "transformers nat"),
        ),
        **{
            name: (
                Published(f"{_DINAT}imagenet1k/{name}_in1k_224.pth"),
                Published(f"shi-labs/{name.replace('_', '-')}-in1k-224", "transformers"),
            )
            for name in ("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base")
        },
        "dinat_large": (
            Published(f"{_LARGE}224.pth"),
            Published(f"{_LARGE}384.pth", changes={"dilations": "cls384"}),
            Published(f"{_LARGE}384_11x11.pth", changes=_K11),
            Published(f"{_DINAT}imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
            Published(f"{_DINAT}imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841, changes=_K11),
        ),
    },
)
