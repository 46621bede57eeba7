"""Top-k accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vicinal.metrics.tally import sample_weights


@dataclass(frozen=True)
class TopK:
    """The share of samples whose label is among the `k` best scores; of equal scores the first class is better.

    A label whose score is NaN is never found.

    >>> metric = TopK(2)
    >>> metric.value(metric.tally(torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([2])))
    1.0
    """

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def tally(self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """`[hits, samples]` of scores `[batch, classes]` and labels `[batch]`."""
        weights = sample_weights(outputs, targets, weights)
        own = outputs.gather(1, targets[:, None])
        before = torch.arange(outputs.shape[1], device=outputs.device) < targets[:, None]
        better = (outputs > own) | ((outputs == own) & before)
        hits = (better.sum(1) < self.k) & ~own[:, 0].isnan()
        return torch.stack([(hits * weights).sum(), weights.sum()])

    def value(self, tally: torch.Tensor) -> float:
        """The share of hits."""
        hits, total = tally.tolist()
        return hits / total if total else math.nan


def accuracy(scores: torch.Tensor, targets: torch.Tensor, k: int = 1) -> float:
    """Top-k accuracy of scores or logits `[batch, classes]` for labels `[batch]`.

    >>> accuracy(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([2, 0]))
    0.5
    """
    metric = TopK(k)
    return metric.value(metric.tally(scores, targets))
