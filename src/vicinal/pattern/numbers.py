"""Checks of the plain numbers that patterns are made of."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any


def as_integer(where: str, name: str, value: Any, least: int) -> int:
    """`value` as a Python integer of at least `least`; NumPy and torch integers are integers too."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{where}: {name} must be an integer of at least {least}, got {value!r}") from None
    if number < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {number}")
    return number


def check_flag(where: str, name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is True or False."""
    if value is not True and value is not False:
        raise ValueError(f"{where}: {name} must be True or False, got {value!r}")


def as_grid(where: str, name: str, value: Any) -> tuple[int, ...]:
    """`value` as a grid: one to three axis lengths, each at least 1."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not 1 <= len(value) <= 3:
        raise ValueError(f"{where}: {name} must be a tuple of 1 to 3 axis lengths, got {value!r}")
    return tuple(as_integer(where, f"{name}[{axis}]", length, 1) for axis, length in enumerate(value))
