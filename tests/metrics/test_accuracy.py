"""Top-k accuracy against scikit-learn, its ties, and its sums over batches."""

from __future__ import annotations

import math

import pytest
import torch

from vicinal.metrics import Tallies, TopK, accuracy


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_equals_scikit_learn(k, dtype):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores = torch.stack([torch.randperm(7) for _ in range(113)]).to(dtype)  # without ties, whose order is a choice
    targets = torch.randint(0, 7, (113,))
    expected = sklearn_metrics.top_k_accuracy_score(targets, scores.float().numpy(), k=k, labels=range(7))
    assert accuracy(scores, targets, k) == pytest.approx(expected, abs=1e-12)


def test_accuracy_of_equal_scores_prefers_the_first_class():
    tied = torch.zeros(3, 3)
    assert accuracy(tied, torch.tensor([0, 1, 2])) == pytest.approx(1 / 3)
    assert accuracy(tied, torch.tensor([0, 1, 2]), k=2) == pytest.approx(2 / 3)
    assert accuracy(tied, torch.tensor([0, 0, 0])) == (tied.argmax(1) == 0).float().mean()


def test_accuracy_does_not_count_nan_as_found():
    assert accuracy(torch.tensor([[math.nan, math.nan]]), torch.tensor([0]), k=2) == 0.0


def test_tallies_do_not_depend_on_how_samples_are_cut_into_batches():
    scores, targets = torch.randn(50, 4), torch.randint(0, 4, (50,))
    whole, pieces = Tallies({"top2": TopK(2)}), Tallies({"top2": TopK(2)})
    whole.add(scores, targets)
    for part in torch.arange(50).split([7, 1, 42]):
        pieces.add(scores[part], targets[part])
    assert whole.values() == pieces.values()


def test_samples_of_weight_zero_do_not_count():
    scores, targets = torch.eye(4), torch.tensor([0, 1, 0, 0])
    tallies = Tallies({"accuracy": TopK()})
    tallies.add(scores, targets, torch.tensor([1, 1, 0, 0]))
    assert tallies.values() == {"accuracy": 1.0}


def test_an_empty_batch_is_no_number():
    assert math.isnan(accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))


@pytest.mark.parametrize(
    ("scores", "targets", "words"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "batch, classes"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), "batch, classes"),
        (torch.zeros(3, 2), torch.zeros(3), "class numbers"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), r"0 \.\. 1"),
    ],
)
def test_wrong_input_is_refused(scores, targets, words):
    with pytest.raises(ValueError, match=words):
        accuracy(scores, targets)


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        Tallies({"accuracy": TopK()}).values()
    with pytest.raises(ValueError, match="k must be"):
        TopK(0)
