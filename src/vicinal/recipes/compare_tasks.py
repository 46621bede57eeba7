"""One OneFormer against a model for each task alone, and against itself without text.

`python -m vicinal.recipes.compare_tasks OUT` trains them all: the stem first, then one run after the other. Every run
is resumable, and a finished one is read, not repeated; so the comparison can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vicinal.models.checkpoint import read
from vicinal.recipes import segmentation
from vicinal.tasks.segmentation import Segmentation
from vicinal.training import train
from vicinal.training.checkpoint import save_weights, write_whole
from vicinal.training.recipe import Recipe
from vicinal.training.report import Report
from vicinal.training.trained import opened
from vicinal.training.written import override, to_plain

ORDER = (
    segmentation.scenes_oneformer,
    segmentation.scenes_panoptic,
    segmentation.scenes_semantic,
    segmentation.scenes_instance,
    segmentation.scenes_oneformer_without_text,
)


def run_one(recipe: Recipe, folder: Path, report: Report | None = None) -> dict[str, Any]:
    """What one run gave; a run that is there is gone on with, or read. Seconds are of the processor, of all parts."""
    result = folder / "result.json"
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    clock = folder / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    begin = time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome = train(recipe, folder, resume=True, report=report)
    finally:
        write_whole(clock, json.dumps(before + time.process_time() - begin))
    found = {
        "name": recipe.name,
        "steps": outcome.step,
        "images": outcome.step * recipe.loop.batch_size,
        "parameters": outcome.facts["parameters"],
        "metrics": outcome.metrics,
        "cpu_seconds": round(json.loads(clock.read_text()), 1),
    }
    write_whole(result, json.dumps(found, indent=2))
    return found


def compare(out: Path, changes: Sequence[str] = (), report: Report | None = None) -> dict[str, Any]:
    """The stem and every run; the summary is written after each."""
    runs = [run_one(segmentation.scenes_stem(), out / "stem", report)]
    for make in ORDER:
        recipe = override(make(), [f"task.stem={out / 'stem' / 'model.safetensors'}", *changes])
        runs.append(run_one(recipe, out / recipe.name, report))
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        assert isinstance(recipe.task, Segmentation)
        plain = {"loop": to_plain(recipe.loop), "rules": to_plain(recipe.task.rules), "data": to_plain(recipe.data)}
        summary = {"table": table(runs[1:]), "runs": runs, "settings": plain, "machine": machine}
        write_whole(out / "segmentation.json", json.dumps(summary, indent=2))
    return summary


def table(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """mIoU, AP and PQ in percent by run; a run lacks the metrics of tasks that it was not trained for.

    >>> table([{"name": "a", "metrics": {"miou": 0.5, "pq": 0.25}}])
    {'a': {'miou': 50.0, 'pq': 25.0}}
    """
    return {
        run["name"]: {
            name: round(100 * run["metrics"][name], 2) for name in ("miou", "ap", "pq") if name in run["metrics"]
        }
        for run in runs
    }


def ship(folder: Path, target: Path) -> None:
    """A run's weights as they come with the library: in 16 bits, without the text branch, training's alone."""
    recipe, info, _, path = opened(folder)
    assert isinstance(recipe.task, Segmentation)
    model = replace(recipe.task.model, text=None)
    recipe = replace(recipe, task=replace(recipe.task, model=model, stem=None))
    state = {
        name: tensor.half() for name, tensor in read(path, is_whole=True).state.items() if not name.startswith("text.")
    }
    save_weights(target, state, {"recipe": json.dumps(to_plain(recipe)), "info": json.dumps(to_plain(info))})
    assert len(recipe.task.build(info).model.state_dict()) == len(state)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes to every recipe but the stem's")
    parser.add_argument("--ship", type=Path, metavar="FILE", help="write the joint run's weights as they are shipped")
    options = parser.parse_args()
    if options.ship is not None:
        ship(options.out / ORDER[0].__name__, options.ship)
        return
    print(json.dumps(compare(options.out, options.changes)["table"], indent=2))


if __name__ == "__main__":
    main()
