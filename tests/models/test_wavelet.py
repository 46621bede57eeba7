"""The wavelet discriminator: published key set, its filters, the spectral norm, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vicinal.models import checkpoint, loading, wavelet
from vicinal.models.layout import to_theirs
from vicinal.models.wavelet import WaveletConfig, WaveletDiscriminator, blurred, from_wavelets, to_wavelets, variety

from . import published

TINY = WaveletConfig(32, (8, 12, 16, 20), 3)


def spectral(name, *shape, bias=False):
    yield f"{name}.weight_orig", shape
    yield f"{name}.weight_u", shape[:1]
    yield f"{name}.weight_v", (math.prod(shape[1:]),)
    if bias:
        yield f"{name}.bias", shape[:1]


def keys(size):
    """The published discriminator with spectral norms."""
    widths = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}
    haar = [(part, (2, 2)) for part in ("ll", "lh", "hl", "hh")]
    yield from ((f"dwt.{part}", shape) for part, shape in haar)
    maps = [2**power for power in range(int(math.log2(size)) - 1, 1, -1)]
    for level, length in enumerate(maps):
        width = widths[size] if not level else widths[length]
        if level:
            yield from ((f"from_rgbs.{level}.{kind}.{part}", s) for kind in ("iwt", "dwt") for part, s in haar)
            yield f"from_rgbs.{level}.downsample.kernel", (4, 4)
        yield from spectral(f"from_rgbs.{level}.conv.0", width, 12, 1, 1)
        yield f"from_rgbs.{level}.conv.1.bias", (width,)
        if length > 4:
            after = widths[length // 2]
            yield from spectral(f"convs.{level}.conv1.0", width, width, 3, 3)
            yield f"convs.{level}.conv1.1.bias", (width,)
            yield f"convs.{level}.conv2.0.kernel", (4, 4)
            yield from spectral(f"convs.{level}.conv2.1", after, width, 3, 3)
            yield f"convs.{level}.conv2.2.bias", (after,)
    yield from spectral("final_conv.0", 512, 513, 3, 3)
    yield "final_conv.1.bias", (512,)
    yield from spectral("final_linear.0", 512, 8192, bias=True)
    yield "final_linear.1.bias", (512,)
    yield from spectral("final_linear.2", 1, 512, bias=True)


@pytest.mark.parametrize("size", [256, 1024])
def test_published_keys_load_strictly_and_come_back(size):
    theirs = {name: torch.randn(1).expand(shape) for name, shape in keys(size)}
    with torch.device("meta"):
        model = WaveletDiscriminator(WaveletConfig(size))
    found, ours, fit = loading.match(theirs, model, wavelet.FAMILY)
    assert (found, str(fit)) == ("published", "everything fits")
    back = to_theirs(wavelet.FAMILY.layouts["published"], ours)
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == dict(keys(size))
    for name, tensor in theirs.items():
        if "weight" in name or "bias" in name:
            assert torch.equal(back[name], tensor), name


def test_it_is_found_beside_a_generator(tmp_path):
    model = WaveletDiscriminator(TINY)
    theirs = to_theirs(wavelet.FAMILY.layouts["published"], model.state_dict())
    torch.save({"g_ema": published.state([("input.input", (1, 8, 4, 4))]), "d": theirs}, tmp_path / "old.pt")
    torch.save({"state_dicts": {"g_ema": {"x": torch.zeros(1)}, "d": theirs}}, tmp_path / "new.pt")
    for name in ("old.pt", "new.pt"):
        other = WaveletDiscriminator(TINY)
        assert wavelet.load(other, checkpoint.read(tmp_path / name, "d").state) == "published"
        assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_the_filters_are_those_that_are_published():
    made = wavelet._filters({"from_rgbs.1.conv.0.weight_orig": torch.zeros(1)})
    image = torch.randn(2, 3, 6, 8)
    parts = []
    for name in ("ll", "lh", "hl", "hh"):  # published code convolves, so its filters are turned around
        kernel = made[f"dwt.{name}"].flip(0, 1).expand(3, 1, 2, 2)
        parts.append(nn.functional.conv2d(image, kernel, stride=2, groups=3))
    torch.testing.assert_close(to_wavelets(image), torch.cat(parts, 1))
    again = 0.0
    for part, name in zip(parts, ("ll", "lh", "hl", "hh"), strict=True):
        kernel = made[f"from_rgbs.1.iwt.{name}"].flip(0, 1).expand(3, 1, 2, 2)
        spread = torch.zeros(2, 3, 6, 8)
        spread[:, :, ::2, ::2] = part
        again = again + nn.functional.conv2d(nn.functional.pad(spread, (1, 0, 1, 0)), kernel, groups=3)
    torch.testing.assert_close(again, image)
    torch.testing.assert_close(from_wavelets(to_wavelets(image)), image)
    torch.testing.assert_close(to_wavelets(image).norm(), image.norm())
    taps = made["from_rgbs.1.downsample.kernel"].expand(3, 1, 4, 4)
    expected = nn.functional.conv2d(image, taps, stride=2, padding=1, groups=3)
    torch.testing.assert_close(blurred(image, 1, 2), expected)


def test_every_layer_s_norm_comes_to_one():
    model = WaveletDiscriminator(TINY)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for _ in range(40):
            model(images)
    norms = [
        torch.linalg.matrix_norm(module.weight.flatten(1), 2).item()
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert len(norms) == 3 + 2 * 2 + 1 + 2
    assert norms == pytest.approx([1.0] * len(norms), abs=0.03)


def test_variety_is_of_groups_of_four_or_what_divides_the_batch():
    maps = torch.randn(6, 2, 3, 3)
    found = variety(maps)
    for first in (0, 1):  # groups of three: every second sample
        spread = maps[first::2].var(0, correction=0).add(1e-8).sqrt().mean()
        torch.testing.assert_close(found[first::2], spread.expand(3, 1, 3, 3))
    assert variety(torch.randn(7, 2, 3, 3)).shape == (7, 1, 3, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ((8, (8, 8)), "at least 16, got 8"),
        ((48, (8,) * 9), "power of two"),
        ((32, (8, 8)), "widths must be 4 positive numbers"),
        ((32, (8, 8, 8, 8), 0), "channels must be at least 1"),
    ],
)
def test_a_wrong_option_is_a_sentence(config, message):
    with pytest.raises(ValueError, match=message):
        WaveletConfig(*config)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 32, 32\], got \(4, 3, 28, 28\)"):
        WaveletDiscriminator(TINY)(torch.zeros(4, 3, 28, 28))
