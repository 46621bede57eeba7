"""Which query answers for which segment: the assignment that costs least, on sampled points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

Target = Mapping[str, torch.Tensor]
"""Segments of one picture: `labels` `[segments]` whole numbers, and `masks` `[segments, height, width]`."""

Pairs = tuple[torch.Tensor, torch.Tensor]
"""Numbers of queries, rising, and of the segments they answer for."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss, which are those of the match too, and the points that masks are compared on.

    `no_object` weighs the queries without a segment. Of `num_points` for the loss, the `importance` share are the least
    certain of `num_points * oversample` drawn ones; the others are random.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    contrastive_weight: float = 0.5
    no_object: float = 0.1
    num_points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75

    def __post_init__(self) -> None:
        """Say what cannot be sampled."""
        if self.num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {self.num_points}")
        if self.oversample < 1 or not 0 <= self.importance <= 1:
            raise ValueError(
                f"oversample must be at least 1 and importance from 0 to 1, got {self.oversample} and {self.importance}"
            )


@torch.no_grad()
def match(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, targets: Sequence[Target], config: LossConfig | None = None
) -> list[Pairs]:
    """The pairs of each picture: as many as it has segments, or queries if those are fewer.

    >>> masks = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2) * 20 - 10
    >>> target = {"labels": torch.tensor([0]), "masks": torch.tensor([[[False, True]]])}
    >>> match(torch.zeros(1, 2, 4), masks, [target])
    [(tensor([1]), tensor([0]))]

    Args:
        class_logits: `[batch, queries, classes + 1]`.
        mask_logits: `[batch, queries, height, width]`.
        targets: the segments of each picture, masks of any size.
        config: the weights and the number of points.
    """
    assign = _solver()
    config = LossConfig() if config is None else config
    found = []
    for classes, masks, target in zip(class_logits, mask_logits, targets, strict=True):
        matrix = cost(classes, masks, target, config)
        largest = torch.finfo(matrix.dtype).max  # a model that has diverged is matched somehow, as published
        matrix = matrix.nan_to_num(nan=largest, posinf=largest, neginf=largest)
        queries, segments = (torch.as_tensor(numbers) for numbers in assign(matrix.cpu().numpy()))
        found.append((queries.to(class_logits.device), segments.to(class_logits.device)))
    return found


def cost(classes: torch.Tensor, masks: torch.Tensor, target: Target, config: LossConfig) -> torch.Tensor:
    """What each query would cost for each segment of one picture, `[queries, segments]`, at least in float32.

    >>> target = {"labels": torch.tensor([0]), "masks": torch.ones(1, 4, 4, dtype=torch.bool)}
    >>> cost(torch.zeros(3, 5), torch.zeros(3, 2, 2), target, LossConfig()).shape
    torch.Size([3, 1])
    """
    precise = torch.promote_types(masks.dtype, torch.float32)
    points = torch.rand(1, config.num_points, 2, device=masks.device)
    wanted = at_points(target["masks"].to(precise), points)
    with torch.autocast(masks.device.type, enabled=False):
        logits = at_points(masks.to(precise), points)
        probabilities = logits.sigmoid()
        # the cross entropy of all pairs: softplus(x) - x t, summed over points
        entropy = (nn.functional.softplus(logits).sum(1, keepdim=True) - logits @ wanted.T) / config.num_points
        overlap = 2 * probabilities @ wanted.T
        dice = 1 - (overlap + 1) / (probabilities.sum(1, keepdim=True) + wanted.sum(1) + 1)
        likelihood = classes.to(precise).softmax(-1)[:, target["labels"]]
        return config.mask_weight * entropy - config.class_weight * likelihood + config.dice_weight * dice


def at_points(masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Masks `[masks, height, width]` at points `[masks or 1, points, 2]`, (column, row) from 0 to 1.

    >>> at_points(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.75, 0.5], [0.5, 0.5]]]))
    tensor([[2., 1.]])
    """
    places = (2 * points - 1).to(masks.dtype)
    if len(points) == 1:  # the same points for all: the masks are channels of one picture
        return nn.functional.grid_sample(masks[None], places[:, :, None], align_corners=False)[0, ..., 0]
    return nn.functional.grid_sample(masks[:, None], places[:, :, None], align_corners=False)[:, 0, :, 0]


def check_targets(targets: Sequence[Target], batch: int, classes: int) -> None:
    """Raise a `ValueError` that says what is wrong with the segments of a batch.

    >>> check_targets([{"labels": torch.tensor([7]), "masks": torch.ones(1, 2, 2)}], 1, 5)
    Traceback (most recent call last):
    ValueError: targets[0]: labels must be from 0 to 4, got 7
    """
    if len(targets) != batch:
        raise ValueError(f"targets must be one per image, got {len(targets)} for {batch} images")
    sizes = set()
    for number, target in enumerate(targets):
        absent = [key for key in ("labels", "masks") if not isinstance(target.get(key), torch.Tensor)]
        if absent:
            raise ValueError(f"targets[{number}] must have tensors labels and masks, but has none as {absent[0]}")
        labels, masks = target["labels"], target["masks"]
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"targets[{number}]: labels must be int32 or int64, got {labels.dtype}")
        if masks.dim() != 3 or labels.dim() != 1 or len(masks) != len(labels):
            raise ValueError(
                f"targets[{number}]: labels must be [segments] and masks [segments, height, width], "
                f"got {tuple(labels.shape)} and {tuple(masks.shape)}"
            )
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"targets[{number}]: labels must be from 0 to {classes - 1}, got {int(wrong[0])}")
        # 255 for "inside" would make a loss below zero that teaches nonsense; bool, as readers give, needs no look
        if masks.dtype != torch.bool and not bool(((masks >= 0) & (masks <= 1)).all()):
            raise ValueError(f"targets[{number}]: masks must be bool, or from 0 to 1, got other values")
        sizes.add(tuple(masks.shape[1:]))
    if len(sizes) > 1:
        raise ValueError(f"targets: masks of one batch must be as large as its images, padded; got {sorted(sizes)}")


def _solver():  # type: ignore[no-untyped-def]
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "matching queries with segments needs scipy, which is not installed: pip install vicinal[segment]",
            name="scipy",
        ) from None
    return linear_sum_assignment
