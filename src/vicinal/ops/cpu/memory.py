"""Memory of results: what an output or a gradient that is gone has lain in is given to the next one of its shape.

New memory comes in pages of 4 KB, each with an interruption when it is first written to. The system's allocator gives
larger blocks back as soon as they are free and takes them anew, so a loop that makes an output at a time pays for its
pages in every turn: for a 7x7 window as much as for a quarter of the arithmetic. Here the storages of results are
remembered, each with a tensor of our own on it, and one that nobody else refers to is used again: `data` of our tensor
is another on the same storage, and quicker to have than any empty one. No lock is needed: a storage that is looked at
is off its list meanwhile, and neither another thread nor the handler of a signal comes upon it.

`VICINAL_CPU_KEEP_MB` is how many megabytes of results may be remembered, those in use included (256; 0 for none).
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable

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
        users: int = _users(self.address)  # type: ignore[misc]  # nothing is kept where it is missing
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


class Shelf:
    """Where results of one shape and type are taken from: contiguous tensors that will be written to the last element.

    With `parts` a result is so many tensors side by side, the parts `[..., heads, head_dim]` of `[..., parts, heads,
    head_dim]`. Sizes below `least` are not kept.

    >>> Shelf((2, 3), torch.float32).empty().shape
    torch.Size([2, 3])
    """

    __slots__ = ("empty", "is_kept", "like", "parts", "rooms", "size")

    empty: Callable[[], torch.Tensor]
    """A tensor, in memory of an earlier one where there is some."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, parts: int = 0, least: int = LEAST_BYTES) -> None:
        whole = (*shape[:-2], parts, *shape[-2:]) if parts else tuple(shape)
        self.size = math.prod(whole) * dtype.itemsize
        self.parts = parts
        with ordinary_tensors():
            self.like = torch.empty(whole, dtype=dtype, device="cpu")
            self.like.untyped_storage().resize_(0)  # only shape and type are looked at
        self.rooms: list[_Room] = []
        self.is_kept = max(least, 1) <= self.size <= most_kept()
        self.empty = self._take if self.is_kept else functools.partial(torch.empty_like, self.like)

    def empty_parts(self) -> tuple[torch.Tensor, ...]:
        """All parts, which together are contiguous."""
        if not self.is_kept:
            return tuple(torch.empty_like(self.like).unbind(-3))
        room = self._room()
        parts = tuple([part.data for part in room.tensors])
        self.rooms.append(room)
        return parts

    def _take(self) -> torch.Tensor:
        room = self._room()
        result = room.whole.data
        self.rooms.append(room)
        return result

    def _room(self) -> _Room:
        """A room that nobody uses, taken off the list: the one that had been used last if it is free."""
        rooms = self.rooms
        busy: list[_Room] = []
        found = None
        while rooms and len(busy) < MOST_TRIED:
            try:
                room = rooms.pop()
            except IndexError:  # another thread was quicker
                break
            if room.references() != room.alone:
                busy.append(room)
            elif room.is_as_new(self.size):
                found = room
                break
        if busy:
            rooms[:0] = busy  # the next one who looks sees others first, so that none is overlooked for good
        return self._new_room() if found is None else found

    def _new_room(self) -> _Room:
        _make_space(self)
        whole = torch.empty_like(self.like)
        return _Room(whole, tuple(whole.unbind(-3)) if self.parts else ())


_filled: dict[Shelf, None] = {}
"""The shelves with rooms on them; the one that got a room last stands last."""


def _make_space(shelf: Shelf) -> None:
    """Forget as much as another room of a shelf takes, where it gets too much."""
    if shelf not in _filled:
        _forget_shared()
    _filled.pop(shelf, None)
    _filled[shelf] = None
    excess = shelf.size - most_kept() + sum(other.size * len(other.rooms) for other in list(_filled))
    for other in list(_filled):
        while excess > 0 and other.rooms:
            del other.rooms[:1]
            excess -= other.size
        if not other.rooms and other is not shelf:
            _filled.pop(other, None)


def _forget_shared() -> None:
    """Let go of what was shared since: it holds a file and a part of the memory for sharing, and is of no use."""
    for shelf in list(_filled):
        shelf.rooms[:] = [room for room in shelf.rooms if not room.storage.is_shared()]


def forget() -> None:
    """Give all memory that nobody uses back to the system."""
    for shelf in list(_filled):
        shelf.rooms.clear()
    _filled.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)


@functools.lru_cache(maxsize=1024)
def _shelf(shape: tuple[int, ...], dtype: torch.dtype, parts: int, least: int, is_inference: bool) -> Shelf:
    del is_inference  # that mode has tensors of its own
    return Shelf(shape, dtype, parts, least)


def shelf(shape: tuple[int, ...], dtype: torch.dtype, parts: int = 0, least: int = LEAST_BYTES) -> Shelf:
    """The shelf of that shape and type, for tensors of the mode (inference or not) that is on."""
    return _shelf(tuple(shape), dtype, parts, least, torch.is_inference_mode_enabled())


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor that will be written to the last element, in memory of earlier results where there is some.

    >>> empty((2, 3), torch.float32).shape
    torch.Size([2, 3])
    """
    return shelf(shape, dtype).empty()
