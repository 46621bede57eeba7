"""What a run found: as data, as JSON, and as tables."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

HALOS = ("halo_bmm", "halo_sdpa")
"""The two frozen hand-written variants; what counts is the faster of them."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contender in one row: its time, or the reason why it has none."""

    name: str
    is_ours: bool
    detail: str = ""
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    best_ms: float | None = None
    worst_ms: float | None = None
    first_ms: float | None = None
    """A turn's first call, with the caches full of what the contender before has left there."""
    rounds: int = 0
    gflops: float | None = None
    share_of_gemm: float | None = None
    error: float | None = None
    """The largest error, as a share of what the gate allows."""
    peak_mb: float | None = None
    """Memory beyond inputs and results, where it was measured."""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem in one dtype and direction. `speedups`: of our back ends, over every other contender."""

    problem: str
    size: str
    dtype: str
    direction: str
    flops: int
    entries: tuple[Entry, ...]
    speedups: dict[str, dict[str, float]]

    def entry(self, name: str) -> Entry | None:
        """The contender of that name, if it was timed."""
        return next((entry for entry in self.entries if entry.name == name and entry.median_ms is not None), None)

    def best_halo(self) -> Entry | None:
        """The faster of the halo variants."""
        timed = [entry for entry in map(self.entry, HALOS) if entry is not None]
        return min(timed, key=lambda entry: entry.median_ms or 0.0, default=None)

    def over_halo(self, backend: str) -> float | None:
        """How many times faster than the best halo variant a back end is."""
        ratios = [self.speedups.get(backend, {}).get(name) for name in HALOS]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    def over_halo_at_best(self, backend: str) -> float | None:
        """The same by everyone's fastest round: what is left to compare where a machine is too busy for medians."""
        own = self.entry(backend)
        theirs = [entry.best_ms for entry in map(self.entry, HALOS) if entry is not None and entry.best_ms is not None]
        return min(theirs) / own.best_ms if theirs and own is not None and own.best_ms else None


@dataclasses.dataclass
class Report:
    """A run: the machine, its peaks, the settings, and the rows so far."""

    created: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    peaks: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def save(self, path: pathlib.Path) -> None:
        """Write it as JSON, whole or not at all."""
        write(dataclasses.asdict(self), path)

    @staticmethod
    def load(path: pathlib.Path) -> Report:
        """Read what `save` wrote."""
        found = json.loads(path.read_text())
        rows = [Row(**{**row, "entries": tuple(map(_entry, row["entries"]))}) for row in found.pop("rows")]
        return Report(**found, rows=rows)

    def select(self, dtype: str, direction: str) -> list[Row]:
        """The rows of one dtype and direction."""
        return [row for row in self.rows if (row.dtype, row.direction) == (dtype, direction)]

    def kinds(self) -> list[tuple[str, str]]:
        """Which dtypes and directions there are, in the order they were measured."""
        return list(dict.fromkeys((row.dtype, row.direction) for row in self.rows))


def write(found: dict[str, Any], path: pathlib.Path) -> None:
    """Write plain values as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    draft.replace(path)


def _entry(found: dict[str, Any]) -> Entry:
    """An entry from JSON, which knows lists only."""
    quartiles = found["quartiles_ms"]
    return Entry(**{**found, "quartiles_ms": None if quartiles is None else tuple(quartiles)})


def milliseconds(value: float | None) -> str:
    """Three digits.

    >>> milliseconds(0.25), milliseconds(12.345), milliseconds(1463.2), milliseconds(None)
    ('0.250', '12.3', '1463', '-')
    """
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share as a whole percentage."""
    return "-" if share is None else f"{100 * share:.0f}%"


def times(ratio: float | None) -> str:
    """A ratio as a factor.

    >>> times(1.234), times(56.0), times(None)
    ('1.23x', '56x', '-')
    """
    if ratio is None:
        return "-"
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 4 else f"{ratio:.2f}x"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Rows of one dtype and direction as cells, the heading first: who takes how long, and how ours compare."""
    entries = [entry for row in rows for entry in row.entries]
    timed = {entry.name for entry in entries if entry.median_ms is not None}
    names = [name for name in dict.fromkeys(entry.name for entry in entries) if name in timed]
    ours = [name for name in names if any(entry.is_ours and entry.name == name for entry in entries)]
    heading = ["problem", *(f"{name} ms" for name in names)]
    for name in ours:
        heading += [f"{name} GEMM share", f"{name} vs best halo", "by fastest rounds"]
    cells = [heading]
    for row in rows:
        line = [row.problem]
        for name in names:
            entry = row.entry(name)
            where = f" ({entry.detail})" if entry is not None and name in HALOS else ""
            line.append(milliseconds(None if entry is None else entry.median_ms) + where)
        for name in ours:
            own = row.entry(name)
            line += [percent(None if own is None else own.share_of_gemm), times(row.over_halo(name))]
            line.append(times(row.over_halo_at_best(name)))
        cells.append(line)
    return cells


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table, the first row its heading.

    >>> print(markdown([["problem", "ms"], ["small", "1.0"]]))
    | problem | ms |
    |---|---:|
    | small | 1.0 |
    """
    heading, *body = cells
    rule = "|---|" + "---:|" * (len(heading) - 1)
    return "\n".join([_line(heading), rule, *map(_line, body)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def not_timed(report: Report) -> list[str]:
    """Who was not timed where, and why: one line for each contender and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        for entry in row.entries:
            if entry.reason:
                found.setdefault((entry.name, entry.reason), []).append(f"{row.problem} {row.direction}")
    return [
        f"{name}: {reason} ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''})"
        for (name, reason), places in found.items()
    ]


def wrong(report: Report) -> list[str]:
    """Our own answers that the gate turned away."""
    return [
        f"{entry.name} on {row.problem}, {row.dtype} {row.direction}: {entry.reason}"
        for row in report.rows
        for entry in row.entries
        if entry.is_ours and entry.reason.startswith("wrong")
    ]
