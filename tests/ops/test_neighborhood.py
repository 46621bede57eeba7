"""Which tables are a neighborhood: told from the numbers, whatever pattern they were made from."""

from __future__ import annotations

import numpy as np
import pytest

from vicinal import Full, Grid, Halo, Near, Same, Window, bounds, heads, union
from vicinal.ops.neighborhood import axis_neighborhood, neighborhood_of
from vicinal.pattern.table import AxisTable


@pytest.mark.parametrize("length", [1, 2, 7, 12, 17])
def test_every_neighborhood_that_fits_is_found(length: int) -> None:
    for size in range(1, length + 1):
        for dilation in range(1, length // size + 1):
            for stride in range(1, size + 1):
                for causal in (False, True):
                    table = AxisTable.of(Near(size, dilation, stride, causal), length)
                    found = axis_neighborhood(table)
                    assert found is not None, (size, dilation, stride, causal)
                    again = AxisTable.of(found, length)
                    assert np.array_equal(again.start, table.start)
                    assert np.array_equal(again.count, table.count)


def test_other_patterns_are_neighborhoods_where_their_tables_are() -> None:
    assert neighborhood_of(bounds((Window(4), Full()), (12, 9))) == (Near(4, stride=4), Near(9))
    assert neighborhood_of(bounds(bounds(Near(5), (11,)))) == (Near(5),)
    assert neighborhood_of(bounds(Grid(4), (12,))) == (Near(4, dilation=3),)
    assert neighborhood_of(bounds(Full(causal=True), (9,))) == (Near(9, causal=True),)


@pytest.mark.parametrize(
    ("pattern", "grid", "key_grid"),
    [
        (Near(5, border="crop"), (12,), None),
        (Near(5, border="wrap"), (12,), None),
        (Near(5, dilation=3), (13,), None),
        (Window(5), (12,), None),
        (Window(4, shift=2), (12,), None),
        (Halo(4, 1), (12,), None),
        (Near(3), (12,), (5,)),
        (heads(Near(3), Near(5)), (12,), None),
        (union((Same(), Full()), (Full(), Same())), (6, 6), None),
        (bounds(Near(5), (12,)).slice(0, 2, 9), None, None),
    ],
    ids=str,
)
def test_what_is_no_neighborhood_is_not_taken_for_one(pattern, grid, key_grid) -> None:
    assert neighborhood_of(bounds(pattern, grid, key_grid)) is None
