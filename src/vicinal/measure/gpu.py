"""`make bench-gpu`: our kernels and everybody else's on one GPU, beside what the FLOPs and the tiles promise."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vicinal.measure import machine, report, sources
from vicinal.measure.bench import Checked, checked_candidates, contenders, fastest
from vicinal.measure.gate import Gate
from vicinal.measure.peers.gpu import DENSE, SPARSE, Maker, dense_of
from vicinal.measure.problems import Problem
from vicinal.measure.task import NotRun, Prepared, Task
from vicinal.measure.timing import Timing, compare
from vicinal.ops import simulate
from vicinal.ops.backend import known
from vicinal.ops.engines.block_mask import chosen_orders
from vicinal.pattern import bounds
from vicinal.pattern.counting import attention_flops

OURS, SPARSE_PEER, DENSE_PEER = "ours", "peer", "dense"
LONGEST_SECONDS = 20.0
"""Dense attention that would take longer is not run."""


class NoGpu(RuntimeError):
    """There is no GPU that torch can use; the message says so."""


class GpuLost(RuntimeError):
    """A kernel went wrong so badly that this process can do nothing more on the GPU."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure. `backends` are ours; each whose name is in `dense` also runs dense attention.

    With `minutes` no row is begun that would end later, if it took as long as the longest one before it.
    """

    problems: tuple[Problem, ...]
    backends: tuple[str, ...] = ("triton", "flex")
    dense: tuple[str, ...] = ("triton",)
    sparse_peers: Mapping[str, Maker] = dataclasses.field(default_factory=lambda: dict(SPARSE))
    dense_peers: Mapping[str, Maker] = dataclasses.field(default_factory=lambda: dict(DENSE))
    dtype: torch.dtype = torch.bfloat16
    backwards: tuple[bool, ...] = (False, True)
    seconds: float = 2.0
    device: str = "cuda"
    minutes: float | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contender in one row: its figures, or the reason why it has none.

    `tflops` counts what the definition asks for: the pattern's own pairs, or all pairs for dense attention.
    `over_dense` is the speed-up over the fastest dense kernel of torch's, `over_own_dense` that over dense attention
    by the same back end, and `share_of_bound` that as a share of the modelled bound.
    """

    name: str
    role: str
    detail: str = ""
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    best_ms: float | None = None
    rounds: int = 0
    tflops: float | None = None
    over_dense: float | None = None
    over_own_dense: float | None = None
    share_of_bound: float | None = None
    error: float | None = None
    peak_mb: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a problem can gain over dense attention: by its FLOPs, and on a kernel that works in tiles of these sides.

    Dense attention is taken without any waste here. Kernels of smaller tiles may gain more on small windows.
    """

    flops: float
    worst_tile: float
    mean_of_tiles: float
    is_block_sparse: bool
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem in one direction."""

    problem: str
    size: str
    dtype: str
    direction: str
    flops: int
    dense_flops: int
    bounds: Bounds
    entries: tuple[Entry, ...]

    def entry(self, name: str) -> Entry | None:
        """The contender of that name, if it was timed."""
        return next((entry for entry in self.entries if entry.name == name and entry.median_ms is not None), None)


def modelled(problem: Problem) -> Bounds:
    """The bounds of a problem on the tiles of 128 queries by 128 keys that visit the fewest pairs.

    >>> from vicinal.measure.gpu_problems import find_gpu
    >>> found = modelled(find_gpu(("flux-4k-s16",))[0])
    >>> round(found.flops, 2), round(found.mean_of_tiles, 2), found.is_block_sparse
    (10.24, 10.24, True)
    """
    table = bounds(problem.pattern, problem.grid)
    queries, keys = chosen_orders(table.groups[0].members[0])
    found = simulate(table, query_tile=queries.tile, key_tile=keys.tile, heads=problem.heads)
    # the simulator cuts dense attention into the same tiles, which its own kernels need not fill up
    filled = math.prod(math.ceil(n / tile) * tile / n for n, tile in zip(problem.grid, queries.tile, strict=True))
    filled *= math.prod(math.ceil(n / tile) * tile / n for n, tile in zip(problem.grid, keys.tile, strict=True))
    return Bounds(
        flops=round(found.flop_bound, 3),
        worst_tile=round(found.attention_bound / filled, 3),
        mean_of_tiles=round(found.mean_bound / filled, 3),
        is_block_sparse=found.is_block_sparse,
        query_tile=found.query_tile,
        key_tile=found.key_tile,
    )


