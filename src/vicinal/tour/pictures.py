"""Pictures of a pattern as PNG files: the views of `vicinal show`, drawn with matplotlib.

Figures are made and saved as objects; nothing here touches matplotlib's global state or opens a window.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vicinal.ops.tiling import EMPTY, FULL, PARTIAL
from vicinal.tour.extras import require
from vicinal.tour.views import Reach, Seen, TileMap

View: TypeAlias = Seen | Reach | TileMap
Axes: TypeAlias = Any
"""matplotlib's, which is optional and therefore unknown to the type checker."""

INK, FAINT, PAPER = "#1b2333", "#8a93a5", "#ffffff"
UNSEEN, SEEN, QUERY = "#e9edf2", "#149c93", "#ff5a36"
TILE_COLORS = {FULL: "#0e6f6a", PARTIAL: "#f4b53f", EMPTY: UNSEEN}
TILE_WORDS = {FULL: "full", PARTIAL: "partial", EMPTY: "empty"}
DEPTHS = ("#0d3b52", "#149c93", "#9fd8a4", "#f6e7a1")
"""From the keys that one layer reaches to those that need the whole stack."""

PANEL_INCHES, STRIP_INCHES, GAP_INCHES, MARGIN_INCHES = 4.0, 0.5, 0.5, 0.25
TITLE_INCHES, SUBTITLE_INCHES, FOOT_INCHES = 0.19, 0.15, 0.42
"""Room for a line above a picture, and for the legend below it."""

MOST_COLUMNS, MOST_LEGEND_COLUMNS, MOST_NAMES = 3, 6, 4


def save_views(views: Sequence[View], path: str | Path, *, columns: int = MOST_COLUMNS) -> Path:
    """Draw views side by side and write them to a PNG file (or another kind that matplotlib knows by its ending).

    `save_views(seen(Near(7), (24, 24)), "near.png")` shows which keys the middle query sees.
    """
    if not views:
        raise ValueError("views must hold at least one view, got none")
    target = Path(path)
    figure = _figure(views, min(columns, len(views)))
    if target.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"the picture's name must end in .png (or .svg, .pdf), got {target.name!r}")
    figure.savefig(target, dpi=160, facecolor=PAPER)
    return target


def _figure(views: Sequence[View], columns: int) -> Any:
    figures = require("matplotlib.figure", "plot", "drawing")
    rows = [views[start : start + columns] for start in range(0, len(views), columns)]
    panels = [max(_inches(view)[1] for view in row) for row in rows]
    heads = [max(_head_inches(view) for view in row) for row in rows]
    height = sum(heads) + sum(panels) + len(rows) * FOOT_INCHES + 2 * MARGIN_INCHES
    width = columns * (PANEL_INCHES + GAP_INCHES) - GAP_INCHES + 2 * MARGIN_INCHES
    figure = figures.Figure(figsize=(width, height))
    top = height - MARGIN_INCHES
    for row, head, panel in zip(rows, heads, panels, strict=True):
        top -= head
        for column, view in enumerate(row):
            own_width, own_height = _inches(view)
            left = MARGIN_INCHES + column * (PANEL_INCHES + GAP_INCHES)
            box = (left / width, (top - own_height) / height, own_width / width, own_height / height)
            draw_view(figure.add_axes(box), view)
        top -= panel + FOOT_INCHES
    return figure


def _inches(view: View) -> tuple[float, float]:
    """Width and height of a view's picture: cells are square unless the picture is very long."""
    height, width = _image_of(view)[0].shape
    if max(height, width) > 8 * min(height, width):
        return (PANEL_INCHES, STRIP_INCHES) if width > height else (STRIP_INCHES, PANEL_INCHES)
    scale = PANEL_INCHES / max(width, height)
    return width * scale, height * scale


def _head_inches(view: View) -> float:
    title, subtitle = _words(view)
    return 0.18 + TITLE_INCHES * len(title) + SUBTITLE_INCHES * len(subtitle)


