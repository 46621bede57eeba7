"""Data sets small enough to be held in memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import DataMissing, Image, Info


class InMemory:
    """Images `[samples, height, width, channels]` and labels `[samples]`.

    >>> info = Info("made", ("dark", "light"), 1, (0.5,), (0.5,))
    >>> len(InMemory(info, np.zeros((3, 8, 8, 1), np.uint8), np.zeros(3, np.int64)))
    3
    """

    def __init__(self, info: Info, images: Image, labels: npt.NDArray[np.integer]) -> None:
        if len(images) != len(labels):
            raise DataMissing(f"{info.name} has {len(images)} images but {len(labels)} labels")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(info.classes):
            raise DataMissing(f"{info.name} has labels outside 0 .. {len(info.classes) - 1}")
        self.info, self.images, self.labels = info, images, labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image, int]:
        """Image and label of a sample."""
        return self.images[index], int(self.labels[index])

    def order(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Any order."""
        return random.permutation(len(self))