def check_device(device: str) -> None:
    """Raise `NoGpu` where torch has no such device."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise NoGpu("this benchmark needs a GPU that torch can use (CUDA or ROCm), and there is none here")


def run(
    settings: Settings, path: pathlib.Path | None, say: Callable[[str], None], *, resume: bool = False
) -> dict[str, Any]:
    """Measure everything in `settings`; with a `path`, what is known is written there after every row.

    With `resume`, rows that the file at `path` has of the same GPU, torch and kernels are kept, not measured again.
    """
    check_device(settings.device)
    limit = _Limit(settings.minutes)
    found: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(settings.device),
        "kernels": sources.digest("ops/triton"),
        "settings": _plain(settings),
        "peaks": machine.peaks([settings.dtype], settings.device),
        "rows": [],
    }
    if resume and path is not None and path.exists():
        found["rows"] = _kept(json.loads(path.read_text()), found)
    done = {(row["problem"], row["dtype"], row["direction"]) for row in found["rows"]}
    dtype = str(settings.dtype).removeprefix("torch.")
    wanted = {
        problem: [
            backward for backward in settings.backwards if (problem.name, dtype, _direction(backward)) not in done
        ]
        for problem in settings.problems
    }
    left = sum(map(len, wanted.values()))
    for problem, backwards in wanted.items():
        if not backwards or not limit.allows():
            continue
        task = Task(problem, settings.dtype, backward=any(backwards), device=settings.device)
        gate = Gate(task)
        for backward in backwards:
            if not limit.allows():
                break
            row = measure(task if backward else task.forward_only(), gate, settings, say)
            found["rows"].append(json.loads(json.dumps(dataclasses.asdict(row))))
            if path is not None:
                report.write(found, path)
            say(summary(row))
            limit.note()
            left -= 1
            lost = _lost(settings.device)
            if lost:
                raise GpuLost(
                    f"the GPU is lost to this process ({lost}): run it again with --resume for {left} more rows"
                )
        del task, gate
        _release(settings.device)
    if left:
        say(f"out of time with {left} rows left: run it again with --resume")
    return found


class _Limit:
    """The time that a run may take, and the longest row so far."""

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.last, self.longest = time.monotonic(), 0.0

    def allows(self) -> bool:
        """Whether a row as long as the longest would end in time."""
        return time.monotonic() + self.longest < self.end

    def note(self) -> None:
        """A row has ended."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now


