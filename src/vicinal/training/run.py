"""A run from its recipe to its end: training, evaluation, checkpoints, pictures, and going on after a stop."""

from __future__ import annotations

import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from vicinal.data.stream import Share, Stream
from vicinal.training.checkpoint import save_weights
from vicinal.training.journal import Journal, read_lines
from vicinal.training.loop import Trainer
from vicinal.training.recipe import Recipe
from vicinal.training.report import Outcome, Report, Silent
from vicinal.training.world import World, join, leave
from vicinal.training.written import to_plain

DRAWING_PAUSE = 20.0
"""Seconds between pictures; a short run draws them once, at its end."""


class Stopped(ValueError):
    """A run ended before its last step; the message says why and how to go on."""


class LostProcess(ValueError):
    """Another process of the run is gone."""


def train(recipe: Recipe, folder: str | Path, *, resume: bool = False, report: Report | None = None) -> Outcome:
    """Run a recipe in a folder, or go on with the run that is there.

    Under torchrun every process calls this; `vicinal.training.launch.train_on` starts them. Ctrl-C ends after the
    step and writes a checkpoint, a second one at once.
    """
    if recipe.loop.threads:
        torch.set_num_threads(recipe.loop.threads)
    world = join(recipe.loop.timeout_s)
    try:
        with _lost_processes(world, Journal(Path(folder))):
            return _Run(recipe, Path(folder), world, report or Silent()).go(resume)
    finally:
        leave(world)


