"""Building the tour: every picture and figure, in order, and then the page."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vicinal.measure.machine import describe
from vicinal.measure.problems import Problem, find
from vicinal.pattern import Near, Pattern, Window
from vicinal.tour import live, race, smoothing
from vicinal.tour.extras import require
from vicinal.tour.page import Contents, render
from vicinal.tour.photo import coffee
from vicinal.tour.pictures import save_views
from vicinal.tour.systems import SYSTEMS, Row, System, run_systems
from vicinal.tour.views import reach, tile_maps
from vicinal.version import __version__

Announce = Callable[[int, int, str], None]
"""Told before each step: its number from 1, how many there are, and what begins."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much the tour does: the photograph's size, what is smoothed, run and timed, and for how long."""

    shrink: int
    patterns: tuple[Pattern, ...]
    problems: tuple[tuple[str, Problem], ...]
    models: tuple[live.Model, ...]
    smoothing_seconds: float
    race_seconds: float
    live_seconds: float


FULL = Scale(
    2,
    smoothing.PATTERNS,
    race.PROBLEMS,
    live.MODELS,
    smoothing_seconds=2.0,
    race_seconds=1.2,
    live_seconds=1.5,
)
QUICK = Scale(
    8,
    smoothing.PATTERNS[:1],
    (("NAT, third level", find(["nat-14x14"])[0]),),
    live.QUICK_MODELS,
    smoothing_seconds=0.05,
    race_seconds=0.05,
    live_seconds=0.05,
)

STACKS: tuple[list[Pattern], ...] = (
    [Near(7)] * 4,
    [Window(7), Window(7, shift=3)] * 2,
    [Near(7), Near(7, dilation=8)] * 2,
)
"""Four layers of NAT, of Swin and of DiNAT."""

STACK_GRID = (56, 56)
TILED: tuple[Pattern, ...] = (Near(12), Near(12, stride=4), Window(8, shift=4))
TILED_GRID, TILE = (28, 28), (4, 4)


@dataclasses.dataclass(frozen=True)
class Tour:
    """What was built: the page, and the figures on it."""

    page: Path
    images: tuple[Path, ...]
    smoothing: smoothing.Smoothing
    races: tuple[race.Result, ...]
    live: tuple[live.Result, ...]
    systems: tuple[Row, ...]
    seconds: float


def build(
    out: str | Path,
    *,
    scale: Scale = FULL,
    systems: Sequence[System] = SYSTEMS,
    announce: Announce = lambda number, total, title: None,
) -> Tour:
    """Build `index.html` in the folder `out`, with its pictures in `out/images`; under a minute on two cores.

    `build("demo", scale=QUICK)` makes a smaller one in a few seconds. What is there already is written over.
    """
    for module in ("matplotlib", "PIL", "skimage"):
        require(module, "demo", "the tour")
    start = time.perf_counter()
    folder = Path(out)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    steps = _Steps(announce, _number_of_steps(scale, systems))
    images = _Images(folder)

    steps.begin("drawing patterns over a photograph")
    photo = coffee()
    images.save_pixels("photo", photo.pixels)
    steps.begin("drawing layers and tiles")
    images.save_stacks()
    images.save_tiles()
    smoothed = smoothing.compare_smoothings(
        photo.shrunk(scale.shrink), scale.patterns, seconds=scale.smoothing_seconds, begin=steps.begin
    )
    images.save_smoothing(smoothed)
    races = tuple(race.race(scale.problems, seconds=scale.race_seconds, begin=steps.begin))
    hosted = tuple(live.run_models(scale.models, seconds=scale.live_seconds, begin=steps.begin))
    rows = tuple(run_systems(folder / "images", systems, begin=steps.begin))
    images.add_systems(rows)

    seconds = time.perf_counter() - start
    contents = Contents(
        images=images.places,
        smoothing=smoothed,
        races=races,
        live=hosted,
        systems=rows,
        machine=describe(),
        credit=photo.credit,
        version=__version__,
        seconds=seconds,
    )
    page = folder / "index.html"
    page.write_text(render(contents), "utf-8")
    files = tuple(folder / place for place in images.places.values())
    return Tour(page, files, smoothed, races, hosted, rows, seconds)


def _number_of_steps(scale: Scale, systems: Sequence[System]) -> int:
    built = sum(system.run is not None for system in systems)
    return 2 + len(scale.patterns) + 1 + 2 * len(scale.problems) + len(scale.models) + built


class _Steps:
    """Counts what begins, and tells it."""

    def __init__(self, announce: Announce, total: int) -> None:
        self.announce, self.total, self.number = announce, total, 0

    def begin(self, title: str) -> None:
        self.number += 1
        self.announce(self.number, self.total, title)


class _Images:
    """The pictures beside the page, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, str] = {}

    def save_pixels(self, name: str, pixels: torch.Tensor) -> None:
        """Write a picture `[height, width, 3]` with values in 0..1."""
        image = require("PIL.Image", "demo", "the tour")
        values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
        image.fromarray(values.numpy()).save(self._place(name))

    def save_stacks(self) -> None:
        save_views([reach(layers, STACK_GRID) for layers in STACKS], self._place("stacks"))

    def save_tiles(self) -> None:
        views = [view for pattern in TILED for view in tile_maps(pattern, TILED_GRID, query_tile=TILE)]
        save_views(views, self._place("tiles"))

    def save_smoothing(self, smoothed: smoothing.Smoothing) -> None:
        self.save_pixels("original", smoothed.original)
        self.save_pixels("noisy", smoothed.noisy.picture)
        self.save_pixels("gaussian", smoothed.gaussian.picture)
        for number, result in enumerate(smoothed.results):
            self.save_pixels(f"smooth{number}", result.picture)

    def add_systems(self, rows: Sequence[Row]) -> None:
        """Take up the pictures that the systems made themselves."""
        for row in rows:
            if row.outcome is not None:
                place = os.path.relpath(row.outcome.picture, self.folder)
                self.places[row.system.name] = place.replace(os.sep, "/")

    def _place(self, name: str) -> Path:
        self.places[name] = f"images/{name}.png"
        return self.folder / self.places[name]
