"""Average precision of instance masks by the rules of the COCO detection task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from vicinal.metrics.scenes import Instances, check_labels

THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""Intersection over union from which a prediction is a hit."""

SIZES = {"": (0.0, 1e10), "_small": (0.0, 32.0**2), "_medium": (32.0**2, 96.0**2), "_large": (96.0**2, 1e10)}
"""Areas in pixels, both ends included."""

_RECALLS = np.linspace(0, 1, 101)
_BITS = 1 << np.arange(len(THRESHOLDS))


@dataclass(frozen=True)
class Detections:
    """What average precision follows from; these add up over pictures, batches and processes.

    `rows` `[detections, 6]`: picture, rank in it, class, size range, and bits of the thresholds at which it is a hit
    and at which it does not count; `scores` `[detections]`; `truths` `[sizes, classes]`: instances to be found.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    truths: npt.NDArray[np.int64]

    def __add__(self, other: Detections) -> Detections:
        return Detections(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.scores, other.scores]),
            self.truths + other.truths,
        )

    def gathered(self) -> Detections:
        """Those of all processes; each process has to ask."""
        if not distributed.is_available() or not distributed.is_initialized():
            return self
        parts: list[Detections | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, self)
        total = Detections(self.rows[:0], self.scores[:0], np.zeros_like(self.truths))
        for part in parts:
            assert part is not None
            total = total + part
        return total


@dataclass(frozen=True)
class AveragePrecision:
    """Precision averaged over recall, over ten thresholds of overlap, and over classes.

    Predictions are taken best first, at most `most` of a class in a picture. A crowd may be found any number of times
    and is neither a hit nor a mistake.

    >>> metric = AveragePrecision(classes=1)
    >>> mask = torch.ones(1, 4, 4, dtype=torch.bool)
    >>> found = Instances(mask, torch.tensor([0]), torch.tensor([0.9]))
    >>> metric.values(metric.tally([found], [Instances(mask, torch.tensor([0]))], [0]))["ap"]
    1.0
    """

    classes: int
    most: int = 100

    def tally(
        self,
        outputs: Sequence[Instances],
        targets: Sequence[Instances],
        pictures: Sequence[int],
        weights: torch.Tensor | None = None,
    ) -> Detections:
        """Matches of pictures; each picture has a number of its own in the whole test set."""
        total = Detections(np.zeros((0, 6), np.int64), np.zeros(0), np.zeros((len(SIZES), self.classes), np.int64))
        for place, (found, truth, picture) in enumerate(zip(outputs, targets, pictures, strict=True)):
            if weights is None or weights[place] > 0:
                total = total + self._picture(found, truth, picture)
        return total

    def _picture(self, found: Instances, truth: Instances, picture: int) -> Detections:
        if found.scores is None:
            raise ValueError("predicted instances need scores")
        if found.masks.shape[1:] != truth.masks.shape[1:]:
            raise ValueError(
                f"predicted and true masks must be of one size, got {tuple(found.masks.shape[1:])} and "
                f"{tuple(truth.masks.shape[1:])}"
            )
        check_labels(found.labels, self.classes, "predicted")
        check_labels(truth.labels, self.classes, "true")
        rows, scores = [np.zeros((0, 6), np.int64)], [np.zeros(0)]
        truths = np.zeros((len(SIZES), self.classes), np.int64)
        for label in sorted({*found.labels.tolist(), *truth.labels.tolist()}):
            chosen = _best(found, label, self.most)
            pair = _Pair(found.masks[chosen], truth, truth.labels == label)
            values = found.scores[chosen].double().cpu().numpy()
            for size, (low, high) in enumerate(SIZES.values()):
                hits, passed, number = pair.matched(low, high)
                truths[size, label] += number
                ranks = np.arange(len(values))
                fixed = [np.full_like(ranks, picture), ranks, np.full_like(ranks, label), np.full_like(ranks, size)]
                rows.append(np.stack([*fixed, hits, passed], 1))
                scores.append(values)
        return Detections(np.concatenate(rows), np.concatenate(scores), truths)

    def values(self, tally: Detections) -> dict[str, float]:
        """`ap`, `ap50`, `ap75`, and `ap` of small, medium and large instances; NaN of what does not occur."""
        curves = [self._curves(tally, size) for size in range(len(SIZES))]
        result = {f"ap{name}": _mean(curve) for name, curve in zip(SIZES, curves, strict=True)}
        return {"ap": result.pop("ap"), "ap50": _mean(curves[0][:, 0]), "ap75": _mean(curves[0][:, 5]), **result}

    def value(self, tally: Detections) -> float:
        """`ap`."""
        return self.values(tally)["ap"]

    def _curves(self, tally: Detections, size: int) -> npt.NDArray[np.float64]:
        """Average precision `[classes that occur, thresholds]`."""
        of_size = tally.rows[:, 3] == size
        result = []
        for label in np.flatnonzero(tally.truths[size]):
            chosen = of_size & (tally.rows[:, 2] == label)
            rows, scores = tally.rows[chosen], tally.scores[chosen]
            # best first; of equal scores the earlier picture, as the official code has it
            order = np.lexsort((rows[:, 1], rows[:, 0], -scores))
            hits = (rows[order, 4, None] & _BITS) > 0
            passed = (rows[order, 5, None] & _BITS) > 0
            number = int(tally.truths[size, label])
            result.append([_area_under(hits[:, at], passed[:, at], number) for at in range(len(THRESHOLDS))])
        return np.array(result, np.float64).reshape(-1, len(THRESHOLDS))


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan


def _best(found: Instances, label: int, most: int) -> torch.Tensor:
    """The places of a label's predictions, best first."""
    assert found.scores is not None
    places = (found.labels == label).nonzero().flatten()
    return places[found.scores[places].argsort(descending=True, stable=True)[:most]]


