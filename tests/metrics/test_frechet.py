"""Fréchet distance: Gaussians whose answer is known, scipy's root of a matrix, batches, processes, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vicinal.metrics import Moments, frechet_distance, gaussian_distance


def by_scipy(first, second):
    """The formula as it is written in papers, with numpy's moments and scipy's root of a product of matrices."""
    linalg = pytest.importorskip("scipy.linalg")
    one, other = np.cov(first.double().numpy().T), np.cov(second.double().numpy().T)
    root = linalg.sqrtm(one @ other)
    apart = first.double().mean(0).numpy() - second.double().mean(0).numpy()
    return apart @ apart + np.trace(one + other - 2 * root.real)


@pytest.mark.parametrize(("samples", "features"), [(400, 17), (1000, 63), (90, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_equals_that_with_scipys_root(samples, features, dtype):
    mixing = torch.randn(features, features) / features**0.5
    first = torch.randn(samples, features).to(dtype)
    second = (torch.randn(samples + 7, features) @ mixing + 0.3).to(dtype)
    if features == 1:  # numpy's covariance of one feature is no matrix
        expected = (first.double().mean() - second.double().mean()) ** 2
        expected = (expected + (first.double().std() - second.double().std()) ** 2).item()
    else:
        expected = by_scipy(first, second)
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_gaussians_with_one_set_of_axes_is_that_of_their_widths():
    """Covariances that commute: the root is that of the eigenvalues, and the distance a sum over them."""
    turn = torch.linalg.qr(torch.randn(23, 23, dtype=torch.float64)).Q
    widths, others = torch.rand(2, 23, dtype=torch.float64) * 10
    mean, other = torch.randn(2, 23, dtype=torch.float64)
    got = gaussian_distance(mean, turn @ torch.diag(widths**2) @ turn.T, other, turn @ torch.diag(others**2) @ turn.T)
    assert got == pytest.approx(((mean - other) ** 2).sum().item() + ((widths - others) ** 2).sum().item(), rel=1e-12)


def test_distance_of_lines_is_known_though_their_covariances_have_no_inverse():
    """Two flat Gaussians at an angle: all mass of each on a line, so that the shared part is the cosine."""
    angle = 0.7
    line = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    flat = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    got = gaussian_distance(torch.zeros(2), flat, torch.zeros(2), 4 * torch.outer(line, line))
    assert got == pytest.approx(1 + 4 - 2 * 2 * math.cos(angle), rel=1e-9)


def test_distance_to_itself_is_nothing_even_with_fewer_samples_than_features():
    moments = Moments.of(torch.randn(20, 50))
    assert frechet_distance(moments, moments) <= 1e-10 * moments.covariance.trace().item()
    shifted = Moments.of(torch.randn(20, 50) + 5)
    assert frechet_distance(moments, shifted) == pytest.approx(frechet_distance(shifted, moments), rel=1e-9)


@pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 33, 34], [2, 0, 98]])
def test_moments_do_not_depend_on_batches(sizes):
    rows = torch.randn(100, 11) + 1000  # far from 0, where sums of squares would lose half their digits
    parts = [Moments.of(part) for part in rows.split(sizes)]
    whole = sum(parts[1:], start=parts[0])
    assert whole.count == 100
    np.testing.assert_allclose(whole.mean.numpy(), rows.double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance.numpy(), np.cov(rows.double().numpy().T), rtol=1e-11, atol=1e-12)


def test_rows_of_weight_zero_do_not_count():
    rows = torch.randn(10, 3)
    filled = torch.cat([rows, torch.full((2, 3), math.nan)])
    moments = Moments.of(filled, torch.tensor([1.0] * 10 + [0.0] * 2))
    assert moments.count == 10
    torch.testing.assert_close(moments.covariance, Moments.of(rows).covariance)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Moments.of(torch.zeros(3)), "batch, features"),
        (lambda: Moments.of(torch.zeros(3, 2, dtype=torch.uint8)), "floats"),
        (lambda: Moments.of(torch.tensor([[math.inf]])), "finite"),
        (lambda: Moments.of(torch.zeros(3, 2), torch.ones(2)), "weights must be"),
        (lambda: Moments.of(torch.zeros(1, 2)).covariance, "at least 2 vectors, got 1"),
        (lambda: Moments.of(torch.zeros(2, 2)) + Moments.of(torch.zeros(2, 3)), "2 and of 3"),
        (lambda: gaussian_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2)), "covariance must be"),
        (lambda: gaussian_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(2)), "other_mean must be"),
        (lambda: gaussian_distance(torch.zeros(1) / 0, torch.eye(1), torch.zeros(1), torch.eye(1)), "mean must be f"),
    ],
)
def test_wrong_input_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