def draw_view(axes: Axes, view: View) -> None:
    """Draw one view into matplotlib axes."""
    image, colors, legend = _image_of(view)
    rules = require("matplotlib.colors", "plot", "drawing")
    patches = require("matplotlib.patches", "plot", "drawing")
    norm = rules.BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    axes.imshow(image, cmap=rules.ListedColormap(colors), norm=norm, interpolation="nearest", aspect="auto")
    _rule(axes, image.shape)
    title, subtitle = _words(view)
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate("\n".join(subtitle), (0, 1), xytext=(0, 6), color=FAINT, fontsize=8, linespacing=1.35, **above)
    lift = 9 + 72 * SUBTITLE_INCHES * len(subtitle)
    axes.annotate("\n".join(title), (0, 1), xytext=(0, lift), color=INK, fontsize=9.5, fontfamily="monospace", **above)
    axes.legend(
        handles=[patches.Patch(facecolor=color, edgecolor="none", label=label) for color, label in legend],
        loc="upper left",
        bbox_to_anchor=(0, 0),
        borderaxespad=0.5,
        borderpad=0,
        ncols=min(len(legend), MOST_LEGEND_COLUMNS),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.0,
        handleheight=1.0,
        handletextpad=0.5,
        columnspacing=1.2,
    )


def _rule(axes: Axes, shape: tuple[int, ...]) -> None:
    """Thin lines between cells, where cells are large enough to be told apart."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if max(shape) <= 72:
        width = 0.9 if max(shape) <= 36 else 0.4
        axes.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=PAPER, linewidth=width)
        axes.tick_params(which="minor", length=0)


Legend: TypeAlias = list[tuple[str, str]]


def _image_of(view: View) -> tuple[npt.NDArray[np.int64], list[str], Legend]:
    """A picture as numbers of colors `[rows, columns]`, the colors, and what they mean."""
    if isinstance(view, TileMap):
        legend = [(color, TILE_WORDS[kind]) for kind, color in TILE_COLORS.items()]
        return view.pairs().astype(np.int64), [TILE_COLORS[kind] for kind in sorted(TILE_COLORS)], legend
    if isinstance(view, Seen):
        colors = [PAPER, UNSEEN, SEEN, QUERY]
        legend = [(SEEN, "key it sees"), (UNSEEN, "key it does not see")]
        image = view.keys + 1
    else:
        depths = _shades(len(view.names))
        colors = [PAPER, UNSEEN, *depths, QUERY]
        legend = [(color, f"{depth}" if depth > 1 else "1 layer") for depth, color in enumerate(depths, 1)]
        image = view.layers + 1
    if view.has_own_place:
        image = np.array(image)
        image[view.query] = len(colors) - 1
        legend = [(QUERY, "query"), *legend]
    return _side_by_side(image), colors, legend


def _side_by_side(image: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A grid of 1 to 3 axes as one picture: a strip, the plane itself, or frames in rows with a gap between."""
    if image.ndim < 3:
        return np.atleast_2d(image)
    frames, height, width = image.shape
    columns = min(frames, math.ceil(math.sqrt(frames * height / width)))
    rows = math.ceil(frames / columns)
    sheet = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1), dtype=np.int64)
    for number, frame in enumerate(image):
        top, left = (number // columns) * (height + 1), (number % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _shades(number: int) -> list[str]:
    """So many colors along `DEPTHS`."""
    rules = require("matplotlib.colors", "plot", "drawing")
    ramp = rules.LinearSegmentedColormap.from_list("depths", DEPTHS)
    return [rules.to_hex(ramp(place)) for place in np.linspace(0, 1, max(number, 2))[:number]]


def _words(view: View) -> tuple[list[str], list[str]]:
    """The lines of the title and of the subtitle."""
    if isinstance(view, TileMap):
        work = view.work
        return _wrapped(view.name), [
            f"rows: query tiles {_times(work.query_tile)}, columns: key tiles {_times(work.key_tile)}",
            f"{work.visited:,} visits, {work.full:,} of them full; {work.waste:.2f} pairs computed per pair needed",
        ]
    if isinstance(view, Seen):
        number, size, verb, name = int(view.keys.sum()), view.keys.size, "sees", view.name
    else:
        number, size, verb = int((view.layers > 0).sum()), view.layers.size, "hears of"
        name = " > ".join(view.names if len(view.names) <= MOST_NAMES else (*view.names[:2], "...", view.names[-1]))
    place = ", ".join(map(str, view.query))
    return _wrapped(name), [f"query ({place}) {verb} {number:,} of {size:,} keys, {100 * number / size:.1f} %"]


def _wrapped(title: str) -> list[str]:
    return textwrap.wrap(title, 46, max_lines=3, placeholder=" ...")


def _times(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))
