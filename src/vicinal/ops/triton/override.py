"""Other tiles than the chosen ones, for tests and measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vicinal.ops.triton.plan import PASSES, Tiles

_FORCED: list[Tiles | None] = [None, None, None]


@contextlib.contextmanager
def forced(forward: Tiles | None = None, query: Tiles | None = None, key: Tiles | None = None) -> Iterator[None]:
    """Use these tiles for every call within, in the forward and in the passes over queries and keys of the backward.

    Not for threads: what is remembered of earlier calls is forgotten, at the beginning and at the end.

    >>> tiles = Tiles(query=(1, 8, 8), phase=(0, 0, 0), key=(1, 4, 16), warps=4, stages=2)
    >>> with forced(forward=tiles):
    ...     pass
    """
    before = list(_FORCED)
    _FORCED[:] = [new or old for new, old in zip((forward, query, key), before, strict=True)]
    forget()
    try:
        yield
    finally:
        _FORCED[:] = before
        forget()


def forget() -> None:
    """Choose anew for calls like earlier ones."""
    from vicinal.ops import api, resolve

    api._KNOWN.clear()
    resolve._choose.cache_clear()


def forced_tiles(name: str) -> Tiles | None:
    """What is forced for one of the `PASSES`, if anything."""
    return _FORCED[PASSES.index(name)]
