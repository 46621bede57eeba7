"""`vicinal evaluate`: the metrics of a trained model on its test split."""

from __future__ import annotations

import argparse
import json

from vicinal.cli.terminal import console
from vicinal.training import trained
from vicinal.training.written import override


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    model = trained.load(options.model)
    values = trained.evaluate(model, override(model.recipe, options.changes))
    if options.json:
        print(json.dumps({"model": str(model.path), "recipe": model.recipe.name, **values}, indent=2))
        return
    out = console()
    for name, value in values.items():
        out.print(f"{name.replace('_', ' ')}: {value:.4f}")
