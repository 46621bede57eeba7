"""The text branch: what the segments of a picture are called, as queries that training compares with the object's."""

from __future__ import annotations

import math

import torch
from torch import nn

from vicinal.layers.tags import Tag, tag
from vicinal.models.oneformer.attention import Perceptron, PlacedAttention
from vicinal.models.oneformer.config import TextConfig


class TextLayer(nn.Module):
    """Attention over the words so far, then a feed-forward with CLIP's quick GELU; norms first.

    >>> TextLayer(TextConfig(width=64))(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.width
        self.is_causal = config.is_causal
        self.norm1 = nn.LayerNorm(width)
        self.attention = PlacedAttention(width, width // 64)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        narrow = width**-0.5 * (2 * config.num_layers) ** -0.5
        for weight, deviation in (
            (self.attention.qkv.weight, width**-0.5),
            (self.attention.proj.weight, narrow),
            (self.fc1.weight, (2 * width) ** -0.5),
            (self.fc2.weight, narrow),
        ):
            nn.init.normal_(weight, std=deviation)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, is_causal=self.is_causal)
        hidden = self.fc1(self.norm2(tokens))
        result: torch.Tensor = tokens + self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return result


class TextMapper(nn.Module):
    """Token ids `[batch, texts, length]` to text queries `[batch, texts + contexts, dim]`.

    A text is read at its end, the largest id it has.

    >>> mapper = TextMapper(TextConfig(width=64, num_layers=1, vocabulary=9, context_length=6, contexts=2), dim=16)
    >>> mapper(torch.tensor([[[7, 1, 8, 0, 0, 0], [7, 2, 3, 8, 0, 0]]])).shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, config: TextConfig, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.context_length, config.width))
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.project = Perceptron([config.width, dim, dim])
        self.contexts = nn.Embedding(config.contexts, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for embedding in (self.words, self.contexts):
            tag(embedding, weight=Tag(weight_decay=False))
        tag(self, positions=Tag(weight_decay=False))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """See above."""
        if text.dim() != 3 or text.shape[-1] != self.positions.shape[0]:
            raise ValueError(
                f"text must be token ids [batch, texts, {self.positions.shape[0]}], got {tuple(text.shape)}"
            )
        # the same few texts pad every picture: each is read once
        different, places = text.flatten(0, 1).unique(dim=0, return_inverse=True)
        tokens = self.words(different) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        ends = self.norm(tokens)[torch.arange(len(different), device=text.device), different.argmax(-1)]
        queries = self.project(ends)[places].unflatten(0, tuple(text.shape[:2]))
        return torch.cat([queries, self.contexts.weight.expand(text.shape[0], -1, -1)], 1)
