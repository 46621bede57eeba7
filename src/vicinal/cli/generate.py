"""`vicinal generate`: pictures of a generator, as files, as a sheet, as a film, and where its heads look."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vicinal.cli.counting import counting
from vicinal.cli.terminal import console
from vicinal.data.dataset import Image
from vicinal.data.saving import check_film, enlarged, save_film, save_png, sheet
from vicinal.models.registry import config_of
from vicinal.recipes.shipped import shipped_generator
from vicinal.tasks.head_maps import group_panels
from vicinal.tasks.sampling import Sampler, checked, latents_of
from vicinal.tour.extras import require
from vicinal.training.drawing import save_panels
from vicinal.training.generator import Generator, open_generator
from vicinal.training.written import override

VISIBLE = 128
"""Pixels a side that pictures on sheets and in films have at least, unless --zoom says otherwise."""

GAP = 2


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    seeds = _seeds(options)
    places = _places(options)
    generator = _generator(options)
    if generator.model.channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, {generator.name} makes {generator.model.channels}")
    sampler = Sampler(generator.model, options.truncation, options.batch_size)
    for kind, place in places.items():
        (place if kind == "folder" else place.parent).mkdir(parents=True, exist_ok=True)
    zoom = options.zoom or max(1, VISIBLE // generator.model.image_size)
    frames = round(len(seeds) * options.seconds * options.fps) if "film" in places else 0
    wanted = len(seeds) if {"folder", "sheet"} & set(places) else 0
    files: list[Path] = []
    with counting(wanted + frames, "pictures", quiet=options.json) as announce:
        if wanted:
            files += _draw(sampler, seeds, places, options.columns, zoom, announce)
        if frames:
            walk = sampler.between(seeds, frames, lambda done: announce(wanted + done))
            save_film([enlarged(_pixels(frame), zoom) for frame in walk], places["film"], options.fps)
            files.append(places["film"])
    if "heads" in places:
        mapped = sampler.mapped(latents_of(seeds[:1], generator.model.latent_size))
        save_panels(group_panels(generator.model, mapped), places["heads"])
        files.append(places["heads"])
    _tell(generator, sampler, seeds, files, options.json)


def _seeds(options: argparse.Namespace) -> range:
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    seeds = range(options.seed, options.seed + options.count)
    checked(seeds)
    return seeds


def _places(options: argparse.Namespace) -> dict[str, Path]:
    """Where each kind of output goes, checked before anything is made."""
    given = {"folder": options.out, "sheet": options.grid, "film": options.video, "heads": options.attention}
    places = {kind: Path(place).expanduser() for kind, place in given.items() if place is not None}
    if not places:
        places = {"folder": Path("generated")}
    for kind in ("sheet", "heads"):
        if kind in places and places[kind].suffix.lower() != ".png":
            raise ValueError(f"pictures end in .png, got {places[kind].name!r}")
    require("PIL", "plot", "writing pictures")
    if "heads" in places:
        require("matplotlib", "plot", "--attention")
    if "film" in places:
        check_film(places["film"])
        if not 0 < options.seconds <= 60 or not 1 <= options.fps <= 120:
            raise ValueError(
                f"--seconds must be in 0 .. 60 and --fps in 1 .. 120, got {options.seconds:g} and {options.fps:g}"
            )
    if options.zoom is not None and options.zoom < 1:
        raise ValueError(f"--zoom must be at least 1, got {options.zoom}")
    if options.columns is not None and options.columns < 1:
        raise ValueError(f"--columns must be at least 1, got {options.columns}")
    return places


def _generator(options: argparse.Namespace) -> Generator:
    weights = options.weights
    if options.untrained and weights is not None:
        raise ValueError("--untrained and --weights exclude each other")
    if options.changes and options.model is None:
        raise ValueError("changes to a configuration need --model, whose they are")
    if weights is None and not options.untrained:
        weights = shipped_generator()
    overrides: dict[str, Any] = {}
    if options.changes:
        config = override(config_of(options.model), options.changes)
        overrides = {name: getattr(config, name) for name in (one.partition("=")[0] for one in options.changes)}
    return open_generator(weights, options.model, overrides, options.device)


def _draw(
    sampler: Sampler,
    seeds: Sequence[int],
    places: dict[str, Path],
    columns: int | None,
    zoom: int,
    announce: Callable[[int], None],
) -> list[Path]:
    files, shown = [], []
    for done, (seed, picture) in enumerate(sampler.draw(seeds), 1):
        pixels = _pixels(picture)
        if "folder" in places:
            files.append(places["folder"] / f"{seed:06}.png")
            save_png(pixels, files[-1])
        if "sheet" in places:
            shown.append(enlarged(pixels, zoom))
        announce(done)
    if shown:
        save_png(sheet(shown, columns or math.ceil(math.sqrt(len(shown))), GAP), places["sheet"])
        files.append(places["sheet"])
    return files


def _pixels(picture: torch.Tensor) -> Image:
    pixels: Image = picture.permute(1, 2, 0).numpy()
    return pixels


def _tell(generator: Generator, sampler: Sampler, seeds: range, files: list[Path], as_json: bool) -> None:
    model = generator.model
    device = model.constant.device.type
    facts = {
        "model": generator.name,
        "weights": generator.weights,
        "image_size": model.image_size,
        "truncation": sampler.truncation,
        "seeds": [seeds.start, seeds.stop - 1],
        "device": device,
        "threads": torch.get_num_threads(),
        "batch_size": sampler.batch_size,
        "images": sampler.pictures,
        "seconds": round(sampler.seconds, 4),
        "images_per_second": round(sampler.pictures_per_second, 2),
        "files": [str(path) for path in files],
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    out = console()
    note = "" if generator.weights != "none" else ", untrained: noise"
    out.print(f"{generator.name}, {model.image_size}x{model.image_size}, weights: {generator.weights}{note}")
    if sampler.pictures:
        number = torch.get_num_threads()
        threads = "" if device != "cpu" else ", 1 thread" if number == 1 else f", {number} threads"
        out.print(
            f"{sampler.pictures_per_second:.1f} images/s ({sampler.pictures} in {sampler.seconds:.1f} s on "
            f"{device}{threads}, {sampler.batch_size} at once)"
        )
    singles = [path for path in files if path.stem.isdigit()]
    if singles:
        range_of = f"{len(singles)} pictures, {singles[0]} to {singles[-1].name}"
        out.print(range_of if len(singles) > 1 else str(singles[0]), soft_wrap=True)
    for path in files[len(singles) :]:
        out.print(str(path), soft_wrap=True)
