"""The pixel decoder: deformable attention over the three coarse maps, and a fine map for masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vicinal.layers.multiscale import Grids, MultiScaleDeformableAttention, centers
from vicinal.layers.tags import Tag, tag
from vicinal.models.oneformer.attention import FeedForward, sine_positions
from vicinal.models.oneformer.config import OneFormerConfig

LEVELS = 3
"""Maps that attend to each other and that the decoder reads."""


@dataclass(frozen=True)
class Pixels:
    """What the pixel decoder gives: maps `[batch, dim, height, width]`, coarsest first, and features for masks."""

    maps: tuple[torch.Tensor, ...]
    mask_features: torch.Tensor


class PixelLayer(nn.Module):
    """Pixels of all maps look at each other by deformable attention.

    >>> from vicinal.layers.multiscale import centers
    >>> layer = PixelLayer(OneFormerConfig(dim=16, num_heads=2, pixel_hidden_dim=32))
    >>> grids = [(1, 2), (2, 4), (4, 8)]
    >>> layer(torch.randn(1, 42, 16), torch.randn(42, 16), centers(grids), grids).shape
    torch.Size([1, 42, 16])
    """

    def __init__(self, config: OneFormerConfig) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(
            config.dim, num_heads=config.num_heads, num_levels=LEVELS, num_points=config.num_points
        )
        self.norm = nn.LayerNorm(config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.feed_forward = FeedForward(config.dim, config.pixel_hidden_dim, config.dropout)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, grids: Grids
    ) -> torch.Tensor:
        """The same shape."""
        found = self.attention(tokens + positions, tokens, places, grids)
        result: torch.Tensor = self.feed_forward(self.norm(tokens + self.drop(found)))
        return result


class PixelDecoder(nn.Module):
    """Maps of strides 4, 8, 16 and 32 to `Pixels`.

    >>> decoder = PixelDecoder(OneFormerConfig(dim=16, num_heads=2, pixel_layers=1), (8, 16, 32, 64))
    >>> maps = [torch.randn(1, 8 * 2**level, 16 // 2**level, 16 // 2**level) for level in range(4)]
    >>> decoder(maps).mask_features.shape
    torch.Size([1, 16, 16, 16])
    """

    def __init__(self, config: OneFormerConfig, channels: Sequence[int]) -> None:
        super().__init__()
        dim = config.dim
        coarse = tuple(reversed(channels))[:LEVELS]
        self.inputs = nn.ModuleList(nn.Sequential(nn.Conv2d(width, dim, 1), _norm(dim)) for width in coarse)
        self.level_embed = nn.Parameter(torch.empty(LEVELS, dim))
        tag(self, level_embed=Tag(weight_decay=False))
        self.layers = nn.ModuleList(PixelLayer(config) for _ in range(config.pixel_layers))
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], dim, 1, bias=False), _norm(dim))
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), _norm(dim))
        self.mask_features = nn.Conv2d(dim, dim, 1)
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for projection in self.inputs:
            nn.init.xavier_uniform_(projection.get_parameter("0.weight"))

    def forward(self, maps: Sequence[torch.Tensor]) -> Pixels:
        """Maps `[batch, channels, height, width]`, finest first."""
        coarse = [project(features) for project, features in zip(self.inputs, reversed(maps), strict=False)]
        grids = [(features.shape[2], features.shape[3]) for features in coarse]
        tokens = torch.cat([features.flatten(2).transpose(1, 2) for features in coarse], 1)
        positions = torch.cat(
            [
                sine_positions(*grid, tokens.shape[-1], tokens).flatten(0, 1) + level
                for grid, level in zip(grids, self.level_embed, strict=True)
            ]
        )
        places = centers(grids, tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, positions, places, grids)
        pieces = tokens.split([rows * columns for rows, columns in grids], 1)
        seen = [piece.transpose(1, 2).unflatten(2, grid) for piece, grid in zip(pieces, grids, strict=True)]
        finest = self.lateral(maps[0])
        above = nn.functional.interpolate(seen[-1], size=finest.shape[2:], mode="bilinear", align_corners=False)
        return Pixels(tuple(seen), self.mask_features(nn.functional.relu(self.smooth(finest + above))))


def _norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, dim), dim)