class _Run:
    """The parts of a run while it goes on."""

    def __init__(self, recipe: Recipe, folder: Path, world: World, report: Report) -> None:
        self.recipe, self.world, self.report = recipe, world, report if world.is_first else Silent()
        self.loop, self.journal = recipe.loop, Journal(folder, recipe.loop.keep)
        train_set, test_set = recipe.data.open("train"), recipe.data.open("test")
        size, seed, workers = self.loop.batch_size, self.loop.seed, self.loop.workers
        share = Share(world.rank, world.processes, self.loop.accumulation)
        self.stream = Stream(train_set, recipe.train_steps, batch_size=size, seed=seed, share=share, workers=workers)
        alone = Share(world.rank, world.processes)
        self.test = Stream(test_set, recipe.test_steps, batch_size=size, seed=seed, share=alone, workers=workers)
        if not self.stream.steps_per_epoch:
            self.stream.training()  # says what is wrong
        torch.manual_seed(seed)
        self.info = train_set.info
        self.task = recipe.task.build(train_set.info)
        self.trainer = Trainer(recipe, self.task, world, self.stream.steps_per_epoch)
        self.best: dict[str, Any] = {}
        self.drawn = time.perf_counter()
        self.metrics: dict[str, float] = {}
        self.evaluation_steps = max(1, round(self.loop.evaluate_every * self.stream.steps_per_epoch))

    def go(self, resume: bool) -> Outcome:
        trainer, begin = self.trainer, time.perf_counter()
        step = self._open(resume)
        if step is None:
            if resume:
                self.report.say(
                    f"{self.journal.folder} has no checkpoint to go on from: the run begins at its beginning"
                )
            self.task.prepare(self.stream.training(0))
            trainer.restart_average()  # of what `prepare` left
        else:
            tensors = trainer.tensors()
            facts = self.journal.store.facts(step)
            self.journal.store.load(step, tensors, self.world)
            trainer.take_over(tensors, facts)
            self.best, self.metrics = facts["best"], facts["metrics"]
            if self.world.is_first and self.best:
                self.journal.store.mark_best(self.best["step"])  # a kill may have come between the two
        self.report.begin(trainer.total, trainer.step, self._facts())
        try:
            self._steps()
        finally:
            self.report.end()  # a bar that is left alone leaves a terminal without its cursor
        # also in a finished run that is resumed: its checkpoint is of before, and its weights are written again
        torch.manual_seed(self.loop.seed)
        with trainer.averaged():
            self.task.finish(self.stream.training(0))
        return self._outcome(time.perf_counter() - begin)

    def _steps(self) -> None:
        trainer = self.trainer
        pieces = self.stream.training(trainer.step)
        with stops(self.world) as asked:
            while trainer.step < trainer.total:
                is_saved = self._step(pieces)
                if asked.is_set() and trainer.step < trainer.total:
                    if not is_saved:
                        self._save(is_best=False)
                    raise Stopped(
                        f"stopped after step {trainer.step} of {trainer.total}, in good order; go on by --resume"
                    )

    def _open(self, resume: bool) -> int | None:
        """Every process takes the step that the first found, also where folders are shared late."""
        found: list[int | str | None] = [None]
        error: ValueError | None = None
        if self.world.is_first:
            try:
                found = [self.journal.open(to_plain(self.recipe), resume=resume)]
            except ValueError as refused:
                error, found = refused, [str(refused)]
        if self.world.mesh is not None:
            distributed.broadcast_object_list(found)
        if error is not None:
            raise error
        if isinstance(found[0], str):
            raise Stopped(found[0])
        return found[0]

    def _facts(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "folder": str(self.journal.folder),
            "processes": self.world.processes,
            "device": str(self.world.device),
            "parameters": sum(parameter.numel() for parameter in self.task.model.parameters()),
            "steps_per_epoch": self.stream.steps_per_epoch,
        }

    def _step(self, pieces: Iterator[Any]) -> bool:
        """A step and what is due after it; whether that was a checkpoint."""
        trainer, begin = self.trainer, time.perf_counter()
        losses, rate = trainer.take_step(list(itertools.islice(pieces, self.loop.accumulation)))
        step, is_last = trainer.step, trainer.step == trainer.total
        evaluates, saves = is_last or step % self.evaluation_steps == 0, step % self.loop.checkpoint_every == 0
        numbers = None
        if step % self.loop.log_every == 0 or evaluates or saves:
            numbers = self.world.mean(losses)
            self._check(numbers)
            line = {"step": step, "epoch": round(step / trainer.steps_per_epoch, 6), "split": "train", **numbers}
            speed = self.loop.batch_size / (time.perf_counter() - begin)
            self._write({**line, "learning_rate": rate, "images_per_second": round(speed, 1)})
        self.report.step(step, self.loop.batch_size, numbers)
        if evaluates:
            self._save(is_best=self._evaluate())
            self._draw(is_last)
        elif saves:
            self._save(is_best=False)
        return evaluates or saves

    def _check(self, numbers: dict[str, float]) -> None:
        odd = [name for name, value in numbers.items() if not math.isfinite(value)]
        if odd:
            steps = self.journal.store.steps()
            last = f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise Stopped(
                f"{odd[0]} is {numbers[odd[0]]} at step {self.trainer.step}; {last}. A lower learning rate, "
                "loop.clip_norm=1 or float32 usually helps"
            )

    def _evaluate(self) -> bool:
        """Measure; whether it is the best so far."""
        step = self.trainer.step
        self.metrics = self.trainer.evaluate(self.test)
        self._write(
            {"step": step, "epoch": round(step / self.stream.steps_per_epoch, 6), "split": "test", **self.metrics}
        )
        self.report.evaluated(step, self.metrics)
        name, more = self.task.best
        before = self.best.get(name)
        if before is None or (self.metrics[name] > before if more else self.metrics[name] < before):
            self.best = {"step": step, **self.metrics}
            return True
        return False

    def _save(self, *, is_best: bool) -> None:
        facts = {**self.trainer.facts(), "best": self.best, "metrics": self.metrics}
        self.journal.store.save(self.trainer.step, self.trainer.tensors(), facts, self.world, is_best=is_best)

    def _write(self, line: dict[str, Any]) -> None:
        if self.world.is_first:
            self.journal.write(line)

    def _draw(self, is_last: bool) -> None:
        """Curves and predictions, where the packages for them are here; at the end, and before it now and then.

        Several processes draw at the end alone: all have to run a sharded model at once, but have clocks of their own.
        """
        is_due = self.world.mesh is None and time.perf_counter() - self.drawn > DRAWING_PAUSE
        if not self.loop.pictures or not (is_last or is_due):
            return
        from vicinal.training import drawing

        with self.trainer.averaged():
            batch = next(self.test.evaluation())
            panels = self.task.draw(batch.to(self.world.device))[: drawing.PANELS]
        if not self.world.is_first:
            return
        try:
            drawing.save_panels(panels, self.journal.folder / "predictions.png")
            drawing.save_curves(read_lines(self.journal.metrics), self.journal.folder / "curves.png")
        except drawing.NothingToDrawWith as error:
            self.report.say(str(error))
        except OSError as error:  # a disk without room for a picture may have room for what matters
            self.report.say(f"{error.filename} could not be written: {error.strerror}")
        self.drawn = time.perf_counter()

    def _outcome(self, seconds: float) -> Outcome:
        weights = self.trainer.whole_weights()
        metadata = {"recipe": json.dumps(to_plain(self.recipe)), "info": json.dumps(to_plain(self.info))}
        if self.world.is_first:
            save_weights(self.journal.weights, weights, {**metadata, "metrics": json.dumps(self.metrics)})
        self.world.wait()
        return Outcome(
            self.journal.folder,
            self.trainer.step,
            self.metrics,
            self.best,
            seconds,
            self.journal.weights,
            self._facts(),
        )


@contextmanager
def stops(world: World) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second does what it always does. One process only."""
    asked = threading.Event()
    if world.mesh is not None or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNS = ("closed by peer", "Connection reset", "Timed out", "timed out", "Timeout", "Broken pipe", "ncclRemoteError")


@contextmanager
def _lost_processes(world: World, journal: Journal) -> Iterator[None]:
    """Turn the many ways in which torch notices a lost process into one sentence."""
    try:
        yield
    except RuntimeError as error:
        steps = journal.store.steps()
        last = f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
        if "DataLoader worker" in str(error):
            raise Stopped(
                f"a process that reads samples ahead was lost ({' '.join(str(error).split())}); {last}; go on by "
                "--resume, with fewer loop.workers if memory was short"
            ) from error
        if world.mesh is None or not any(sign in str(error) for sign in _SIGNS):
            raise
        raise LostProcess(
            f"process {world.rank} of {world.processes} lost another one ({str(error).splitlines()[0]}); {last}; "
            "go on by --resume"
        ) from error
