"""Memory of results: what an output or a gradient that is gone has lain in is given to the next one of its size.

New memory comes in pages of 4 KB, each with an interruption when it is first written to. The system's allocator gives
larger blocks back as soon as they are free and takes them anew, so a loop that makes an output at a time pays for its
pages in every turn: for a 7x7 window as much as for a quarter of the arithmetic. Here the storages of results are
remembered, and one that only this module still refers to is used again.

`VICINAL_CPU_KEEP_MB` is how many megabytes of results may be remembered, those in use included (256; 0 for none).
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading

import torch

LEAST_BYTES = 128 << 10
"""Smaller blocks stay with the system's allocator, which does not give them back."""

MOST_TRIED = 16
"""So many storages of a size are looked at for one that is free."""

_users = getattr(torch._C, "_storage_Use_Count", None)
_OURS, _OURS_IN_PYTHON = 1, 3
"""References to a storage that nobody else uses: torch's, and those to the object (a list, a variable, an argument)."""


@functools.cache
def most_kept() -> int:
    """How many bytes may be remembered."""
    given = os.environ.get("VICINAL_CPU_KEEP_MB", "256")
    if not given.isdecimal():
        raise ValueError(f"VICINAL_CPU_KEEP_MB must be a whole number of megabytes, 0 or more, got {given!r}")
    return int(given) << 20 if _users is not None else 0


class _Kept:
    """The storages that are remembered, by size; sizes that were used last stand last."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Give all memory that nobody uses back to the system."""
        self.lock = threading.Lock()  # after a fork the old one may be held by nobody
        self.rooms: dict[int, list[torch.UntypedStorage]] = {}
        self.bytes = 0

    def take(self, size: int) -> torch.UntypedStorage | None:
        """A storage of that size that nobody uses; it must be given back by `keep` once somebody does."""
        with self.lock:
            rooms = self.rooms.get(size)
            if not rooms:
                return None
            for place in range(len(rooms) - 1, max(len(rooms) - 1 - MOST_TRIED, -1), -1):
                room = rooms[place]
                if _users(room._cdata) == _OURS and sys.getrefcount(room) == _OURS_IN_PYTHON:  # type: ignore[misc]
                    del rooms[place]
                    self.bytes -= size
                    # another process may read what was shared, and whoever resized it has another block
                    return room if not room.is_shared() and room.nbytes() == size else None
        return None

    def keep(self, size: int, room: torch.UntypedStorage) -> None:
        """Remember a storage; others are forgotten where it gets too much."""
        if size > most_kept():
            return
        with self.lock:
            self.rooms[size] = [*self.rooms.pop(size, ()), room]
            self.bytes += size
            while self.bytes > most_kept():
                oldest = next(iter(self.rooms))
                self.rooms[oldest].pop(0)
                self.bytes -= oldest
                if not self.rooms[oldest]:
                    del self.rooms[oldest]


_kept = _Kept()
forget = _kept.forget

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor that will be written to the last element, in memory of earlier results where there is some.

    >>> empty((2, 3), torch.float32).shape
    torch.Size([2, 3])
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES or not most_kept():
        return torch.empty(shape, dtype=dtype)
    room = _kept.take(size)
    if room is None:
        tensor = torch.empty(shape, dtype=dtype)
        room = tensor.untyped_storage()
    else:
        tensor = torch.empty(0, dtype=dtype).set_(room, 0, shape)  # type: ignore[call-overload]
    _kept.keep(size, room)
    return tensor
