"""A run that is killed and resumed gives what an uninterrupted run gives, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch
from runs import start, tensors, tiny
from safetensors.torch import load_file

from vicinal.tasks import Classification
from vicinal.tasks.classification import ClassificationTask, make_model
from vicinal.training import train
from vicinal.training.checkpoint import CheckpointFailed, Store
from vicinal.training.journal import FolderTaken, read_lines
from vicinal.training.report import Silent
from vicinal.training.run import Stopped

pytest.importorskip("sklearn")

TIMES = ("images_per_second",)
SCRIPT = "import sys, runs, torch; from vicinal.training import train; train(runs.tiny(), sys.argv[1], resume=True)"


def lines(folder):
    """The metrics of a run without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_lines(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run in one piece."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    torch.manual_seed(12345)  # what was drawn before a run does not matter
    train(tiny(), folder)
    return folder


def assert_same(folder, expected):
    ours, theirs = tensors(folder), tensors(expected)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg" in name for name in ours)
    assert any(name.startswith(".average") for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert lines(folder) == lines(expected)
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_repeated_run_is_the_same(uninterrupted, tmp_path):
    random.seed(99)
    torch.manual_seed(99)
    train(tiny(), tmp_path / "again")
    assert_same(tmp_path / "again", uninterrupted)


class KillsItself(Silent):
    """Raises in the middle of a run, as a crash would."""

    def __init__(self, at):
        self.at = at

    def step(self, step, images, losses):
        if step == self.at:
            raise ZeroDivisionError


@pytest.mark.parametrize("at", [1, 10, 21])
def test_a_crash_at_any_step_is_made_good(at, uninterrupted, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path / "run", report=KillsItself(at))
    train(tiny(), tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", uninterrupted)


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(uninterrupted, tmp_path, monkeypatch):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    written = FileSystemWriter.finish

    def dies(self, *arguments, **named):
        if "00000008" in str(self.path):
            raise KeyboardInterrupt  # after the tensors, before the folder is renamed
        return written(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "finish", dies)
        with pytest.raises(BaseException):  # noqa: B017 - torch wraps even this one
            train(tiny(), tmp_path / "run")
    store = Store(tmp_path / "run" / "checkpoints")
    assert store.steps() == [4]
    train(tiny(), tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", uninterrupted)
    assert not list(store.folder.glob(".part-*"))


def kill_and_resume(folder, seed, kills):
    """SIGKILL at random moments, also while checkpoints are written; then let it end."""
    draw = random.Random(seed)
    died = 0
    for _ in range(kills):
        begun = len(lines(folder)) if (folder / "metrics.jsonl").exists() else 0
        process = start(folder, SCRIPT)
        while process.poll() is None and not ((folder / "metrics.jsonl").exists() and len(lines(folder)) > begun):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            died += 1
        process.communicate(timeout=60)
    process = start(folder, SCRIPT)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 0, words
    return died


def test_a_run_killed_by_sigkill_is_made_good(uninterrupted, tmp_path):
    assert kill_and_resume(tmp_path / "run", seed=1, kills=1) == 1
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_several_times_is_made_good(seed, uninterrupted, tmp_path):
    assert kill_and_resume(tmp_path / "run", seed, kills=3) > 0
    assert_same(tmp_path / "run", uninterrupted)


def test_ctrl_c_ends_in_good_order(uninterrupted, tmp_path):
    class Interrupts(Silent):
        def step(self, step, images, losses):
            if step == 6:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="after step 6 of 22"):
        train(tiny(), tmp_path / "run", report=Interrupts())
    assert Store(tmp_path / "run" / "checkpoints").steps()[-1] == 6
    assert signal.getsignal(signal.SIGINT) is before
    train(tiny(), tmp_path / "run", resume=True)
    ours, theirs = tensors(tmp_path / "run"), tensors(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_workers_do_not_change_a_run(uninterrupted, tmp_path):
    train(tiny(workers=2), tmp_path / "run")
    ours, theirs = tensors(tmp_path / "run"), tensors(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_resumes_to_its_end(uninterrupted):
    outcome = train(tiny(), uninterrupted, resume=True)
    assert outcome.step == 22
    assert outcome.metrics["accuracy"] == lines(uninterrupted)[-1]["accuracy"]


@dataclass(frozen=True)
class Solving(Classification):
    """A task that changes the model when training has ended, as one does that solves for thresholds."""

    def build(self, info):
        return SolvingTask(self, info, make_model(self.model, info))


class SolvingTask(ClassificationTask):
    def finish(self, batches):
        assert not self.model.training
        next(self.model.parameters()).data.add_(torch.rand(()) + next(batches).labels[0])


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_what_a_task_does_at_the_end_is_done_again_by_resuming(ema_decay, tmp_path):
    recipe = tiny(ema_decay=ema_decay, epochs=0.3)
    train(recipe, tmp_path / "plain")
    recipe = replace(recipe, task=Solving(recipe.task.model, recipe.task.label_smoothing))
    train(recipe, tmp_path / "run")
    plain, first = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "run"))
    assert sum(not torch.equal(plain[name], first[name]) for name in first) == 1
    (tmp_path / "run" / "model.safetensors").unlink()  # killed between the last checkpoint and the weights
    train(recipe, tmp_path / "run", resume=True)
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_kill_between_a_checkpoint_and_its_mark_as_the_best_is_made_good(uninterrupted, tmp_path):
    train(tiny(epochs=1), tmp_path)
    mark = tmp_path / "checkpoints" / "best.json"
    best = mark.read_text()
    mark.write_text('{"step": 4}')
    train(tiny(epochs=1), tmp_path, resume=True)
    assert mark.read_text() == best == '{"step": 11}'


class Listens(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_resuming_nothing_says_that_it_begins(tmp_path):
    report = Listens()
    train(tiny(epochs=0.2), tmp_path / "new", resume=True, report=report)
    assert [text for text in report.said if "no checkpoint to go on from" in text]
    again = Listens()
    train(tiny(epochs=0.2), tmp_path / "new", resume=True, report=again)
    assert not again.said


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    train(tiny(epochs=0.2), tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(FolderTaken, match=r"recipe\.json cannot be read as JSON"):
        train(tiny(epochs=0.2), tmp_path, resume=True)


def test_a_folder_is_not_written_over(uninterrupted):
    with pytest.raises(FolderTaken, match="--resume"):
        train(tiny(), uninterrupted)
    with pytest.raises(FolderTaken, match=r"loop\.seed"):
        train(tiny(seed=1), uninterrupted, resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(tiny(epochs=0.5), tmp_path)
    store = Store(tmp_path / "checkpoints")
    data = next(store.path(store.steps()[-1]).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointFailed, match="remove it to go on from the one before"):
        train(tiny(epochs=0.5), tmp_path, resume=True)


def test_the_best_and_the_newest_checkpoints_are_kept(tmp_path):
    recipe = tiny(epochs=3, keep=1, evaluate_every=0.5)
    train(replace(recipe, optimizers={"main": replace(recipe.optimizers["main"], learning_rate=0.02)}), tmp_path)
    store = Store(tmp_path / "checkpoints", 1)
    measured = {line["step"]: line["accuracy"] for line in lines(tmp_path) if line["split"] == "test"}
    assert store.best() == max(measured, key=lambda step: (measured[step], -step))
    assert set(store.steps()) == {33, store.best()}
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": store.best()}
