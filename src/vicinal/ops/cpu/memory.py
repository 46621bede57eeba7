"""Memory of results: what an output or a gradient that is gone has lain in is given to the next one of its shape.

New memory comes in pages of 4 KB, each with an interruption when it is first written to. The system's allocator gives
larger blocks back as soon as they are free and takes them anew, so a loop that makes an output at a time pays for its
pages in every turn: for a 7x7 window as much as for a quarter of the arithmetic. Here the storages of results are
remembered, each with a tensor of our own on it, and one that nobody else refers to is used again: `data` of our tensor
is another on the same storage, and quicker to have than any empty one.

`VICINAL_CPU_KEEP_MB` is how many megabytes of results may be remembered, those in use included (256; 0 for none).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import threading

import torch

from vicinal.ops.packing import ordinary_tensors

LEAST_BYTES = 128 << 10
"""Smaller blocks stay with the system's allocator, which does not give them back."""

MOST_TRIED = 16
"""So many storages of a shape are looked at for one that is free."""

_users = getattr(torch._C, "_storage_Use_Count", None)


class _Room:
    """A storage, and our own tensors on it: all of it, or its parts."""

    __slots__ = ("address", "alone", "storage", "tensors", "whole")

    def __init__(self, whole: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> None:
        self.whole, self.tensors = whole, tensors
        self.storage = whole.untyped_storage()
        self.address = self.storage._cdata  # where torch counts
        self.alone = self.references()

    def references(self) -> int:
        """How many refer to the storage: torch's tensors, and Python's names for it."""
        assert _users is not None
        users: int = _users(self.address)
        return users + sys.getrefcount(self.storage)

    def is_as_new(self, size: int) -> bool:
        """Whether nobody has left a trace: by sharing with another process, resizing, lending to numpy, or a note."""
        storage = self.storage
        return (
            storage.nbytes() == size
            and storage.resizable()
            and not storage.is_shared()
            and not getattr(storage, "__dict__", None)
        )


@functools.cache
def most_kept() -> int:
    """How many bytes may be remembered."""
    given = os.environ.get("VICINAL_CPU_KEEP_MB", "256")
    if not given.isdecimal():
        raise ValueError(f"VICINAL_CPU_KEEP_MB must be a whole number of megabytes, 0 or more, got {given!r}")
    return int(given) << 20 if _users is not None else 0


class _Kept:
    """The shelves that have rooms on them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Give all memory that nobody uses back to the system."""
        for shelf in getattr(self, "shelves", ()):
            shelf.rooms = ([], [])
        self.lock = threading.Lock()  # after a fork the old one may be held by nobody
        self.shelves: dict[Shelf, None] = {}
        self.bytes = 0

    def add(self, shelf: Shelf, rooms: list[_Room], room: _Room) -> None:
        """Put a room on a shelf; what was used longest ago is forgotten where it gets too much."""
        if shelf not in self.shelves:
            self._forget_shared()
            self.shelves[shelf] = None
        rooms.append(room)
        self.bytes += shelf.size
        while self.bytes > most_kept():
            oldest = min(self.shelves, key=lambda one: one.last_use)
            some = oldest.rooms[0] or oldest.rooms[1]
            self.drop(oldest, some, some[0])

    def _forget_shared(self) -> None:
        """Let go of what was shared since: it holds a file and a part of the memory for sharing, and is of no use."""
        for shelf in list(self.shelves):
            for rooms in shelf.rooms:
                for room in [room for room in rooms if room.storage.is_shared()]:
                    self.drop(shelf, rooms, room)

    def drop(self, shelf: Shelf, rooms: list[_Room], room: _Room) -> None:
        """Take a room off its shelf."""
        rooms.remove(room)
        self.bytes -= shelf.size
        if not any(shelf.rooms):
            del self.shelves[shelf]


class Shelf:
    """Where results of one shape and type are taken from: contiguous tensors that will be written to the last element.

    With `parts` a result is so many tensors side by side, the parts `[..., heads, head_dim]` of `[..., parts, heads,
    head_dim]`.

    >>> Shelf((2, 3), torch.float32).take().shape
    torch.Size([2, 3])
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, parts: int = 0) -> None:
        whole = (*shape[:-2], parts, *shape[-2:]) if parts else tuple(shape)
        self.size = math.prod(whole) * dtype.itemsize
        self.parts = parts
        with ordinary_tensors():
            self.like = torch.empty(whole, dtype=dtype, device="cpu")
            self.like.untyped_storage().resize_(0)  # only shape and type are looked at
        self.rooms: tuple[list[_Room], list[_Room]] = ([], [])  # inference mode has tensors of its own
        self.last_use = 0
        self.is_kept = LEAST_BYTES <= self.size <= most_kept()
        self.empty = self.take if self.is_kept else functools.partial(torch.empty_like, self.like)

    def take(self) -> torch.Tensor:
        """A tensor, in memory of an earlier one where there is some."""
        if not self.is_kept or not _kept.lock.acquire(blocking=False):  # or a signal's handler came between
            return torch.empty_like(self.like)
        try:
            return self._room().tensors[0].data
        finally:
            _kept.lock.release()

    def take_parts(self) -> tuple[torch.Tensor, ...]:
        """All parts, which together are contiguous."""
        if not self.is_kept or not _kept.lock.acquire(blocking=False):
            return tuple(torch.empty_like(self.like).unbind(-3))
        try:
            return tuple([part.data for part in self._room().tensors])
        finally:
            _kept.lock.release()

    def _room(self) -> _Room:
        self.last_use = next(_TURNS)
        rooms = self.rooms[torch.is_inference_mode_enabled()]
        for room in rooms[: -MOST_TRIED - 1 : -1]:
            if room.references() == room.alone:
                if room.is_as_new(self.size):
                    return room
                _kept.drop(self, rooms, room)
        made = torch.empty_like(self.like)
        room = _Room(made, tuple(made.unbind(-3)) if self.parts else (made,))
        _kept.add(self, rooms, room)
        return room


_TURNS = itertools.count()
_kept = _Kept()
forget = _kept.forget

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)


@functools.lru_cache(maxsize=1024)
def shelf(shape: tuple[int, ...], dtype: torch.dtype, parts: int = 0) -> Shelf:
    """The shelf of that shape and type."""
    return Shelf(shape, dtype, parts)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor that will be written to the last element, in memory of earlier results where there is some.

    >>> empty((2, 3), torch.float32).shape
    torch.Size([2, 3])
    """
    return shelf(tuple(shape), dtype).empty()
