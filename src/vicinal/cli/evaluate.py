"""`vicinal evaluate`: a classifier's metrics on its test split, or how far a generator's pictures are from it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from vicinal.cli.counting import counting
from vicinal.cli.distance import print_comparison
from vicinal.cli.terminal import console
from vicinal.data.dataset import Split
from vicinal.tasks.adversarial import Adversarial
from vicinal.tasks.image_distance import open_extractor
from vicinal.training import trained
from vicinal.training.generator import measure, open_generator, recipe_of
from vicinal.training.recipe import Recipe
from vicinal.training.written import override

COUNT = 10_000
"""Pictures of a generator that are measured, and as many real ones."""


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    place = Path(options.model)
    path = place / "model.safetensors" if place.is_dir() else place
    written = recipe_of(path) if path.is_file() else None
    if written is not None and isinstance(written.task, Adversarial):
        _run_generator(options, override(written, options.changes))
        return
    for name in ("inception", "size", "count", "split"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for generators, and {path} is of none")
    recipe, info, task, path = trained.opened(options.model)
    values = trained.measured(task, info, override(recipe, options.changes))
    if options.json:
        print(json.dumps({"model": str(path), "recipe": recipe.name, **values}, indent=2))
        return
    out = console()
    for name, value in values.items():
        out.print(f"{name.replace('_', ' ')}: {value:.4f}")


def _run_generator(options: argparse.Namespace, recipe: Recipe) -> None:
    extractor = open_extractor(options.inception, options.size)
    generator = open_generator(options.model)
    count = COUNT if options.count is None else options.count
    split: Split = "test" if options.split is None else options.split
    with counting(2 * count, "pictures", quiet=options.json) as announce:
        found = measure(generator, extractor, recipe, count=count, split=split, announce=announce)
    if options.json:
        plain = {"model": generator.weights, "recipe": recipe.name, **dataclasses.asdict(found)}
        print(json.dumps(plain, indent=2))
        return
    print_comparison(found, console())
