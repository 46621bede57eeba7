"""`vicinal train`: a recipe, or the list of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from rich import box
from rich.table import Table

from vicinal.cli.terminal import console
from vicinal.recipes.book import RECIPES, find
from vicinal.training.bar import Bar, JsonLines
from vicinal.training.launch import train_on
from vicinal.training.memory import keep_memory
from vicinal.training.written import to_plain


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    if options.recipe is None:
        list_recipes(options.json)
        return
    recipe = find(options.recipe, options.changes)
    folder = Path("runs") / recipe.name if options.out is None else Path(options.out)
    if options.show:
        print(json.dumps(to_plain(recipe), indent=2))
        return
    report = JsonLines() if options.json else Bar()
    is_first = os.environ.get("RANK", "0") == "0"  # under torchrun every process comes here
    keep_memory()
    outcome = train_on(options.processes, recipe, folder, resume=options.resume, report=report)
    if not is_first:
        return
    plain = {**dataclasses.asdict(outcome), "folder": str(outcome.folder), "weights": str(outcome.weights)}
    if options.json:
        print(json.dumps({"event": "end", **plain}), flush=True)
        return
    table = Table(f"{recipe.name}, step {outcome.step}", "last", "best", box=box.SIMPLE_HEAD)
    for name, value in outcome.metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{outcome.best[name]:.4f}")
    out = console()
    out.print(table)
    out.print(f"{outcome.weights} ({outcome.seconds:.0f} s)", soft_wrap=True)


def list_recipes(as_json: bool) -> None:
    """Every recipe with what is known of it."""
    known = [(name, make().status, (make.__doc__ or "").split("\n")[0]) for name, make in RECIPES.items()]
    if as_json:
        print(json.dumps([{"name": name, "status": status, "about": about} for name, status, about in known], indent=2))
        return
    table = Table("recipe", "about", "status", box=box.SIMPLE_HEAD)
    for name, status, about in known:
        table.add_row(name, about, status)
    console().print(table)
