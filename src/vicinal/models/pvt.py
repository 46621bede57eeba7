"""PVT: every token attends to a map reduced by a strided convolution; the last stage has a class token instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block, drop_rates
from vicinal.layers.initialization import initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.pooled import PooledAttention, Reduce
from vicinal.layers.pyramid import Head, Output, Pyramid, Stage
from vicinal.layers.tags import Tag, tag
from vicinal.layers.tokens import ConvPatches, LearnedPositions
from vicinal.models.family import Family, Published
from vicinal.models.layout import How, Layout, rule, split
from vicinal.pattern.axis import Full

norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class PvtConfig:
    """A PVT; `reductions` say how many times coarser the keys' map is, 1 in the stage with the class token."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    reductions: tuple[int, ...]
    drop_path_rate: float
    image_size: int = 224
    num_classes: int = 1000
    in_channels: int = 3


VARIANTS = {"pvt_tiny": PvtConfig((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1), 0.1)}


class ClassTokenStage(Stage):
    """A stage whose blocks see one token more than the map has; tokens in a row, the class token first.

    >>> found, token = ClassTokenStage([torch.nn.Identity()], dim=8)(torch.ones(1, 4, 4, 8))
    >>> found.shape, token.shape
    (torch.Size([1, 4, 4, 8]), torch.Size([1, 1, 8]))
    """

    def __init__(self, blocks: Sequence[nn.Module], *, dim: int, downsample: nn.Module | None = None) -> None:
        super().__init__(blocks, dim=dim, downsample=downsample)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.token_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim), std=0.02))
        undecayed = Tag(weight_decay=False, role="position")
        tag(self, token=undecayed, token_position=undecayed)

    def forward(self, inputs: torch.Tensor) -> Output:
        """The map, and the class token `[batch, 1, dim]`."""
        features = inputs if self.downsample is None else self.downsample(inputs)
        token = (self.token + self.token_position).expand(features.shape[0], -1, -1)
        tokens = torch.cat([token, features.flatten(1, -2)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, 1:].unflatten(1, tuple(features.shape[1:-1])), tokens[:, :1]


class TokenHead(Head):
    """Reads the class token.

    >>> TokenHead(8, 10)(torch.ones(2, 4, 4, 8), torch.ones(2, 1, 8)).shape
    torch.Size([2, 10])
    """

    def embed(self, features: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        """One vector per sample, `[batch, dim]`."""
        assert extra is not None
        result: torch.Tensor = self.norm(extra[:, 0])
        return result


def build(config: PvtConfig) -> Pyramid:
    """The model of a configuration, with fresh weights."""
    least = 4 * 2 ** (len(config.dims) - 1)
    if config.image_size < least:
        raise ValueError(f"image_size must be at least {least}, got {config.image_size}")
    stages: list[Stage] = []
    rates = drop_rates(config.depths, config.drop_path_rate)
    embeddings = [_embedding(config, level) for level in range(len(config.dims))]
    for level, (dim, heads, reduction) in enumerate(zip(config.dims, config.num_heads, config.reductions, strict=True)):
        blocks = [
            Block(
                dim, _mixer(dim, heads, reduction), Mlp(dim, config.mlp_ratios[level] * dim), norm=norm, drop_rate=rate
            )
            for rate in rates[level]
        ]
        kind = Stage if reduction > 1 else ClassTokenStage
        stages.append(kind(blocks, dim=dim, downsample=embeddings[level] if level else None))
    head = TokenHead(config.dims[-1], config.num_classes, norm(config.dims[-1]))
    model = Pyramid(embeddings[0], stages, head, in_channels=config.in_channels)
    initialize(model, linear=truncated(0.02))  # convolutions keep torch's draw
    return model


def _embedding(config: PvtConfig, level: int) -> nn.Module:
    size = 2 if level else 4
    into = config.dims[level - 1] if level else config.in_channels
    side = config.image_size // (4 * 2**level)
    patches = ConvPatches(into, config.dims[level], kernel_size=size, stride=size, norm_after=norm)
    return nn.Sequential(patches, LearnedPositions((side, side), config.dims[level]))


def _mixer(dim: int, heads: int, reduction: int) -> nn.Module:
    if reduction == 1:
        return PatternAttention(dim, heads, Full(), rank=1)
    return PooledAttention(dim, heads, Reduce(dim, reduction, norm=norm(dim)))


_BLOCK, _THERE = "stages.{i}.blocks.{j}.", "block{i+1}.{j}."
_LAYER = "encoder.block.{i}.{j}."
_SELF = _LAYER + "attention.self."


def _with_token(ours: list[torch.Tensor], shapes: list[torch.Size]) -> list[torch.Tensor]:
    (positions,) = ours
    return [positions[0, :1], positions[0, 1:].reshape(shapes[1])]


_ROW = How(lambda theirs, shapes: [theirs[0].reshape(shapes[0])], lambda ours: [ours[0].flatten(0, 1)[None]])
_TOKEN_ROW = How(_with_token, lambda ours: [torch.cat([ours[0], ours[1].flatten(0, 1)])[None]])
_LAST = ("stages.3.token_position", "stages.3.downsample.1.table")

PUBLISHED_LAYOUT = Layout(
    (
        rule("stem.0.conv.{rest}", "patch_embed1.proj.{rest}"),
        rule("stem.0.norm_after.{rest}", "patch_embed1.norm.{rest}"),
        rule("stem.1.table", "pos_embed1", _ROW),
        rule(_LAST, "pos_embed4", _TOKEN_ROW),
        rule("stages.3.token", "cls_token"),
        rule("stages.{i}.downsample.0.conv.{rest}", "patch_embed{i+1}.proj.{rest}"),
        rule("stages.{i}.downsample.0.norm_after.{rest}", "patch_embed{i+1}.norm.{rest}"),
        rule("stages.{i}.downsample.1.table", "pos_embed{i+1}", _ROW),
        rule(_BLOCK + "mixer.qkv.{rest}", (_THERE + "attn.q.{rest}", _THERE + "attn.kv.{rest}"), split(1, 2)),
        rule(_BLOCK + "mixer.pool.conv.{rest}", _THERE + "attn.sr.{rest}"),
        rule(_BLOCK + "mixer.pool.norm.{rest}", _THERE + "attn.norm.{rest}"),
        rule(_BLOCK + "mixer.{rest}", _THERE + "attn.{rest}"),
        rule(_BLOCK + "{rest}", _THERE + "{rest}"),
        rule("head.norm.{rest}", "norm.{rest}"),
        rule("head.classifier.{rest}", "head.{rest}"),
        rule("norms.{i}.{rest}", "norm{i+1}.{rest}"),
    )
)

TRANSFORMERS_LAYOUT = Layout(
    (
        rule("stem.0.conv.{rest}", "encoder.patch_embeddings.0.projection.{rest}"),
        rule("stem.0.norm_after.{rest}", "encoder.patch_embeddings.0.layer_norm.{rest}"),
        rule("stem.1.table", "encoder.patch_embeddings.0.position_embeddings", _ROW),
        rule(_LAST, "encoder.patch_embeddings.3.position_embeddings", _TOKEN_ROW),
        rule("stages.3.token", "encoder.patch_embeddings.3.cls_token"),
        rule("stages.{i}.downsample.0.conv.{rest}", "encoder.patch_embeddings.{i}.projection.{rest}"),
        rule("stages.{i}.downsample.0.norm_after.{rest}", "encoder.patch_embeddings.{i}.layer_norm.{rest}"),
        rule("stages.{i}.downsample.1.table", "encoder.patch_embeddings.{i}.position_embeddings", _ROW),
        rule(_BLOCK + "norm1.{rest}", _LAYER + "layer_norm_1.{rest}"),
        rule(_BLOCK + "norm2.{rest}", _LAYER + "layer_norm_2.{rest}"),
        rule(
            _BLOCK + "mixer.qkv.{rest}",
            (_SELF + "query.{rest}", _SELF + "key.{rest}", _SELF + "value.{rest}"),
            split(1, 1, 1),
        ),
        rule(_BLOCK + "mixer.q.{rest}", _SELF + "query.{rest}"),
        rule(_BLOCK + "mixer.kv.{rest}", (_SELF + "key.{rest}", _SELF + "value.{rest}"), split(1, 1)),
        rule(_BLOCK + "mixer.pool.conv.{rest}", _SELF + "sequence_reduction.{rest}"),
        rule(_BLOCK + "mixer.pool.norm.{rest}", _SELF + "layer_norm.{rest}"),
        rule(_BLOCK + "mixer.proj.{rest}", _LAYER + "attention.output.dense.{rest}"),
        rule(_BLOCK + "mlp.fc1.{rest}", _LAYER + "mlp.dense1.{rest}"),
        rule(_BLOCK + "mlp.fc2.{rest}", _LAYER + "mlp.dense2.{rest}"),
        rule("head.norm.{rest}", "encoder.layer_norm.{rest}"),
        rule("head.classifier.{rest}", "classifier.{rest}"),
        rule("norms.{i}.{rest}", "norms.{i}.{rest}"),
    ),
    prefix="pvt.",
    bare=("classifier.",),
)

FAMILY = Family(
    VARIANTS,
    build,
    {"published": PUBLISHED_LAYOUT, "transformers": TRANSFORMERS_LAYOUT},
    {
        "pvt_tiny": (
            Published("https://github.com/whai362/PVT/releases/download/v2/pvt_tiny.pth"),
            Published("Xrenya/pvt-tiny-224", "transformers"),
        )
    },
)
