"""Local attention against what a few lines of torch do without it: dense attention with a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from vicinal.measure import Timing, compare
from vicinal.measure.gate import Gate
from vicinal.measure.peers.dense import sdpa_mask
from vicinal.measure.problems import Problem, find
from vicinal.measure.task import Prepared, Task
from vicinal.ops import attention
from vicinal.pattern import Near

PROBLEMS: tuple[tuple[str, Problem], ...] = (
    ("NAT, first level", find(["nat-56x56"])[0]),
    ("DiNAT, first level", find(["dinat-56x56"])[0]),
    ("NAT, second level", find(["nat-28x28"])[0]),
    ("Swin, shifted windows", find(["swin-7x7-shifted"])[0]),
    ("a sequence", Problem("seq-4096", (Near(127),), (4096,), 4, 32)),
)
"""What is measured, each under a name that says where such a call occurs."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Both sides of one race, in one run; `reason` says why there are no times, where an answer was wrong."""

    title: str
    problem: Problem
    direction: str
    ours: Timing | None = None
    dense: Timing | None = None
    reason: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times faster we are, by pairs of calls that took turns."""
        return None if self.ours is None or self.dense is None else self.ours.speedup_over(self.dense)


def race(
    problems: Sequence[tuple[str, Problem]] = PROBLEMS,
    *,
    seconds: float = 1.5,
    begin: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Time our attention and torch's dense masked one, forward and with the backward, about `seconds` each."""
    results = []
    for title, problem in problems:
        for backward in (False, True):
            task = Task(problem, torch.float32, backward=backward)
            begin(f"timing {problem.name} {task.direction}")
            results.append(_run(title, task, seconds))
    return results


def _run(title: str, task: Task, seconds: float) -> Result:
    """Check both answers against the definition, then time both; a wrong answer gets no time."""

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attention(query, key, value, task.problem.pattern)
        return out

    [dense] = sdpa_mask(task)
    sides = {"vicinal": Prepared(ours), "dense": dense}
    gate = Gate(task)
    for name, side in sides.items():
        verdict = gate.check(task.answer(side))
        if not verdict.is_right:
            return Result(title, task.problem, task.direction, reason=f"{name} is wrong: {verdict.reason}")
    timings = compare({name: task.runner(side) for name, side in sides.items()}, seconds=seconds)
    return Result(title, task.problem, task.direction, timings["vicinal"], timings["dense"])
