"""Precision, recomputation, compilation and several optimizers: what they may change and what not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from runs import steady
from torch import nn

from vicinal.tasks import Turn
from vicinal.training import AdamW, Sgd, Steps, train
from vicinal.training.journal import read_lines
from vicinal.training.loop import Trainer
from vicinal.training.world import World

pytest.importorskip("sklearn")


def losses(folder):
    return torch.tensor([line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(steady(epochs=0.6), folder)
    return losses(folder)


def test_recomputation_changes_nothing(plain, tmp_path):
    train(steady(epochs=0.6, activation_checkpointing=True), tmp_path / "run")
    torch.testing.assert_close(losses(tmp_path / "run"), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precisions_learn_nearly_the_same(precision, plain, tmp_path):
    train(steady(epochs=0.6, precision=precision), tmp_path / "run")
    torch.testing.assert_close(losses(tmp_path / "run"), plain, rtol=0.05, atol=0)
    assert not torch.equal(losses(tmp_path / "run"), plain)


@pytest.mark.slow
def test_compilation_changes_nothing_but_rounding(plain, tmp_path):
    train(steady(epochs=0.6, compile=True), tmp_path / "run")
    torch.testing.assert_close(losses(tmp_path / "run"), plain, rtol=1e-3, atol=0)


class Pull(nn.Module):
    """Moves one number towards, or away from, another's."""

    def __init__(self, own, other, sign):
        super().__init__()
        self.own, self.others, self.sign = own, [other], sign

    def forward(self, batch, moment):
        loss = self.sign * (self.own.weight - self.others[0].weight.detach()).square().sum()
        return loss, {f"pull{self.sign}": loss.detach()}


class Duel:
    """As in a GAN: two networks with an optimizer each, and a penalty on one of them at every third step."""

    best = ("distance", False)

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        a, b = self.model["a"], self.model["b"]
        self.turns = (
            Turn("judge", Pull(a, b, 1), optimizer="judge"),
            Turn("penalty", Pull(a, b, 2), optimizer="judge", every=3),
            Turn("maker", Pull(b, a, -1), optimizer="maker"),
        )
        self.moments = []

    def units(self):
        return []

    def after_step(self, moment):
        self.moments.append(moment.step)


def test_turns_take_place_in_order_with_optimizers_of_their_own():
    task = Duel()
    recipe = replace(
        steady(ema_decay=None, clip_norm=None, epochs=1),
        optimizers={
            "judge": Sgd(0.1, weight_decay=0.0, momentum=0.0),
            "maker": Sgd(0.01, weight_decay=0.0, momentum=0.0),
        },
        schedule=Steps(),
    )
    a, b = (task.model[name].weight.detach().clone() for name in "ab")
    trainer = Trainer(recipe, task, World(0, 1, torch.device("cpu")), steps_per_epoch=7)

    class Piece:
        def to(self, device):
            return self

    for step in range(7):
        found, rate = trainer.take_step([Piece()])
        a = a - 0.1 * 2 * (a - b)
        if step % 3 == 0:
            a = a - 0.1 * 4 * (a - b)
        b = b + 0.01 * 2 * (b - a)
        assert ("pull2" in found) == (step % 3 == 0)
        assert rate == 0.1
    torch.testing.assert_close(task.model["a"].weight.detach(), a)
    torch.testing.assert_close(task.model["b"].weight.detach(), b)
    assert task.moments == list(range(7))
    assert {name for name in trainer.tensors() if name.startswith("optimizer")} == {
        "optimizer.judge",
        "optimizer.maker",
    }


def test_adam_s_state_of_two_optimizers_is_saved_and_taken_over():
    recipe = replace(steady(ema_decay=None), optimizers={"judge": AdamW(0.1), "maker": AdamW(0.01)})
    world = World(0, 1, torch.device("cpu"))

    class Piece:
        def to(self, device):
            return self

    first, second = (Trainer(recipe, Duel(), world, steps_per_epoch=9) for _ in range(2))
    for _ in range(4):
        first.take_step([Piece()])
    second.take_over(copy.deepcopy(first.tensors()), first.facts())
    for trainer in (first, second):
        trainer.take_step([Piece()])
    for ours, theirs in zip(first.task.model.parameters(), second.task.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
