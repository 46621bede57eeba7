"""Made scenes with exact panoptic truth: objects on grounds, before parts of real photographs.

A scene is a function of its seed and its number. Training and test scenes share no object and no photograph; of the
grounds they take different halves. The photographs come with scikit-image (chelsea, rocket, camera, coffee, brick,
grass, gravel: CC0; astronaut: NASA, public domain) and scikit-learn (china by danielbuechele, flower by vultilion:
CC BY 2.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vicinal.data.chance import sample_random
from vicinal.data.dataset import DataMissing, Image, Info, Look, Split
from vicinal.data.layers import layered
from vicinal.data.picture import pillow
from vicinal.data.sprites import KINDS, painted, sprites

GROUNDS = ("grass", "gravel", "brick")
CLASSES = (*KINDS, "photograph", *GROUNDS)
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": ("china", "flower", "chelsea", "rocket", "camera"),
    "test": ("coffee", "astronaut"),
}
_HELD = 240
"""Pixels of the short side of a photograph in memory."""

_SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Scenes:
    """Scenes of `size` by `size` pixels with up to `most` objects: so many to train on, so many to test.

    >>> scenes = Scenes(size=64, train=10).open("train")
    >>> len(scenes), scenes.read(3)[0].shape, scenes.info.classes[:3]
    (10, (64, 64, 6), ('ball', 'coin', 'star'))
    """

    size: int = 96
    train: int = 8000
    test: int = 200
    most: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(f"size must be at least 32, got {self.size}")
        if not 1 <= self.most <= 50:
            raise ValueError(f"most must be in 1 .. 50, got {self.most}")

    def look(self) -> tuple[Look, ...]:
        """Whether the packages are here that the photographs, coins and signs come with."""
        import importlib.util

        looks = []
        for module, what in (("skimage", "photographs and coins"), ("sklearn", "photographs"), ("matplotlib", "signs")):
            found = importlib.util.find_spec(module) is not None
            looks.append(Look(module, f"{what} come inside the package", found, "" if found else "not installed"))
        return tuple(looks)

    def advice(self) -> str:
        """What to do when nothing is there."""
        return "pip install vicinal[demo]"

    def open(self, split: Split) -> SceneDataset:
        """The data set; scenes are made when they are asked for."""
        absent = next((look for look in self.look() if not look.found), None)
        if absent is not None:
            raise DataMissing(f"scenes are made with {absent.place}, which is not here: {self.advice()}")
        return SceneDataset(self, split)


class SceneDataset:
    """The scenes of a split, numbered."""

    def __init__(self, config: Scenes, split: Split) -> None:
        self.config, self.split = config, split
        self.info = Info(
            "scenes",
            CLASSES,
            3,
            (0.44, 0.43, 0.41),
            (0.24, 0.21, 0.21),
            (config.size, config.size),
            KINDS,
        )

    def __len__(self) -> int:
        return self.config.train if self.split == "train" else self.config.test

    def read(self, index: int) -> tuple[Image, int]:
        """A layered picture, and its number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return scene(self.config, self.split, index), index

    def order(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Any order."""
        return random.permutation(len(self))


def scene(config: Scenes, split: Split, index: int) -> Image:
    """Scene number `index` of a split as a layered picture.

    >>> scene(Scenes(size=48), "test", 7)[..., 3].max() < len(CLASSES)
    np.True_
    """
    random = sample_random(config.seed, _SPLITS.index(split), index)
    picture, labels = _background(config.size, split, random)
    instances = np.zeros(labels.shape, np.int64)
    placed = 0
    for _ in range(int(random.integers(1, config.most + 1))):
        kind = int(random.integers(len(KINDS)))
        placed += _place(picture, labels, instances, kind, placed + 1, split, random)
    noise = random.standard_normal(picture.shape).astype(np.float32) * random.uniform(0, 0.03)
    pixels = ((picture + noise).clip(0, 1) * 255).round().astype(np.uint8)
    return layered(pixels, labels, instances)


def _place(
    picture: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    instances: npt.NDArray[np.int64],
    kind: int,
    number: int,
    split: Split,
    random: np.random.Generator,
) -> bool:
    """Put an object into the scene, where it hides no other too much; whether there was such a place."""
    choices = sprites(split)[KINDS[kind]]
    size = round(picture.shape[0] * float(random.uniform(0.2, 0.45)))
    cover, colors = painted(choices[int(random.integers(len(choices)))], size, random)
    mask = cover > 0.5
    before = np.bincount(instances.ravel(), minlength=number)
    for _ in range(6):
        top, left = random.integers(-size // 6, picture.shape[0] - size + size // 6 + 1, 2)
        rows, columns = _inside(top, size, picture.shape[0]), _inside(left, size, picture.shape[0])
        there = (slice(top + rows.start, top + rows.stop), slice(left + columns.start, left + columns.stop))
        part = mask[rows, columns]
        hidden = np.bincount(instances[there][part], minlength=number)
        if part.sum() >= 16 and not ((before - hidden < 0.5 * before) & (np.arange(len(before)) > 0)).any():
            share = cover[rows, columns, None]
            picture[there] = picture[there] * (1 - share) + colors[rows, columns] * share
            labels[there][part], instances[there][part] = kind, number
            return True
    return False


def _inside(start: int, size: int, length: int) -> slice:
    return slice(max(0, -int(start)), min(size, length - int(start)))


def _background(
    size: int, split: Split, random: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Part of a photograph, and below a wavy line a ground; now and then only one of the two."""
    photographs, grounds = _backdrops(split)
    photograph = _part(photographs[int(random.integers(len(photographs)))], size, random, (0.4, 1.0))
    which = int(random.integers(len(GROUNDS)))
    ground = _part(grounds[which], size, random, (0.35, 0.8))
    tint = random.uniform(0.75, 1.15, 3)
    tint[1] += 0.15 * (which == 0)
    ground = (ground * tint * random.uniform(0.8, 1.2)).clip(0, 1)
    axis = np.arange(size) / size
    line = random.uniform(-0.1, 1.15) + random.uniform(0, 0.12) * np.sin(
        2 * np.pi * (random.uniform(0.5, 2) * axis + random.random())
    )
    line = line + random.uniform(-0.3, 0.3) * (axis - 0.5)
    below = axis[:, None] > line
    picture = np.where(below[..., None], ground, photograph).astype(np.float32)
    return picture, np.where(below, CLASSES.index(GROUNDS[which]), CLASSES.index("photograph"))


def _part(
    picture: Image, size: int, random: np.random.Generator, share: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """A random square of a picture, of a share of its short side, perhaps mirrored; `[size, size, 3]` in 0..1."""
    height, width, _ = picture.shape
    side = max(8, round(min(height, width) * float(random.uniform(*share))))
    top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
    module = pillow()
    square = module.fromarray(np.ascontiguousarray(picture[top : top + side, left : left + side]))
    pixels = np.asarray(square.resize((size, size), module.Resampling.BILINEAR), np.float32) / np.float32(255)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


@lru_cache(maxsize=2)
def _backdrops(split: Split) -> tuple[list[Image], list[Image]]:
    """The photographs of a split, shrunk, and its half of each ground."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    module, pictures = pillow(), []
    for name in PHOTOGRAPHS[split]:
        pixels = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(data, name)()
        picture = module.fromarray(np.array(pixels)).convert("RGB")
        factor = _HELD / min(picture.size)
        small = picture.resize((round(picture.width * factor), round(picture.height * factor)), module.Resampling.BOX)
        pictures.append(np.asarray(small))
    grounds = []
    for name in GROUNDS:
        pixels = getattr(data, name)()
        half = pixels[:, : pixels.shape[1] // 2] if split == "train" else pixels[:, pixels.shape[1] // 2 :]
        grounds.append(np.repeat(half[..., None], 3, -1))
    return pictures, grounds
