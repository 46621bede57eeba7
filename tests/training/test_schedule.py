"""Schedules, optimizers and averages against what they are defined to be."""

from __future__ import annotations

import math

import pytest
import torch

from vicinal.training import AdamW, Cosine, Poly, Sgd, Steps
from vicinal.training.average import Average
from vicinal.training.optimizer import make_optimizer, set_rate


def test_cosine_is_the_published_one_of_nat():
    """1e-3 over 300 epochs to 5e-6, warm-up from 1e-6 in 20 epochs, then 10 epochs at the end's rate."""
    schedule = Cosine(warmup=20, start=1e-3, final=5e-3, cooldown=10)
    assert 1e-3 * schedule.factor(0, 310) == pytest.approx(1e-6)
    assert 1e-3 * schedule.factor(10, 310) == pytest.approx(1e-3 * (1e-3 + (1 - 1e-3) / 2))
    assert 1e-3 * schedule.factor(150, 310) == pytest.approx((1e-3 + 5e-6) / 2)
    assert 1e-3 * schedule.factor(300, 310) == pytest.approx(5e-6)
    assert 1e-3 * schedule.factor(309, 310) == pytest.approx(5e-6)


def test_poly_and_steps():
    assert Poly(power=0.9).factor(40, 160) == pytest.approx(0.75**0.9)
    assert Poly(warmup=4, start=0).factor(1, 8) == 0.25
    assert [Steps(at=(2, 3), gamma=0.5).factor(epoch, 4) for epoch in (1.9, 2, 3.5)] == [1, 0.5, 0.25]
    assert Steps().factor(7, 8) == 1.0


@pytest.mark.parametrize("schedule", [Cosine(1), Poly(2.0, 1), Steps((2,), 0.1, 1)])
def test_schedules_stay_between_nothing_and_all(schedule):
    values = [schedule.factor(step / 50, 4) for step in range(201)]
    assert all(0 <= value <= 1 and math.isfinite(value) for value in values)
    assert max(values) > 0.9


def test_groups_keep_their_share_of_the_rate():
    from vicinal.models.compact import CompactConfig, build

    model = build(CompactConfig(dim=16, depths=(1,)))
    optimizer = make_optimizer(model, AdamW(learning_rate=0.1, scales={"stem": 0.5}))
    assert set_rate(optimizer, 0.2) == pytest.approx(0.02)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["stem"] == pytest.approx(0.01)
    undecayed = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    assert any(parameter.dim() == 3 for group in undecayed for parameter in group["params"])  # position biases
    counted = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_frozen_parameters_are_left_alone():
    layer = torch.nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    groups = make_optimizer(layer, Sgd()).param_groups
    assert [parameter is layer.bias for group in groups for parameter in group["params"]] == [True]
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to optimize"):
        make_optimizer(layer, Sgd())


def test_an_average_is_what_its_definition_says():
    layer = torch.nn.Linear(2, 2).double()
    average, by_hand = Average(layer, 0.8), layer.weight.detach().clone()
    for step in range(30):
        layer.weight.data.normal_()
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(average.values["weight"], by_hand)
    now = layer.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(layer.weight.detach(), by_hand)
    assert torch.equal(layer.weight.detach(), now)
