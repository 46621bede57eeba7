"""The command: `python -m vicinal.measure [problems ...]`, `... growth`, `... gpu` and `... readme`."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

import torch

from vicinal.measure import bench, gpu, growth, readme
from vicinal.measure.gpu_problems import find_gpu
from vicinal.measure.peers import PEERS
from vicinal.measure.peers.gpu import SPARSE
from vicinal.measure.problems import find
from vicinal.measure.progress import Lines, shown
from vicinal.measure.report import Report, markdown, not_timed, table, wrong
from vicinal.ops.backend import known

RESULTS = pathlib.Path("benchmarks/results")
Direction = Literal["forward", "forward+backward"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure our back ends against what people write by hand. No time is shown for a wrong answer."""

    problems: tuple[str, ...] = ("default",)
    """Groups (quick, default, large, all) or problems."""
    backends: tuple[str, ...] = ("cpu", "tiled")
    """Our back ends."""
    peers: tuple[str, ...] = tuple(PEERS)
    """What they are measured against; "none" for nothing."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """Precisions."""
    directions: tuple[Direction, ...] = ("forward", "forward+backward")
    """Forward alone, or with the backward."""
    seconds: float = 6.0
    """Time that one row's timing may take; preparing and checking come on top."""
    threads: int | None = None
    """Threads; torch's own choice by default."""
    device: str = "cpu"
    """Where to run."""
    memory: bool = False
    """Measure peak memory too."""
    output: pathlib.Path | None = None
    """The JSON; benchmarks/results/<device>.json by default."""


@dataclasses.dataclass(frozen=True)
class GrowthOptions:
    """How time and peak memory grow with tokens, window, heads and batch: JSON and a plot."""

    backend: str = "cpu"
    """Which back end."""
    directions: tuple[Direction, ...] = ("forward", "forward+backward")
    """Forward alone, or with the backward."""
    seconds: float = 10.0
    """Time that one curve's timing may take."""
    device: str = "cpu"
    """Where to run."""
    output: pathlib.Path = RESULTS
    """The folder for the JSON and the plot."""


@dataclasses.dataclass(frozen=True)
class GpuOptions:
    """Measure our back ends on a GPU against dense kernels, FlexAttention and others' sparse kernels."""

    problems: tuple[str, ...] = ("all",)
    """Groups (first, maps, sequence, images, video, all) or problems."""
    backends: tuple[str, ...] = ("triton", "flex")
    """Our back ends; those that this version lacks are left out."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision."""
    directions: tuple[Direction, ...] = ("forward", "forward+backward")
    """Forward alone, or with the backward."""
    seconds: float = 2.0
    """Time that one row's timing may take; preparing, compiling and checking come on top."""
    peers: tuple[str, ...] = tuple(SPARSE)
    """Others' sparse kernels to measure against; "none" for nothing. Dense kernels always run."""
    minutes: float | None = None
    """Begin no row that would probably end later than this; without it all rows are measured."""
    resume: bool = False
    """Keep the rows that the JSON has from this GPU, this torch and these kernels, and measure the others."""
    output: pathlib.Path = RESULTS / "gpu.json"
    """The JSON."""


@dataclasses.dataclass(frozen=True)
class ReadmeOptions:
    """Write the README's table of times anew from the results."""

    root: pathlib.Path = pathlib.Path()
    """The repository."""
    check: bool = False
    """Change nothing; fail where the table is out of date."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code is 1 where one of our answers was wrong, 2 where the arguments are."""
    import tyro

    given = list(arguments)
    try:
        if given[:1] == ["readme"]:
            return _readme(tyro.cli(ReadmeOptions, args=given[1:], prog="python -m vicinal.measure readme"))
        if given[:1] == ["growth"]:
            return _growth(tyro.cli(GrowthOptions, args=given[1:], prog="python -m vicinal.measure growth"))
        if given[:1] == ["gpu"]:
            return _gpu(tyro.cli(GpuOptions, args=_named(given[1:]), prog="python -m vicinal.measure gpu"))
        return measure(tyro.cli(Options, args=_named(given), prog="python -m vicinal.measure"))
    except (ValueError, FileNotFoundError, gpu.NoGpu, gpu.GpuLost) as error:
        print(f"python -m vicinal.measure: {error}", file=sys.stderr)
        return 2


def _named(given: list[str]) -> list[str]:
    """The arguments with `--problems` before names that simply come first: `quick --seconds 2`."""
    return ["--problems", *given] if given and not given[0].startswith("-") else given


