"""A bar that counts things done, on standard error; in a pipe a line every ten percent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vicinal.cli.terminal import console


@contextmanager
def counting(total: int, what: str, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Give a function to be told how many of `total` are done.

    >>> with counting(3, "pictures", quiet=True) as announce:
    ...     announce(3)
    """
    out = console(stderr=True)
    if quiet:
        yield lambda done: None
        return
    if not out.is_terminal:
        last = [0]

        def line(done: int) -> None:
            if done * 10 // total > last[0]:
                last[0] = done * 10 // total
                out.print(f"{done}/{total} {what}")

        yield line
        return
    begin = time.perf_counter()
    words = (TextColumn("{task.fields[speed]}"), TextColumn("left"), TimeRemainingColumn())
    with Progress(BarColumn(), MofNCompleteColumn(), *words, console=out, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(what, total=total, speed=f"{what}/s")

        def move(done: int) -> None:
            speed = done / max(time.perf_counter() - begin, 1e-9)
            bar.update(task, completed=done, speed=f"{speed:,.1f} {what}/s")

        yield move
