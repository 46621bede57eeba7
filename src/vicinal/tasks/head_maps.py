"""Where the heads of a generator look: the weights of one query, group of heads by group, as pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vicinal.data.dataset import Image
from vicinal.data.saving import enlarged
from vicinal.layers.attention import PatternAttention
from vicinal.layers.words import at
from vicinal.models.stylenat import StyleNAT
from vicinal.ops.api import attention
from vicinal.pattern.compose import pattern_parts, split_heads
from vicinal.tasks.protocol import Panel

VISIBLE = 64
SHADE = np.array([40.0, 200.0, 120.0])
QUERY = np.array([230, 40, 40], np.uint8)


def head_weights(mixer: PatternAttention, inputs: torch.Tensor, query: tuple[int, ...]) -> torch.Tensor:
    """The weights `[heads, *grid]` that one query of `inputs` `[1, *grid, dim]` gives the keys, of every head.

    They are the derivative of what the query gets by the values, so the operator itself tells them, at any size.

    >>> mixer = PatternAttention(16, 2, heads(Near(3), Near(3, dilation=2)))
    >>> weights = head_weights(mixer, torch.randn(1, 8, 8, 16), (4, 4))
    >>> weights.shape, (weights > 0).sum((1, 2)).tolist()
    (torch.Size([2, 8, 8]), [9, 9])
    """
    if mixer.norm_q is not None or mixer.rotary is not None or mixer.pad_mode != "none":
        raise ValueError("weights are told of mixers without norms, rotation and padding alone")
    grid = tuple(inputs.shape[1:-1])
    if len(query) != len(grid) or not all(0 <= place < size for place, size in zip(query, grid, strict=True)):
        raise ValueError(f"query must be inside the grid {grid}, got {query}")
    tables = mixer.rpb
    bias = tuple(tables) if isinstance(tables, nn.ParameterList) else tables
    with torch.enable_grad():
        parts = mixer.qkv(inputs.detach()).detach().unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).unbind(-3)
        values = torch.zeros(1, *grid, mixer.num_heads, 1, dtype=inputs.dtype, device=inputs.device, requires_grad=True)
        out = attention(parts[0], parts[1], values, at(mixer.pattern, grid), bias=bias)
        (weights,) = torch.autograd.grad(out[(0, *query)].sum(), values)
    return weights[0, ..., 0].movedim(-1, 0)


def looks(
    model: StyleNAT, mapped: torch.Tensor, block: int = 0
) -> tuple[torch.Tensor, list[tuple[PatternAttention, torch.Tensor]]]:
    """The picture of `mapped` `[1, latent]`, and a mixer of every level above 4x4 with what came into it."""
    mixers = [level.get_submodule(f"blocks.{block}.mixer") for level in list(model.levels)[1:]]
    held: list[torch.Tensor] = []
    handles = [mixer.register_forward_pre_hook(lambda module, inputs: held.append(inputs[0])) for mixer in mixers]
    try:
        with torch.no_grad():
            picture = model.to_bytes(model.synthesis(mapped))[0]
    finally:
        for handle in handles:
            handle.remove()
    assert all(isinstance(mixer, PatternAttention) for mixer in mixers)
    return picture, list(zip(mixers, held, strict=True))  # type: ignore[arg-type] # asserted above


def group_panels(model: StyleNAT, mapped: torch.Tensor, block: int = 0) -> list[Panel]:
    r"""The picture, and for every level above 4x4 each group of heads: where the middle query (red) looks.

    >>> model = vicinal.create_model("stylenat_fashion32")
    >>> group_panels(model, torch.zeros(1, model.latent_size))[-1].caption.split("\n")[0]
    '32x32, head 2'
    """
    made, found = looks(model, mapped, block)
    picture = _pixels(made)
    panels = [Panel(picture, "the picture")]
    for mixer, inputs in found:
        size = inputs.shape[1]
        query = (size // 2, size // 2)
        weights = head_weights(mixer, inputs, query)
        groups, sizes = pattern_parts(at(mixer.pattern, (size, size)), 2)
        first = 0
        for members, count in zip(groups, split_heads(mixer.num_heads, len(groups), sizes), strict=True):
            own = weights[first : first + count].mean(0).double().cpu().numpy()
            kinds = " + ".join(repr(axes[0]) for axes in members)
            caption = f"{size}x{size}, {_heads(first, count)}\n{kinds}"
            panels.append(Panel(shaded(picture, own, query), caption))
            first += count
    return panels


def shaded(picture: Image, weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]], query: tuple[int, int]) -> Image:
    """A picture `[size, size, 1 or 3]` under the weights `[grid, grid]` of a query, which is red.

    On grids beyond 64x64 each key is drawn larger than it is, or nobody would see it.

    >>> shaded(np.zeros((8, 8, 1), np.uint8), np.ones((4, 4)), (2, 2)).shape
    (8, 8, 3)
    """
    times = picture.shape[0] // len(weights)
    reach = len(weights) // VISIBLE
    wide = torch.nn.functional.max_pool2d(torch.from_numpy(weights)[None], 2 * reach + 1, 1, reach)[0].numpy()
    strength = np.kron(wide / wide.max(), np.ones((times, times)))[..., None]
    pixels = (picture * (0.35 + 0.35 * strength) + 0.65 * strength * SHADE).clip(0, 255).astype(np.uint8)
    rows, columns = (slice((place - reach) * times, (place + reach + 1) * times) for place in query)
    pixels[rows, columns] = QUERY
    return pixels


def _heads(first: int, count: int) -> str:
    return f"head {first + 1}" if count == 1 else f"heads {first + 1}-{first + count}"


def _pixels(image: torch.Tensor) -> Image:
    pixels: Image = image.permute(1, 2, 0).cpu().numpy()
    return enlarged(pixels, max(1, 64 // len(pixels)))
