"""Every axis kind, and what each sees by its definition, written a second time in plain Python.

The definitions here say which keys are nearest, in the same block, or in the same place of another block;
the library says where a range starts and how long it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

import pytest

from vicinal.pattern import AxisKind, AxisTable, Full, Grid, Halo, Near, Same, Window

LENGTHS = range(1, 18)
COMPLETE = 11
"""Up to this length every dilation is tried; beyond it a few, so that the whole stays within seconds."""

by_length = pytest.mark.parametrize("length", LENGTHS, ids=lambda length: f"n{length}")


def dilations(length: int) -> list[int]:
    return list(range(1, length + 3)) if length <= COMPLETE else [1, 2, 3, 5, length - 1, length]


def near_kinds(length: int) -> Iterator[Near]:
    """Every kernel up to larger than the axis, every stride, every dilation, and what stands at the border."""
    for dilation, kernel_size in itertools.product(dilations(length), range(1, length + 3)):
        for stride in range(1, kernel_size + 1):
            yield Near(kernel_size, dilation, stride)
            yield Near(kernel_size, dilation, stride, border="crop")
            yield Near(kernel_size, dilation, stride, causal=True)
        if length % dilation == 0:
            yield Near(kernel_size, dilation, border="wrap")


def other_kinds(length: int) -> Iterator[AxisKind]:
    yield from (Full(), Full(causal=True), Same())
    for size in range(1, length + 3):
        yield from (Window(size, shift) for shift in range(size))
        yield from (Halo(size, halo) for halo in range(length + 2))
        if length % size == 0:
            yield Grid(size)


def natten_keys(query: int, length: int, kind: Near) -> list[int]:
    """NATTEN's rule, as its reference kernel computes it; defined where kernel_size * dilation <= length."""
    kernel_size, stride, dilation = kind.kernel_size, kind.stride, kind.dilation
    residue, place = query % dilation, query // dilation
    members = length // dilation + (1 if residue < length % dilation else 0)
    if kind.causal:
        leader = min((place // stride) * stride + stride - 1, members - 1)
        first, end = max(leader - kernel_size + 1, 0), place + 1
    else:
        left = kernel_size // 2
        right = kernel_size // 2 + kernel_size % 2 - 1
        leader = min((place // stride) * stride + stride // 2, members - 1)
        center = min(max(leader, left), members - 1 - right)
        first, end = center - left, center + right + 1
    return [residue + dilation * at for at in range(first, end)]


def nearest(places: range, leader: int, number: int) -> list[int]:
    """The `number` places nearest to the leader; of two equally near ones the left one comes first."""
    return sorted(sorted(places, key=lambda place: (abs(place - leader), place > leader))[:number])


def near_keys(query: int, length: int, kind: Near) -> list[int]:
    """The nearest keys among those a dilation apart from the query; unwrapped, for `wrap`."""
    group = range(query % kind.dilation, length, kind.dilation)
    place = group.index(query)
    siblings = [at for at in range(len(group)) if at // kind.stride == place // kind.stride]
    inside = range(len(group))
    endless = range(-2 * len(group) - kind.kernel_size, 3 * len(group) + kind.kernel_size)
    if kind.causal:
        leader = siblings[-1]
        chosen = [at for at in range(leader - kind.kernel_size + 1, place + 1) if at in inside]
    else:
        full_group = range(siblings[0], siblings[0] + kind.stride)
        leader = min(full_group[len(full_group) // 2], len(group) - 1)
        if kind.border == "shift":
            chosen = nearest(inside, leader, kind.kernel_size)
        elif kind.border == "crop":
            chosen = [at for at in nearest(endless, leader, kind.kernel_size) if at in inside]
        else:
            chosen = nearest(endless, leader, min(kind.kernel_size, len(group)))
    return [group[0] + kind.dilation * at for at in chosen]


def keys_of(table: AxisTable) -> list[list[int]]:
    """The unwrapped keys of every query, in order."""
    rows = zip(table.start.tolist(), table.count.tolist(), strict=True)
    return [list(range(start, start + table.step * count, table.step)) for start, count in rows]


def defined(query: int, length: int, kind: AxisKind) -> list[int]:
    """The keys of one query by the definition of its kind."""
    match kind:
        case Near():
            return near_keys(query, length, kind)
        case Window(size, shift):
            edges = {0, length} if length <= size else {0, length, *range(shift, length, size)}
            return [
                key for key in range(length) if not any(min(query, key) < edge <= max(query, key) for edge in edges)
            ]
        case Halo(block, halo):
            low, high = query // block * block - halo, (query // block + 1) * block + halo
            return [key for key in range(length) if low <= key < high]
        case Grid(size):
            return [key for key in range(length) if (key - query) % (length // size) == 0]
        case Full(causal):
            return [key for key in range(length) if not causal or key <= query]
        case Same():
            return [query]
    raise NotImplementedError(kind)


GRID_PAIRS = [(queries, keys) for queries in range(1, 10) for keys in range(1, 10)]


def center_of(query: int, query_length: int, key_length: int) -> int:
    """The key whose cell holds the middle of the query's cell."""
    middle = Fraction(2 * query + 1, 2) / query_length
    return int(middle * key_length)
