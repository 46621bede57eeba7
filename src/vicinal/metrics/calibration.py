"""Expected calibration error: how far a classifier's confidence is from how often it is right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vicinal.metrics.tally import sample_weights


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error of the best class over equal bins of confidence, each open below and closed above.

    `from_logits` says that scores are logits, and puts them through a softmax first.

    >>> metric = Calibration(bins=10)
    >>> round(metric.value(metric.tally(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))), 4)
    0.25
    """

    bins: int = 15
    from_logits: bool = False

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")

    def tally(self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """`[3, bins]`: samples, hits, and confidence summed, per bin."""
        weights = sample_weights(outputs, targets, weights)
        probabilities = outputs.double().softmax(1) if self.from_logits else outputs.double()
        if not self.from_logits and probabilities.numel() and not bool(((outputs >= 0) & (outputs <= 1)).all()):
            raise ValueError("probabilities must be in 0 .. 1; for logits use from_logits=True")
        confidence, chosen = probabilities.max(1)
        # inner edges: what equals an edge belongs below it
        edges = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64, device=outputs.device)[1:-1]
        place = torch.bucketize(confidence, edges)
        rows = torch.stack([weights, weights * (chosen == targets), weights * confidence])
        return rows.new_zeros(3, self.bins).index_add_(1, place, rows)

    def value(self, tally: torch.Tensor) -> float:
        """The mean distance between confidence and accuracy, bins weighted by their samples."""
        samples, hits, confidence = tally
        total = samples.sum().item()
        return (hits - confidence).abs().sum().item() / total if total else math.nan


def calibration_error(probabilities: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error of `[batch, classes]` probabilities for labels `[batch]`.

    >>> round(calibration_error(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0])), 4)
    0.25
    """
    metric = Calibration(bins)
    return metric.value(metric.tally(probabilities, targets))