def measure(options: Options) -> int:
    """Run the benchmark, print its tables, save its JSON."""
    settings = _settings(options)
    path = options.output or RESULTS / f"{options.device.partition(':')[0]}.json"
    rows = len(settings.problems) * len(settings.dtypes) * len(settings.backwards)
    with shown(rows) as progress:
        report = bench.run(settings, path, progress)
    _print(report)
    print(f"\nsaved as {path}")
    return 1 if wrong(report) else 0


def _settings(options: Options) -> bench.Settings:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name in options.backends:
        if name not in known(with_engines=True):
            raise ValueError(f"--backends: {name!r} is none of {', '.join(known(with_engines=True))}")
    peers = () if options.peers == ("none",) else options.peers
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"--peers: {name!r} is none of {', '.join(PEERS)}")
    return bench.Settings(
        problems=tuple(find(options.problems)),
        backends=options.backends,
        peers=peers,
        dtypes=tuple(getattr(torch, name) for name in options.dtypes),
        backwards=tuple(name == "forward+backward" for name in options.directions),
        seconds=options.seconds,
        device=options.device,
        has_memory=options.memory,
    )


def _print(report: Report) -> None:
    """The tables, then who was not timed and why, then our own wrong answers."""
    for dtype, direction in report.kinds():
        cells = table(report.select(dtype, direction))
        if sys.stdout.isatty():
            _print_rich(f"{direction}, {dtype}", cells)
        else:
            print(f"\n{direction}, {dtype}\n\n{markdown(cells)}")
    peaks = ", ".join(f"{name} {peak['gflops']} GFLOP/s ({peak['by']})" for name, peak in report.peaks["gemm"].items())
    print(f"\nbest GEMM here: {peaks}; memory copy {report.peaks['copy_gb_per_second']} GB/s")
    print("\nwithout a time:", *(f"  {line}" for line in not_timed(report)), sep="\n")
    if wrong(report):
        print("\nOUR ANSWER WAS WRONG:", *(f"  {line}" for line in wrong(report)), sep="\n")


def _print_rich(title: str, cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for number, name in enumerate(cells[0]):
        drawn.add_column(name, justify="right" if number else "left")
    for line in cells[1:]:
        drawn.add_row(*line)
    Console().print(drawn)


def _growth(options: GrowthOptions) -> int:
    with shown(0) as progress:
        for direction in options.directions:
            progress.say(direction)
            found = growth.measure(
                options.backend,
                backward=direction == "forward+backward",
                seconds=options.seconds,
                device=options.device,
                say=progress.say,
            )
            stem = f"growth-{options.backend}-{direction.replace('+', '-')}"
            growth.save(found, options.output / f"{stem}.json")
            try:
                growth.plot(found, options.output / f"{stem}.png")
            except ImportError:
                progress.say("no plot: matplotlib is not installed (pip install 'vicinal[plot]')")
    print(f"saved in {options.output}")
    return 0


def _gpu(options: GpuOptions) -> int:
    gpu.check_device("cuda")
    backends = gpu.available(options.backends)
    peers = () if options.peers == ("none",) else options.peers
    for name in peers:
        if name not in SPARSE:
            raise ValueError(f"--peers: {name!r} is none of {', '.join(SPARSE)}")
    settings = gpu.Settings(
        problems=find_gpu(options.problems),
        backends=backends,
        dense=tuple(name for name in backends if name == "triton"),
        sparse_peers={name: SPARSE[name] for name in peers},
        dtype=getattr(torch, options.dtype),
        backwards=tuple(name == "forward+backward" for name in options.directions),
        seconds=options.seconds,
        minutes=options.minutes,
    )
    with Lines() as lines:
        found = gpu.run(settings, options.output, lines.say, resume=options.resume)
    for direction in options.directions:
        print(f"\n{direction}, {options.dtype}\n\n{markdown(gpu.table(found, direction))}")
    print(f"\nsaved as {options.output}")
    failed = gpu.failures(found)
    if failed:
        print("\nOURS FAILED:", *(f"  {line}" for line in failed), sep="\n")
    return 1 if failed else 0


def _readme(options: ReadmeOptions) -> int:
    if options.check:
        is_current = readme.is_current(options.root)
        print("README.md is up to date" if is_current else "README.md is out of date: python -m vicinal.measure readme")
        return 0 if is_current else 1
    print("README.md rewritten" if readme.rewrite(options.root) else "README.md was up to date")
    return 0
