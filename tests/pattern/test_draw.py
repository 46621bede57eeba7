"""Pictures, character by character."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vicinal.pattern import AxisKind, Full, Grid, Halo, Near, Same, Window, draw, heads, union


def picture(text: str) -> str:
    """A picture as it stands in a test: without the first line break and the indentation."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


@pytest.mark.parametrize(
    ("pattern", "length", "query", "expected"),
    [
        (Near(3), 7, 3, "..#Q#.."),
        (Near(3), 7, 0, "Q##...."),
        (Near(3), 7, 6, "....##Q"),
        (Near(4), 7, 3, ".##Q#.."),
        (Near(4), 7, 6, "...###Q"),
        (Near(3, border="crop"), 7, 0, "Q#....."),
        (Near(3, border="wrap"), 7, 0, "Q#....#"),
        (Near(3, dilation=2), 7, 3, ".#.Q.#."),
        (Near(3, dilation=2), 7, 0, "Q.#.#.."),
        (Near(3, stride=3), 7, 0, "Q##...."),
        (Near(3, stride=3), 7, 6, "....##Q"),
        (Near(3, causal=True), 7, 3, ".##Q..."),
        (Near(9), 7, 3, "###Q###"),
        (Window(3), 7, 4, "...#Q#."),
        (Window(3), 7, 6, "......Q"),
        (Window(3, shift=1), 7, 0, "Q......"),
        (Halo(3, 1), 7, 4, "..##Q##"),
        (Grid(2), 8, 5, ".#...Q.."),
        (Full(), 7, 2, "##Q####"),
        (Full(causal=True), 7, 2, "##Q...."),
        (Same(), 7, 2, "..Q...."),
        (union(Near(3), Near(3, dilation=3)), 9, 4, ".#.#Q#.#."),
        (Near(1), 1, 0, "Q"),
    ],
    ids=lambda value: f"{value}",
)
def test_draw_in_one_dimension(pattern, length, query, expected):
    assert draw(pattern, (length,), query=(query,)) == expected


def test_draw_in_two_dimensions_has_a_line_per_row():
    expected = """
        .......
        .......
        ...###.
        ...#Q#.
        ...###.
    """
    assert draw(Near(3), (5, 7), query=(3, 4)) == picture(expected)
    expected = """
        .......
        .......
        .#.#.#.
        .#.#.#.
        .#.#.Q.
    """
    assert draw((Near(3), Near(3, dilation=2)), (5, 7), query=(4, 5)) == picture(expected)
    expected = """
        ..#..
        ##Q##
        ..#..
    """
    assert draw(union((Same(), Full()), (Full(), Same())), (3, 5), query=(1, 2)) == picture(expected)


def test_draw_in_three_dimensions_has_a_picture_per_frame():
    expected = """
        .##.
        .##.
        ....

        .#Q.
        .##.
        ....

        ....
        ....
        ....
    """
    pattern = (Full(causal=True), Window(2), Near(2))
    assert draw(pattern, (3, 3, 4), query=(1, 0, 2)) == picture(expected)


def test_draw_of_heads_names_each_group():
    expected = """
        group 0
        ..#..
        ..Q..

        group 1
        .....
        ##Q##

        group 2
        .....
        .#Q#.
    """
    pattern = heads((Full(), Same()), (Same(), Full()), union((Same(), Near(3)), Same()))
    assert draw(pattern, (2, 5), query=(1, 2)) == picture(expected)
    assert draw(heads(Near(3)), (5,)) == ".#Q#."


def test_draw_on_two_grids_marks_no_query():
    assert draw(Near(3), (4,), (8,), query=(1,)) == "..###..."
    assert draw(Full(), (4,), (2,), query=(3,)) == "##"
    expected = """
        ....
        .###
        .###
        .###
    """
    assert draw(Near(3), (4, 2), (4, 4), query=(2, 1)) == picture(expected)


def test_draw_takes_the_middle_where_no_query_is_given():
    assert draw(Near(3), (6,)) == "..#Q#."
    assert draw(Same(), (3, 4)) == "....\n..Q.\n...."


@dataclasses.dataclass(frozen=True, repr=False)
class Past(AxisKind):
    """All keys before the query, without itself."""

    def rows(self, center, length, xp):
        return 0 * center, center


def test_draw_shows_a_query_that_does_not_see_itself():
    assert draw(Past(), (5,), query=(2,)) == "##q.."
    assert draw(Past(), (5,), query=(0,)) == "q...."


def test_draw_of_a_large_grid_needs_one_row_of_its_mask():
    text = draw(Near(5), (1500, 1500), query=(0, 1499))
    assert text.count("#") == 24
    assert text.count("\n") == 1499
    assert text.splitlines()[0] == "." * 1495 + "####Q"


@pytest.mark.parametrize("query", [3, (3,), (1, 2, 3), (4, 0), (0, 5), (-1, 0), (0.0, 0), "12", (True, 0)], ids=repr)
def test_draw_refuses_a_query_outside_the_grid(query):
    with pytest.raises(ValueError, match="draw: query"):
        draw(Near(3), (4, 5), query=query)


def test_draw_takes_integers_of_numpy():
    assert draw(Near(3), (4, 5), query=(np.int64(1), np.int64(2))) == draw(Near(3), (4, 5), query=(1, 2))
