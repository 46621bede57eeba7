"""A run: every problem, every contender, gated, timed in turns, saved after each row."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from vicinal.measure import machine, memory
from vicinal.measure.gate import Gate
from vicinal.measure.peers import PEERS
from vicinal.measure.problems import Problem
from vicinal.measure.report import Entry, Report, Row
from vicinal.measure.task import NotRun, Prepared, Task
from vicinal.measure.timing import Timing, compare
from vicinal.ops import BackendRefused, attention

TRIAL_SHARE = 0.25
"""The part of a row's time in which a contender with several candidates (tiles, say) finds its best."""


class Progress(Protocol):
    """What hears how a run gets on."""

    def begin(self, title: str) -> None:
        """A row begins."""

    def doing(self, what: str) -> None:
        """What the row is at."""

    def end(self, row: Row) -> None:
        """A row is done."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure. `seconds` is what timing one row may take; preparing and checking come on top."""

    problems: tuple[Problem, ...]
    backends: tuple[str, ...] = ("cpu", "tiled")
    peers: tuple[str, ...] = tuple(PEERS)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    backwards: tuple[bool, ...] = (False, True)
    seconds: float = 6.0
    device: str = "cpu"
    has_memory: bool = False
    """Whether to measure peak memory too; a fresh process for each back end and halo variant of each row."""


def run(settings: Settings, path: pathlib.Path | None, progress: Progress) -> Report:
    """Measure everything in `settings`; with a `path`, what is known is written there after every row."""
    progress.doing("peaks of this machine")
    report = Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine.describe(settings.device),
        settings=_plain(settings),
        peaks=machine.peaks(settings.dtypes, settings.device),
    )
    for problem in settings.problems:
        for dtype in settings.dtypes:
            task = Task(problem, dtype, backward=any(settings.backwards), device=settings.device)
            progress.begin(_title(task))
            progress.doing("the right answer")
            gate = Gate(task)
            for backward in settings.backwards:
                this = task if backward else task.forward_only()
                progress.begin(_title(this))
                row = measure(this, gate, settings, report.peaks, progress)
                report.rows.append(row)
                report.settings["load_average"] = _load()
                if path is not None:
                    report.save(path)
                progress.end(row)
                gc.collect()
    return report


def measure(task: Task, gate: Gate, settings: Settings, peaks: dict[str, Any], progress: Progress) -> Row:
    """One row: prepare, check and time all contenders."""
    turned_away: dict[str, Entry] = {}
    ready: dict[str, Checked] = {}
    for name, make in contenders(settings.backends, settings.peers).items():
        progress.doing(name)
        is_ours = name in settings.backends
        try:
            found, reason = checked_candidates(task, gate, make)
        except NotRun as refusal:
            turned_away[name] = Entry(name, is_ours, reason=f"not run: {refusal}")
            continue
        if reason or not found:
            turned_away[name] = Entry(name, is_ours, reason=f"wrong: {reason}")
            continue
        ready[name] = fastest(task, found, settings.seconds * TRIAL_SHARE)
    progress.doing("timing")
    calls = {name: task.runner(checked.prepared) for name, checked in ready.items()}
    timings = compare(calls, seconds=settings.seconds, device=task.device)
    flops = task.problem.flops(backward=task.backward)
    dtype = str(task.dtype).removeprefix("torch.")
    gemm = peaks["gemm"][dtype]["gflops"] if peaks else None
    peak_mb = _peaks_of_memory(task, settings, list(ready), progress)
    entries = {
        name: _entry(name, name in settings.backends, ready[name], timing, flops, gemm, peak_mb.get(name))
        for name, timing in timings.items()
    }
    return Row(
        problem=task.problem.name,
        size=task.problem.size,
        dtype=dtype,
        direction=task.direction,
        flops=flops,
        entries=tuple({**entries, **turned_away}.values()),
        speedups={
            name: {other: round(timings[name].speedup_over(timings[other]), 3) for other in timings if other != name}
            for name in settings.backends
            if name in timings
        },
    )


