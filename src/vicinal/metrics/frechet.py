"""Fréchet distance between two sets of feature vectors, each taken for a Gaussian."""

from __future__ import annotations

import torch

from vicinal.metrics.moments import Moments


def frechet_distance(first: Moments, second: Moments) -> float:
    """The squared Fréchet distance of the Gaussians with these moments: `FID` where the features are Inception's.

    >>> real = torch.tensor([[0.0], [1.0], [2.0]])
    >>> round(frechet_distance(Moments.of(real), Moments.of(real + 2)), 9)
    4.0
    """
    return gaussian_distance(first.mean, first.covariance, second.mean, second.covariance)


def gaussian_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """`|m - n|² + trace(C + D - 2 (C D)^½)` of means `[features]` and covariances `[features, features]`.

    >>> zero, one = torch.zeros(2), torch.eye(2)
    >>> gaussian_distance(zero, one, zero + 3, 4 * one)  # 2 * 3**2 + 2 * (2 - 1)**2
    20.0
    """
    size = len(mean)
    for name, given, shape in (
        ("mean", mean, (size,)),
        ("covariance", covariance, (size, size)),
        ("other_mean", other_mean, (size,)),
        ("other_covariance", other_covariance, (size, size)),
    ):
        if given.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(given.shape)}")
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} must be finite; some of it is NaN or infinite")
    apart = (mean.double() - other_mean.double()).square().sum()
    # with C = A A^T and D = B B^T the root of C D has the trace of the singular values of A^T B: no root of a product
    # that is not symmetric, and no more than rounding is lost where there are fewer samples than features
    shared = torch.linalg.svdvals(_factor(covariance).T @ _factor(other_covariance)).sum()
    spread = covariance.double().trace() + other_covariance.double().trace()
    return max(0.0, (apart + spread - 2 * shared).item())


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """`A` with `A A^T` the covariance."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors * values.clamp(min=0).sqrt()