def _area_under(hits: npt.NDArray[np.bool_], passed: npt.NDArray[np.bool_], number: int) -> float:
    """Precision at 101 recalls, each the best at that recall or a higher one, averaged."""
    right, wrong = np.cumsum(hits & ~passed), np.cumsum(~hits & ~passed)
    recall = right / number
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.concatenate([precision, [0.0]])[np.minimum(at, len(precision))].mean())


class _Pair:
    """Predictions of a class in a picture, best first, beside the true instances of that class."""

    def __init__(self, masks: torch.Tensor, truth: Instances, of_class: torch.Tensor) -> None:
        # counts of pixels, which float32 holds exactly below 2 ** 24
        exact = torch.float32 if masks[:1].numel() < 2**24 else torch.float64
        found, true = (part.flatten(1).to("cpu", exact) for part in (masks, truth.masks[of_class]))
        self.crowd = truth.crowd.cpu()[of_class.cpu()].numpy()
        self.areas, self.true_areas = found.sum(1).double().numpy(), true.sum(1).double().numpy()
        shared = (found @ true.T).double().numpy()
        union = np.where(self.crowd, self.areas[:, None], self.areas[:, None] + self.true_areas - shared)
        self.overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)

    def matched(self, low: float, high: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        """Bits of hits and of what does not count, per prediction; and how many instances there are to be found."""
        outside = (self.true_areas < low) | (self.true_areas > high)
        ignored = self.crowd | outside
        order = np.argsort(ignored, kind="stable")  # what counts is tried first
        odd = (self.areas < low) | (self.areas > high)
        hits, passed = np.zeros(len(self.areas), np.int64), np.zeros(len(self.areas), np.int64)
        for bit, threshold in zip(_BITS, THRESHOLDS, strict=True):
            taken = np.zeros(len(ignored), bool)
            for place, overlaps in enumerate(self.overlap):
                best = self._choice(overlaps, order, ignored, taken, min(threshold, 1 - 1e-10))
                if best is None:
                    passed[place] |= bit * odd[place]
                    continue
                taken[best] = True
                hits[place] |= bit
                passed[place] |= bit * ignored[best]
        return hits, passed, int((~ignored).sum())

    def _choice(
        self,
        overlaps: npt.NDArray[np.float64],
        order: npt.NDArray[np.intp],
        ignored: npt.NDArray[np.bool_],
        taken: npt.NDArray[np.bool_],
        least: float,
    ) -> int | None:
        """The free instance with the largest overlap; one that does not count only where no other will do."""
        best: int | None = None
        for place in order:
            if taken[place] and not self.crowd[place]:
                continue
            if best is not None and not ignored[best] and ignored[place]:
                break
            if overlaps[place] >= least:
                least, best = float(overlaps[place]), int(place)
        return best