def contenders(backends: Sequence[str], peers: Sequence[str]) -> dict[str, Callable[[Task], list[Prepared]]]:
    """Our back ends and the peers, by name; ours come first."""
    return {**{name: _ours(name) for name in backends}, **{name: PEERS[name] for name in peers}}


def _ours(backend: str) -> Callable[[Task], list[Prepared]]:
    def make(task: Task) -> list[Prepared]:
        pattern = task.problem.pattern

        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = attention(query, key, value, pattern, backend=backend)
            return out

        return [Prepared(call)]

    return make


@dataclasses.dataclass(frozen=True)
class Checked:
    """A candidate whose answer is right: its error as a share of what is allowed, and how long that answer took."""

    prepared: Prepared
    error: float
    seconds: float


def checked_candidates(task: Task, gate: Gate, make: Callable[[Task], list[Prepared]]) -> tuple[list[Checked], str]:
    """A contender's candidates that are right; and what is wrong with the last that is not."""
    right, reason = [], ""
    try:
        for prepared in make(task):
            begin = time.perf_counter()
            answer = task.answer(prepared)
            seconds = time.perf_counter() - begin
            verdict = gate.check(answer)
            if verdict.is_right:
                right.append(Checked(prepared, verdict.worst, seconds))
            else:
                reason = f"{prepared.detail} {verdict.reason}".strip()
    except BackendRefused as refusal:
        raise NotRun(str(refusal)) from refusal
    return right, reason


def fastest(task: Task, found: list[Checked], seconds: float) -> Checked:
    """The fastest of a contender's candidates: by its best round in a trial, or where calls are slow, by its check."""
    if sum(candidate.seconds for candidate in found) > max(10 * seconds, 10.0):
        return min(found, key=lambda candidate: candidate.seconds)
    if len(found) == 1:
        return found[0]
    calls = {str(number): task.runner(candidate.prepared) for number, candidate in enumerate(found)}
    trial = compare(calls, seconds=seconds, device=task.device)
    return found[int(min(trial, key=lambda number: trial[number].best_ms))]


def _entry(
    name: str,
    is_ours: bool,
    checked: Checked,
    timing: Timing,
    flops: int,
    gemm: float | None,
    peak_mb: float | None,
) -> Entry:
    gflops = flops / timing.median_ms / 1e6
    low, high = timing.quartiles_ms
    return Entry(
        name=name,
        is_ours=is_ours,
        detail=checked.prepared.detail,
        median_ms=round(timing.median_ms, 4),
        quartiles_ms=(round(low, 4), round(high, 4)),
        best_ms=round(timing.best_ms, 4),
        worst_ms=round(timing.worst_ms, 4),
        first_ms=None if timing.first_ms is None else round(timing.first_ms, 4),
        rounds=timing.rounds,
        gflops=round(gflops, 2),
        share_of_gemm=None if gemm is None else round(gflops / gemm, 4),
        error=round(checked.error, 3),
        peak_mb=peak_mb,
    )


def _peaks_of_memory(task: Task, settings: Settings, ready: list[str], progress: Progress) -> dict[str, float]:
    if not settings.has_memory:
        return {}
    found = {}
    for name in ready:
        if name in settings.backends or name.startswith("halo"):
            progress.doing(f"memory of {name}")
            peak = memory.peak(task.problem, name, dtype=task.dtype, backward=task.backward, device=settings.device)
            found[name] = round(peak.beyond / 1e6, 2)
    return found


def _plain(settings: Settings) -> dict[str, Any]:
    return {
        "backends": list(settings.backends),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in settings.dtypes],
        "seconds_per_row": settings.seconds,
        "device": settings.device,
        "garbage_collection": "off while timing",
        "load_average": _load(),
    }


def _load() -> float | None:
    """How busy the machine is besides: processes that ran or waited in the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _title(task: Task) -> str:
    return f"{task.problem.name} {str(task.dtype).removeprefix('torch.')} {task.direction}"
