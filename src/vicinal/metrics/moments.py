"""Mean and covariance of feature vectors that arrive in batches and in several processes, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vicinal.metrics.tally import across_processes


@dataclass(frozen=True)
class Moments:
    """How many vectors there were, their mean `[features]`, and the scatter `[features, features]` around it.

    Moments of parts add up to those of the whole. The scatter is kept around the mean, so that nothing is lost where
    the mean is large and the spread is small.

    >>> first, second = Moments.of(torch.tensor([[0.0], [2.0]])), Moments.of(torch.tensor([[4.0]]))
    >>> whole = first + second
    >>> whole.count, whole.mean.tolist(), whole.covariance.tolist()
    (3.0, [2.0], [[4.0]])
    """

    count: float
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
        """The moments of `features` `[batch, features]`; `weights` `[batch]` is 0 for vectors that do not count."""
        if features.dim() != 2 or not features.is_floating_point():
            raise ValueError(f"features must be floats [batch, features], got {features.dtype} {tuple(features.shape)}")
        if weights is not None and weights.shape != features.shape[:1]:
            raise ValueError(f"weights must be [batch] = [{len(features)}], got {tuple(weights.shape)}")
        rows = features.double()
        if weights is not None:
            rows = rows[weights > 0]
        if not bool(rows.isfinite().all()):
            raise ValueError("features must be finite; some of these are NaN or infinite")
        mean = rows.sum(0) / max(len(rows), 1)
        apart = rows - mean
        return cls(float(len(rows)), mean, apart.T @ apart)

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} features do not add up")
        count = self.count + other.count
        if count == 0:
            return self
        step = other.mean - self.mean
        return Moments(
            count,
            self.mean + step * (other.count / count),
            self.scatter + other.scatter + torch.outer(step, step) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance `[features, features]`."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {self.count:.0f}")
        return self.scatter / (self.count - 1)

    def across_processes(self) -> Moments:
        """The moments over all processes, of which each has to ask; these themselves where there is one."""
        total = across_processes(torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean]))
        mean = total[1:] / total[0].clamp(min=1)
        step = self.mean - mean
        scatter = across_processes(self.scatter + self.count * torch.outer(step, step))
        return Moments(total[0].item(), mean, scatter)
