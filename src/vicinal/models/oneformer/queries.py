"""Queries: made of the task by the class transformer, then refined by masked attention, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vicinal.layers.tags import Tag, tag
from vicinal.models.oneformer.attention import Perceptron, QueryLayer, sine_positions
from vicinal.models.oneformer.config import OneFormerConfig
from vicinal.models.oneformer.pixels import LEVELS, Pixels

Prediction = tuple[torch.Tensor, torch.Tensor]
"""Logits of classes `[batch, queries, classes + 1]`, and of masks `[batch, queries, height, width]`."""


@dataclass(frozen=True)
class Refined:
    """All predictions in their order, the queries as they were at first, and as they are at last."""

    predictions: tuple[Prediction, ...]
    first: torch.Tensor
    last: torch.Tensor


class ClassTransformer(nn.Module):
    """Queries of a task: the task's token, once per query, looks at the features for masks.

    The published arguments, on which the weights depend: what is read are the positions of the pixels, and the
    features are what is added to them to find them by.

    >>> transformer = ClassTransformer(OneFormerConfig(dim=16, num_heads=2))
    >>> transformer(torch.randn(1, 16), torch.randn(5, 16), torch.randn(1, 16, 4, 6)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, config: OneFormerConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(config.dim, config.dim, 1)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        assert self.project.bias is not None
        nn.init.zeros_(self.project.bias)
        self.layers = nn.ModuleList(
            QueryLayer(config.dim, config.num_heads, config.hidden_dim, is_memory_first=False, dropout=config.dropout)
            for _ in range(config.query_layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, task: torch.Tensor, positions: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
        """Tasks `[batch, dim]` and positions `[queries, dim]` to queries `[batch, queries, dim]`."""
        batch, dim, rows, columns = mask_features.shape
        memory = sine_positions(rows, columns, dim, mask_features).flatten(0, 1).expand(batch, -1, -1)
        features = self.project(mask_features).flatten(2).transpose(1, 2)
        queries = task[:, None].expand(-1, positions.shape[0], -1)
        for layer in self.layers:
            queries = layer(queries, positions, memory, features)
        result: torch.Tensor = self.norm(queries)
        return result


class QueryDecoder(nn.Module):
    """Queries refined on the three maps in turn; each sees only the pixels of the mask it had so far.

    With a task the queries come from the class transformer and the task's token itself, else they are learned.

    >>> config = OneFormerConfig(dim=16, num_heads=2, decoder_layers=3, num_queries=5, num_classes=7)
    >>> maps = tuple(torch.randn(1, 16, size, size) for size in (2, 4, 8))
    >>> refined = QueryDecoder(config)(Pixels(maps, torch.randn(1, 16, 16, 16)), torch.randn(1, 16))
    >>> len(refined.predictions), refined.last.shape
    (4, torch.Size([1, 5, 16]))
    """

    def __init__(self, config: OneFormerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.class_transformer = ClassTransformer(config) if config.task else None
        self.query_features = None if config.task else nn.Embedding(config.num_queries, dim)
        self.query_positions = nn.Embedding(config.num_queries, dim)
        self.level_embed = nn.Embedding(LEVELS, dim)
        for embedding in (self.query_features, self.query_positions, self.level_embed):
            if embedding is not None:
                tag(embedding, weight=Tag(weight_decay=False))
        self.layers = nn.ModuleList(
            QueryLayer(dim, config.num_heads, config.hidden_dim, is_memory_first=True)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.classes = nn.Linear(dim, config.num_classes + 1)
        self.masks = Perceptron([dim, dim, dim, dim])

    def forward(self, pixels: Pixels, task: torch.Tensor | None = None) -> Refined:
        """Tasks are `[batch, dim]`."""
        queries = self._first(pixels, task)
        first, positions = queries, self.query_positions.weight
        memories = [self._memory(pixels.maps[level], level) for level in range(LEVELS)]
        predictions = [self._predict(queries, pixels)]
        for index, layer in enumerate(self.layers):
            level = index % LEVELS
            is_seen = _seen(predictions[-1][1], pixels.maps[level])
            queries = layer(queries, positions, *memories[level], is_seen)
            predictions.append(self._predict(queries, pixels))
        return Refined(tuple(predictions), first, queries)

    def _first(self, pixels: Pixels, task: torch.Tensor | None) -> torch.Tensor:
        if self.class_transformer is None:
            assert self.query_features is not None
            return self.query_features.weight.expand(pixels.mask_features.shape[0], -1, -1)
        assert task is not None
        normed = self.norm(task)
        queries = self.class_transformer(normed, self.query_positions.weight[:-1], pixels.mask_features)
        return torch.cat([queries, normed[:, None]], 1)

    def _memory(self, features: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = features.flatten(2).transpose(1, 2) + self.level_embed.weight[level]
        return tokens, sine_positions(features.shape[2], features.shape[3], features.shape[1], features).flatten(0, 1)

    def _predict(self, queries: torch.Tensor, pixels: Pixels) -> Prediction:
        normed = self.norm(queries)
        return self.classes(normed), torch.einsum("bqc,bchw->bqhw", self.masks(normed), pixels.mask_features)


def _seen(mask_logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Which pixels each query sees, `[batch, 1, queries, keys]`; one whose mask is empty sees them all."""
    resized = nn.functional.interpolate(
        mask_logits.detach(), size=features.shape[2:], mode="bilinear", align_corners=False
    )
    is_seen = resized.flatten(2).sigmoid() >= 0.5
    return (is_seen | ~is_seen.any(-1, keepdim=True))[:, None]
