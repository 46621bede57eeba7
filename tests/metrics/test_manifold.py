"""Precision and recall against their definition, vector by vector, and where the answer is plain."""

from __future__ import annotations

import math

import pytest
import torch

from vicinal.metrics import precision_recall
from vicinal.metrics.manifold import PrecisionRecall


def by_definition(real, generated, k):
    """Python over lists: a vector is inside if one center is as near to it as to that center's own k-th nearest."""

    def share(points, centers):
        centers = [tuple(center) for center in centers.tolist()]
        radii = [
            sorted(math.dist(center, other) for place, other in enumerate(centers) if place != own)[k - 1]
            for own, center in enumerate(centers)
        ]
        hits = [
            any(math.dist(point, center) <= radius for center, radius in zip(centers, radii, strict=True))
            for point in points.tolist()
        ]
        return sum(hits) / len(hits)

    return PrecisionRecall(share(generated, real), share(real, generated))


@pytest.mark.parametrize(("k", "features"), [(1, 2), (3, 2), (3, 7), (5, 3)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_both_equal_their_definition(k, features, shift):
    real = torch.randn(61, features, dtype=torch.float64) + 50
    generated = 0.6 * torch.randn(47, features, dtype=torch.float64) + 50 + shift
    expected = by_definition(real, generated, k)
    assert precision_recall(real, generated, k) == expected
    assert precision_recall(generated, real, k) == PrecisionRecall(expected.recall, expected.precision)
    if shift == 1.0:
        assert 0 < expected.precision < 1, "the case would not tell a wrong answer from a right one"


def test_the_answer_does_not_depend_on_how_many_are_compared_at_a_time(monkeypatch):
    real, generated = torch.randn(50, 4), torch.randn(40, 4) + 0.5
    expected = precision_recall(real, generated)
    monkeypatch.setattr("vicinal.metrics.manifold.BLOCK", 100)
    assert precision_recall(real, generated) == expected


def test_a_set_against_itself_is_all_right_and_all_there_even_with_equal_vectors():
    rows = torch.randn(10, 5).repeat(5, 1) + 1e4  # each five times, so that every radius is 0
    assert precision_recall(rows, rows.clone()) == PrecisionRecall(1.0, 1.0)


def test_one_mode_of_two_is_precise_and_half_there():
    near, far = torch.randn(2, 200, 2) * 0.1
    found = precision_recall(torch.cat([near, far + 50]), near + 0.001)
    assert found.precision > 0.95
    assert found.recall == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("real", "generated", "k", "words"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), 3, "as many features"),
        (torch.zeros(5), torch.zeros(5, 3), 3, "samples, features"),
        (torch.zeros(3, 2), torch.zeros(5, 2), 3, "got 3 for 3 real"),
        (torch.zeros(5, 2), torch.zeros(2, 2), 3, "got 3 for 2 generated"),
        (torch.zeros(5, 2), torch.zeros(5, 2), 0, "got 0"),
        (torch.zeros(5, 2), torch.full((5, 2), math.nan), 3, "generated must be finite"),
    ],
)
def test_wrong_input_is_refused(real, generated, k, words):
    with pytest.raises(ValueError, match=words):
        precision_recall(real, generated, k)
