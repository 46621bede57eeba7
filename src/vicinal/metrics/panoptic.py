"""Panoptic quality by the rules of the COCO panoptic task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vicinal.metrics.scenes import Segments, check_labels


@dataclass(frozen=True)
class PanopticQuality:
    """How well segments are found and how well they fit, by class and over all.

    A predicted and a true segment of a class match where they overlap by more than half of their union; void in the
    truth does not count to the union. What is predicted mostly on void or on a crowd of its class is no mistake. As in
    the official code, of several crowds of a class in one picture the last counts. `things` names the classes whose
    segments are counted one by one, for the figures of things and of stuff.

    >>> metric = PanopticQuality(classes=2)
    >>> truth = Segments(torch.tensor([[1, 1, 2, 2]]), torch.tensor([0, 1]))
    >>> found = Segments(torch.tensor([[1, 1, 0, 2]]), torch.tensor([0, 1]))
    >>> metric.values(metric.tally([found], [truth]))["pq"]
    0.5
    """

    classes: int
    things: frozenset[int] = field(default_factory=frozenset)

    def tally(
        self, outputs: Sequence[Segments], targets: Sequence[Segments], weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[classes, 4]`: overlap of the matches summed, matches, wrong and missed segments."""
        total = torch.zeros(self.classes, 4, dtype=torch.float64)
        for number, (found, truth) in enumerate(zip(outputs, targets, strict=True)):
            if weights is None or weights[number] > 0:
                total += self._picture(found, truth)
        return total

    def _picture(self, found: Segments, truth: Segments) -> torch.Tensor:
        if found.numbers.shape != truth.numbers.shape:
            raise ValueError(
                f"predicted and true segments must be of one size, got {tuple(found.numbers.shape)} and "
                f"{tuple(truth.numbers.shape)}"
            )
        check_labels(found.labels, self.classes, "predicted")
        check_labels(truth.labels, self.classes, "true")
        shared = _shared(found, truth)
        areas, true_areas = shared.sum(0), shared.sum(1)
        found_labels, true_labels, crowd = found.labels.cpu(), truth.labels.cpu(), truth.crowd.cpu()
        union = areas[1:] + true_areas[1:, None] - shared[1:, 1:] - shared[0, 1:]
        overlap = torch.where(union > 0, shared[1:, 1:] / union, 0.0)
        matches = (overlap > 0.5) & (true_labels[:, None] == found_labels) & ~crowd[:, None]
        result = torch.zeros(self.classes, 4, dtype=torch.float64)
        rows, columns = matches.nonzero(as_tuple=True)
        result[:, 0].index_add_(0, true_labels[rows], overlap[rows, columns])
        result[:, 1].index_add_(0, true_labels[rows], torch.ones(len(rows), dtype=torch.float64))
        wrong = ~matches.any(0) & ~_excused(shared, found_labels, true_labels, crowd) & (areas[1:] > 0)
        missed = ~matches.any(1) & ~crowd & (true_areas[1:] > 0)
        result[:, 2] += torch.bincount(found_labels[wrong], minlength=self.classes)
        result[:, 3] += torch.bincount(true_labels[missed], minlength=self.classes)
        return result

    def value(self, tally: torch.Tensor) -> float:
        """Panoptic quality over all classes that occur."""
        return self.values(tally)["pq"]

    def values(self, tally: torch.Tensor) -> dict[str, float]:
        """Panoptic, segmentation and recognition quality; panoptic quality of things and of stuff, where told apart."""
        overlap, matches, wrong, missed = tally.T
        occurs = matches + wrong + missed > 0
        pq = torch.where(occurs, overlap / (matches + wrong / 2 + missed / 2).clamp(min=0.5), 0.0)
        sq = torch.where(matches > 0, overlap / matches.clamp(min=1), 0.0)
        rq = torch.where(occurs, matches / (matches + wrong / 2 + missed / 2).clamp(min=0.5), 0.0)
        result = {name: _mean(part[occurs]) for name, part in (("pq", pq), ("sq", sq), ("rq", rq))}
        if self.things:
            is_thing = torch.tensor([number in self.things for number in range(self.classes)])
            result["pq_things"], result["pq_stuff"] = _mean(pq[occurs & is_thing]), _mean(pq[occurs & ~is_thing])
        return result


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _shared(found: Segments, truth: Segments) -> torch.Tensor:
    """Pixels `[true segments + 1, predicted segments + 1]`; row and column 0 are void."""
    rows, columns = len(truth.labels) + 1, len(found.labels) + 1
    pairs = truth.numbers.long() * columns + found.numbers.long()
    return torch.bincount(pairs.flatten().cpu(), minlength=rows * columns).view(rows, columns).double()


def _excused(shared: torch.Tensor, found: torch.Tensor, true: torch.Tensor, crowd: torch.Tensor) -> torch.Tensor:
    """Which predicted segments lie mostly on void or on the crowd of their class."""
    beside = shared[0, 1:].clone()
    crowds = {int(true[row]): row for row in range(len(true)) if crowd[row]}
    for column, label in enumerate(found.tolist()):
        if label in crowds:
            beside[column] += shared[crowds[label] + 1, column + 1]
    return beside > 0.5 * shared.sum(0)[1:]
