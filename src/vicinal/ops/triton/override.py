"""Other tiles than the chosen ones, for tests and measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vicinal.ops.triton.plan import Choice, Tiles

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
    _forget()
    try:
        yield
    finally:
        _FORCED[:] = before
        _forget()


def _forget() -> None:
    from vicinal.ops import api, resolve

    api._KNOWN.clear()
    resolve._choose.cache_clear()


def with_forced(choice: Choice) -> Choice:
    """A choice with what is forced in its place."""
    forward, query, key = (own if other is None else other for own, other in zip(choice, _FORCED, strict=True))
    return forward, query, key
