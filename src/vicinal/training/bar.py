"""A live bar: loss, metric, images a second, time left. In a pipe it is a line at each evaluation instead."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WIDE = 10_000
"""Columns that a line in a pipe may take, so that nothing is broken into lines."""


class Bar:
    """Shows a run to a person, on standard error. A console is made where it is needed, so that a bar can be pickled.

    >>> bar = Bar()
    >>> bar.begin(10, 0, {"recipe": "digits", "parameters": 5, "processes": 1, "device": "cpu", "folder": "runs/a"})
    >>> bar.step(1, 128, {"loss": 2.3})
    >>> bar.end()
    """

    def __init__(self, metric: str = "accuracy") -> None:
        self.metric = metric
        self.console: Console | None = None
        self.progress: Progress | None = None
        self.smooth: float | None = None
        self.last = ""

    def begin(self, total: int, done: int, facts: dict[str, Any]) -> None:
        """A headline, and the bar."""
        self.console = _console()
        where = f"{facts['processes']} processes" if facts["processes"] > 1 else facts["device"]
        begun = f", going on after step {done}" if done else ""
        self.console.print(
            f"{facts['recipe']}: {facts['parameters']:,} parameters on {where}, in {facts['folder']}{begun}"
        )
        self.total, self.begun, self.images, self.done = total, time.perf_counter(), 0, done
        if self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console, refresh_per_second=4)
            self.progress.start()
            self.task = self.progress.add_task("training", total=total, completed=done, words="")

    def step(self, step: int, images: int, losses: dict[str, float] | None) -> None:
        """Move the bar."""
        self.images += images
        self.done = step
        if losses:
            loss = sum(losses.values())
            self.smooth = loss if self.smooth is None else 0.8 * self.smooth + 0.2 * loss
        if self.progress is not None:
            self.progress.update(self.task, completed=step, words=self._words())

    def _words(self) -> str:
        speed = self.images / max(time.perf_counter() - self.begun, 1e-9)
        loss = "" if self.smooth is None else f"loss {self.smooth:.3f}  "
        return f"{loss}{self.last}{speed:,.0f} images/s"

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The metric, on the bar or as a line."""
        name = self.metric if self.metric in metrics else next(iter(metrics), "")
        self.last = f"{name} {metrics[name]:.2%}  " if name else ""
        if self.progress is None and self.console is not None:
            self.console.print(f"step {step}/{self.total}: {self._words()}, {self._left()} left")
        elif self.progress is not None:
            self.progress.update(self.task, words=self._words())

    def _left(self) -> str:
        seconds = (time.perf_counter() - self.begun) / max(self.images, 1)
        left = seconds * (self.total - self.done) * (self.images / max(self.done, 1))
        return f"{left // 60:.0f}:{left % 60:02.0f}"

    def say(self, text: str) -> None:
        """A line."""
        (self.console or _console()).print(text)

    def end(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()


def _console() -> Console:
    made = Console(stderr=True, highlight=False, emoji=False, markup=False)
    if not made.is_terminal:
        made = Console(stderr=True, highlight=False, emoji=False, markup=False, width=WIDE)
    return made


class JsonLines:
    """Tells a program: every message is a line of JSON on standard output."""

    def begin(self, total: int, done: int, facts: dict[str, Any]) -> None:
        """A line."""
        self._line("begin", total=total, done=done, **facts)

    def step(self, step: int, images: int, losses: dict[str, float] | None) -> None:
        """A line, where losses were read."""
        if losses is not None:
            self._line("step", step=step, **losses)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """A line."""
        self._line("evaluated", step=step, **metrics)

    def say(self, text: str) -> None:
        """A line."""
        self._line("note", text=text)

    def end(self) -> None:
        """Nothing; the command writes the outcome."""

    def _line(self, kind: str, **content: Any) -> None:
        print(json.dumps({"event": kind, **content}), file=sys.stdout, flush=True)
