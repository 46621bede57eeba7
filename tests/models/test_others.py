"""The families that prove the builder, each against an independent implementation where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from vicinal.layers.convolution import LargeKernelAttention, RecursiveGate
from vicinal.layers.deformable import DeformableMerging
from vicinal.models import convnext, cswin, davit, focalnet, litv2, maxvit, poolformer, pvt, registry

from .parity import assert_close, take_over


def in_transformers(name, config):
    transformers = pytest.importorskip("transformers")
    there = getattr(transformers, f"{name}Config")(num_labels=10, drop_path_rate=0.0, **config)
    return getattr(transformers, f"{name}ForImageClassification")(there)


@pytest.mark.parametrize("size", [(64, 64), (75, 109)], ids=["64x64", "75x109"])
@torch.no_grad()
def test_convnext_equals_transformers(size, lively):
    dims, depths = (8, 16, 24, 32), (1, 1, 2, 1)
    theirs = lively(in_transformers("ConvNext", {"hidden_sizes": dims, "depths": depths, "layer_norm_eps": 1e-6}))
    ours = convnext.build(convnext.ConvNextConfig(dims, depths, 0.0, num_classes=10)).eval()
    take_over(convnext.TRANSFORMERS_LAYOUT, ours, theirs)
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), theirs(images).logits)


@pytest.mark.parametrize("size", [(64, 64), (75, 109)], ids=["64x64", "75x109"])
@torch.no_grad()
def test_poolformer_equals_transformers(size, lively):
    dims, depths = (8, 16, 24, 32), (1, 1, 2, 1)
    theirs = lively(in_transformers("PoolFormer", {"hidden_sizes": list(dims), "depths": list(depths)}))
    ours = poolformer.build(poolformer.PoolFormerConfig(dims, depths, 0.0, num_classes=10)).eval()
    take_over(poolformer.TRANSFORMERS_LAYOUT, ours, theirs)
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), theirs(images).logits)


@torch.no_grad()
def test_pvt_refuses_an_image_size_without_a_place_in_the_last_stage():
    with pytest.raises(ValueError, match="image_size must be at least 32, got 31"):
        pvt.build(dataclasses.replace(pvt.VARIANTS["pvt_tiny"], image_size=31))


def test_pvt_equals_transformers(lively):
    small = dataclasses.replace(pvt.VARIANTS["pvt_tiny"], dims=(8, 16, 40, 64), image_size=64, num_classes=10)
    there = {"hidden_sizes": small.dims, "image_size": 64}
    theirs = lively(in_transformers("Pvt", there))
    ours = pvt.build(small).eval()
    take_over(pvt.TRANSFORMERS_LAYOUT, ours, theirs)
    images = torch.randn(2, 3, 64, 64)
    assert_close(ours(images), theirs(images).logits)


@pytest.mark.parametrize("size", [(64, 64), (75, 109)], ids=["64x64", "75x109"])
@torch.no_grad()
def test_focalnet_equals_transformers(size, lively):
    config = {"embed_dim": 16, "depths": [1, 1, 2, 1], "image_size": 64}
    theirs = lively(in_transformers("FocalNet", config))
    ours = focalnet.build(focalnet.FocalNetConfig(16, (1, 1, 2, 1), 0.0, levels=2, num_classes=10)).eval()
    take_over(focalnet.TRANSFORMERS_LAYOUT, ours, theirs)
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), theirs(images).logits)


@torch.no_grad()
def test_maxvit_equals_timm(lively):
    pytest.importorskip("timm")
    from timm.models.maxxvit import MaxxVit, model_cfgs

    small = maxvit.MaxVitConfig((32, 64, 64, 96), (1, 2, 1, 1), 32, 0.0, size=2, num_classes=10)
    there = dataclasses.replace(
        model_cfgs["maxvit_tiny_tf"], embed_dim=small.dims, depths=small.depths, stem_width=32, head_hidden_size=96
    )
    theirs = lively(MaxxVit(there, img_size=64, num_classes=10))
    ours = maxvit.build(small).eval()
    take_over(maxvit.TIMM_LAYOUT, ours, theirs)
    images = torch.randn(2, 3, 64, 64)
    assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("size", [(56, 112), (75, 109)], ids=["56x112", "padded"])
@torch.no_grad()
def test_davit_equals_timm(size, lively):
    pytest.importorskip("timm")
    from timm.models.davit import DaVit

    dims, depths, heads = (16, 32, 48, 64), (1, 1, 2, 1), (1, 2, 3, 4)
    theirs = lively(DaVit(depths=depths, embed_dims=dims, num_heads=heads, num_classes=10))
    ours = davit.build(davit.DavitConfig(dims, depths, heads, 0.0, num_classes=10)).eval()
    take_over(davit.TIMM_LAYOUT, ours, theirs)
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "there"), [("maxvit_tiny", "maxvit_tiny_tf_224"), ("davit_tiny", "davit_tiny"), ("swin_tiny", None)]
)
def test_the_full_size_is_timms(name, there):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(there or "swin_tiny_patch4_window7_224")
        ours = registry.create_model(name)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def reference_stripes(mixer, inputs, width):
    """CSWin's attention as written in its paper: cut stripes out, attend, add the convolved values, put them back."""
    _, height, length, dim = inputs.shape
    halves = []
    for half, (tall, wide) in enumerate(((height, width), (width, length))):
        part = slice(half * dim // 2, (half + 1) * dim // 2)
        query, key, value = (piece[..., part] for piece in mixer.qkv(inputs).chunk(3, -1))
        out = torch.zeros_like(query)
        for top in range(0, height, tall):
            for left in range(0, length, wide):
                cut = (slice(None), slice(top, top + tall), slice(left, left + wide))
                heads = [
                    piece[cut].flatten(1, 2).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
                    for piece in (query, key, value)
                ]
                attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
                place = mixer.value_mixer.mixers[half].conv(value[cut].movedim(-1, 1)).movedim(1, -1)
                out[cut] = attended.reshape(place.shape) + place
        halves.append(out)
    return mixer.proj(torch.cat(halves, -1))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)], ids=["divisible", "cut"])
