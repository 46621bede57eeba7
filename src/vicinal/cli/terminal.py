"""Printing: with color and a terminal's width on a terminal, plain and never wrapped in a pipe."""

from __future__ import annotations

from rich.console import Console

PIPE_WIDTH = 10_000
"""Columns that output in a pipe may take; as wide as anything we print, so that nothing is broken into lines."""


def console(*, stderr: bool = False) -> Console:
    """A console that respects NO_COLOR, and whose lines stay whole where a program reads them."""
    made = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not made.is_terminal:
        made = Console(stderr=stderr, highlight=False, emoji=False, markup=False, width=PIPE_WIDTH)
    return made
