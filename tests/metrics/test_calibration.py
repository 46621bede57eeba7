"""Calibration error against scikit-learn's reliability curve and against its definition, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from vicinal.metrics import Calibration, calibration_error


def by_definition(probabilities, targets, bins):
    """Bin by bin over Python lists."""
    total = 0.0
    for index in range(bins):
        inside = [
            (max(row), row.index(max(row)) == target)
            for row, target in zip(probabilities.tolist(), targets.tolist(), strict=True)
            if index / bins < max(row) <= (index + 1) / bins
        ]
        if inside:
            total += abs(sum(hit for _, hit in inside) - sum(confidence for confidence, _ in inside))
    return total / len(targets)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_equals_its_definition(bins):
    probabilities, targets = torch.randn(211, 5).double().softmax(1), torch.randint(0, 5, (211,))
    assert calibration_error(probabilities, targets, bins) == pytest.approx(by_definition(probabilities, targets, bins))


@pytest.mark.parametrize("bins", [5, 10])
def test_calibration_error_equals_scikit_learn(bins):
    calibration = pytest.importorskip("sklearn.calibration")
    probabilities, targets = torch.randn(317, 3).double().softmax(1), torch.randint(0, 3, (317,))
    confidence, chosen = probabilities.max(1)
    true, predicted = calibration.calibration_curve(chosen == targets, confidence.numpy(), n_bins=bins)
    sizes = [size for size in confidence.histc(bins, 0, 1).tolist() if size]
    expected = sum(size * abs(t - p) for size, t, p in zip(sizes, true, predicted, strict=True)) / 317
    assert calibration_error(probabilities, targets, bins) == pytest.approx(expected)


def test_calibration_error_of_logits_is_that_of_their_softmax():
    logits, targets = 3 * torch.randn(40, 6), torch.randint(0, 6, (40,))
    metric = Calibration(15, from_logits=True)
    expected = calibration_error(logits.double().softmax(1), targets)
    assert metric.value(metric.tally(logits, targets)) == pytest.approx(expected)


def test_calibration_tallies_add_up():
    probabilities, targets = torch.randn(60, 4).softmax(1), torch.randint(0, 4, (60,))
    metric = Calibration()
    pieces = sum(metric.tally(probabilities[part], targets[part]) for part in torch.arange(60).split([1, 20, 39]))
    assert metric.value(pieces) == pytest.approx(calibration_error(probabilities, targets), rel=1e-12)


def test_calibration_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="from_logits"):
        calibration_error(torch.tensor([[3.0, -2.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="bins"):
        Calibration(0)
    assert math.isnan(calibration_error(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)))
