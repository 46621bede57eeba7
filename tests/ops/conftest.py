"""Fixtures of the operator's tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal.ops import api
from vicinal.ops.cpu import library

Forced = Callable[..., None]
Shrink = Callable[[int], None]


class _Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "vicinal", f"{func} was called"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_work() -> Iterator[None]:
    """Fail if one of our operators runs: whatever is wrong with a call must be found before any work is done."""
    with _Refuse():
        yield


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Forced]:
    """Calls that force a strategy or an instruction set for the rest of the test."""

    def force(strategy: str = "auto", isa: str = "best") -> None:
        monkeypatch.setenv("VICINAL_CPU_STRATEGY", strategy)
        monkeypatch.setenv("VICINAL_CPU_ISA", isa)
        forget()
        library.load()

    def forget() -> None:
        library.load.cache_clear()
        api._KNOWN.clear()  # calls that are known have the strategy in their records

    yield force
    monkeypatch.undo()
    forget()


@pytest.fixture
def shrink() -> Iterator[Shrink]:
    """Sets how many bytes a panel or a unit of the CPU kernels may take, 0: as is best; until the test ends."""
    function = ctypes.CDLL(str(library.path())).vicinal_shrink_units
    function.argtypes, function.restype = (ctypes.c_int64,), None
    yield function
    function(0)
