"""Swin: a pyramid of windows, shifted on every second layer. No roll and no mask: `Window` cuts at the edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vicinal.layers.attention import PadMode, PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.layers.tokens import ConvPatches, PatchMerging
from vicinal.layers.words import AnyPattern, window
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, Rule, rule, split, swin_table
from vicinal.pattern import Window


@dataclass(frozen=True)
class SwinConfig:
    """A Swin. With `pad_mode="legacy"` maps that windows do not divide are padded, as detection code does.

    With `always_partition` windows stay as large as they are, and shifted, on a map that is smaller, as they do there.
    """

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path_rate: float
    window_size: int = 7
    mlp_ratio: float = 4.0
    pad_mode: PadMode = "legacy"
    always_partition: bool = False
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {
    "swin_tiny": SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "swin_small": SwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "swin_base": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
    "swin_large": SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 0.2),
}


def build(config: SwinConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    rates = drop_rates(config.depths, config.drop_path_rate)
    size, shift = config.window_size, config.window_size // 2
    words: tuple[AnyPattern, AnyPattern] = (window(size), window(size, shift=shift))
    if config.always_partition:
        words = (Window(size), Window(size, shift=shift))
    stages = []
    for level, heads in enumerate(config.num_heads):
        dim = config.dim * 2**level
        mixer = partial(PatternAttention, dim, heads, rel_pos_bias=True, pad_mode=config.pad_mode)
        blocks = [
            Block(dim, mixer(words[layer % 2]), Mlp(dim, int(dim * config.mlp_ratio)), drop_rate=rate)
            for layer, rate in enumerate(rates[level])
        ]
        stages.append(Stage(blocks, dim=dim, downsample=PatchMerging(dim // 2, dim) if level else None))
    stem = patches(config.in_channels, config.dim)
    model = Pyramid(stem, stages, Head(stages[-1].dim, config.num_classes), in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02), position_bias=truncated(0.02))  # convolutions keep torch's draw
    return model


def patches(in_channels: int, dim: int, size: int = 4) -> ConvPatches:
    """Swin's stem: non-overlapping patches, images padded to whole ones, then a norm."""
    return ConvPatches(in_channels, dim, kernel_size=size, stride=size, norm_after=nn.LayerNorm, use_whole_patches=True)


def position_index(table: torch.Tensor) -> torch.Tensor:
    """The index buffer `[w^2, w^2]` that published code keeps beside a table of `(2w-1)^2` rows.

    >>> position_index(torch.zeros(9, 1)).tolist()
    [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    """
    size = (round(table.shape[0] ** 0.5) + 1) // 2
    places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    distances = places[:, None] - places[None] + size - 1
    return distances[..., 0] * (2 * size - 1) + distances[..., 1]


def _index_buffers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ending = "relative_position_bias_table"
    return {
        name.removesuffix(ending) + "relative_position_index": position_index(tensor)
        for name, tensor in state.items()
        if name.endswith(ending)
    }


_BLOCK = "stages.{i}.blocks.{j}."
_THERE = "layers.{i}.blocks.{j}."
_BUFFERS = r"relative_position_index$|attn_mask$"


