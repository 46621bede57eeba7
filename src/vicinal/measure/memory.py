"""Peak memory of one call, measured in a fresh process, beyond its inputs and what it returns."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import pathlib
import pickle
import subprocess
import sys

import torch

from vicinal.measure.problems import Problem
from vicinal.pattern import Near

_STATUS, _CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
_CHILD = "from vicinal.measure.memory import child; child()"


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes: what the call needed at its worst `beyond` inputs and results, and what these take."""

    beyond: int
    inputs: int
    results: int


@dataclasses.dataclass(frozen=True)
class _Job:
    problem: Problem
    contender: str
    dtype: torch.dtype
    backward: bool
    device: str
    threads: int


def peak(
    problem: Problem,
    contender: str = "tiled",
    *,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    device: str = "cpu",
) -> Peak:
    """Peak memory of one call of a back end or peer, beyond inputs and results.

    A fresh process runs the call once on a tiny problem, so that libraries and thread stacks are not charged to
    it, then once on this one. With the backward, gradients count as results.
    """
    job = _Job(problem, contender, dtype, backward, device, torch.get_num_threads())
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD], input=pickle.dumps(job), capture_output=True, check=False, env=os.environ
    )
    if ran.returncode:
        last = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"measuring the memory of {contender} on {problem.name} failed: {' '.join(last)}")
    return Peak(*map(int, ran.stdout.split()))


def child() -> None:
    """What the fresh process does: reads a job, prints the three numbers of its `Peak`."""
    job = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(job.threads)
    print(*dataclasses.astuple(_measured(job)))


def _measured(job: _Job) -> Peak:
    from vicinal.measure.bench import contenders
    from vicinal.measure.peers import PEERS
    from vicinal.measure.task import NotRun, Task

    backends = () if job.contender in PEERS else (job.contender,)
    make = contenders(backends, tuple(PEERS))[job.contender]
    tiny = Task(_tiny(job.problem), job.dtype, backward=job.backward, device=job.device)
    with contextlib.suppress(NotRun):  # not a peer for neighborhoods; then libraries are charged to it
        tiny.runner(make(tiny)[0])()
    task = Task(job.problem, job.dtype, backward=job.backward, device=job.device)
    runner = task.runner(make(task)[0])
    meter = _GpuMeter(task.device) if task.device.type == "cuda" else HostMeter()
    results = runner()
    used = meter.peak()
    size = sum(tensor.nbytes for tensor in results)
    return Peak(max(0, used - size), 3 * task.query.nbytes, size)


def _tiny(problem: Problem) -> Problem:
    """A problem of the same rank that every general contender takes."""
    grid = {1: (256,), 2: (16, 16), 3: (4, 8, 8)}[len(problem.grid)]
    return Problem("tiny", (Near(3),) * len(grid), grid, problem.heads, problem.head_dim)


class HostMeter:
    """The highest memory of this process since the meter was made, beyond what it had then, in bytes."""

    def __init__(self) -> None:
        gc.collect()
        if sys.platform == "linux":
            with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would be used unseen
        self.resets = self._reset()
        self.before = _status("VmRSS") if self.resets else _highest()

    @staticmethod
    def _reset() -> bool:
        """Set the system's high-water mark back to now; not every system can."""
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return True

    def peak(self) -> int:
        return (_status("VmHWM") if self.resets else _highest()) - self.before


def _status(name: str) -> int:
    """An entry of Linux's account of this process, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {name}")


def _highest() -> int:
    """The highest memory of this process in its life, in bytes."""
    import resource  # not on Windows, which is why it is imported here

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


class _GpuMeter:
    """The same on a GPU, by torch's own account of its allocations."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before
