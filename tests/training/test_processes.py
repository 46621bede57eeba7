"""Two processes against one: the same curve; a lost process ends in words; another world size takes a run over."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import start, steady, tensors

from vicinal.data import Digits, ImageFolders, Stream
from vicinal.training import train
from vicinal.training.checkpoint import Store
from vicinal.training.journal import read_lines
from vicinal.training.launch import train_on
from vicinal.training.report import Silent

pytest.importorskip("sklearn")


def curve(folder, split="train"):
    return torch.tensor([line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["split"] == split])


def assert_close_curves(ours, theirs):
    """Equal but for rounding, which grows step by step as any difference does in training."""
    assert len(ours) == len(theirs) > 20
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(steady(), folder)
    return folder


def assert_learned_the_same(folder, alone):
    assert_close_curves(curve(folder), curve(alone))
    torch.testing.assert_close(curve(folder, "test"), curve(alone, "test"), rtol=2e-3, atol=0)  # across processes too
    ours, theirs = tensors(folder), tensors(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.startswith(".model"):
            assert (ours[name] - tensor).norm() <= 0.02 * tensor.norm() + 1e-4, name


def assert_drawn(folder):
    for name in ("curves.png", "predictions.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_two_processes_learn_what_one_learns(alone, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    outcome = train_on(2, steady(accumulation=2), tmp_path / "run", report=Silent())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert outcome.facts["processes"] == 2
    assert_drawn(tmp_path / "run")
    assert_learned_the_same(tmp_path / "run", alone)


class Stops(Silent):
    """Crashes after a checkpoint."""

    def step(self, step, images, losses):
        if step == 5:
            raise ZeroDivisionError


def test_two_sharded_processes_go_on_where_one_stopped(alone, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(steady(parallel="fsdp2"), folder, report=Stops())
    assert Store(folder / "checkpoints").steps() == [4]
    train_on(2, steady(parallel="fsdp2", accumulation=2), folder, resume=True, report=Silent())
    assert_drawn(folder)
    assert_learned_the_same(folder, alone)


def test_accumulation_alone_learns_the_same(alone, tmp_path):
    train(steady(accumulation=4), tmp_path / "run")
    assert_close_curves(curve(tmp_path / "run"), curve(alone))


LOSES = """
import os, signal, sys, runs
from vicinal.training.launch import train_on
from vicinal.training.report import Silent
if __name__ == "__main__":
    train_on(2, runs.steady(epochs=2000, timeout_s=20), sys.argv[1], report=Silent())
"""


def children(pid):
    """The processes that a process started."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        found += [int(word) for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds the process to kill in /proc")
def test_a_lost_process_ends_the_run_in_words(tmp_path):
    process = start(tmp_path / "run", LOSES)
    store = Store(tmp_path / "run" / "checkpoints")
    deadline = time.monotonic() + 90
    while not store.steps() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    ranks = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    _, words = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in words.splitlines()[-1], words
    assert "the last checkpoint is of step" in words.splitlines()[-1]
    assert time.monotonic() - killed < 45
    assert all(not os.path.exists(f"/proc/{pid}") for pid in ranks)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds the processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(number, tmp_path):
    process = start(tmp_path / "run", LOSES)
    store = Store(tmp_path / "run" / "checkpoints")
    deadline = time.monotonic() + 90
    while not store.steps() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    ranks = children(process.pid)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    _, words = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}; the last checkpoint is of step" in words.splitlines()[-1]
        assert words.count("Traceback") == 1  # of this script itself
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


def test_a_users_mistake_is_one_sentence_from_many_processes(tmp_path):
    recipe = steady(seed=3)
    with pytest.raises(ValueError, match="batch_size must be a multiple of processes"):
        train_on(2, replace(recipe, loop=replace(recipe.loop, batch_size=127)), tmp_path, report=Silent())
    absent = replace(recipe, data=ImageFolders(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"^there is no folder .*nowhere"):
        train_on(2, absent, tmp_path / "no" / "such", report=Silent())
    with pytest.raises(ValueError, match="processes must be at least 1"):
        train_on(0, recipe, tmp_path, report=Silent())


def test_processes_share_out_every_sample_once():
    from vicinal.data import Share

    digits = Digits().open("test")
    seen, batches = [], set()
    for rank in range(3):
        stream = Stream(digits, (), batch_size=99, share=Share(rank, 3))
        own = list(stream.evaluation())
        batches.add(len(own))
        seen += [index for batch in own for index in batch.indices[batch.weights > 0].tolist()]
    assert sorted(seen) == list(range(360))
    assert batches == {4}
