"""Scenes as metrics see them: pictures cut into segments, and sets of masks that may overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segments:
    """A picture cut into segments that do not overlap.

    `numbers` `[height, width]` is 0 for void and i + 1 for segment i; `labels` `[segments]` are classes and `is_crowd`
    `[segments]` marks groups that nobody cut apart (none by default).

    >>> Segments.of_masks(torch.eye(2).bool()[None], torch.tensor([3])).numbers.tolist()
    [[1, 0], [0, 1]]
    """

    numbers: torch.Tensor
    labels: torch.Tensor
    is_crowd: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.numbers.dim() != 2 or self.labels.dim() != 1:
            raise ValueError(
                "numbers must be [height, width] and labels [segments], "
                f"got {tuple(self.numbers.shape)} and {tuple(self.labels.shape)}"
            )
        if self.is_crowd is not None and self.is_crowd.shape != self.labels.shape:
            raise ValueError(
                f"is_crowd must be [segments] like labels {tuple(self.labels.shape)}, got {tuple(self.is_crowd.shape)}"
            )
        most = len(self.labels)
        if self.numbers.numel() and not 0 <= int(self.numbers.min()) <= int(self.numbers.max()) <= most:
            raise ValueError(
                f"numbers must be 0 (void) .. {most}, one for each label, "
                f"got {int(self.numbers.min())} .. {int(self.numbers.max())}"
            )

    @classmethod
    def of_masks(cls, masks: torch.Tensor, labels: torch.Tensor, is_crowd: torch.Tensor | None = None) -> Segments:
        """From masks bool `[segments, height, width]`, which must not overlap."""
        if masks.dim() != 3:
            raise ValueError(f"masks must be [segments, height, width], got {tuple(masks.shape)}")
        covered = masks.sum(0)
        if masks.numel() and int(covered.max()) > 1:
            row, column = (covered > 1).nonzero()[0].tolist()
            both = masks[:, row, column].nonzero().flatten().tolist()
            raise ValueError(
                f"masks of one picture must not overlap: {int((covered > 1).sum())} pixels are in several, "
                f"such as ({row}, {column}) in masks {' and '.join(map(str, both))}"
            )
        places = torch.arange(1, len(masks) + 1, device=masks.device)[:, None, None]
        return cls((masks * places).sum(0), labels, is_crowd)

    @property
    def crowd(self) -> torch.Tensor:
        """`is_crowd`, also where it was not given."""
        return torch.zeros_like(self.labels, dtype=torch.bool) if self.is_crowd is None else self.is_crowd.bool()

    def masks(self) -> torch.Tensor:
        """Bool `[segments, height, width]`."""
        places = torch.arange(1, len(self.labels) + 1, device=self.numbers.device)
        return self.numbers[None] == places[:, None, None]


@dataclass(frozen=True)
class Instances:
    """Masks bool `[instances, height, width]`, which may overlap, with labels and, where predicted, scores.

    >>> len(Instances(torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, dtype=torch.long)))
    0
    """

    masks: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor | None = None
    is_crowd: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.masks.dim() != 3 or self.masks.dtype != torch.bool:
            raise ValueError(
                f"masks must be bool [instances, height, width], got {self.masks.dtype} {tuple(self.masks.shape)}"
            )
        for name, value in (("labels", self.labels), ("scores", self.scores), ("is_crowd", self.is_crowd)):
            if value is not None and value.shape != self.masks.shape[:1]:
                raise ValueError(f"{name} must be [{len(self.masks)}], one for each mask, got {tuple(value.shape)}")

    @property
    def crowd(self) -> torch.Tensor:
        """`is_crowd`, also where it was not given."""
        return torch.zeros(len(self), dtype=torch.bool) if self.is_crowd is None else self.is_crowd.bool()

    def __len__(self) -> int:
        return len(self.masks)


def check_labels(labels: torch.Tensor, classes: int, which: str) -> None:
    """Refuse a label outside the list of classes.

    >>> check_labels(torch.tensor([3]), 3, "predicted")
    Traceback (most recent call last):
    ValueError: predicted labels must be in 0 .. 2, got 3
    """
    odd = labels[(labels < 0) | (labels >= classes)]
    if odd.numel():
        raise ValueError(f"{which} labels must be in 0 .. {classes - 1}, got {int(odd[0])}")
