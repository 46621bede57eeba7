"""Mixup and cutmix: two samples and their labels in one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from vicinal.data.chance import order_random
from vicinal.tasks.protocol import Moment

_OTHER_USE = 1 << 30
"""Added to a step, so that mixing and the order of an epoch do not draw the same numbers."""


@dataclass(frozen=True)
class Mixing:
    """Mixup with Beta(mixup, mixup), cutmix with Beta(cutmix, cutmix), or one of the two by `switch`; 0 leaves one out.

    The share is drawn once for a step, and rows 2n and 2n + 1 of the batch are partners: so the mixture does not
    depend on how the batch is cut into pieces or dealt out to processes.

    >>> images, labels = torch.rand(4, 1, 8, 8), torch.eye(3)[[0, 1, 2, 0]]
    >>> mixed, soft = Mixing()(images, labels, Moment(step=0, total=10, seed=0))
    >>> soft.sum(1).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0 or self.mixup == self.cutmix == 0:
            raise ValueError(f"mixup and cutmix must be at least 0 and not both 0, got {self.mixup} and {self.cutmix}")

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, moment: Moment) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `[batch, channels, height, width]` and labels `[batch, classes]`, mixed with their partners."""
        if len(images) % 2:
            raise ValueError(
                f"mixing pairs samples: pieces of a batch must have an even number of them, got {len(images)}"
            )
        random = order_random(moment.seed, _OTHER_USE + moment.step)
        if random.random() >= self.probability:
            return images, labels
        partner = torch.arange(len(images), device=images.device) ^ 1
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or random.random() < self.switch)
        alpha = self.cutmix if use_cutmix else self.mixup
        share = float(random.beta(alpha, alpha))
        if not use_cutmix:
            return share * images + (1 - share) * images[partner], share * labels + (1 - share) * labels[partner]
        top, bottom, left, right = _box(images.shape[-2], images.shape[-1], share, random)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[partner][..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
        return mixed, share * labels + (1 - share) * labels[partner]


def _box(height: int, width: int, share: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    side = math.sqrt(1 - share)
    rows, columns = int(height * side), int(width * side)
    row, column = int(random.integers(height)), int(random.integers(width))
    top, left = max(row - rows // 2, 0), max(column - columns // 2, 0)
    return top, min(row + rows // 2, height), left, min(column + columns // 2, width)
