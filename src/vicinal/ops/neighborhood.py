"""Which tables are a neighborhood in NATTEN's sense, and with which arguments; told from the numbers alone."""

from __future__ import annotations

import functools

import numpy as np

from vicinal.pattern.axis import Near
from vicinal.pattern.bounds import Bounds
from vicinal.pattern.table import AxisTable


def neighborhood_of(bounds: Bounds) -> tuple[Near, ...] | None:
    """One `Near` per axis that has exactly these tables and whose windows all fit; None where there is none.

    >>> neighborhood_of(bounds((Near(5, stride=2), Window(4)), (15, 16)))
    (Near(5, stride=2), Near(4, stride=4))
    >>> neighborhood_of(bounds(Window(4, shift=1), (16,))) is None
    True
    """
    if len(bounds.groups) > 1 or len(bounds.groups[0].members) > 1:
        return None
    kinds = []
    for table in bounds.groups[0].members[0]:
        kind = axis_neighborhood(table)
        if kind is None:
            return None
        kinds.append(kind)
    return tuple(kinds)


@functools.lru_cache(maxsize=1024)
def axis_neighborhood(table: AxisTable) -> Near | None:
    """The `Near` that has this table, its window no longer than each residue class; None where there is none."""
    length, kernel_size, dilation = len(table), int(table.count.max()), table.step
    if table.wraps or length != table.length or kernel_size < 1 or kernel_size * dilation > length:
        return None
    causal = bool(table.count.min() < kernel_size)
    for stride in _strides(table):
        if stride <= kernel_size:
            kind = Near(kernel_size, dilation, stride, causal)
            own = AxisTable.of(kind, length)
            if np.array_equal(own.start, table.start) and np.array_equal(own.count, table.count):
                return kind
    return None


def _strides(table: AxisTable) -> list[int]:
    """Strides that the table may have: its windows move at multiples of the stride, and inside at each of them."""
    places = np.flatnonzero(np.diff(table.start[:: table.step])) + 1
    if not len(places):
        return [1]
    if len(places) > 1:
        return [int(np.diff(places).min())]
    only = int(places[0])
    return [stride for stride in range(1, only + 1) if only % stride == 0]
