"""Changes to layered pictures: large-scale jitter for the whole, and changes to the colors alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vicinal.data.augment import ColorJitter, Erase, Step, resized
from vicinal.data.dataset import Image
from vicinal.data.layers import CHANNELS, VOID

PADDING = 128
"""The gray around a picture that was made smaller than its frame."""


@dataclass(frozen=True)
class ScaleJitter:
    """Large-scale jitter: scale by a factor in `scale` of what fits, then cut out or frame `size` by `size` pixels.

    What comes in from outside is gray and void. `size` is (height, width) or one number for both.

    >>> step, picture = ScaleJitter(32, scale=(0.1, 2.0)), np.zeros((20, 40, 6), np.uint8)
    >>> step(picture, np.random.default_rng(0)).shape
    (32, 32, 6)
    """

    size: int | tuple[int, int] = 1024
    scale: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two rising numbers above 0, got {self.scale}")

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        share = float(random.uniform(*self.scale))
        factor = share * min(height / image.shape[0], width / image.shape[1])
        rows, columns = (max(1, round(length * factor)) for length in image.shape[:2])
        return framed(scaled(image, rows, columns), height, width, random)


@dataclass(frozen=True)
class ShortSide:
    """Make the short side one of `choices` pixels long and the long side at most `most`, then cut out `crop` pixels.

    The published jitter of ADE20K and Cityscapes; `crop` is (height, width) or one number for both.

    >>> ShortSide((16,), 99, crop=8)(np.zeros((32, 64, 6), np.uint8), np.random.default_rng(0)).shape
    (8, 8, 6)
    """

    choices: tuple[int, ...]
    most: int = 2560
    crop: int | tuple[int, int] = 640

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        short = self.choices[int(random.integers(len(self.choices)))]
        height, width = image.shape[:2]
        factor = min(short / min(height, width), self.most / max(height, width))
        image = scaled(image, max(1, round(height * factor)), max(1, round(width * factor)))
        rows, columns = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        return framed(image, rows, columns, random)


@dataclass(frozen=True)
class OnColors:
    """A step that changes colors alone, such as `ColorJitter`: the truth stays.

    >>> OnColors(ColorJitter(0.4))(np.zeros((8, 8, 6), np.uint8), np.random.default_rng(0)).shape
    (8, 8, 6)
    """

    step: ColorJitter | Erase

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        step: Step = self.step
        return np.concatenate([step(np.ascontiguousarray(image[..., :3]), random), image[..., 3:]], -1)


def scaled(image: Image, height: int, width: int) -> Image:
    """A layered picture in another size: colors between pixels, truth from the nearest.

    >>> scaled(np.zeros((4, 6, 6), np.uint8), 8, 12).shape
    (8, 12, 6)
    """
    if image.shape[-1] != CHANNELS:
        raise ValueError(f"a layered picture has {CHANNELS} channels, got {image.shape[-1]}")
    colors = resized(np.ascontiguousarray(image[..., :3]), height, width, "BILINEAR")
    truth = resized(np.ascontiguousarray(image[..., 3:]), height, width, "NEAREST")
    return np.concatenate([colors, truth], -1)


def framed(image: Image, height: int, width: int, random: np.random.Generator) -> Image:
    """A random part of a layered picture; one that is smaller goes into the top left of a gray, void frame."""
    top = int(random.integers(max(0, image.shape[0] - height) + 1))
    left = int(random.integers(max(0, image.shape[1] - width) + 1))
    part = image[top : top + height, left : left + width]
    if part.shape[:2] == (height, width):
        return np.ascontiguousarray(part)
    whole = np.zeros((height, width, CHANNELS), np.uint8)
    whole[..., :3], whole[..., 3] = PADDING, VOID
    whole[: part.shape[0], : part.shape[1]] = part
    return whole
