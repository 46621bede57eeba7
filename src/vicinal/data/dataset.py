"""What a data set is: numbered samples, an order to visit them in, and facts that a model is built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

Image: TypeAlias = npt.NDArray[np.uint8]
"""Pixels `[height, width, channels]`."""

Split = Literal["train", "test"]


class DataMissing(ValueError):
    """Data are not where they were looked for, or not what they should be; the message says what to do."""


@dataclass(frozen=True)
class Info:
    """Facts about a data set: names of its classes, channels, and the mean and deviation of pixels in 0..1.

    `image_size` is (height, width), or None where images differ. Of data to be segmented, `things` are the classes that
    are counted one by one, and samples are layered pictures (`vicinal.data.layers`).
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int] | None = None
    things: tuple[str, ...] = ()


class Dataset(Protocol):
    """Numbered samples."""

    info: Info

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image, int]:
        """Image and label of a sample."""

    def order(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """All samples in a random order; data on disk prefer one that reads near to where it read last."""


@dataclass(frozen=True)
class Look:
    """One place that was looked at: where, why there, and what was found."""

    place: str
    reason: str
    found: bool
    detail: str = ""


@runtime_checkable
class Source(Protocol):
    """The description of a data set, as it stands in a recipe."""

    def open(self, split: Split) -> Dataset:
        """The data set, or `DataMissing`."""

    def look(self) -> tuple[Look, ...]:
        """Where it looks, in order, and what is there."""

    def advice(self) -> str:
        """What to do when nothing is there."""
