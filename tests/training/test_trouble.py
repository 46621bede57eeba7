"""What goes wrong on people's machines ends in words, and what was there stays."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import torch
from runs import start, tiny

from vicinal.data import DataMissing, ImageFolders
from vicinal.data.augment import CenterCrop, Resize
from vicinal.models.compact import CompactConfig
from vicinal.tasks import Classification
from vicinal.training import train
from vicinal.training.checkpoint import CheckpointFailed, Store, write_bytes_whole
from vicinal.training.journal import Journal
from vicinal.training.report import Silent
from vicinal.training.run import Stopped, _lost_processes
from vicinal.training.world import World

pytest.importorskip("sklearn")

FULL = """
import resource, sys, runs
from vicinal.training import train
from vicinal.training.journal import Journal
from vicinal.training.report import Silent
class Fills(Silent):
    def step(self, step, images, losses):
        if step == 5:  # from here on no file may grow beyond 4096 bytes: what a full disk does, done by the kernel
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
train(runs.tiny(log_every=50), sys.argv[1], report=Fills())
"""


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes as POSIX systems do")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    process = start(tmp_path / "run", FULL)
    _, words = process.communicate(timeout=120)
    last = words.splitlines()[-1]
    assert process.returncode != 0
    assert "the checkpoint of step 8 could not be written" in last, words
    assert "the checkpoint of step 4 is complete; make room, then --resume" in last
    store = Store(tmp_path / "run" / "checkpoints")
    assert store.steps() == [4]
    assert not list(store.folder.glob(".part-*"))
    train(tiny(log_every=50), tmp_path / "run", resume=True)
    assert store.steps()[-1] == 22


def test_a_disk_without_room_for_metrics_is_named(tmp_path, monkeypatch):
    from vicinal.training.journal import Journal

    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is what is always full")
    tmp_path.joinpath("metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="metrics are no longer written") as caught:
        Journal(tmp_path).write({"step": 1})
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_without_room_for_pictures_ends_no_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from vicinal.training import drawing

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    class Listens(Silent):
        said = ""

        def say(self, text):
            self.said += text

    monkeypatch.setattr(drawing, "write_bytes_whole", full)
    report = Listens()
    assert train(tiny(epochs=0.2), tmp_path, report=report).weights.is_file()
    assert "predictions.png could not be written: No space left on device" in report.said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is what is always full")
def test_a_file_without_room_is_named_and_the_one_before_stays(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"before")
    (tmp_path / ".model.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*/model\.safetensors'") as caught:
        write_bytes_whole(file, b"after")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert file.read_bytes() == b"before"


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    recipe = tiny(clip_norm=None, ema_decay=None)
    recipe = replace(recipe, optimizers={"main": replace(recipe.optimizers["main"], learning_rate=1e25)})
    with pytest.raises(Stopped, match=r"loss is (nan|inf) at step \d+; .*lower learning rate"):
        train(recipe, tmp_path / "run")


def folders(base, size=12):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for shade, name in enumerate(("dark", "light")):
            (base / split / name).mkdir(parents=True)
            for number in range(4):
                mode, color = ("L", 200 * shade) if number % 2 else ("RGB", (200 * shade,) * 3)
                image.new(mode, (size + number, size), color).save(base / split / name / f"{number}.png")


def from_folders(base):
    return replace(
        tiny(batch_size=4, epochs=3),
        data=ImageFolders(str(base)),
        task=Classification(CompactConfig(dim=16, depths=(1,), kernel_size=3)),
        train_steps=(Resize(12), CenterCrop(12)),
        test_steps=(Resize(12), CenterCrop(12)),
    )


def test_a_run_learns_from_gray_and_color_pictures_of_any_size(tmp_path):
    folders(tmp_path)
    outcome = train(from_folders(tmp_path), tmp_path / "run")
    assert outcome.metrics.keys() == {"accuracy", "calibration_error", "loss"}


def test_a_corrupt_picture_stops_the_run_by_its_name(tmp_path):
    folders(tmp_path)
    picture = tmp_path / "train" / "dark" / "2.png"
    picture.write_bytes(picture.read_bytes()[:50])
    with pytest.raises(DataMissing, match=r"2\.png cannot be read"):
        train(from_folders(tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 5000}, "fewer than one batch of 5000"),
        ({"accumulation": 3}, "multiple of processes x accumulation"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lost_reader_is_named(tmp_path):
    words = "DataLoader worker (pid 7) is killed by signal: Killed. "  # torch's, raised wherever the signal comes
    alone = World(0, 1, torch.device("cpu"))
    with (
        pytest.raises(Stopped, match=r"reads samples ahead was lost \(DataLoader worker .*there is no checkpoint yet"),
        _lost_processes(alone, Journal(tmp_path)),
    ):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="something else"), _lost_processes(alone, Journal(tmp_path)):
        raise RuntimeError("something else")


def test_a_bar_is_taken_away_whatever_happens(tmp_path):
    class Ends(Silent):
        ended = 0

        def step(self, step, images, losses):
            raise ZeroDivisionError

        def end(self):
            self.ended += 1

    report = Ends()
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path / "run", report=report)
    assert report.ended == 1


def test_a_recipe_without_the_task_s_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs an optimizer 'main'"):
        train(replace(tiny(), optimizers={}), tmp_path / "run")


def test_a_failed_checkpoint_says_when_it_was_the_first(tmp_path, monkeypatch):
    from vicinal.training import checkpoint

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(CheckpointFailed, match="No space left on device; there is no earlier checkpoint"):
        train(tiny(), tmp_path / "run")
