"""How a run shows itself: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from vicinal.measure.report import Row, milliseconds, percent, times


def summary(row: Row) -> str:
    """A row in one line: our back ends, and how they compare with the best halo variant."""
    parts = []
    for entry in row.entries:
        if not entry.is_ours:
            continue
        if entry.median_ms is None:
            parts.append(f"{entry.name} {entry.reason}")
            continue
        spread = "" if entry.quartiles_ms is None else f" ({'..'.join(map(milliseconds, entry.quartiles_ms))})"
        parts.append(f"{entry.name} {milliseconds(entry.median_ms)} ms{spread}, {percent(entry.share_of_gemm)} of GEMM")
        if (halo := row.best_halo()) is not None:
            parts.append(
                f"{times(row.over_halo(entry.name))} {halo.name} {halo.detail} {milliseconds(halo.median_ms)} ms"
            )
    return f"{row.problem} {row.dtype} {row.direction}: " + ", ".join(parts)


class Lines:
    """Plain lines on standard error, one for each row when it is done."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, title: str) -> None:
        """Nothing: a pipe wants results."""

    def doing(self, what: str) -> None:
        """Nothing: a pipe wants results."""

    def end(self, row: Row) -> None:
        """Print the row."""
        self.say(summary(row))

    def say(self, text: str) -> None:
        """Print a line, with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", file=sys.stderr, flush=True)


class Bar:
    """A bar over the rows of a run, with what is being done; finished rows scroll by above it."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns: list[Any] = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        columns += [TextColumn("{task.description} [dim]{task.fields[what]}[/dim]")]
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.row = self.bar.add_task("", total=total, what="")

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, title: str) -> None:
        """Name the row."""
        self.bar.update(self.row, description=title)

    def doing(self, what: str) -> None:
        """Name the step."""
        self.bar.update(self.row, what=what)

    def end(self, row: Row) -> None:
        """Print the row and move on."""
        self.say(summary(row))
        self.bar.advance(self.row)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)


def shown(total: int) -> Lines | Bar:
    """A bar where someone watches, lines elsewhere."""
    return Bar(total) if sys.stderr.isatty() else Lines()
