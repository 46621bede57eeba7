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


def _references(rooms: list[torch.UntypedStorage], place: int) -> tuple[int, int]:
    """How many refer to a storage in a list: torch's tensors, and Python's names (its versions count differently)."""
    room = rooms[place]
    return (0 if _users is None else _users(room._cdata)), sys.getrefcount(room)


_OURS = _references([torch.empty(1).untyped_storage()], 0)
"""The same where nobody else does."""


def _is_as_new(room: torch.UntypedStorage, size: int) -> bool:
    """Whether nobody has left a trace: by sharing it with another process, resizing, lending it to numpy, or a note."""
    return not room.is_shared() and room.nbytes() == size and room.resizable() and not getattr(room, "__dict__", None)


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
        if not self.lock.acquire(blocking=False):  # another thread's, or this one's before a signal's handler came
            return None
        try:
            rooms = self.rooms.get(size, [])
            for place in range(len(rooms) - 1, max(len(rooms) - 1 - MOST_TRIED, -1), -1):
                if _references(rooms, place) == _OURS:
                    room = rooms.pop(place)
                    self.bytes -= size
                    if not rooms:
                        del self.rooms[size]
                    return room if _is_as_new(room, size) else None
        finally:
            self.lock.release()
        return None

    def keep(self, size: int, room: torch.UntypedStorage) -> None:
        """Remember a storage; others are forgotten where it gets too much."""
        if size > most_kept() or not self.lock.acquire(blocking=False):
            return
        try:
            if size not in self.rooms:
                self._forget_shared()
            self.rooms[size] = [*self.rooms.pop(size, ()), room]
            self.bytes += size
            while self.bytes > most_kept():
                oldest = next(iter(self.rooms))
                self.rooms[oldest].pop(0)
                self.bytes -= oldest
                if not self.rooms[oldest]:
                    del self.rooms[oldest]
        finally:
            self.lock.release()

    def _forget_shared(self) -> None:
        """Let go of what was shared since: it holds a file and a part of the memory for sharing, and is of no use."""
        for size, rooms in list(self.rooms.items()):
            left = [room for room in rooms if not room.is_shared()]
            self.bytes -= size * (len(rooms) - len(left))
            self.rooms[size] = left
            if not left:
                del self.rooms[size]


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
