"""Freed memory that the process keeps: a setting of glibc that a program may make, and a library may not."""

from __future__ import annotations

import contextlib
import ctypes
import os

# from glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1
_PAD_BYTES = 64 << 20


def keep_memory() -> bool:
    """Make the C library keep what is freed for what comes next; returns whether it could be told.

    >>> answer = "kept" if keep_memory() else "this is no glibc"

    Otherwise glibc gives large pieces back to the system at once, and every page of the next one (an activation, a
    gradient) interrupts the program when it is first written. The process then holds the most it ever needed until
    it ends; the peak of a training step did not change here. With another C library (macOS, Windows, musl) nothing
    happens, and the answer is False. It holds for the whole process, so programs call it, at their start: `vicinal
    train` does.
    """
    if not _is_glibc():
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _PAD_BYTES}
    return all([set_option(option, value) == 1 for option, value in wanted.items()])


def _is_glibc() -> bool:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows, macOS, some of musl
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    return False
