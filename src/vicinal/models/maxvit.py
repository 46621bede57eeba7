"""MaxViT: in turn a convolution block, attention in windows and attention on a grid, all in one block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vicinal.layers.attention import PadMode, PatternAttention
from vicinal.layers.block import Block, DropPath, drop_rates
from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.convolution import MobileConv, same_padding
from vicinal.layers.initialization import fan_out, initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pyramid import Head, Pyramid, Stage
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, rule
from vicinal.pattern.axis import Grid, Window

norm = partial(nn.BatchNorm2d, eps=1e-3)
act = partial(nn.GELU, approximate="tanh")


@dataclass(frozen=True)
class MaxVitConfig:
    """A MaxViT; window and grid are `size` tokens a side, 7 for 224 pixels. Heads have 32 channels."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    stem_dim: int
    drop_path_rate: float
    size: int = 7
    head_dim: int = 32
    pad_mode: PadMode = "legacy"
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"maxvit_tiny": MaxVitConfig((64, 128, 256, 512), (2, 2, 5, 2), 64, 0.2)}


class MaxVitStem(nn.Module):
    """Two 3x3 convolutions, the first of stride 2, with a norm and an activation between them.

    >>> MaxVitStem(3, 8)(torch.randn(1, 9, 8, 3)).shape
    torch.Size([1, 5, 4, 8])
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, 2)
        self.norm = norm(dim)
        self.act = act()
        self.conv2 = nn.Conv2d(dim, dim, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, in_dim]` to `[batch, ceil(height / 2), ceil(width / 2), dim]`."""
        hidden = self.act(self.norm(self.conv1(same_padding(channels_first(inputs), 3, 2))))
        return channels_last(self.conv2(same_padding(hidden, 3, 1)))


class HiddenHead(Head):
    """The mean of all tokens, a norm, and a hidden layer before the classifier.

    >>> HiddenHead(8, 10)(torch.ones(2, 4, 4, 8), None).shape
    torch.Size([2, 10])
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        self.hidden = nn.Linear(dim, dim)

    def embed(self, features: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        """One vector per sample, `[batch, dim]`."""
        result: torch.Tensor = self.hidden(self.norm(features.flatten(1, -2).mean(1))).tanh()
        return result


def build(config: MaxVitConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    stages, into = [], config.stem_dim
    rates = drop_rates(config.depths, config.drop_path_rate)
    for level, dim in enumerate(config.dims):
        attend = partial(PatternAttention, dim, dim // config.head_dim, rel_pos_bias=True, pad_mode=config.pad_mode)
        blocks: list[nn.Module] = []
        for index, rate in enumerate(rates[level]):
            drop = DropPath(rate) if rate else None
            conv = MobileConv(into, dim, norm=norm, act=act, stride=1 if index else 2, drop_path=drop)
            patterns = (Window(config.size), Grid(config.size))
            attention = [Block(dim, attend(one), Mlp(dim, 4 * dim, act=act), drop_rate=rate) for one in patterns]
            blocks.append(nn.Sequential(conv, *attention))
            into = dim
        stages.append(Stage(blocks, dim=dim, stride=2))
    head = HiddenHead(config.dims[-1], config.num_classes)
    stem = MaxVitStem(config.in_channels, config.stem_dim)
    model = Pyramid(stem, stages, head, stem_stride=2, in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02), convolution=fan_out, position_bias=truncated(0.02))
    return model


_BLOCK, _THERE = "stages.{i}.blocks.{j}.", "stages.{i}.blocks.{j}."
_CONV = (
    ("shortcut", "shortcut.expand"),
    ("norm_in", "pre_norm"),
    ("expand", "conv1_1x1"),
    ("norm_expand", "norm1"),
    ("depthwise", "conv2_kxk"),
    ("norm_depthwise", "norm2"),
    ("squeeze", "se.fc1"),
    ("excite", "se.fc2"),
    ("project", "conv3_1x1"),
)
_ATTENTION = tuple(
    pair
    for place, name in ((1, "attn_block"), (2, "attn_grid"))
    for pair in (
        rule(f"{_BLOCK}{place}.mixer.rpb", f"{_THERE}{name}.attn.rel_pos.relative_position_bias_table"),
        rule(f"{_BLOCK}{place}.mixer.{{rest}}", f"{_THERE}{name}.attn.{{rest}}"),
        rule(f"{_BLOCK}{place}.{{rest}}", f"{_THERE}{name}.{{rest}}"),
    )
)

TIMM_LAYOUT = Layout(
    (
        rule("stem.norm.{rest}", "stem.norm1.{rest}"),
        rule("stem.{rest}", "stem.{rest}"),
        *(rule(f"{_BLOCK}0.{ours}.{{rest}}", f"{_THERE}conv.{theirs}.{{rest}}") for ours, theirs in _CONV),
        *_ATTENTION,
        rule("head.norm.{rest}", "head.norm.{rest}"),
        rule("head.hidden.{rest}", "head.pre_logits.fc.{rest}"),
        rule("head.classifier.{rest}", "head.fc.{rest}"),
        rule("norms.{i}.{rest}", "norms.{i}.{rest}"),
    )
)

FAMILY = Family(
    VARIANTS, build, {"timm": TIMM_LAYOUT}, {"maxvit_tiny": (Published("timm/maxvit_tiny_tf_224.in1k", "timm"),)}
)
