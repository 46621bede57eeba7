"""Mixing and the classification task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vicinal.data import Batch, Info
from vicinal.models.compact import CompactConfig
from vicinal.tasks import Classification, Mixing, Moment, Named
from vicinal.tasks.classification import make_model

INFO = Info("made", ("a", "b", "c"), 1, (0.3,), (0.2,))


def batch(size=6):
    images = torch.randint(0, 256, (size, 1, 12, 10), dtype=torch.uint8)
    rows = torch.arange(size)
    return Batch(images, torch.randint(0, 3, (size,)), rows, torch.ones(size), rows)


@pytest.mark.parametrize("mixing", [Mixing(0.8, 0.0), Mixing(0.0, 1.0), Mixing()])
@pytest.mark.parametrize("step", range(5))
def test_mixing_does_not_depend_on_how_a_batch_is_cut(mixing, step):
    images, labels = torch.rand(8, 1, 9, 7), torch.eye(5)[torch.randint(0, 5, (8,))]
    moment = Moment(step, 10, 3)
    whole = mixing(images, labels, moment)
    halves = [mixing(images[part], labels[part], moment) for part in (slice(0, 2), slice(2, 8))]
    assert torch.equal(whole[0], torch.cat([half[0] for half in halves]))
    assert torch.equal(whole[1], torch.cat([half[1] for half in halves]))
    torch.testing.assert_close(whole[1].sum(1), torch.ones(8))


def test_cutmix_labels_count_the_pixels():
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    for step in range(20):
        mixed, labels = Mixing(0.0, 1.0)(images, torch.eye(2), Moment(step, 20, 0))
        assert mixed[0].mean().item() == pytest.approx(labels[0, 1].item(), abs=1e-6)


def test_mixing_is_drawn_anew_at_each_step():
    images, labels = torch.rand(2, 1, 8, 8), torch.eye(2)
    shares = {round(Mixing(0.8, 0.0)(images, labels, Moment(step, 9, 0))[1][0, 0].item(), 6) for step in range(9)}
    assert len(shares) == 9


def test_mixing_refuses_what_it_cannot_pair():
    with pytest.raises(ValueError, match="even number"):
        Mixing()(torch.rand(3, 1, 4, 4), torch.eye(3), Moment(0, 1, 0))
    with pytest.raises(ValueError, match="not both 0"):
        Mixing(0.0, 0.0)


def test_the_loss_is_cross_entropy_of_normalized_images():
    task = Classification(CompactConfig(dim=16, depths=(1,)), label_smoothing=0.1).build(INFO)
    given = batch()
    loss, parts = task.objective(given, Moment(0, 1, 0))
    logits = task.model((given.images.double() / 255 - 0.3).float() / 0.2)
    expected = torch.nn.functional.cross_entropy(logits, given.labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert parts.keys() == {"loss"}
    assert not parts["loss"].requires_grad


def test_evaluation_counts_every_sample_once():
    task = Classification(CompactConfig(dim=16, depths=(1,))).build(INFO)
    given, evaluation = batch(30), task.evaluation()
    evaluation.add(given)
    with torch.no_grad():
        right = (task.logits(given.images).argmax(1) == given.labels).double().mean().item()
    assert evaluation.values()["accuracy"] == pytest.approx(right)


def test_panels_say_what_is_and_what_was_taken_for_it():
    task = Classification(CompactConfig(dim=16, depths=(1,))).build(INFO)
    panels = task.draw(given := batch(9))
    assert {panel.is_right for panel in panels} <= {True, False}
    assert all(("is " in panel.caption) == (not panel.is_right) for panel in panels)
    assert np.array_equal(panels[0].image[..., 0], given.images[0, 0].numpy())


def test_named_models_take_the_data_s_classes_and_channels():
    config = Named(
        "nat_mini", {"dim": 32, "depths": (1, 1), "num_heads": (1, 2), "dilations": "max", "drop_path_rate": 0.0}
    )
    model = make_model(config, INFO)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="no option"):
        make_model(Named("nat_mini", {"dims": 32}), INFO)


def test_wrong_smoothing_is_refused():
    with pytest.raises(ValueError, match="label_smoothing"):
        Classification(CompactConfig(), label_smoothing=1.0)
