"""Image folders: one folder per class, pictures in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import DataMissing, Image, Info
from vicinal.data.picture import SUFFIXES, read_picture

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderDataset:
    """The pictures under `folder/CLASS/...`, classes and files in the order of their names.

    `classes` are the names in another folder (that of the training split), which then have to be the same.
    """

    def __init__(self, folder: Path, channels: int = 3, classes: tuple[str, ...] | None = None) -> None:
        self.folder = folder
        names = class_names(folder)
        if classes is not None and names != classes:
            odd = sorted(set(names) ^ set(classes))
            raise DataMissing(f"{folder} has other classes than the training split: {', '.join(odd)}")
        self.files: list[Path] = []
        labels = []
        for label, name in enumerate(names):
            found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise DataMissing(
                    f"{folder / name} holds no picture ({', '.join(SUFFIXES)}); put some there or remove the folder"
                )
            self.files += found
            labels += [label] * len(found)
        self.labels = np.array(labels, np.int64)
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.25,))
        self.info = Info(folder.name, names, channels, mean, std)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image, int]:
        """Image and label of a sample; a picture that cannot be read is named."""
        return read_picture(self.files[index], self.info.channels), int(self.labels[index])

    def order(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Any order."""
        return random.permutation(len(self))


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the class folders."""
    if not folder.is_dir():
        raise DataMissing(f"there is no folder {folder}; it should hold one folder per class")
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise DataMissing(f"{folder} holds no class folders; pictures belong into {folder}/CLASS/")
    return names
