"""Improved precision and recall of generated samples (Kynkäänniemi et al. 2019): how much is right, how much is there.

A set stands for the union of the balls around its vectors, each as large as the distance to the k-th nearest other
vector of the set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 2**22
"""Distances held at a time."""


@dataclass(frozen=True)
class PrecisionRecall:
    """The share of generated vectors among the real ones, and of real ones among the generated."""

    precision: float
    recall: float


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> PrecisionRecall:
    """Precision and recall of `generated` `[m, features]` for `real` `[n, features]`.

    >>> real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])
    >>> precision_recall(real, torch.tensor([[0.5], [1.5], [2.5], [-90.0]]), k=1)
    PrecisionRecall(precision=0.75, recall=0.8)
    """
    for name, given in (("real", real), ("generated", generated)):
        if given.dim() != 2 or given.shape[1] != real.shape[-1]:
            raise ValueError(
                f"real and generated must be [samples, features] with as many features, got {list(real.shape)} and "
                f"{list(generated.shape)}"
            )
        if not 1 <= k < len(given):
            raise ValueError(f"k must be at least 1 and below the number of vectors, got {k} for {len(given)} {name}")
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} must be finite; some of it is NaN or infinite")
    # around the middle numbers are small, so that squares lose little
    middle = real.double().mean(0)
    real, generated = real.double() - middle, generated.double() - middle
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, k)),
        recall=_share_inside(real, generated, _radii(generated, k)),
    )


def _radii(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The squared distance of each vector to its k-th nearest other."""
    found = []
    for numbers in torch.arange(len(rows), device=rows.device).split(max(1, BLOCK // len(rows))):
        distances = _distances(rows[numbers], rows)
        distances[torch.arange(len(numbers), device=rows.device), numbers] = torch.inf  # not itself
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _share_inside(rows: torch.Tensor, centers: torch.Tensor, radii: torch.Tensor) -> float:
    """The share of vectors in at least one ball."""
    parts = rows.split(max(1, BLOCK // len(centers)))
    inside = sum(int((_distances(part, centers) <= radii).any(1).sum()) for part in parts)
    return inside / len(rows)


def _distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Squared distances `[rows, others]`; what is nothing but rounding is 0, so that equal vectors are found equal."""
    sizes = rows.square().sum(1)[:, None] + others.square().sum(1)
    distances = sizes - 2 * rows @ others.T
    return distances.masked_fill_(distances < 1e-13 * sizes, 0.0)
