"""How cost grows: time and peak memory of one back end against tokens, window, heads and batch."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vicinal.measure import machine, memory
from vicinal.measure.bench import contenders
from vicinal.measure.problems import Problem
from vicinal.measure.report import percent
from vicinal.measure.task import Task
from vicinal.measure.timing import compare
from vicinal.pattern import Near, count


def _map(side: int = 64, kernel_size: int = 7, heads: int = 4, batch: int = 1) -> Problem:
    name = f"map-{side}x{side}-k{kernel_size}-h{heads}-b{batch}"
    return Problem(name, (Near(kernel_size), Near(kernel_size)), (side, side), heads, 32, batch)


CURVES: dict[str, tuple[Problem, ...]] = {
    "tokens": tuple(_map(side=side) for side in (32, 48, 64, 96, 128, 192, 256)),
    "window": tuple(_map(side=96, kernel_size=size) for size in (3, 5, 7, 9, 11, 13, 17, 21, 25)),
    "heads": tuple(_map(heads=heads) for heads in (1, 2, 4, 6, 8, 12, 16)),
    "batch": tuple(_map(batch=batch) for batch in (1, 2, 4, 6, 8, 12, 16)),
}
"""What is varied -> the problems along it, all else equal."""

_SIZES: dict[str, Callable[[Problem], int]] = {
    "tokens": lambda problem: problem.tokens,
    "window": lambda problem: count(problem.pattern, problem.grid) // problem.tokens,
    "heads": lambda problem: problem.heads,
    "batch": lambda problem: problem.batch,
}
"""What stands along a curve's horizontal axis; for the window its keys per query."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One problem of a curve."""

    size: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    peak_mb: float


def line(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """The straight line through some costs: `fixed + each * size`, and the share of the variation it explains.

    >>> {name: round(value, 6) for name, value in line([1, 2, 4], [5.0, 7.0, 11.0]).items()}
    {'fixed': 3.0, 'each': 2.0, 'explains': 1.0}
    """
    each, fixed = np.polyfit(sizes, costs, 1)
    left = np.square(np.asarray(costs) - fixed - each * np.asarray(sizes)).sum()
    spread = np.square(np.asarray(costs) - np.mean(costs)).sum()
    return {"fixed": float(fixed), "each": float(each), "explains": float(1 - left / spread) if spread else 1.0}


def measure(
    backend: str, *, backward: bool, seconds: float, device: str = "cpu", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """All curves of a back end, as plain values. `seconds` is what timing one curve may take."""
    curves: dict[str, Any] = {}
    for name, problems in CURVES.items():
        tasks = {problem.name: Task(problem, torch.float32, backward=backward, device=device) for problem in problems}
        make = contenders((backend,), ())[backend]
        timings = compare(
            {key: task.runner(make(task)[0]) for key, task in tasks.items()}, seconds=seconds, device=device
        )
        points = []
        for problem in problems:
            peak = memory.peak(problem, backend, backward=backward, device=device)
            timing = timings[problem.name]
            total = (peak.beyond + peak.inputs + peak.results) / 1e6
            points.append(Point(_SIZES[name](problem), timing.median_ms, timing.quartiles_ms, round(total, 3)))
        sizes = [float(point.size) for point in points]
        curves[name] = {
            "points": [dataclasses.asdict(point) for point in points],
            "time": line(sizes, [point.median_ms for point in points]),
            "memory": line(sizes, [point.peak_mb for point in points]),
        }
        time, space = curves[name]["time"]["explains"], curves[name]["memory"]["explains"]
        say(f"{name}: a straight line explains {percent(time)} of how time varies, {percent(space)} of memory")
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "backend": backend,
        "direction": "forward+backward" if backward else "forward",
        "curves": curves,
    }


def save(found: dict[str, Any], path: pathlib.Path) -> None:
    """Write the curves as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the curves, time above and memory below, each with its straight line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = found["curves"]
    figure, axes = plt.subplots(2, len(curves), figsize=(3.2 * len(curves), 6), squeeze=False, layout="constrained")
    rows = (("time", "median_ms", "milliseconds"), ("memory", "peak_mb", "MB with inputs"))
    for column, (name, curve) in enumerate(curves.items()):
        sizes = np.array([0, *(point["size"] for point in curve["points"])])
        for row, (what, key, label) in enumerate(rows):
            axis, fit = axes[row][column], curve[what]
            axis.plot(sizes, fit["fixed"] + fit["each"] * sizes, "--", color="gray", linewidth=1)
            axis.plot(sizes[1:], [point[key] for point in curve["points"]], "o", markersize=4)
            axis.set_title(f"{what} against {name}: {percent(fit['explains'])} straight", fontsize=9)
            axis.set_xlabel("keys per query" if name == "window" else name)
            axis.set_ylim(bottom=0)
            if not column:
                axis.set_ylabel(label)
    figure.suptitle(f"{found['backend']}, {found['direction']}, float32, threads: {found['machine']['threads']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
