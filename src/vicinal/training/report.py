"""What a run tells while it runs, to whoever listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the metrics of the last and of the best evaluation, and what it took.

    `seconds` are those of training and evaluation since this process began or went on.
    """

    folder: Path
    step: int
    metrics: dict[str, float]
    best: dict[str, Any]
    seconds: float
    weights: Path
    facts: dict[str, Any] = field(default_factory=dict)


class Report(Protocol):
    """A listener. Only the first process reports."""

    def begin(self, total: int, done: int, facts: dict[str, Any]) -> None:
        """Training begins, or goes on after `done` of `total` steps."""

    def step(self, step: int, images: int, losses: dict[str, float] | None) -> None:
        """A step over so many images is done; losses where they were read."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation is done."""

    def say(self, text: str) -> None:
        """Something a person should know."""

    def end(self) -> None:
        """No more steps."""


class Silent:
    """Tells nobody."""

    def begin(self, total: int, done: int, facts: dict[str, Any]) -> None:
        """Nothing."""

    def step(self, step: int, images: int, losses: dict[str, float] | None) -> None:
        """Nothing."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
