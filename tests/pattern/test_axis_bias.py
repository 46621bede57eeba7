"""Where a query reads its bias for a key: inside the table, each key its own place."""

from __future__ import annotations

import itertools

import pytest

from vicinal.pattern import AxisTable, Full, Grid, Halo, Near, Same, Window

from .definitions import GRID_PAIRS, by_length, keys_of, near_kinds, other_kinds


@pytest.mark.parametrize(
    ("kind", "length", "bias_length"),
    [
        (Near(7), 12, 13),
        (Near(7, dilation=3, stride=2), 12, 13),
        (Near(20), 12, 39),
        (Near(4, border="wrap"), 12, 7),
        (Near(4, causal=True), 12, 7),
        (Window(4, shift=1), 12, 7),
        (Grid(4), 12, 7),
        (Halo(4, 3), 12, 13),
        (Halo(4, 0), 12, 7),
        (Full(), 12, 23),
        (Full(causal=True), 12, 23),
        (Same(), 12, 1),
    ],
    ids=repr,
)
def test_bias_length_is_the_published_one(kind, length, bias_length):
    assert AxisTable.of(kind, length).bias_length == bias_length


def check_bias(table: AxisTable, where: object) -> None:
    for center, keys in zip(table.center.tolist(), keys_of(table), strict=True):
        distances = [key - center for key in keys]
        assert not any(distance % table.step for distance in distances), where
        index = [distance // table.step + (table.bias_length - 1) // 2 for distance in distances]
        assert all(0 <= at < table.bias_length for at in index), where
        assert len(set(index)) == len(keys), where


@by_length
def test_bias_index_stays_inside_its_table(length):
    for kind in itertools.chain(near_kinds(length), other_kinds(length)):
        table = AxisTable.of(kind, length)
        assert table.center.tolist() == list(range(length))
        check_bias(table, kind)


def test_bias_index_on_two_grids_stays_inside_its_table():
    for query_length, key_length in GRID_PAIRS:
        for kind in (Full(), *(Near(k, border=b) for k in range(1, key_length + 3) for b in ("shift", "crop"))):
            check_bias(AxisTable.of(kind, query_length, key_length), (kind, query_length, key_length))


def test_bias_index_reaches_both_ends_of_its_table():
    for kind in (Near(5), Near(5, dilation=2), Near(4, stride=4), Window(4), Grid(4), Full()):
        table = AxisTable.of(kind, 20)
        index = {(key - at) // table.step for at, keys in enumerate(keys_of(table)) for key in keys}
        assert (min(index), max(index)) == (-(table.bias_length // 2), table.bias_length // 2), kind