def _lost(device: str) -> str | None:
    """What a kernel did to the GPU, where this process can no longer use it."""
    if torch.device(device).type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _direction(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def _kept(before: dict[str, Any], here: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run on the same GPU with the same torch and the same kernels of ours."""
    same = all(before["machine"].get(name) == here["machine"].get(name) for name in ("gpu", "torch"))
    return list(before["rows"]) if same and before.get("kernels") == here["kernels"] else []


def _plain(settings: Settings) -> dict[str, Any]:
    return {
        "backends": list(settings.backends),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "seconds_per_row": settings.seconds,
        "device": settings.device,
        "time": "from Python, by events on the device; tensors in the layout each likes",
    }


def measure(task: Task, gate: Gate, settings: Settings, say: Callable[[str], None]) -> Row:
    """One row: prepare, check and time all contenders."""
    problem = task.problem
    pairs = problem.batch * problem.heads * problem.tokens**2
    dense_flops = attention_flops(pairs, problem.head_dim, problem.head_dim)
    if task.backward:
        dense_flops += attention_flops(pairs, problem.head_dim, problem.head_dim, backward=True)
    turned_away: dict[str, Entry] = {}
    ready: dict[str, Checked] = {}
    roles: dict[str, str] = {}
    everyone = _everyone(settings)
    for name, role, make in everyone:
        say(f"  {problem.name} {task.direction}: {name}")
        roles[name] = role
        found, reason = _ready(task, gate, make, role, dense_flops)
        if found is None:
            turned_away[name] = Entry(name, role, reason=reason)
            if reason.startswith("failed") and _lost(settings.device):
                left_over = "not run: the GPU was lost before"
                turned_away = {other: Entry(other, kind, reason=left_over) for other, kind, _ in everyone} | turned_away
                ready = {}
                break
        else:
            ready[name] = found
        _release(settings.device)
    peaks = {name: _peak_mb(task, checked.prepared) for name, checked in ready.items()}
    calls = {name: task.runner(checked.prepared) for name, checked in ready.items()}
    timings = compare(calls, seconds=settings.seconds, device=task.device)
    flops, model = problem.flops(backward=task.backward), modelled(problem)
    entries = {
        name: _entry(name, roles[name], ready[name], timings, roles, (flops, dense_flops), model, peaks[name])
        for name in timings
    }
    order = [*entries.values(), *turned_away.values()]
    dtype = str(task.dtype).removeprefix("torch.")
    return Row(problem.name, problem.size, dtype, task.direction, flops, dense_flops, model, tuple(order))


def _everyone(settings: Settings) -> list[tuple[str, str, Maker]]:
    """Names, roles and makers; ours first."""
    ours = [(name, OURS, make) for name, make in contenders(settings.backends, ()).items()]
    own_dense = [(f"dense_{name}", DENSE_PEER, dense_of(name)) for name in settings.dense]
    peers = [(name, SPARSE_PEER, make) for name, make in settings.sparse_peers.items()]
    dense = [(name, DENSE_PEER, make) for name, make in settings.dense_peers.items()]
    return [*ours, *own_dense, *peers, *dense]


def _ready(task: Task, gate: Gate, make: Maker, role: str, dense_flops: int) -> tuple[Checked | None, str]:
    """A contender that runs and is right, or why it has no figures."""
    try:
        if role == DENSE_PEER:
            return _dense_ready(task, make, dense_flops), ""
        found, reason = checked_candidates(task, gate, make)
    except NotRun as refusal:
        return None, f"not run: {refusal}"
    except Exception as error:  # noqa: BLE001 - Triton's own errors have no common base; one failure must not end the run
        return None, f"failed: {type(error).__name__}: {_first_line(error)}"
    if reason or not found:
        return None, f"wrong: {reason}"
    return fastest(task, found, 0.5), ""


def _dense_ready(task: Task, make: Maker, dense_flops: int) -> Checked:
    """Dense attention, which answers another question than the gate's: only that it runs is checked."""
    rate = 4e14 if task.device.type == "cuda" else 2e10
    if dense_flops / rate > LONGEST_SECONDS:
        raise NotRun(f"dense attention would take about {dense_flops / rate:.0f} s")
    (prepared,) = make(task)
    answer = task.answer(prepared)
    if not all(bool(part.isfinite().all()) for part in answer):
        raise NotRun("its answer is not finite")
    return Checked(prepared, 0.0, 0.0)


def _entry(
    name: str,
    role: str,
    checked: Checked,
    timings: Mapping[str, Timing],
    roles: Mapping[str, str],
    work: tuple[int, int],
    model: Bounds,
    peak_mb: float | None,
) -> Entry:
    timing = timings[name]
    flops, dense_flops = work
    torch_dense = [other for other in timings if roles[other] == DENSE_PEER and not other.startswith("dense_")]
    over_dense = min((timing.speedup_over(timings[other]) for other in torch_dense), default=None)
    own = timings.get(f"dense_{name}")
    over_own = None if own is None else timing.speedup_over(own)
    low, high = timing.quartiles_ms
    return Entry(
        name=name,
        role=role,
        detail=checked.prepared.detail,
        median_ms=round(timing.median_ms, 4),
        quartiles_ms=(round(low, 4), round(high, 4)),
        best_ms=round(timing.best_ms, 4),
        rounds=timing.rounds,
        tflops=round((dense_flops if role == DENSE_PEER else flops) / timing.median_ms / 1e9, 2),
        over_dense=None if over_dense is None else round(over_dense, 3),
        over_own_dense=None if over_own is None else round(over_own, 3),
        share_of_bound=None if over_own is None else round(over_own / model.mean_of_tiles, 3),
        error=None if role == DENSE_PEER else round(checked.error, 3),
        peak_mb=peak_mb,
    )


def _peak_mb(task: Task, prepared: Prepared) -> float | None:
    """Memory beyond inputs and results at its worst, by torch's account; None where the device keeps none."""
    if task.device.type != "cuda":
        return None
    runner = task.runner(prepared)
    _release(task.device.type)
    torch.cuda.reset_peak_memory_stats(task.device)
    before = torch.cuda.memory_allocated(task.device)
    results = runner()
    torch.cuda.synchronize(task.device)
    used = torch.cuda.max_memory_allocated(task.device) - before
    return round(max(0, used - sum(tensor.nbytes for tensor in results)) / 1e6, 2)


def _release(device: str) -> None:
    """Give a GPU's memory back, for which contenders that are gone must be gone from Python too."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def summary(row: Row) -> str:
    """A row in one line: times, speed-ups over dense, and the bounds beside them."""
    parts = []
    for entry in row.entries:
        if entry.median_ms is None:
            if entry.role == OURS:
                parts.append(f"{entry.name} {entry.reason}")
            continue
        over = "" if entry.role == DENSE_PEER else f" {report.times(entry.over_dense)}"
        parts.append(f"{entry.name} {report.milliseconds(entry.median_ms)} ms{over}")
    bound = f"bounds {row.bounds.flops:.2f}x FLOPs, {row.bounds.mean_of_tiles:.2f}x tiles"
    return f"{row.problem} {row.direction}: {', '.join(parts)}; {bound}"


def failures(found: Mapping[str, Any]) -> list[str]:
    """Our own contenders that were wrong or failed."""
    return [
        f"{entry['name']} on {row['problem']} {row['direction']}: {entry['reason']}"
        for row in found["rows"]
        for entry in row["entries"]
        if entry["role"] == OURS and entry["reason"].startswith(("wrong", "failed"))
    ]


def table(found: Mapping[str, Any], direction: str) -> list[list[str]]:
    """The rows of one direction as cells, the heading first."""
    rows = [row for row in found["rows"] if row["direction"] == direction]
    names = list(dict.fromkeys(entry["name"] for row in rows for entry in row["entries"] if entry["median_ms"]))
    cells = [["problem", "FLOP bound", "tile bound", *(f"{name} ms (x dense)" for name in names)]]
    for row in rows:
        entries = {entry["name"]: entry for entry in row["entries"]}
        line = [row["problem"], f"{row['bounds']['flops']:.2f}x", f"{row['bounds']['mean_of_tiles']:.2f}x"]
        for name in names:
            line.append(_cell(entries.get(name)))
        cells.append(line)
    return cells


def _cell(entry: Mapping[str, Any] | None) -> str:
    """One contender's time and speed-up over dense."""
    if entry is None or entry["median_ms"] is None:
        return "-"
    return f"{report.milliseconds(entry['median_ms'])} ({report.times(entry['over_dense'])})"


def available(backends: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some back ends that this version has.

    >>> available(("tiled", "flex"))
    ('tiled', 'flex')
    """
    return tuple(name for name in backends if name in known(with_engines=True))
