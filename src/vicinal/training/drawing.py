"""Pictures of a run: curves of its metrics, and a sheet of what the model makes of test samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vicinal.tasks.protocol import Panel
from vicinal.training.checkpoint import write_bytes_whole

PANELS = 24
_COLUMNS = 8
_BESIDE = ("step", "epoch", "split", "images_per_second", "learning_rate")
_COLORS = {True: "tab:green", False: "tab:red", None: "black"}


class NothingToDrawWith(ImportError):
    """matplotlib is missing."""


def figure(columns: float, rows: float) -> Any:
    """A matplotlib figure of its own, which changes no setting of anybody's."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise NothingToDrawWith(
            "no pictures are drawn, because matplotlib is not here: pip install vicinal[plot]"
        ) from None
    made = Figure(figsize=(columns, rows), dpi=100)
    FigureCanvasAgg(made)
    return made


def save_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Every metric of a run over its epochs, training and test."""
    names = list(dict.fromkeys(name for line in lines for name in line if name not in _BESIDE))
    if not names:
        return
    sheet = figure(4.2 * len(names), 3.2)
    for axes, name in zip(sheet.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for split, style in (("train", {"alpha": 0.35, "linewidth": 0.8}), ("test", {"marker": "o", "markersize": 3})):
            points = [(line["epoch"], line[name]) for line in lines if line["split"] == split and name in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, **style)
        axes.set_xlabel("epoch")
        axes.set_title(name.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend()
    sheet.subplots_adjust(left=0.3 / len(names), right=0.99, bottom=0.17, top=0.9, wspace=0.25)
    save_figure(sheet, path)


def save_panels(panels: Sequence[Panel], path: Path) -> None:
    """Pictures with captions in rows; green where right, red where wrong."""
    if not panels:
        return
    rows = -(-len(panels) // _COLUMNS)
    sheet = figure(1.5 * _COLUMNS, 1.95 * rows)
    for number, panel in enumerate(panels):
        row, column = divmod(number, _COLUMNS)
        left, bottom = (column + 0.06) / _COLUMNS, (rows - row - 0.98) / rows
        axes = sheet.add_axes((left, bottom, 0.88 / _COLUMNS, 0.72 / rows))
        axes.set_axis_off()  # ticks and labels would take most of the time
        pixels = np.repeat(panel.image, 3, -1) if panel.image.shape[-1] == 1 else panel.image
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(panel.caption, fontsize=7, color=_COLORS[panel.is_right], pad=3)
    save_figure(sheet, path)


def save_figure(sheet: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    drawn = io.BytesIO()
    sheet.savefig(drawn, format="png")
    write_bytes_whole(path, drawn.getvalue())
