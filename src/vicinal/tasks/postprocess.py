"""From a model's queries to segments, by the published rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vicinal.metrics import Instances, Segments


@dataclass(frozen=True)
class Rules:
    """Thresholds: a query counts from `least_score`, and as much of its mask as `least_visible` has to be left to it.

    `most` instances are kept of a picture.

    >>> PUBLISHED["ade20k"].least_score, PUBLISHED["coco_panoptic"].least_score
    (0.5, 0.8)
    """

    least_score: float = 0.8
    least_visible: float = 0.8
    most: int = 100

    def __post_init__(self) -> None:
        for name in ("least_score", "least_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"rules.{name} must be in 0 .. 1, got {getattr(self, name)}")
        if self.most < 1:
            raise ValueError(f"rules.most must be at least 1, got {self.most}")


PUBLISHED: Mapping[str, Rules] = {
    "ade20k": Rules(0.5, 0.8, 250),
    "cityscapes": Rules(0.8, 0.8, 150),
    "coco_panoptic": Rules(0.8, 0.8, 150),
    "mapillary": Rules(0.8, 0.8, 250),
}
"""By data set; `most` is that of the large backbones, 150 on Cityscapes being that of ResNet-50."""


def class_scores(class_logits: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
    """Scores `[classes, height, width]` of logits `[queries, classes + 1]` and `[queries, height, width]`.

    >>> class_scores(torch.zeros(5, 4), torch.zeros(5, 2, 2)).shape
    torch.Size([3, 2, 2])
    """
    chances = class_logits.softmax(-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", chances, mask_logits.sigmoid())


def panoptic(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, things: Sequence[int], rules: Rules
) -> tuple[Segments, torch.Tensor]:
    """Segments that do not overlap, and their scores `[segments]`; what no query is sure of is void.

    Every pixel goes to the query with the highest score times probability there; a query that keeps too little of its
    mask is dropped, and stuff of one class becomes one segment.

    >>> logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    >>> masks = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])
    >>> panoptic(logits, masks, [0], Rules())[0].labels.tolist()
    [0, 1]
    """
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > rules.least_score)
    scores, labels, chances = scores[kept], labels[kept], mask_logits[kept].sigmoid()
    numbers = torch.zeros(mask_logits.shape[-2:], dtype=torch.long, device=mask_logits.device)
    found: list[int] = []
    values: list[float] = []
    if not len(labels):
        return Segments(numbers, labels), scores
    owner = (scores[:, None, None] * chances).argmax(0)
    stuff: dict[int, int] = {}
    for query, label in enumerate(labels.tolist()):
        owned, own = owner == query, chances[query] >= 0.5
        mask, area = owned & own, int(own.sum())
        if not bool(mask.any()) or int(owned.sum()) / area < rules.least_visible:
            continue
        if label not in things and label in stuff:
            numbers[mask] = stuff[label]
            continue
        found.append(label)
        values.append(float(scores[query]))
        numbers[mask] = len(found)
        if label not in things:
            stuff[label] = len(found)
    return Segments(numbers, labels.new_tensor(found)), scores.new_tensor(values)


def instances(class_logits: torch.Tensor, mask_logits: torch.Tensor, things: Sequence[int], rules: Rules) -> Instances:
    """The best pairs of query and class among things; a score is the class's times the mean of the mask's.

    >>> logits, masks = torch.tensor([[9.0, 0.0, 0.0]]), torch.full((1, 2, 2), 9.0)
    >>> round(float(instances(logits, masks, [0], Rules()).scores[0]), 2)
    1.0
    """
    classes = class_logits.shape[-1] - 1
    chances = class_logits.softmax(-1)[:, :-1].flatten()
    scores, places = chances.topk(min(rules.most, len(chances)))
    labels, queries = places % classes, places // classes
    chosen = torch.isin(labels, torch.tensor(sorted(things), device=labels.device))
    scores, labels, queries = scores[chosen], labels[chosen], queries[chosen]
    masks = mask_logits > 0
    sure = (mask_logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = scores * sure[queries]
    seen = scores > 0  # a query without a pixel finds nothing
    order = scores[seen].argsort(descending=True, stable=True)
    return Instances(masks[queries[seen]][order], labels[seen][order], scores[seen][order])
