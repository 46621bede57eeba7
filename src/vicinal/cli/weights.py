"""`vicinal weights FILE`: which model a checkpoint is of, in which layout, and whether it fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from vicinal.cli.terminal import console
from vicinal.models.checkpoint import Checkpoint, read, unwrap
from vicinal.models.registry import Candidate, holds_segmenter, identify

SHOWN = 3
"""How many of the nearest models are shown where none fits."""


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    checkpoint = read(options.file, is_whole=True)
    if not holds_segmenter(checkpoint.state):  # whatever else has a backbone is known by it
        inner = unwrap(checkpoint.state)
        checkpoint = Checkpoint(inner.state, checkpoint.wrappers + inner.wrappers)
    candidates = identify(checkpoint.state)
    fitting = [candidate for candidate in candidates if not candidate.problems]
    if options.json:
        print(json.dumps(answer(checkpoint, fitting or candidates[:SHOWN]), indent=2))
        return
    out = console()
    facts = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("file", options.file)
    facts.add_row("holds", _holds(checkpoint))
    for candidate in fitting:
        facts.add_row("fits", f"{call(candidate)}, layout {candidate.layout}", style="bold")
    for candidate in () if fitting else candidates[:SHOWN]:
        facts.add_row("nearest", f"{call(candidate)}, layout {candidate.layout}: {candidate.fit}")
    for source in dict.fromkeys(one.source for candidate in fitting for one in candidate.published):
        facts.add_row("published", f"{source} (not fetched here)")
    out.print(facts)


def call(candidate: Candidate) -> str:
    """How the model is made.

    >>> from vicinal.models.layout import Fit
    >>> call(Candidate("nat_mini", {"num_classes": 10}, "vicinal", Fit((), (), ()), ()))
    "create_model('nat_mini', num_classes=10)"
    """
    options = "".join(f", {key}={value!r}" for key, value in candidate.options.items())
    return f"create_model({candidate.name!r}{options})"


def answer(checkpoint: Checkpoint, candidates: list[Candidate]) -> dict[str, Any]:
    """The answer as plain values."""
    return {
        "wrappers": list(checkpoint.wrappers),
        "tensors": len(checkpoint.state),
        "numbers": sum(tensor.numel() for tensor in checkpoint.state.values()),
        "models": [
            {
                "name": candidate.name,
                "options": dict(candidate.options),
                "layout": candidate.layout,
                "fits": not candidate.problems,
                "missing": list(candidate.fit.missing),
                "extra": list(candidate.fit.extra),
                "misshapen": list(candidate.fit.misshapen),
            }
            for candidate in candidates
        ],
    }


def _holds(checkpoint: Checkpoint) -> str:
    numbers = sum(tensor.numel() for tensor in checkpoint.state.values())
    inside = f" inside {', '.join(checkpoint.wrappers)}" if checkpoint.wrappers else ""
    return f"{len(checkpoint.state)} tensors, {numbers:,} numbers{inside}"
