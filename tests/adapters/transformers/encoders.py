"""Small encoders of transformers, on our attention and on dense attention with a mask."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch
import transformers

import vicinal
from vicinal.adapters.transformers import register_attention

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=48, patch_size=8
)
"""A grid of 6 x 6."""

MODELS = {
    "ViT": (1, {}),
    "Dinov2": (1, {}),
    "Dinov2WithRegisters": (4, {"num_register_tokens": 3}),
    "DINOv3ViT": (3, {"num_register_tokens": 2}),
    "DeiT": (2, {}),
    "SiglipVision": (0, {}),
    "IJepa": (0, {}),
}
"""Prefix tokens, and what the configuration says besides `SMALL`."""


def build(name, **changes):
    """A model with random weights, such that attention matters, on the host's dense attention."""
    own = {"mlp_ratio": 1} if name.startswith("Dinov2") else {}
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **own, **MODELS[name][1], **changes})
    model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager")
    for _, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def on(model, name, pattern, **options):
    """The model on attention by a pattern."""
    register_attention(name, pattern, **options)
    model.set_attn_implementation(name)
    return model


def sees(pattern, grid, prefix, num_heads):
    """Who sees whom, `[heads, tokens, tokens]`, with prefix tokens that see and are seen by all."""
    cells = vicinal.pattern.mask(pattern, grid)
    count = math.prod(grid)
    cells = cells.reshape(-1, count, count)
    cells = cells.repeat_interleave(num_heads // len(cells), 0)
    whole = torch.ones(num_heads, prefix + count, prefix + count, dtype=torch.bool)
    whole[:, prefix:, prefix:] = cells
    return whole


def register_dense(name, allowed):
    """Dense attention with the given masks, a list with one per layer in the order of the calls."""
    masks = itertools.cycle(allowed)

    def dense(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~next(masks), -torch.inf)
        weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    transformers.AttentionInterface.register(name, dense)


def answer(model, images, **kwargs):
    with torch.no_grad():
        return model(images, **kwargs).last_hidden_state


def call(name="ours", *, module=None, query=None, key=None, **kwargs):
    query = torch.randn(1, 4, 9, 8) if query is None else query
    key = query if key is None else key
    attend = transformers.AttentionInterface._global_mapping[name]
    return attend(module or SimpleNamespace(), query, key, key, None, **kwargs)
