"""Changes to one image, each drawn from the generator it is given, so that a sample's changes are always the same.

A step is a frozen description that is called with an image uint8 `[height, width, channels]` and a generator.
"""

from __future__ import annotations

import math
import random as python_random
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vicinal.data.dataset import DataMissing, Image
from vicinal.data.folders import IMAGENET_MEAN, IMAGENET_STD
from vicinal.data.picture import pillow

Size = int | tuple[int, int]


class Step(Protocol):
    """A change to an image."""

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """The changed image."""


@dataclass(frozen=True)
class Shift:
    """Move the image by up to `most` pixels along each axis; what comes in from outside is black.

    >>> Shift(2)(np.ones((8, 8, 1), np.uint8), np.random.default_rng(0)).shape
    (8, 8, 1)
    """

    most: int = 2

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        down, right = random.integers(-self.most, self.most + 1, 2)
        height, width, _ = image.shape
        moved = np.zeros_like(image)
        moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
        return moved


@dataclass(frozen=True)
class Flip:
    """Mirror left and right."""

    probability: float = 0.5

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        return np.ascontiguousarray(image[:, ::-1]) if random.random() < self.probability else image


@dataclass(frozen=True)
class Resize:
    """Make the short side `short` pixels long (bicubic); `short=0` leaves the image alone."""

    short: int = 256

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        height, width, _ = image.shape
        factor = self.short / min(height, width)
        return resized(image, round(height * factor), round(width * factor)) if self.short else image


@dataclass(frozen=True)
class CenterCrop:
    """The square in the middle; a smaller image is framed in black."""

    size: int = 224

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        height, width, channels = image.shape
        if height < self.size or width < self.size:
            framed = np.zeros((max(height, self.size), max(width, self.size), channels), np.uint8)
            top, left = (framed.shape[0] - height) // 2, (framed.shape[1] - width) // 2
            framed[top : top + height, left : left + width] = image
            image, (height, width) = framed, framed.shape[:2]
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return image[top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, of an area in `scale` and an aspect in `ratio`, made `size` pixels square.

    Interpolation is bilinear or bicubic, drawn too. After ten parts that do not fit, the largest middle that does.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        height, width, _ = image.shape
        for _ in range(10):
            area = height * width * random.uniform(*self.scale)
            aspect = math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
                break
        else:
            columns = min(width, round(height * self.ratio[1]))
            rows = min(height, round(width / self.ratio[0]))
            top, left = (height - rows) // 2, (width - columns) // 2
        filter_name = "BICUBIC" if random.random() < 0.5 else "BILINEAR"
        return resized(image[top : top + rows, left : left + columns], self.size, self.size, filter_name)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation times a factor in `1 - strength .. 1 + strength` each, in random order."""

    strength: float = 0.4

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        pixels = image.astype(np.float32)
        for kind in random.permutation(3):
            factor = random.uniform(max(0.0, 1 - self.strength), 1 + self.strength)
            gray = pixels @ np.array([0.299, 0.587, 0.114], np.float32) if pixels.shape[-1] == 3 else pixels[..., 0]
            other = (0.0, gray.mean(), gray[..., None])[kind]
            pixels = (other + (pixels - other) * np.float32(factor)).clip(0, 255)
        return pixels.round().astype(np.uint8)


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment by its own notation; its draws come from our generator.

    >>> RandAugment().spec
    'rand-m9-mstd0.5-inc1'
    """

    spec: str = "rand-m9-mstd0.5-inc1"

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        try:
            from timm.data.auto_augment import rand_augment_transform
        except ModuleNotFoundError:
            raise DataMissing("RandAugment is timm's: pip install vicinal[timm]") from None
        fill = tuple(round(255 * value) for value in IMAGENET_MEAN)
        change = rand_augment_transform(
            self.spec, {"translate_const": round(0.45 * min(image.shape[:2])), "img_mean": fill}
        )
        module = pillow()
        picture = module.fromarray(image if image.shape[-1] == 3 else np.repeat(image, 3, -1))
        with _global_draws(random):
            changed = np.asarray(change(picture), np.uint8)
        return changed if image.shape[-1] == 3 else np.ascontiguousarray(changed[..., :1])


class _global_draws:
    """Seeds the global generators that timm draws from, and puts them back as they were."""

    def __init__(self, random: np.random.Generator) -> None:
        self.seed = int(random.integers(2**32))

    def __enter__(self) -> None:
        self.before: tuple[Any, Any] = (python_random.getstate(), np.random.get_state())
        python_random.seed(self.seed)
        np.random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        python_random.setstate(self.before[0])
        np.random.set_state(self.before[1])


@dataclass(frozen=True)
class Erase:
    """With `probability`, noise with the data's mean and deviation on a rectangle of 2 to 33 % of the image."""

    probability: float = 0.25
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        if random.random() >= self.probability:
            return image
        height, width, channels = image.shape
        for _ in range(10):
            area = height * width * random.uniform(0.02, 1 / 3)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
                noise = random.standard_normal((rows, columns, channels)) * self.std + self.mean
                erased = image.copy()
                erased[top : top + rows, left : left + columns] = (noise * 255).clip(0, 255).round()
                return erased
        return image


def resized(image: Image, height: int, width: int, filter_name: str = "BICUBIC") -> Image:
    """An image in another size.

    >>> resized(np.zeros((4, 6, 3), np.uint8), 8, 12).shape
    (8, 12, 3)
    """
    if image.shape[-1] not in (1, 3):
        raise ValueError(
            f"an image to be resized has 1 or 3 channels, got {image.shape[-1]}; layered pictures, whose truth must "
            "not be mixed, are resized by ScaleJitter or ShortSide"
        )
    module = pillow()
    picture = module.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    pixels = np.asarray(picture.resize((width, height), getattr(module.Resampling, filter_name)), np.uint8)
    return pixels[..., None] if image.shape[-1] == 1 else pixels
