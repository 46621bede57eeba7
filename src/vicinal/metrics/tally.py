"""Sums from which a metric follows: they add up over batches and over processes, unlike the metric itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import distributed


class Metric(Protocol):
    """A metric that follows from sums over samples.

    `tally` is a pure function of one batch, and tallies of several batches are added; `value` finishes. All samples
    of a test set give the same value however they are cut into batches and dealt out to processes.
    """

    def tally(self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sums over a batch, float64. `weights` `[batch]` is 0 for samples that do not count."""

    def value(self, tally: torch.Tensor) -> float:
        """The metric of all samples in a tally; NaN of none."""


class Tallies:
    """Named metrics over a stream of batches.

    >>> from vicinal.metrics import TopK
    >>> tallies = Tallies({"accuracy": TopK(1)})
    >>> tallies.add(torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.tensor([1, 1]))
    >>> tallies.values()
    {'accuracy': 0.5}
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = dict(metrics)
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take up a batch."""
        for name, metric in self.metrics.items():
            tally = metric.tally(outputs, targets, weights)
            self.sums[name] = self.sums[name] + tally if name in self.sums else tally

    def values(self) -> dict[str, float]:
        """Every metric over all batches of all processes; each process has to ask."""
        if not self.sums:
            raise ValueError("no batch was added, so there is nothing to measure")
        return {name: metric.value(across_processes(self.sums[name])) for name, metric in self.metrics.items()}


def across_processes(tally: torch.Tensor) -> torch.Tensor:
    """The sum of a tally over all processes; the tally itself where there is one process.

    >>> across_processes(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return tally
    total = tally.clone()
    distributed.all_reduce(total)
    return total


def rows_across_processes(rows: torch.Tensor) -> torch.Tensor:
    """The rows `[rows, features]` of all processes, in the order of their ranks; each may have another number of them.

    >>> rows_across_processes(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return rows
    mine = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, mine)
    most = max(int(size) for size in sizes)
    filled = torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])])
    parts = [torch.zeros_like(filled) for _ in sizes]
    distributed.all_gather(parts, filled)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def sample_weights(outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Weights `[batch]` in float64, after a look at the shapes of scores `[batch, classes]` and labels `[batch]`."""
    if outputs.dim() != 2 or targets.shape != outputs.shape[:1]:
        raise ValueError(
            "scores must be [batch, classes] and targets [batch], "
            f"got {tuple(outputs.shape)} and {tuple(targets.shape)}"
        )
    if targets.is_floating_point():
        raise ValueError(f"targets must be class numbers, got {targets.dtype}")
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= outputs.shape[1]):
        raise ValueError(
            f"targets must be in 0 .. {outputs.shape[1] - 1}, got {int(targets.min())} .. {int(targets.max())}"
        )
    if weights is None:
        return torch.ones(targets.shape, dtype=torch.float64, device=outputs.device)
    if weights.shape != targets.shape:
        raise ValueError(f"weights must be [batch] like targets {tuple(targets.shape)}, got {tuple(weights.shape)}")
    return weights.to(torch.float64)
