"""Six mixers in the same pyramid at the same cost and budget, over seeds: `python -m vicinal.recipes.compare OUT`.

Every run is resumable, and a finished one is read, not repeated; so the comparison can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from vicinal.models.compact import CompactConfig, Mixer, build
from vicinal.recipes.small import mixer_fashion_mnist
from vicinal.tasks.classification import Classification
from vicinal.training import train
from vicinal.training.checkpoint import write_whole
from vicinal.training.drawing import figure, save_figure
from vicinal.training.recipe import Recipe
from vicinal.training.report import Report
from vicinal.training.written import override, to_plain


def run_one(recipe: Recipe, folder: Path, report: Report | None = None) -> dict[str, Any]:
    """What one run gave; a run that is there is gone on with, or read."""
    result = folder / "result.json"
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    assert isinstance(recipe.task, Classification)
    assert isinstance(recipe.task.model, CompactConfig)
    cost = build(recipe.task.model).cost(28)
    begin = time.process_time()
    is_new = not (folder / "recipe.json").exists()
    outcome = train(recipe, folder, resume=True, report=report)
    found = {
        "mixer": recipe.task.model.mixer,
        "seed": recipe.loop.seed,
        "multiply_adds": cost.nominal,
        "parameters": cost.parameters,
        "mlp_ratio": recipe.task.model.mlp_ratio,
        "steps": outcome.step,
        "metrics": outcome.metrics,
        "cpu_seconds": round(time.process_time() - begin, 1) if is_new else None,
    }
    write_whole(result, json.dumps(found, indent=2))
    return found


def compare(
    out: Path, seeds: Sequence[int], changes: Sequence[str] = (), report: Report | None = None
) -> dict[str, Any]:
    """Every mixer with every seed; seeds in the outer loop, so that what is there is fair at any time."""
    runs = []
    for seed in seeds:
        for mixer in get_args(Mixer):
            recipe = override(mixer_fashion_mnist(mixer), [*changes, f"loop.seed={seed}", "loop.pictures=false"])
            runs.append(run_one(recipe, out / f"{mixer}-{seed}", report))
            summary = summarized(runs, to_plain(recipe.loop))
            write_whole(out / "mixers.json", json.dumps(summary, indent=2))
    draw(summary, out / "mixers.png")
    return summary


def summarized(runs: Sequence[dict[str, Any]], loop: dict[str, Any]) -> dict[str, Any]:
    """Mean and spread per mixer, best first, beside all runs.

    >>> runs = [{"mixer": "nat", "metrics": {"accuracy": value}} for value in (0.5, 0.75)]
    >>> summarized(runs, {})["mixers"]
    {'nat': {'accuracy': 0.625, 'lowest': 0.5, 'highest': 0.75, 'runs': 2}}
    """
    values: dict[str, list[float]] = {}
    for run in runs:
        values.setdefault(run["mixer"], []).append(run["metrics"]["accuracy"])
    table = {
        mixer: {"accuracy": statistics.mean(found), "lowest": min(found), "highest": max(found), "runs": len(found)}
        for mixer, found in sorted(values.items(), key=lambda item: -statistics.mean(item[1]))
    }
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    return {"mixers": table, "runs": list(runs), "loop": loop, "machine": machine}


def draw(summary: dict[str, Any], path: Path) -> None:
    """A bar per mixer from its lowest to its highest seed, a dot at the mean."""
    sheet = figure(6, 3)
    axes = sheet.add_axes((0.17, 0.17, 0.8, 0.75))
    for row, numbers in enumerate(reversed(summary["mixers"].values())):
        axes.plot([100 * numbers["lowest"], 100 * numbers["highest"]], [row, row], linewidth=6, alpha=0.4)
        axes.plot([100 * numbers["accuracy"]], [row], "o", color="black")
        axes.text(100 * numbers["highest"] + 0.05, row + 0.15, f"{100 * numbers['accuracy']:.2f}", fontsize=8)
    axes.set_yticks(range(len(summary["mixers"])), list(reversed(summary["mixers"])))
    axes.set_xlabel("test accuracy, %: mean and range over seeds")
    axes.grid(alpha=0.3, axis="x")
    save_figure(sheet, path)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes to every recipe")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    summary = compare(options.out, range(options.seeds), options.changes)
    print(json.dumps(summary["mixers"], indent=2))


if __name__ == "__main__":
    main()
