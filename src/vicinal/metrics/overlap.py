"""Mean intersection over union of class maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MeanIoU:
    """The mean over classes of intersection over union, counted over all pixels of all images together.

    Pixels whose truth is `void` do not count. A prediction of `void` is a miss. Classes that are neither in the truth
    nor predicted are left out of the mean, as in torchmetrics.

    >>> metric = MeanIoU(classes=2)
    >>> truth = torch.tensor([[[0, 0], [1, 255]]])
    >>> metric.value(metric.tally(torch.tensor([[[0, 1], [1, 1]]]), truth))
    0.5
    """

    classes: int
    void: int = 255

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, got {self.classes}")
        if 0 <= self.void < self.classes:
            raise ValueError(f"void must be outside 0 .. {self.classes - 1}, got {self.void}")

    def tally(self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels `[classes, classes + 1]` by truth and prediction (last: void) of class maps `[batch, height, width]`.

        `weights` `[batch]` is 0 for images that do not count.
        """
        if outputs.dim() != 3 or outputs.shape != targets.shape:
            raise ValueError(
                "predicted and true class maps must both be [batch, height, width], "
                f"got {tuple(outputs.shape)} and {tuple(targets.shape)}"
            )
        self._check("predicted", outputs)
        self._check("true", targets)
        counted = targets != self.void
        if weights is not None:
            counted &= (weights > 0)[:, None, None]
        found = torch.where(outputs == self.void, self.classes, outputs)
        pairs = targets[counted].long() * (self.classes + 1) + found[counted].long()
        sums = torch.bincount(pairs, minlength=self.classes * (self.classes + 1))
        return sums.view(self.classes, self.classes + 1).double()

    def _check(self, which: str, labels: torch.Tensor) -> None:
        odd = labels[(labels != self.void) & ((labels < 0) | (labels >= self.classes))]
        if odd.numel():
            raise ValueError(
                f"{which} class maps must hold 0 .. {self.classes - 1} or {self.void} for void, got {int(odd[0])}"
            )

    def per_class(self, tally: torch.Tensor) -> torch.Tensor:
        """Intersection over union of each class `[classes]`; NaN of a class that is nowhere."""
        hits = tally.diagonal()
        union = tally.sum(1) + tally[:, : self.classes].sum(0) - hits
        return hits / union  # 0 / 0 is NaN

    def value(self, tally: torch.Tensor) -> float:
        """The mean over the classes that occur."""
        found = self.per_class(tally)
        found = found[~found.isnan()]
        return float(found.mean()) if found.numel() else math.nan
