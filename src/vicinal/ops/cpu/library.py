"""Finding and loading the shared library of CPU kernels, and the variables that steer it.

`VICINAL_CPU_STRATEGY` (`auto`, `simple`, `tiles`, `dense`) and `VICINAL_CPU_ISA` (`best`, `base`, `avx2`, `avx512`,
`avx512_bf16`, `amx`) are for tests and measurements: they force what is chosen by itself otherwise. `amx`, the matrix
registers of Intel's processors, is for bfloat16 alone, where the system lets this process use them; other types get
what they get with `avx512`. `VICINAL_CPU_LIBRARY` is the path of another build of the library, such as one with
sanitizers. They are read when the library is loaded.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ABI = 2
STRATEGIES = ("auto", "simple", "tiles", "dense")
ISAS = ("best", "base", "avx2", "avx512", "avx512_bf16", "amx")
_NAME = {"win32": "_cpu.dll", "darwin": "_cpu.dylib"}.get(sys.platform, "_cpu.so")
_PATH = Path(__file__).parents[2] / _NAME
_MESSAGE_BYTES = 512
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: MemoryError, 3: RuntimeError}

Function = Callable[..., int]


@dataclasses.dataclass(frozen=True)
class Library:
    """The loaded library: its functions, and what the environment asks of them."""

    attend: Function
    attend_backward: Function
    attend_at: Function
    attend_backward_at: Function
    describe: Function
    workspace_bytes: Function
    best_isa: str
    strategy: int
    isa: int


def path() -> Path:
    """The file the library is loaded from."""
    return Path(os.environ.get("VICINAL_CPU_LIBRARY", _PATH))


@functools.cache
def load() -> Library:
    """The library; raises `OSError` with the reason where it cannot be had.

    A value of an environment variable that is not one of those allowed is a `ValueError`.
    """
    file = path()
    if not file.exists():
        built = "its library was not built: no C++ compiler worked when vicinal was installed"
        raise OSError(built if file == _PATH else f"VICINAL_CPU_LIBRARY names no file: {file}")
    try:
        found = ctypes.CDLL(str(file))
    except OSError as problem:
        raise OSError(f"its library cannot be loaded: {problem}") from problem
    found.vicinal_abi.restype = ctypes.c_int64
    if found.vicinal_abi() != ABI:
        raise OSError(f"its library has interface {found.vicinal_abi()}, this version of vicinal needs {ABI}")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    functions = {
        "attend": (pointer, pointer, number),
        "attend_backward": (pointer, pointer, number),
        "attend_at": (pointer, pointer, pointer, number),
        "attend_backward_at": (pointer, pointer, pointer, number),
        "describe": (pointer, pointer, number, pointer, number),
        "workspace_bytes": (),
        "best_isa": (),
    }
    ready: dict[str, Any] = {}
    for name, arguments in functions.items():
        function = getattr(found, f"vicinal_{name}")
        function.argtypes, function.restype = arguments, number
        ready[name] = function
    ready["best_isa"] = ISAS[ready["best_isa"]()]
    return Library(
        **ready,
        strategy=_choice("VICINAL_CPU_STRATEGY", STRATEGIES),
        isa=_choice("VICINAL_CPU_ISA", ISAS),
    )


def _choice(variable: str, names: Sequence[str]) -> int:
    given = os.environ.get(variable, names[0])
    if given not in names:
        raise ValueError(f"{variable} must be one of {', '.join(names)}, got {given!r}")
    return names.index(given)


@functools.cache
def reason_missing() -> str | None:
    """Why the library cannot be had, or None."""
    try:
        load()
    except OSError as problem:
        return str(problem)
    return None


class _Messages(threading.local):
    """Room for a message, one for each thread."""

    def __init__(self) -> None:
        self.room = ctypes.create_string_buffer(_MESSAGE_BYTES)


_messages = _Messages()


def call(function: Function, *arguments: Any) -> None:
    """Call a function of the library that may fail; the failure becomes an exception."""
    room = _messages.room
    status = function(*arguments, room, _MESSAGE_BYTES)
    if status:
        raise _ERRORS[status](f"the CPU kernels refuse the call: {room.value.decode()}")


class Process:
    """What the kernels may use of this process."""

    num_threads: Callable[[], int] = staticmethod(torch.get_num_threads)
    """Torch's number of threads; 1 in a process that was forked off from one that had imported vicinal."""


def _use_one_thread() -> None:
    Process.num_threads = staticmethod(lambda: 1)


if hasattr(os, "register_at_fork"):
    # OpenMP's threads do not survive a fork and would be waited for forever. The library notices a fork by itself,
    # but only once it is loaded, and torch may have used its threads before.
    os.register_at_fork(after_in_child=_use_one_thread)