def _original(merging: str, head: str) -> tuple[Rule, ...]:
    return (
        rule("stem.conv.{rest}", "patch_embed.proj.{rest}"),
        rule("stem.norm_after.{rest}", "patch_embed.norm.{rest}"),
        rule("stages.{i}.downsample.{rest}", merging),
        rule(_BLOCK + "mixer.rpb", _THERE + "attn.relative_position_bias_table", swin_table()),
        rule(_BLOCK + "mixer.{rest}", _THERE + "attn.{rest}"),
        rule(_BLOCK + "{rest}", _THERE + "{rest}"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", head),
        rule("norms.{i}.{rest}", "norm{i}.{rest}"),
    )


def _transformers(attention: dict[str, str | tuple[str, ...]], mlp: tuple[str, str]) -> tuple[Rule, ...]:
    there = "encoder." + _THERE
    qkv = tuple(f"{there}attention.{name}.{{rest}}" for name in attention["qkv"])
    return (
        rule("stem.conv.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
        rule("stem.norm_after.{rest}", "embeddings.norm.{rest}"),
        rule("stages.{i}.downsample.{rest}", "encoder.layers.{i-1}.downsample.{rest}"),
        rule(_BLOCK + "norm1.{rest}", there + "layernorm_before.{rest}"),
        rule(_BLOCK + "norm2.{rest}", there + "layernorm_after.{rest}"),
        rule(_BLOCK + "mixer.rpb", f"{there}attention.{attention['table']}", swin_table()),
        rule(_BLOCK + "mixer.qkv.{rest}", qkv, split(1, 1, 1)),
        rule(_BLOCK + "mixer.proj.{rest}", f"{there}attention.{attention['proj']}.{{rest}}"),
        rule(_BLOCK + "mlp.fc1.{rest}", f"{there}{mlp[0]}.{{rest}}"),
        rule(_BLOCK + "mlp.fc2.{rest}", f"{there}{mlp[1]}.{{rest}}"),
        rule("head.norm.{rest}", "layernorm.{rest}"),
        rule("head.classifier.{rest}", "classifier.{rest}"),
        rule("norms.{i}.{rest}", "hidden_states_norms.stage{i+1}.{rest}"),
    )


LAYOUTS = {
    "published": Layout(
        _original("layers.{i-1}.downsample.{rest}", "head.{rest}"), ignored=_BUFFERS, derived=_index_buffers
    ),
    "timm": Layout(_original("layers.{i}.downsample.{rest}", "head.fc.{rest}"), ignored=_BUFFERS),
    # as transformers 5 holds it in memory
    "transformers": Layout(
        _transformers(
            {
                "qkv": ("q_proj", "k_proj", "v_proj"),
                "proj": "o_proj",
                "table": "relative_position_bias.relative_position_bias_table",
            },
            ("mlp.fc1", "mlp.fc2"),
        ),
        prefix="swin.",
        bare=("classifier.",),
        ignored=_BUFFERS,
    ),
    # as files on the hub have it, written by transformers 4
    "hub": Layout(
        _transformers(
            {
                "qkv": ("self.query", "self.key", "self.value"),
                "proj": "output.dense",
                "table": "self.relative_position_bias_table",
            },
            ("intermediate.dense", "output.dense"),
        ),
        prefix="swin.",
        bare=("classifier.",),
        ignored=_BUFFERS,
        derived=_index_buffers,
    ),
}

_FILES = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
_W12 = {"window_size": 12}

FAMILY = Family(
    VARIANTS,
    build,
    LAYOUTS,
    {
        **{
            name: (
                Published(f"{_FILES}{name}_patch4_window7_224.pth"),
                Published(f"microsoft/{name.replace('_', '-')}-patch4-window7-224", "hub"),
            )
            for name in ("swin_tiny", "swin_small")
        },
        "swin_base": (
            Published(f"{_FILES}swin_base_patch4_window7_224.pth"),
            Published("microsoft/swin-base-patch4-window7-224", "hub"),
            Published(f"{_FILES}swin_base_patch4_window12_384.pth", changes=_W12),
            Published(f"{_FILES}swin_base_patch4_window7_224_22k.pth", num_classes=21841),
            Published(f"{_FILES}swin_base_patch4_window12_384_22k.pth", num_classes=21841, changes=_W12),
        ),
        "swin_large": (
            Published(f"{_FILES}swin_large_patch4_window7_224_22kto1k.pth"),
            Published("microsoft/swin-large-patch4-window7-224", "hub"),
            Published(f"{_FILES}swin_large_patch4_window12_384_22kto1k.pth", changes=_W12),
            Published(f"{_FILES}swin_large_patch4_window7_224_22k.pth", num_classes=21841),
            Published(f"{_FILES}swin_large_patch4_window12_384_22k.pth", num_classes=21841, changes=_W12),
        ),
    },
)
