"""`vicinal evaluate`: the metrics of a trained model on its test split."""

from __future__ import annotations

import argparse
import json

from vicinal.cli.terminal import console
from vicinal.training import trained
from vicinal.training.written import override


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    recipe, info, task, path = trained.opened(options.model)
    values = trained.measured(task, info, override(recipe, options.changes))
    if options.json:
        print(json.dumps({"model": str(path), "recipe": recipe.name, **values}, indent=2))
        return
    out = console()
    for name, value in values.items():
        out.print(f"{name.replace('_', ' ')}: {value:.4f}")
