"""Key sets of the checkpoints of the families that prove the builder, written down from their sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .published import Entry, convolution, linear, vectors

DIMS = (64, 128, 320, 512)


def depthwise(name: str, dim: int, kernel: int, bias: bool = True) -> Iterator[Entry]:
    yield from convolution(name, dim, 1, kernel, bias)


def batch_norm(name: str, dim: int) -> Iterator[Entry]:
    yield from vectors(name, dim)
    yield f"{name}.running_mean", (dim,)
    yield f"{name}.running_var", (dim,)
    yield f"{name}.num_batches_tracked", ()


def patches(dims: Sequence[int]) -> Iterator[Entry]:
    """Stem, downsamplers, norm and head of ConvNeXt and HorNet."""
    yield from convolution("downsample_layers.0.0", dims[0], 3, 4)
    yield from vectors("downsample_layers.0.1", dims[0])
    for level in (1, 2, 3):
        yield from vectors(f"downsample_layers.{level}.0", dims[level - 1])
        yield from convolution(f"downsample_layers.{level}.1", dims[level], dims[level - 1], 2)
    yield from vectors("norm", dims[3])
    yield from linear("head", 1000, dims[3])


def convnext(depths: Sequence[int] = (3, 3, 9, 3), dims: Sequence[int] = (96, 192, 384, 768)) -> Iterator[Entry]:
    yield from patches(dims)
    for level, depth in enumerate(depths):
        for index in range(depth):
            name, dim = f"stages.{level}.{index}", dims[level]
            yield f"{name}.gamma", (dim,)
            yield from depthwise(f"{name}.dwconv", dim, 7)
            yield from vectors(f"{name}.norm", dim)
            yield from linear(f"{name}.pwconv1", 4 * dim, dim)
            yield from linear(f"{name}.pwconv2", dim, 4 * dim)


def hornet() -> Iterator[Entry]:
    dims = (64, 128, 256, 512)
    yield from patches(dims)
    for level, depth in enumerate((2, 3, 18, 2)):
        order, dim = level + 2, dims[level]
        widths = [dim // 2**power for power in range(order)][::-1]
        for index in range(depth):
            name = f"stages.{level}.{index}"
            yield f"{name}.gamma1", (dim,)
            yield f"{name}.gamma2", (dim,)
            yield from vectors(f"{name}.norm1", dim)
            yield from vectors(f"{name}.norm2", dim)
            yield from convolution(f"{name}.gnconv.proj_in", 2 * dim, dim, 1)
            yield from depthwise(f"{name}.gnconv.dwconv", sum(widths), 7)
            yield from convolution(f"{name}.gnconv.proj_out", dim, dim, 1)
            for gate in range(order - 1):
                yield from convolution(f"{name}.gnconv.pws.{gate}", widths[gate + 1], widths[gate], 1)
            yield from linear(f"{name}.pwconv1", 4 * dim, dim)
            yield from linear(f"{name}.pwconv2", dim, 4 * dim)


def poolformer() -> Iterator[Entry]:
    yield from convolution("patch_embed.proj", 64, 3, 7)
    for level, depth in enumerate((2, 2, 6, 2)):
        dim = DIMS[level]
        if level:
            yield from convolution(f"network.{2 * level - 1}.proj", dim, DIMS[level - 1], 3)
        for index in range(depth):
            name = f"network.{2 * level}.{index}"
            yield f"{name}.layer_scale_1", (dim,)
            yield f"{name}.layer_scale_2", (dim,)
            yield from vectors(f"{name}.norm1", dim)
            yield from vectors(f"{name}.norm2", dim)
            yield from convolution(f"{name}.mlp.fc1", 4 * dim, dim, 1)
            yield from convolution(f"{name}.mlp.fc2", dim, 4 * dim, 1)
    yield from vectors("norm", 512)
    yield from linear("head", 1000, 512)


def van() -> Iterator[Entry]:
    dims, ratios = (32, 64, 160, 256), (8, 8, 4, 4)
    for level, depth in enumerate((3, 3, 5, 2)):
        dim, hidden = dims[level], ratios[level] * dims[level]
        into, kernel = (dims[level - 1], 3) if level else (3, 7)
        yield from convolution(f"patch_embed{level + 1}.proj", dim, into, kernel)
        yield from batch_norm(f"patch_embed{level + 1}.norm", dim)
        for index in range(depth):
            name = f"block{level + 1}.{index}"
            yield f"{name}.layer_scale_1", (dim,)
            yield f"{name}.layer_scale_2", (dim,)
            yield from batch_norm(f"{name}.norm1", dim)
            yield from batch_norm(f"{name}.norm2", dim)
            yield from convolution(f"{name}.attn.proj_1", dim, dim, 1)
            yield from depthwise(f"{name}.attn.spatial_gating_unit.conv0", dim, 5)
            yield from depthwise(f"{name}.attn.spatial_gating_unit.conv_spatial", dim, 7)
            yield from convolution(f"{name}.attn.spatial_gating_unit.conv1", dim, dim, 1)
            yield from convolution(f"{name}.attn.proj_2", dim, dim, 1)
            yield from convolution(f"{name}.mlp.fc1", hidden, dim, 1)
            yield from depthwise(f"{name}.mlp.dwconv.dwconv", hidden, 3)
            yield from convolution(f"{name}.mlp.fc2", dim, hidden, 1)
        yield from vectors(f"norm{level + 1}", dim)
    yield from linear("head", 1000, dims[3])


def cswin() -> Iterator[Entry]:
    yield from convolution("stage1_conv_embed.0", 64, 3, 7)
    yield from vectors("stage1_conv_embed.2", 64)
    for level, depth in enumerate((1, 2, 21, 1)):
        dim = 64 * 2**level
        if level:
            yield from convolution(f"merge{level}.conv", dim, dim // 2, 3)
            yield from vectors(f"merge{level}.norm", dim)
        for index in range(depth):
            name = f"stage{level + 1}.{index}"
            yield from linear(f"{name}.qkv", 3 * dim, dim)
            yield from vectors(f"{name}.norm1", dim)
            yield from linear(f"{name}.proj", dim, dim)
            branches = 1 if level == 3 else 2
            for branch in range(branches):
                yield from depthwise(f"{name}.attns.{branch}.get_v", dim // branches, 3)
            yield from linear(f"{name}.mlp.fc1", 4 * dim, dim)
            yield from linear(f"{name}.mlp.fc2", dim, 4 * dim)
            yield from vectors(f"{name}.norm2", dim)
    yield from vectors("norm", 512)
    yield from linear("head", 1000, 512)


def pvt() -> Iterator[Entry]:
    yield "cls_token", (1, 1, 512)
    for level, (ratio, reduction, tokens) in enumerate(((8, 8, 3136), (8, 4, 784), (4, 2, 196), (4, 1, 50))):
        dim, into, size = DIMS[level], DIMS[level - 1] if level else 3, 2 if level else 4
        yield f"pos_embed{level + 1}", (1, tokens, dim)
        yield from convolution(f"patch_embed{level + 1}.proj", dim, into, size)
        yield from vectors(f"patch_embed{level + 1}.norm", dim)
        for index in range(2):
            name = f"block{level + 1}.{index}"
            yield from vectors(f"{name}.norm1", dim)
            yield from linear(f"{name}.attn.q", dim, dim)
            yield from linear(f"{name}.attn.kv", 2 * dim, dim)
            yield from linear(f"{name}.attn.proj", dim, dim)
            if reduction > 1:
                yield from convolution(f"{name}.attn.sr", dim, dim, reduction)
                yield from vectors(f"{name}.attn.norm", dim)
            yield from vectors(f"{name}.norm2", dim)
            yield from linear(f"{name}.mlp.fc1", ratio * dim, dim)
            yield from linear(f"{name}.mlp.fc2", dim, ratio * dim)
    yield from vectors("norm", 512)
    yield from linear("head", 1000, 512)


def litv2() -> Iterator[Entry]:
    yield from convolution("patch_embed.proj", 96, 3, 4)
    yield from vectors("patch_embed.norm", 96)
    for level, depth in enumerate((2, 2, 6, 2)):
        dim = 96 * 2**level
        low = {2: 10 * 32, 3: dim}.get(level, 0)
        for index in range(depth):
            name = f"layers.{level}.blocks.{index}"
            if low:
                yield from vectors(f"{name}.norm1", dim)
                yield from linear(f"{name}.attn.l_q", low, dim)
                yield from linear(f"{name}.attn.l_kv", 2 * low, dim)
                yield from linear(f"{name}.attn.l_proj", low, low)
            if 0 < low < dim:
                yield from linear(f"{name}.attn.h_qkv", 3 * (dim - low), dim)
                yield from linear(f"{name}.attn.h_proj", dim - low, dim - low)
            yield from vectors(f"{name}.norm2", dim)
            yield from linear(f"{name}.mlp.fc1", 4 * dim, dim)
            yield from depthwise(f"{name}.mlp.dwconv.dwconv", 4 * dim, 3)
            yield from linear(f"{name}.mlp.fc2", dim, 4 * dim)
        if level < 3:
            name = f"layers.{level}.downsample"
            yield from convolution(f"{name}.dconv", 2 * dim, dim, 2)
            yield from convolution(f"{name}.dconv.conv_offset", 8, dim, 2)
            yield from batch_norm(f"{name}.norm_layer", 2 * dim)
    yield from vectors("norm", 768)
    yield from linear("head", 1000, 768)