@torch.no_grad()
def test_cswin_mixer_equals_stripe_by_stripe(grid, lively):
    mixer = lively(cswin.stripes(32, 4, 2))
    inputs = torch.randn(2, *grid, 32)
    torch.testing.assert_close(mixer(inputs), reference_stripes(mixer, inputs, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hilo_equals_its_two_halves_written_out(lively):
    mixer = lively(litv2.hilo(32, 4, 2, 0.75))
    high, low = mixer.mixers
    inputs = torch.randn(2, 4, 6, 32)

    def attend(query, key, value, width):
        split = [piece.unflatten(-1, (-1, width)).transpose(1, 2) for piece in (query, key, value)]
        return nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)

    blocks = inputs.reshape(2, 2, 2, 3, 2, 32).transpose(2, 3).reshape(12, 4, 32)
    inside = high.proj(attend(*high.qkv(blocks).chunk(3, -1), 8))
    inside = inside.reshape(2, 2, 3, 2, 2, 8).transpose(2, 3).reshape(2, 4, 6, 8)
    means = inputs.reshape(2, 2, 2, 3, 2, 32).mean((2, 4)).flatten(1, 2)
    whole = low.proj(attend(low.q(inputs.flatten(1, 2)), *low.kv(means).chunk(2, -1), 8)).unflatten(1, (4, 6))
    torch.testing.assert_close(mixer(inputs), torch.cat([inside, whole], -1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_deformable_merging_without_offsets_is_a_convolution(lively):
    merging = lively(DeformableMerging(4, 6))
    nn.init.zeros_(merging.offset.weight)
    nn.init.zeros_(merging.offset.bias)
    inputs = torch.randn(2, 6, 8, 4)
    plain = nn.functional.conv2d(inputs.movedim(-1, 1), merging.weight, merging.bias, stride=2)
    expected = merging.act(merging.norm(plain)).movedim(1, -1)
    torch.testing.assert_close(merging(inputs), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_deformable_merging_moves_its_taps_down_and_right(lively):
    """Offsets of whole pixels, the row first: every tap reads one row lower and two columns further, zero outside."""
    merging = lively(DeformableMerging(4, 6))
    nn.init.zeros_(merging.offset.weight)
    merging.offset.bias.copy_(torch.tensor([1.0, 2.0] * 4))
    inputs = torch.randn(2, 6, 8, 4).movedim(-1, 1)
    moved = torch.zeros_like(inputs)
    moved[:, :, :-1, :-2] = inputs[:, :, 1:, 2:]
    plain = nn.functional.conv2d(moved, merging.weight, merging.bias, stride=2)
    expected = merging.act(merging.norm(plain)).movedim(1, -1)
    torch.testing.assert_close(merging(inputs.movedim(1, -1)), expected, rtol=1e-4, atol=1e-4)


def point(layer, maps):
    """A linear layer as the 1x1 convolution that it is in the original."""
    return nn.functional.conv2d(maps, layer.weight[..., None, None], layer.bias)


@torch.no_grad()
def test_large_kernel_attention_written_out(lively):
    mixer = lively(LargeKernelAttention(6))
    maps = torch.randn(2, 6, 11, 12)
    inner = nn.functional.gelu(point(mixer.proj_in, maps))
    gate = nn.functional.conv2d(inner, mixer.near.conv.weight, mixer.near.conv.bias, padding=2, groups=6)
    gate = nn.functional.conv2d(gate, mixer.far.conv.weight, mixer.far.conv.bias, padding=9, dilation=3, groups=6)
    expected = point(mixer.proj_out, inner * point(mixer.point, gate)) + maps
    torch.testing.assert_close(mixer(maps.movedim(1, -1)).movedim(-1, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_recursive_gate_written_out(lively):
    """Order 3 over 8 channels: shares of 2, 4 and 8, each gate as wide as its share."""
    mixer = lively(RecursiveGate(8, 3, scale=1 / 3))
    maps = torch.randn(2, 8, 9, 10)
    gate, rest = point(mixer.proj_in, maps).split([2, 14], 1)
    conv = mixer.depthwise.conv
    shares = (nn.functional.conv2d(rest, conv.weight, conv.bias, padding=3, groups=14) / 3).split([2, 4, 8], 1)
    gate = gate * shares[0]
    gate = point(mixer.widen[0], gate) * shares[1]
    gate = point(mixer.widen[1], gate) * shares[2]
    expected = point(mixer.proj_out, gate)
    torch.testing.assert_close(mixer(maps.movedim(1, -1)).movedim(-1, 1), expected, rtol=1e-4, atol=1e-4)
