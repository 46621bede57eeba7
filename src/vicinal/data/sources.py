"""The data sets that recipes name, each with the places where it looks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vicinal.data.dataset import DataMissing, Dataset, Look, Source, Split
from vicinal.data.dataset import Info as Facts
from vicinal.data.folders import FolderDataset, class_names
from vicinal.data.idx import read_idx
from vicinal.data.memory import InMemory
from vicinal.data.panoptic_files import Ade20k, Cityscapes, CocoPanoptic
from vicinal.data.scenes import Scenes
from vicinal.data.shards import ShardDataset

FASHION_VARIABLE = "VICINAL_FASHION_MNIST"
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_FASHION_FILES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class FashionMnist:
    """Fashion-MNIST's own files: 60000 and 10000 gray images of clothes, 28x28, in ten classes.

    `folder` comes first, then the environment variable VICINAL_FASHION_MNIST, then the folder of Debian's package.
    A folder that somebody names and that does not hold the files is an error, not a reason to look further.
    """

    folder: str | None = None

    def look(self) -> tuple[Look, ...]:
        """Where it looks, in order, and what is there."""
        named = os.environ.get(FASHION_VARIABLE)
        places = [(self.folder, "the recipe's data.folder"), (named, f"${FASHION_VARIABLE}")]
        given = [(Path(place).expanduser(), reason) for place, reason in places if place]
        return tuple(
            _look_for_fashion(place, reason) for place, reason in [*given, (FASHION_SYSTEM, "Debian's package")]
        )

    def advice(self) -> str:
        """What to do when nothing is there."""
        return (
            "install Debian's package (apt-get install dataset-fashion-mnist), or without root: apt-get download "
            "dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb there && "
            f"export {FASHION_VARIABLE}=$PWD/there{FASHION_SYSTEM}"
        )

    def open(self, split: Split) -> Dataset:
        """The data set, held in memory."""
        first = self.look()[0]
        if not first.found:
            raise DataMissing(f"no Fashion-MNIST in {first.place} ({first.reason}): {first.detail}; {self.advice()}")
        folder, stem = Path(first.place), _FASHION_FILES[split]
        images = read_idx(_file(folder, f"{stem}-images-idx3-ubyte"))
        labels = read_idx(_file(folder, f"{stem}-labels-idx1-ubyte"))
        if images.ndim != 3:
            raise DataMissing(f"{folder}: images should have 3 axes, got {images.ndim}")
        size = (images.shape[1], images.shape[2])
        return InMemory(
            Facts("fashion_mnist", FASHION_CLASSES, 1, (0.2860,), (0.3530,), size), images[..., None], labels
        )


def _look_for_fashion(folder: Path, reason: str) -> Look:
    if not folder.is_dir():
        return Look(str(folder), reason, False, "there is no such folder")
    names = [f"{stem}-{kind}-ubyte" for stem in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [name for name in names if not any((folder / (name + end)).is_file() for end in (".gz", ""))]
    if missing:
        return Look(str(folder), reason, False, f"missing: {', '.join(missing)}")
    return Look(str(folder), reason, True, "four idx files")


def _file(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits: 1797 gray images, 8x8; every fifth is a test image.

    >>> pictures = Digits().open("test")
    >>> len(pictures), pictures.info.image_size
    (360, (8, 8))
    """

    def look(self) -> tuple[Look, ...]:
        """Whether scikit-learn is here."""
        import importlib.util

        found = importlib.util.find_spec("sklearn") is not None
        return (Look("scikit-learn", "the images come inside the package", found, "" if found else "not installed"),)

    def advice(self) -> str:
        """What to do when nothing is there."""
        return "pip install vicinal[digits]"

    def open(self, split: Split) -> Dataset:
        """The data set, held in memory."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise DataMissing(f"the digits come with scikit-learn, which is not here: {self.advice()}") from None
        bunch = load_digits()
        is_test = np.arange(len(bunch.target)) % 5 == 0
        chosen = is_test if split == "test" else ~is_test
        images = (bunch.images[chosen] * (255 / 16)).round().astype(np.uint8)  # sixteen shades
        names = tuple(str(digit) for digit in range(10))
        return InMemory(
            Facts("digits", names, 1, (0.3053,), (0.3761,), (8, 8)), images[..., None], bunch.target[chosen]
        )


@dataclass(frozen=True)
class ImageFolders:
    """Pictures in `folder/train/CLASS/` and `folder/test/CLASS/` (or `folder/val/CLASS/`).

    `channels` is 3 for color or 1 for gray; pictures of the other kind are converted.
    """

    folder: str = "data"
    channels: int = 3

    def look(self) -> tuple[Look, ...]:
        """The two folders."""
        looks = []
        for split in ("train", "test"):
            folder = self._folder(split)
            try:
                names = class_names(folder)
                looks.append(Look(str(folder), f"the {split} split", True, f"{len(names)} classes"))
            except DataMissing as error:
                looks.append(Look(str(folder), f"the {split} split", False, str(error)))
        return tuple(looks)

    def advice(self) -> str:
        """What to do when nothing is there."""
        return "put pictures into FOLDER/train/CLASS/ and FOLDER/test/CLASS/ and say data.folder=FOLDER"

    def open(self, split: Split) -> Dataset:
        """The data set; pictures are read when they are asked for."""
        classes = None if split == "train" else class_names(self._folder("train"))
        return FolderDataset(self._folder(split), self.channels, classes)

    def _folder(self, split: str) -> Path:
        base = Path(self.folder).expanduser()
        if split == "test" and not (base / "test").is_dir() and (base / "val").is_dir():
            return base / "val"
        return base / split


@dataclass(frozen=True)
class Shards:
    """Tar shards `folder/train/*.tar` and `folder/test/*.tar` (or `val`), as webdataset lays them out.

    `folder/classes.txt` names the classes, one a line, in the order of their numbers.
    """

    folder: str = "data"
    channels: int = 3
    window: int = 8

    def look(self) -> tuple[Look, ...]:
        """The two folders and the list of classes."""
        base = Path(self.folder).expanduser()
        listed = (base / "classes.txt").is_file()
        looks = [Look(str(base / "classes.txt"), "names of the classes", listed, "" if listed else "no such file")]
        for split in ("train", "test"):
            folder = self._folder(split)
            number = len(list(folder.glob("*.tar")))
            looks.append(Look(str(folder), f"the {split} split", number > 0, f"{number} shards"))
        return tuple(looks)

    def advice(self) -> str:
        """What to do when nothing is there."""
        return (
            "put shards into FOLDER/train/ and FOLDER/test/, names into FOLDER/classes.txt, and say data.folder=FOLDER"
        )

    def open(self, split: Split) -> Dataset:
        """The data set; the first time every shard's headers are read."""
        absent = next((look for look in self.look() if not look.found), None)
        if absent is not None:
            raise DataMissing(f"{absent.place}: {absent.detail}; {self.advice()}")
        base = Path(self.folder).expanduser()
        names = tuple((base / "classes.txt").read_text("utf-8").split("\n"))
        classes = tuple(name.strip() for name in names if name.strip())
        return ShardDataset(list(self._folder(split).glob("*.tar")), classes, self.channels, self.window, base.name)

    def _folder(self, split: str) -> Path:
        base = Path(self.folder).expanduser()
        if split == "test" and not (base / "test").is_dir() and (base / "val").is_dir():
            return base / "val"
        return base / split


SOURCES: dict[str, Source] = {
    "fashion_mnist": FashionMnist(),
    "digits": Digits(),
    "folders": ImageFolders(),
    "shards": Shards(),
    "scenes": Scenes(),
    "ade20k": Ade20k(),
    "cityscapes": Cityscapes(),
    "coco_panoptic": CocoPanoptic(),
}
"""The sources by the names that `vicinal data` takes."""
