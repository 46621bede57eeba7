"""The patterns that the tour shows, and each as a drawing over the photograph."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from vicinal.pattern import Bounds, Full, Grid, Halo, Near, Pattern, Same, Window, bounds, heads, union
from vicinal.tour.views import seen

GRID = (24, 36)
"""Tokens over the photograph, which is two by three."""

MIDDLE, CORNER = (10, 17), (1, 33)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A pattern with a title, what to notice, and the query at which that shows."""

    title: str
    pattern: Pattern
    notice: str
    query: tuple[int, int] = MIDDLE
    code: str = ""

    @property
    def written(self) -> str:
        """How the pattern is written in Python."""
        return self.code or repr(self.pattern)


@dataclasses.dataclass(frozen=True)
class Section:
    """Panels that belong together."""

    title: str
    text: str
    panels: tuple[Panel, ...]


SECTIONS: tuple[Section, ...] = (
    Section(
        "Neighborhoods",
        "The nearest keys, near or spread out. Alternating the first two, layer by layer, is DiNAT.",
        (
            Panel("Near", Near(7), "The 7 × 7 nearest tokens: neighborhood attention, as in NAT."),
            Panel("Near, dilated", Near(5, dilation=4), "Five keys per axis, four apart: a wide view at a low price."),
            Panel("Near, strided", Near(9, stride=4), "Queries in a block of 4 × 4 share the window of their leader."),
            Panel(
                "Near, causal",
                (Near(7, causal=True), Near(7)),
                "Causal along the first axis only: itself and what came before.",
                code="(Near(7, causal=True), Near(7))",
            ),
        ),
    ),
    Section(
        "Borders",
        "What happens at an edge is part of the table, so no kernel knows about it.",
        (
            Panel("shift", Near(9), "The window moves inward: every query sees 81 keys.", CORNER),
            Panel("crop", Near(9, border="crop"), "The window is cut at the edge.", CORNER),
            Panel("wrap", Near(9, border="wrap"), "It continues on the other side.", CORNER),
            Panel(
                "wrap on one axis",
                (Near(9), Near(9, border="wrap")),
                "A panorama: longitude is round, latitude is not.",
                CORNER,
            ),
        ),
    ),
    Section(
        "Blocks",
        "Windows without rolling, padding or masks. The first two, layer by layer, are Swin.",
        (
            Panel("Window", Window(6), "The block the query is in."),
            Panel("Window, shifted", Window(6, shift=3), "Blocks begin elsewhere; those at the edges are smaller."),
            Panel("Halo", Halo(6, 3), "The block and three tokens around it: overlapping windows, as in HAT."),
            Panel("Grid", Grid(6), "Six by six keys spread over everything: MaxViT's second half."),
        ),
    ),
    Section(
        "Axes and combinations",
        "A tuple has a kind for each axis; heads may differ; a union is one softmax over all that its members see.",
        (
            Panel("axial", (Same(), Full()), "The query's row. With its transpose: axial attention."),
            Panel("heads", heads((Full(), Window(4)), (Window(4), Full())), "Half the heads each: CSWin's cross."),
            Panel("criss-cross", union((Same(), Full()), (Full(), Same())), "Row and column in one softmax."),
            Panel("near and far", union(Near(5), Near(5, dilation=4)), "A key that both members see counts once."),
        ),
    ),
)


def sight(panel: Panel) -> str:
    """What the panel's query sees, in numbers.

    >>> sight(SECTIONS[0].panels[0])
    '49 of 864 keys'
    """
    views = seen(panel.pattern, GRID, query=panel.query)
    numbers = " + ".join(str(int(view.keys.sum())) for view in views)
    return f"{numbers} of {views[0].keys.size} keys"


def drawing(panel: Panel, photo: str, name: str) -> str:
    """The panel as an SVG overlay: the seen keys in the colors of `photo`, and the query framed.

    What lies below is dimmed by the page's style. `name` tells this drawing from the others on the page.
    """
    height, width = GRID
    views = seen(panel.pattern, GRID, query=panel.query)
    either = cells(np.logical_or.reduce([view.keys for view in views]))
    keys = "".join(f'<path class="keys group{number}" d="{cells(view.keys)}"/>' for number, view in enumerate(views))
    row, column = panel.query
    return (
        f'<svg class="groups{len(views)}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="the keys that query {row}, {column} sees">'
        f'<clipPath id="{name}"><path class="seen" d="{either}"/></clipPath>'
        f'<image href="{photo}" width="{width}" height="{height}" preserveAspectRatio="none" clip-path="url(#{name})"/>'
        f'{keys}<rect class="query" x="{column}" y="{row}" width="1" height="1"/></svg>'
    )


def cells(keys: npt.NDArray[np.bool_]) -> str:
    """An SVG path of unit squares, one for each key.

    >>> cells(np.array([[True, False], [False, True]]))
    'M0 0h1v1h-1zM1 1h1v1h-1z'
    """
    return "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(keys))


def tables_json(panel: Panel) -> str:
    """The panel's tables for the page's script: groups -> members -> axes, each as lists of plain numbers."""
    return json.dumps(plain_tables(bounds(panel.pattern, GRID)), separators=(",", ":"))


def plain_tables(table: Bounds) -> list[list[list[dict[str, Any]]]]:
    """A `Bounds` as plain lists and dicts; all there is to know about who sees whom.

    >>> plain_tables(bounds(Window(2), (4,)))
    [[[{'start': [0, 0, 2, 2], 'count': [2, 2, 2, 2], 'step': 1, 'length': 4}]]]
    """
    return [
        [
            [
                {"start": axis.start.tolist(), "count": axis.count.tolist(), "step": axis.step, "length": axis.length}
                for axis in member
            ]
            for member in group.members
        ]
        for group in table.groups
    ]
