"""Patterns that wait for a grid."""

from __future__ import annotations

import pytest

from vicinal.layers.words import at, near, padded, table_shapes, window, window_area
from vicinal.pattern import Full, Grid, Near, Same, Window, heads, union


@pytest.mark.parametrize(("length", "dilation"), [(56, 8), (57, 8), (13, 1), (6, 1), (1, 1)])
def test_max_dilation_is_as_far_as_the_kernel_fits(length, dilation):
    assert at(near(7, dilation="max"), (length, 14)) == (Near(7, dilation=dilation), Near(7, dilation=2))


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((14, 21), (Window(7, shift=3), Window(7, shift=3))),
        ((7, 21), (Window(7), Window(7))),
        ((5, 21), (Window(5), Window(7))),
        ((8, 8), (Window(7, shift=3), Window(7, shift=3))),
    ],
    ids=str,
)
def test_windows_are_unshifted_where_one_axis_is_no_longer_than_they_are(grid, expected):
    assert at(window(7, shift=3), grid) == expected


def test_a_pattern_stays_what_it_is():
    pattern = heads(Near(7), (Full(), Window(4)))
    assert at(pattern, (8, 8)) is pattern


def test_what_is_no_pattern_is_refused():
    with pytest.raises(ValueError, match="pattern must be"):
        at("Near(7)", (8, 8))


@pytest.mark.parametrize("make", [lambda: near(0), lambda: near(7, "most"), lambda: window(7, shift=7)])
def test_a_wrong_word_is_refused_when_it_is_said(make):
    with pytest.raises(ValueError, match=r"near|Near|Window"):
        make()


@pytest.mark.parametrize(
    ("pattern", "grid", "shapes"),
    [
        (Near(7, dilation=3), (20, 20), ((13, 13),)),
        ((Full(), Same()), (9, 20), ((17, 1),)),
        (heads(Near(3), (Full(), Window(2))), (5, 6), ((5, 5), (9, 3))),
        (window(7, shift=3), (5, 20), ((9, 13),)),
    ],
    ids=str,
)
def test_table_shapes(pattern, grid, shapes):
    assert table_shapes(pattern, grid) == shapes


def test_a_union_has_no_table():
    with pytest.raises(ValueError, match="union"):
        table_shapes(union((Same(), Full()), (Full(), Same())), (4, 4))


@pytest.mark.parametrize(
    ("pattern", "grid", "expected"),
    [
        (Near(7, dilation=4), (20, 30), (28, 30)),
        (Window(7), (5, 15), (7, 21)),
        (window(7, shift=3).at((5, 15)), (5, 15), (5, 21)),
        (Grid(4), (9, 8), (12, 8)),
        (heads(Near(7, dilation=2), Near(3, dilation=8)), (10, 10), (24, 24)),
        (Full(), (9, 8), (9, 8)),
    ],
    ids=str,
)
def test_padded(pattern, grid, expected):
    assert padded(pattern, grid) == expected


def test_window_area_counts_windows_whole_and_weighs_groups():
    assert window_area(Window(7, shift=3), (14, 14)) == 49
    assert window_area(Near(7), (5, 20)) == 35
    assert window_area(heads(Near(3), Near(5), sizes=(3, 1)), (9, 9)) == (3 * 9 + 25) / 4
