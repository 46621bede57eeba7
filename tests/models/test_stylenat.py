"""StyleNAT: published sizes and key sets, what its layers compute, and what it refuses."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from torch import nn

import vicinal
from vicinal.models import loading, registry
from vicinal.models.layout import to_theirs
from vicinal.models.stylenat import Grow, StyleNatConfig, doubled, sines

from . import published

SMALL = {"image_size": 32, "widths": (32, 32, 16, 16), "head_dim": 8, "latent_size": 16, "mapping_depth": 2}
SPLIT = "published split-head"


def keys(levels: int, *, is_old: bool):
    """The generator of the released files: widths and groups of FFHQ, 512 latents."""
    widths = (512, 512, 512, 512, 512, 256, 128, 64, 32)
    for number in range(1, 9):
        yield from published.linear(f"style.{number}", 512, 512)
    yield "input.input", (1, 512, 4, 4)
    for level in range(levels):
        width, heads = widths[level], max(widths[level] // 32, 4)
        for block in range(2):
            name = f"layers.{level}.blocks.{block}"
            for norm in ("norm1", "norm2"):
                yield from published.linear(f"{name}.{norm}.style", 2 * width, 512)
            yield from published.linear(f"{name}.attn.qkv", 3 * width, width)
            yield from published.linear(f"{name}.attn.proj", width, width)
            yield from published.linear(f"{name}.mlp.fc1", 4 * width, width)
            yield from published.linear(f"{name}.mlp.fc2", width, 4 * width)
            if not level:
                yield f"{name}.attn.rpb", (heads, 7, 7)
                yield f"{name}.attn.relative_position_index", (16, 16)
            elif is_old:
                yield f"{name}.attn.rpb0", (heads // 2, 13, 13)
                yield f"{name}.attn.rpb1", (heads // 2, 13, 13)
            elif level == 1:
                yield f"{name}.attn.rpb.0", (heads, 13, 13)
            else:
                yield f"{name}.attn.rpb.0", (heads // 2, 13, 13)
                yield f"{name}.attn.rpb.1", (heads // 2, 13, 13)
        after = widths[min(level + 1, levels - 1)]
        if level < levels - 1:
            yield from published.vectors(f"layers.{level}.upsample.norm", width)
            yield f"layers.{level}.upsample.reduction.weight", (after, width)
            yield f"layers.{level}.upsample.alpha", (1,)
            yield f"layers.{level}.upsample.sin_pos_embed._float_tensor", (1,)
            yield f"to_rgbs.{level}.upsample.kernel", (4, 4)
        yield from published.convolution(f"to_rgbs.{level}.conv", 3, after, 1)
        yield f"to_rgbs.{level}.bias", (1, 3, 1, 1)


@pytest.mark.parametrize(("name", "parameters"), [("stylenat_ffhq256", 48_921_000), ("stylenat_ffhq1024", 49_452_934)])
def test_published_parameters_to_the_digit(name, parameters):
    with torch.device("meta"):
        model = vicinal.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize(("name", "levels"), [("stylenat_ffhq256", 7), ("stylenat_ffhq1024", 9)])
def test_both_published_layouts_load_strictly_and_come_back(name, levels, is_old):
    theirs = {key: torch.randn(1).expand(shape) for key, shape in keys(levels, is_old=is_old)}
    with torch.device("meta"):
        model = vicinal.create_model(name)
    layout = SPLIT if is_old else "published"
    family = registry.families()[name]
    found, ours, fit = loading.match(theirs, model, family)
    assert (found, str(fit)) == (layout, "everything fits")
    back = to_theirs(family.layouts[layout], ours)
    assert {key: tuple(tensor.shape) for key, tensor in back.items()} == dict(keys(levels, is_old=is_old))
    for key, tensor in theirs.items():
        if not key.endswith(("index", "_float_tensor", "kernel")):
            assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("is_old", [True, False])
def test_a_released_file_is_found_in_its_container(is_old, tmp_path):
    # four levels with few numbers: enough to see that heads stay in order
    model = vicinal.create_model("stylenat_ffhq256", **SMALL)
    family = registry.families()["stylenat_ffhq256"]
    wanted = to_theirs(family.layouts[SPLIT if is_old else "published"], model.state_dict())
    other = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    held = {"g": other, "d": {"final_linear.2.bias": torch.zeros(1)}, "g_ema": wanted}
    old = {"g_optim": {"state": {}}, "args": argparse.Namespace(size=256)}
    content = {**held, **old} if is_old else {"state_dicts": held, "optim_dicts": {}, "args": {}}
    torch.save(content, tmp_path / "released.pt")
    loaded = vicinal.create_model("stylenat_ffhq256", pretrained=tmp_path / "released.pt", **SMALL)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_a_checkpoint_of_another_resolution_is_named(tmp_path):
    small = vicinal.create_model("stylenat_ffhq256", **{**SMALL, "image_size": 16})
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(loading.CheckpointMismatch, match="of a generator of 16x16 images, this one makes 32x32"):
        vicinal.create_model("stylenat_ffhq256", pretrained=tmp_path / "weights.pt", **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 96}, "image_size must be a power of two from 8 on, got 96"),
        ({"image_size": 4}, "image_size must be a power of two"),
        ({"image_size": 2048}, "widths must have an entry for each of 10 levels"),
        ({"dilations": ((1,), (1,), (1, 2, 1, 2, 1), (1,))}, r"5 head groups at level 2 \(16x16\), but it has 4 heads"),
        ({"dilations": ((1,), (1,), (1, 3), (1,))}, r"must fit the map at level 2 \(16x16\), got 7 x 3"),
        ({"kernel_sizes": ((3,), (7,), (7, 5), (7,)), "dilations": ((1,), (1,), (1, 2, 1), (1,))}, "as many groups"),
        ({"widths": (32, 32, 12, 8)}, "widths must be multiples of 8"),
        ({"latent_size": 0}, "latent_size must be at least 1"),
        ({"mlp_ratio": 0}, "mlp_ratio must be above 0 and finite, got 0"),
        ({"mapping_rate": math.nan}, "mapping_rate must be above 0"),
        ({"normalization": ((0.5,), (0.5, 0.5))}, r"each one number or 3 \(one per channel\), got"),
        ({"normalization": ((0.5,), (0.0,))}, "deviations must be above 0"),
        ({"channels": 1}, "each one number or 1"),
        ({"features_only": True}, "features_only is for models that take images"),
    ],
)
def test_a_wrong_option_is_a_sentence(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        vicinal.create_model("stylenat_ffhq256", **{**SMALL, **options})


def test_an_odd_split_gives_the_last_groups_more_heads():
    config = StyleNatConfig(
        16, widths=(32, 32, 40), dilations=((1,), (1,), (1, 2)), head_dim=8, kernel_sizes=((3,),) * 3
    )
    assert config.pattern(2).sizes == (2, 3)
    model = vicinal.create_model("stylenat_ffhq256", **{name: getattr(config, name) for name in config.__dict__})
    assert [len(table) for table in model.levels[2].blocks[0].mixer.rpb] == [2, 3]


def test_images_of_a_batch_do_not_meet_and_every_parameter_has_a_gradient(lively):
    model = lively(vicinal.create_model("stylenat_ffhq256", **SMALL))
    z = torch.randn(3, 16)
    images = model(z)
    assert images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(model(z[1:2]), images[1:2], rtol=1e-4, atol=1e-5)
    images.square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_each_block_has_a_latent_of_its_own(lively):
    model = lively(vicinal.create_model("stylenat_ffhq256", **SMALL))
    w = model.mapping(torch.randn(1, 16))
    same = model.synthesis(w)
    torch.testing.assert_close(model.synthesis(w[:, None].expand(-1, 8, -1)), same)
    for number in range(8):
        mixed = w[:, None].repeat(1, 8, 1)
        mixed[:, number] += 1
        assert not torch.allclose(model.synthesis(mixed), same)
    with pytest.raises(ValueError, match=r"w must be \[batch, 16\] or \[batch, 8, 16\]"):
        model.synthesis(w[:, None].expand(-1, 7, -1))


def test_truncation_is_off_unless_asked_for(lively):
    model = lively(vicinal.create_model("stylenat_ffhq256", **SMALL))
    z = torch.randn(2, 16)
    mean = model.mean_latent(64, seed=1)
    torch.testing.assert_close(mean, model.mean_latent(64, seed=1), rtol=0, atol=0)
    assert not torch.equal(mean, model.mean_latent(64, seed=2))
    torch.testing.assert_close(model(z), model.synthesis(model.mapping(z)), rtol=0, atol=0)
    center = model(z, truncation=0.0, mean_latent=mean)
    torch.testing.assert_close(center, model.synthesis(mean).expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_skips_are_enlarged_by_the_filter():
    image = torch.randn(2, 3, 5, 6)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    kernel = (taps[:, None] * taps).expand(3, 1, 4, 4)
    expected = nn.functional.conv_transpose2d(image, kernel, stride=2, padding=1, groups=3)
    torch.testing.assert_close(doubled(image), expected)


def test_positions_count_from_one_and_the_column_comes_first():
    grow = Grow(16, 8, 6)
    with torch.no_grad():
        grow.alpha.fill_(1.0)
        grow.reduction.weight.zero_()
    out = grow(torch.randn(1, 3, 3, 16))[0]
    row, column = 4, 1
    rates = [1.0, 1e-4]
    for start, place in ((0, column + 1), (4, row + 1)):
        expected = [math.sin(place * rate) for rate in rates] + [math.cos(place * rate) for rate in rates]
        torch.testing.assert_close(out[row, column, start : start + 4], torch.tensor(expected))
    assert sines(6, 4).shape == (6, 4)


def test_bytes_and_images_are_each_other_s_inverse():
    for name in ("stylenat_ffhq256", "stylenat_fashion32"):
        model = vicinal.create_model(name, **({} if "fashion" in name else SMALL))
        pixels = torch.randint(256, (2, model.channels, 4, 4), dtype=torch.uint8)
        assert torch.equal(model.to_bytes(model.from_bytes(pixels)), pixels)
