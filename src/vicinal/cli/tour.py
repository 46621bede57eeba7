"""`vicinal tour`: builds the demo page, shows how far it is, and sums up what it found."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vicinal.cli.terminal import console
from vicinal.tour.build import FULL, QUICK, Announce, Tour, build


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    with progress(console(stderr=True)) as announce:
        tour = build(options.out, scale=QUICK if options.quick else FULL, announce=announce)
    print_summary(tour, console())


@contextmanager
def progress(out: Console) -> Iterator[Announce]:
    """A bar on a terminal, and elsewhere a line for each step."""
    if not out.is_terminal:
        yield lambda number, total, title: out.print(f"[{number}/{total}] {title}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("the tour", total=None)
        yield lambda number, total, title: bar.update(task, total=total, completed=number - 1, description=title)


def print_summary(tour: Tour, out: Console) -> None:
    """What was found, and last where the page is."""
    smoothed = Table("smoothing a photograph by attention", box=box.SIMPLE_HEAD)
    for heading in ("dB", "equal weights, dB", "ms"):
        smoothed.add_column(heading, justify="right", no_wrap=True)
    noisy, gaussian = tour.smoothing.noisy, tour.smoothing.gaussian
    smoothed.add_row("noisy", f"{noisy.psnr:.2f}", "", "")
    smoothed.add_row(gaussian.name, f"{gaussian.psnr:.2f}", "", "")
    for result in tour.smoothing.results:
        smoothed.add_row(result.name, f"{result.psnr:.2f}", f"{result.plain_psnr:.2f}", f"{result.ms:.0f}")
    out.print(smoothed)
    times = Table("against dense masked attention", "pass", box=box.SIMPLE_HEAD)
    for heading in ("vicinal, ms", "dense, ms", "times faster"):
        times.add_column(heading, justify="right", no_wrap=True)
    for race in tour.races:
        if race.ours is None or race.dense is None or race.speedup is None:
            times.add_row(race.problem.name, race.direction, race.reason)
        else:
            speeds = (f"{race.ours.median_ms:.2f}", f"{race.dense.median_ms:.2f}", f"{race.speedup:.1f}")
            times.add_row(race.problem.name, race.direction, *speeds)
    out.print(times)
    print_live(tour, out)
    built = sum(row.outcome is not None for row in tour.systems)
    out.print(f"systems: {built} of {len(tour.systems)} built")
    out.print(f"{tour.page} (made in {tour.seconds:.0f} s)", soft_wrap=True)


def print_live(tour: Tour, out: Console) -> None:
    """The times of other people's models, and why there are none."""
    times = Table("a forward pass of transformers' models", box=box.SIMPLE_HEAD)
    for heading in ("vicinal, ms", "dense, ms", "times faster"):
        times.add_column(heading, justify="right", no_wrap=True)
    for result in tour.live:
        if result.ours is None or result.dense is None or result.speedup is None:
            out.print(f"{result.title}: no times, {result.reason}", soft_wrap=True, markup=False)
        else:
            speeds = (f"{result.ours.median_ms:.0f}", f"{result.dense.median_ms:.0f}", f"{result.speedup:.1f}")
            times.add_row(result.title, *speeds)
    if times.row_count:
        out.print(times)
