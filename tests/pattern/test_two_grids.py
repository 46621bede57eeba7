"""Axis kinds where queries and keys stand on grids of their own."""

from __future__ import annotations

import pytest

from vicinal.pattern import AxisTable, Full, Grid, Halo, Near, Same, Window, bounds

from .definitions import GRID_PAIRS, center_of, keys_of, near_keys


def test_two_grids_center_each_query_on_the_key_below_it():
    for query_length, key_length in GRID_PAIRS:
        table = AxisTable.of(Near(1), query_length, key_length)
        centers = [center_of(query, query_length, key_length) for query in range(query_length)]
        assert keys_of(table) == [[center] for center in centers]
        assert table.center.tolist() == centers


def test_two_grids_near_sees_the_nearest_keys_of_its_center():
    for query_length, key_length in GRID_PAIRS:
        for kernel_size in range(1, key_length + 3):
            for border in ("shift", "crop"):
                kind = Near(kernel_size, border=border)
                expected = [
                    near_keys(center_of(query, query_length, key_length), key_length, kind)
                    for query in range(query_length)
                ]
                assert keys_of(AxisTable.of(kind, query_length, key_length)) == expected, (kind, query_length)


def test_two_grids_full_sees_every_key():
    for query_length, key_length in GRID_PAIRS:
        seen = AxisTable.of(Full(), query_length, key_length).mask()
        assert seen.shape == (query_length, key_length)
        assert seen.all()


@pytest.mark.parametrize(
    "kind",
    [
        Near(3, dilation=2),
        Near(3, stride=2),
        Near(3, causal=True),
        Near(3, border="wrap"),
        Window(2),
        Halo(2, 1),
        Grid(2),
        Same(),
    ],
    ids=repr,
)
def test_two_grids_are_refused_where_they_are_not_defined(kind):
    assert len(AxisTable.of(kind, 8, 8)) == 8
    for query_length, key_length in ((4, 8), (8, 4)):
        with pytest.raises(ValueError, match=rf"{query_length} queries and {key_length} keys"):
            AxisTable.of(kind, query_length, key_length)
    with pytest.raises(ValueError, match="4 queries and 8 keys"):
        bounds((Full(), kind), (6, 4), (6, 8))
