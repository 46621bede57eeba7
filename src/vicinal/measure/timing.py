"""How long calls take: several at once, in rounds that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

SLICE_SECONDS = 0.05
"""A call that is shorter than this is repeated within its turn; the turn's result is the median of the repeats.

A turn must be long enough for the median to be a call's own: the first ones find the caches full of what the contender
before has left there, and for calls on tens of megabytes that takes several calls to wear off.
"""

LEAST_ROUNDS, MOST_ROUNDS = 3, 40
FEW_ROUNDS = 8
"""Turns are shortened where fewer rounds than this would fit."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call: one sample for each round the call took part in, and what its first call there took.

    >>> timing = Timing({0: 2.0, 1: 3.0, 2: 10.0})
    >>> timing.median_ms, timing.best_ms, timing.rounds
    (3.0, 2.0, 3)
    """

    samples_ms: Mapping[int, float]
    """Round number -> milliseconds per call in that round."""

    firsts_ms: tuple[float, ...] = ()
    """The first call of each round, with the caches full of somebody else's data."""

    def figures(self) -> dict[str, Any]:
        """Median, quartiles and rounds as a result file holds them.

        >>> Timing({0: 2.0, 1: 3.0, 2: 10.0}).figures()
        {'median_ms': 3.0, 'quartiles_ms': [2.0, 10.0], 'rounds': 3}
        """
        quartiles = [round(value, 2) for value in self.quartiles_ms]
        return {"median_ms": round(self.median_ms, 2), "quartiles_ms": quartiles, "rounds": self.rounds}

    @property
    def rounds(self) -> int:
        """In how many rounds it was timed."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples_ms.values())

    @property
    def first_ms(self) -> float | None:
        """The median over the rounds' first calls."""
        return statistics.median(self.firsts_ms) if self.firsts_ms else None

    @property
    def best_ms(self) -> float:
        """The fastest round."""
        return min(self.samples_ms.values())

    @property
    def worst_ms(self) -> float:
        """The slowest round."""
        return max(self.samples_ms.values())

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile, or the extremes where there are too few rounds for quartiles."""
        if self.rounds < 4:
            return self.best_ms, self.worst_ms
        low, _, high = statistics.quantiles(self.samples_ms.values(), n=4, method="inclusive")
        return low, high

    def speedup_over(self, other: Timing) -> float:
        """How many times faster than `other` it was: the median over the rounds both took part in.

        Rounds are compared pair by pair, because what else the machine does changes from one to the next.

        >>> Timing({0: 1.0, 1: 3.0}).speedup_over(Timing({0: 2.0, 1: 6.0, 2: 50.0}))
        2.0
        """
        shared = self.samples_ms.keys() & other.samples_ms.keys()
        if not shared:
            return other.median_ms / self.median_ms
        return statistics.median(other.samples_ms[number] / self.samples_ms[number] for number in shared)


def compare(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 3.0,
    rounds: int | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time some calls against each other, in about `seconds` altogether.

    In every round each call has its turn: A B C, A B C, ... Fast calls take part in every round; slow ones in as many
    as their share of the time allows, spread evenly. What a call returns is dropped at once, so a fresh output is
    paid for in each. `progress(done, all)` is told after each round.

    >>> matrix = torch.ones(64, 64)
    >>> timings = compare({"add": lambda: matrix + 1, "product": lambda: matrix @ matrix}, seconds=0.05)
    >>> sorted(timings), timings["add"].median_ms > 0
    (['add', 'product'], True)
    """
    if not calls:
        return {}
    clock = _Clock(torch.device(device))
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of one call would be charged to it
    try:
        first = {name: _warm_up(call, clock) for name, call in calls.items()}
        turn = SLICE_SECONDS if rounds is not None else min(SLICE_SECONDS, seconds / (FEW_ROUNDS * len(calls)))
        repeats = {name: max(1, math.ceil(turn / max(took, 1e-6))) for name, took in first.items()}
        turns = {name: repeats[name] * took for name, took in first.items()}
        takes = _shares(turns, seconds) if rounds is None else dict.fromkeys(calls, rounds)
        total = max(takes.values())
        samples: dict[str, dict[int, float]] = {name: {} for name in calls}
        firsts: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(total):
            for name, call in calls.items():
                if number * takes[name] // total != (number + 1) * takes[name] // total:
                    times = [clock.seconds(call) for _ in range(repeats[name])]
                    samples[name][number] = 1e3 * statistics.median(times)
                    firsts[name].append(1e3 * times[0])
            if progress is not None:
                progress(number + 1, total)
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(rounds_of, tuple(firsts[name])) for name, rounds_of in samples.items()}


def _warm_up(call: Callable[[], Any], clock: _Clock) -> float:
    """Call until it is warm, but not for long; the time of the fastest call."""
    times = [clock.seconds(call)]
    while len(times) < 5 and sum(times) < 0.25:
        times.append(clock.seconds(call))
    return min(times)


def _shares(turns: Mapping[str, float], seconds: float) -> dict[str, int]:
    """In how many rounds each call takes part, so that all turns together take about `seconds`.

    >>> _shares({"fast": 0.01, "slow": 1.0}, 4.0)
    {'fast': 40, 'slow': 3}
    """
    left, takes = seconds, {}
    for place, (name, turn) in enumerate(sorted(turns.items(), key=lambda item: item[1])):
        share = left / (len(turns) - place)
        least = LEAST_ROUNDS if turn * LEAST_ROUNDS < 2 * seconds else 1
        takes[name] = max(least, min(MOST_ROUNDS, int(share / turn)))
        left = max(0.0, left - takes[name] * turn)
    return takes


class _Clock:
    """Seconds of one call: wall time on a CPU, events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            return self._on_gpu(call)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def _on_gpu(self, call: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            begin.record()
            call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3
