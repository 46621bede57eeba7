"""Each step: the same draw gives the same picture, values stay bytes, and the picture is what the name says."""

from __future__ import annotations

import random as python_random

import numpy as np
import pytest

from vicinal.data.augment import CenterCrop, ColorJitter, Erase, Flip, RandAugment, Resize, ResizedCrop, Shift
from vicinal.data.dataset import DataMissing

pytest.importorskip("PIL")


def picture(height=37, width=23, channels=3):
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), np.uint8)


STEPS = [Shift(3), Flip(0.5), Resize(16), CenterCrop(16), ResizedCrop(16), ColorJitter(), Erase(1.0)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_a_step_depends_on_its_generator_alone(step, channels):
    if channels == 1 and isinstance(step, Erase):
        step = Erase(1.0, (0.5,), (0.25,))
    image = picture(channels=channels)
    before = image.copy()
    first, again = (step(image, np.random.default_rng(5)) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.shape[-1] == channels
    assert np.array_equal(first, again)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "step", [Shift(3), Flip(0.5), ResizedCrop(16), ColorJitter(), Erase(0.9)], ids=lambda s: type(s).__name__
)
def test_a_step_draws(step):
    results = {step(picture(), np.random.default_rng(seed)).tobytes() for seed in range(12)}
    assert len(results) > 1


def test_shift_moves_and_fills_with_black():
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    found = set()
    for seed in range(80):
        moved = Shift(1)(image, np.random.default_rng(seed))
        down, right = (
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if np.array_equal(
                moved, np.pad(image, ((1, 1), (1, 1), (0, 0)))[1 - down : 6 - down, 1 - right : 6 - right]
            )
        ).__next__()
        found.add((down, right))
    assert len(found) == 9


def test_sizes_are_what_was_asked_for():
    random = np.random.default_rng(0)
    assert Resize(16)(picture(), random).shape == (26, 16, 3)
    assert Resize(0)(picture(), random).shape == (37, 23, 3)
    assert CenterCrop(40)(picture(), random).shape == (40, 40, 3)
    assert np.array_equal(CenterCrop(9)(picture(), random), picture()[14:23, 7:16])
    assert ResizedCrop(11)(picture(1, 90), random).shape == (11, 11, 3)


def test_erase_touches_a_rectangle_and_nothing_else():
    image = picture()
    erased = Erase(1.0)(image, np.random.default_rng(2))
    rows, columns = np.nonzero((erased != image).any(-1))
    area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert 0.015 * 37 * 23 < area < 0.4 * 37 * 23
    assert Erase(0.0)(image, np.random.default_rng(2)) is image


def test_randaugment_draws_from_our_generator_and_leaves_the_global_ones():
    pytest.importorskip("timm")
    image = picture(48, 40)
    python_random.seed(8)
    np.random.seed(8)
    expected = python_random.random(), np.random.random()
    python_random.seed(8)
    np.random.seed(8)
    try:
        first = RandAugment()(image, np.random.default_rng(4))
    except DataMissing as error:
        pytest.skip(str(error))
    assert (python_random.random(), np.random.random()) == expected
    assert np.array_equal(first, RandAugment()(image, np.random.default_rng(4)))
    assert len({RandAugment()(image, np.random.default_rng(seed)).tobytes() for seed in range(6)}) > 3
    assert RandAugment()(image[..., :1], np.random.default_rng(4)).shape == (48, 40, 1)
