"""Key sets of published checkpoints, with shapes, written down from their sources and not from our layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

Entry = tuple[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def vectors(name: str, dim: int) -> Iterator[Entry]:
    yield f"{name}.weight", (dim,)
    yield f"{name}.bias", (dim,)


def convolution(name: str, out: int, into: int, kernel: int, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (out, into, kernel, kernel)
    if bias:
        yield f"{name}.bias", (out,)


def layer(name: str, dim: int, heads: int, kernel: int, ratio: int, layer_scale: bool = False) -> Iterator[Entry]:
    yield from vectors(f"{name}.norm1", dim)
    yield f"{name}.attn.rpb", (heads, 2 * kernel - 1, 2 * kernel - 1)
    yield from attention_and_mlp(name, dim, ratio)
    if layer_scale:
        yield f"{name}.gamma1", (dim,)
        yield f"{name}.gamma2", (dim,)


def attention_and_mlp(name: str, dim: int, ratio: int) -> Iterator[Entry]:
    yield from linear(f"{name}.attn.qkv", 3 * dim, dim)
    yield from linear(f"{name}.attn.proj", dim, dim)
    yield from vectors(f"{name}.norm2", dim)
    yield from linear(f"{name}.mlp.fc1", ratio * dim, dim)
    yield from linear(f"{name}.mlp.fc2", dim, ratio * dim)


def nat(
    dim: int, depths: Sequence[int], ratio: int, kernel: int = 7, layer_scale: bool = False, classes: int = 1000
) -> Iterator[Entry]:
    """NAT and DiNAT; heads of 32 channels."""
    yield from convolution("patch_embed.proj.0", dim // 2, 3, 3)
    yield from convolution("patch_embed.proj.1", dim, dim // 2, 3)
    yield from vectors("patch_embed.norm", dim)
    for level, depth in enumerate(depths):
        width = dim * 2**level
        for index in range(depth):
            yield from layer(f"levels.{level}.blocks.{index}", width, width // 32, kernel, ratio, layer_scale)
        if level < len(depths) - 1:
            yield from convolution(f"levels.{level}.downsample.reduction", 2 * width, width, 3, bias=False)
            yield from vectors(f"levels.{level}.downsample.norm", 2 * width)
    yield from vectors("norm", width)
    yield from linear("head", classes, width)


def dinat_s(dim: int, depths: Sequence[int]) -> Iterator[Entry]:
    yield from convolution("patch_embed.proj", dim, 3, 4)
    yield from vectors("patch_embed.norm", dim)
    for level, depth in enumerate(depths):
        width = dim * 2**level
        for index in range(depth):
            yield from layer(f"layers.{level}.blocks.{index}", width, width // 32, 7, 4)
        if level < len(depths) - 1:
            yield from vectors(f"layers.{level}.downsample.norm", 4 * width)
            yield from linear(f"layers.{level}.downsample.reduction", 2 * width, 4 * width, bias=False)
    yield from vectors("norm", width)
    yield from linear("head", 1000, width)


def isotropic(dim: int, kernel: int, depth: int = 12, index_of: int = 0) -> Iterator[Entry]:
    """NAT and DiNAT with kernel 7; vitrpb with "kernel" 14 and the index buffer of a 14x14 map."""
    yield from convolution("patch_embed.proj", dim, 3, 16)
    yield from vectors("patch_embed.norm", dim)
    for index in range(depth):
        yield from layer(f"layers.{index}", dim, dim // 32, kernel, 4)
        if index_of:
            yield f"layers.{index}.attn.relative_position_index", (index_of**2, index_of**2)
    yield from vectors("norm", dim)
    yield from linear("head", 1000, dim)


def swin(dim: int, depths: Sequence[int], window: int = 7, classes: int = 1000) -> Iterator[Entry]:
    yield from convolution("patch_embed.proj", dim, 3, 4)
    yield from vectors("patch_embed.norm", dim)
    for level, depth in enumerate(depths):
        width = dim * 2**level
        for index in range(depth):
            name = f"layers.{level}.blocks.{index}"
            yield from vectors(f"{name}.norm1", width)
            yield f"{name}.attn.relative_position_bias_table", ((2 * window - 1) ** 2, width // 32)
            yield f"{name}.attn.relative_position_index", (window**2, window**2)
            yield from attention_and_mlp(name, width, 4)
        if level < len(depths) - 1:
            yield from vectors(f"layers.{level}.downsample.norm", 4 * width)
            yield from linear(f"layers.{level}.downsample.reduction", 2 * width, 4 * width, bias=False)
    yield from vectors("norm", width)
    yield from linear("head", classes, width)


def swin_hub(dim: int, depths: Sequence[int], window: int = 7) -> Iterator[Entry]:
    """Swin as transformers 4 wrote it to the hub."""
    yield from convolution("swin.embeddings.patch_embeddings.projection", dim, 3, 4)
    yield from vectors("swin.embeddings.norm", dim)
    for level, depth in enumerate(depths):
        width = dim * 2**level
        for index in range(depth):
            name = f"swin.encoder.layers.{level}.blocks.{index}"
            yield from vectors(f"{name}.layernorm_before", width)
            yield from vectors(f"{name}.layernorm_after", width)
            yield f"{name}.attention.self.relative_position_bias_table", ((2 * window - 1) ** 2, width // 32)
            yield f"{name}.attention.self.relative_position_index", (window**2, window**2)
            for part in ("query", "key", "value"):
                yield from linear(f"{name}.attention.self.{part}", width, width)
            yield from linear(f"{name}.attention.output.dense", width, width)
            yield from linear(f"{name}.intermediate.dense", 4 * width, width)
            yield from linear(f"{name}.output.dense", width, 4 * width)
        if level < len(depths) - 1:
            yield from vectors(f"swin.encoder.layers.{level}.downsample.norm", 4 * width)
            yield from linear(f"swin.encoder.layers.{level}.downsample.reduction", 2 * width, 4 * width, bias=False)
    yield from vectors("swin.layernorm", width)
    yield from linear("classifier", 1000, width)


def dinat_hub(dim: int, depths: Sequence[int], ratio: int, layer_scale: bool = False) -> Iterator[Entry]:
    """DiNAT (and NAT) as transformers writes it."""
    yield from convolution("dinat.embeddings.patch_embeddings.projection.0", dim // 2, 3, 3)
    yield from convolution("dinat.embeddings.patch_embeddings.projection.1", dim, dim // 2, 3)
    yield from vectors("dinat.embeddings.norm", dim)
    for level, depth in enumerate(depths):
        width = dim * 2**level
        for index in range(depth):
            name = f"dinat.encoder.levels.{level}.layers.{index}"
            yield from vectors(f"{name}.layernorm_before", width)
            yield from vectors(f"{name}.layernorm_after", width)
            yield f"{name}.attention.self.rpb", (width // 32, 13, 13)
            for part in ("query", "key", "value"):
                yield from linear(f"{name}.attention.self.{part}", width, width)
            yield from linear(f"{name}.attention.output.dense", width, width)
            yield from linear(f"{name}.intermediate.dense", ratio * width, width)
            yield from linear(f"{name}.output.dense", width, ratio * width)
            if layer_scale:
                yield f"{name}.layer_scale_parameters", (2, width)
        if level < len(depths) - 1:
            yield from convolution(
                f"dinat.encoder.levels.{level}.downsample.reduction", 2 * width, width, 3, bias=False
            )
            yield from vectors(f"dinat.encoder.levels.{level}.downsample.norm", 2 * width)
    yield from vectors("dinat.layernorm", width)
    yield from linear("classifier", 1000, width)


def state(entries: Iterator[Entry]) -> dict[str, torch.Tensor]:
    """Random tensors of these names and shapes; index buffers are whole numbers."""
    return {
        name: torch.zeros(shape, dtype=torch.int64) if name.endswith("index") else torch.randn(shape)
        for name, shape in entries
    }
