"""Fixtures of the operator's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode


class _Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "vicinal", f"{func} was called"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_work() -> Iterator[None]:
    """Fail if one of our operators runs: whatever is wrong with a call must be found before any work is done."""
    with _Refuse():
        yield
