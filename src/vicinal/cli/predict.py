"""`vicinal predict`: what a trained model takes pictures for."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from vicinal.cli.terminal import console
from vicinal.tasks.protocol import Panel
from vicinal.training import drawing, trained


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    model = trained.load(options.model)
    images, names = trained.read_pictures(model, options.images)
    found = trained.predict(model, images, names, options.top)
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    else:
        _print(found)
    if options.save is not None:  # last, so that the answer is there also where nothing can be drawn
        captions = [f"{one.classes[0]} {one.probabilities[0]:.0%}" for one in found]
        panels = [Panel(image, caption) for image, caption in zip(images, captions, strict=True)]
        drawing.save_panels(panels[: drawing.PANELS], Path(options.save))


def _print(found: list[trained.Prediction]) -> None:
    out = console()
    for one in found:
        guesses = ", ".join(f"{name} {chance:.1%}" for name, chance in zip(one.classes, one.probabilities, strict=True))
        out.print(f"{one.name}: {guesses}", soft_wrap=True)
