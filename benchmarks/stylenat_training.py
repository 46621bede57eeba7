"""How StyleNAT's heads learn to draw clothes: Frechet distances over a run and over its baseline's, and samples.

    vicinal train stylenat_fashion_mnist --out runs/a
    vicinal train stylenat_local_fashion_mnist --out runs/b
    python benchmarks/stylenat_training.py runs/a runs/b

Every checkpoint's averaged generator draws the same latents, which are measured against the first test images by
EfficientNet-Lite0. Writes benchmarks/results/stylenat-fashion.json, a sheet of samples over time
(benchmarks/training/stylenat_fashion_mnist.png, the first run on the left), and the table of docs/stylenat.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import tempfile
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from vicinal.data.saving import save_png
from vicinal.data.stream import Stream
from vicinal.measure import machine
from vicinal.models.stylenat import StyleNAT
from vicinal.tasks.adversarial import Adversarial
from vicinal.tasks.image_distance import Features, compare, open_extractor
from vicinal.tasks.sampling import Sampler
from vicinal.training.checkpoint import Store
from vicinal.training.journal import read_lines
from vicinal.training.recipe import Recipe
from vicinal.training.written import from_plain

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "stylenat-fashion.json"
SHEET = HERE / "training" / "stylenat_fashion_mnist.png"
DOCS = HERE.parent / "docs" / "stylenat.md"
START, END = "<!-- training:start -->", "<!-- training:end -->"
TITLES = {"stylenat_fashion_mnist": "two groups of heads", "stylenat_local_fashion_mnist": "one local window"}
COLUMNS, ZOOM = 12, 2


def recipe_of(run: pathlib.Path) -> Recipe:
    """The recipe of a run folder."""
    recipe = from_plain(json.loads((run / "recipe.json").read_text()))
    assert isinstance(recipe, Recipe)
    return recipe


def generator_at(run: pathlib.Path, step: int) -> StyleNAT:
    """The averaged generator of a checkpoint."""
    task = recipe_of(run).task
    assert isinstance(task, Adversarial)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        dcp_to_torch_save(Store(run / "checkpoints").path(step), file.name)
        held = torch.load(file.name, weights_only=True)["average"]
    model = StyleNAT(task.generator)
    prefix = "generator."
    state = {name.removeprefix(prefix): part for name, part in held.items() if name.startswith(prefix)}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def real_features(recipe: Recipe, extractor: Any, count: int) -> Features:
    """Of the first test images, prepared as the recipe says."""
    found = Features(extractor)
    for batch in Stream(recipe.data.open("test"), recipe.test_steps, batch_size=50).evaluation():
        if len(found) >= count:
            break
        found.add(batch.images[: count - len(found)])
    return found


def curve(run: pathlib.Path, real: Features, count: int, every: int) -> list[dict[str, Any]]:
    """A point for every checkpoint at a multiple of `every` steps, and for the last."""
    recipe, steps = recipe_of(run), Store(run / "checkpoints").steps()
    watched = {line["step"]: line for line in read_lines(run / "metrics.jsonl") if line["split"] == "test"}
    points = []
    for step in steps:
        if step % every and step != steps[-1]:
            continue
        made = Features(real.extractor)
        sampler = Sampler(generator_at(run, step))
        for part in sampler.batches(range(count), 50):
            made.add(part)
        found = dataclasses.asdict(compare(real, made))
        point = {"step": step, "images": step * recipe.loop.batch_size, **found}
        if step in watched:
            point["pixel_distance"] = watched[step]["pixel_distance"]
        points.append(point)
        print(recipe.name, step, round(found["frechet"], 1), flush=True)
    return points


def sheet(runs: list[pathlib.Path], steps: list[int]) -> torch.Tensor:
    """A row for each of `steps`, the runs side by side, each column one latent: `[1, height, width]`."""
    rows = []
    for step in steps:
        parts = []
        for run in runs:
            sampler = Sampler(generator_at(run, step))
            parts += [picture for _, picture in sampler.draw(range(COLUMNS))]
            parts.append(torch.full_like(parts[0][..., :8], 255))
        rows.append(torch.cat(parts[:-1], -1))
    whole = torch.cat(rows, -2)
    return whole.repeat_interleave(ZOOM, -1).repeat_interleave(ZOOM, -2)


def table(found: dict[str, Any]) -> str:
    """All runs side by side: distances, and in brackets precision and recall where they were taken."""
    runs = found["runs"]
    points: dict[int, dict[str, dict[str, Any]]] = {}
    for name, line in runs.items():
        for point in line:
            points.setdefault(point["step"], {})[name] = point
    head = " | ".join(TITLES.get(name, name) for name in runs)
    lines = [f"| steps | images | {head} |", "|---:|---:|" + "---:|" * len(runs)]
    for step, held in sorted(points.items()):
        cells = " | ".join(figures(held[name]) if name in held else "not measured" for name in runs)
        lines.append(f"| {step} | {next(iter(held.values()))['images']:,} | {cells} |")
    count = next(iter(runs.values()))[-1]["generated"]
    lines += [
        "",
        f"Fréchet distance (precision, recall where measured) of {count} samples to {found['real']},",
        f"by {found['extractor']}.",
    ]
    return "\n".join(lines)


def figures(point: dict[str, Any]) -> str:
    """A point of a curve for reading."""
    distance = f"{point['frechet']:.0f}"
    return f"{distance} ({point['precision']:.2f}, {point['recall']:.2f})" if "precision" in point else distance


def show(found: dict[str, Any], docs: pathlib.Path) -> None:
    """Put the table between the markers of a page."""
    head, rest = docs.read_text().split(START)
    docs.write_text(f"{head}{START}\n{table(found)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--size", type=int, default=64, help="pixels a side that EfficientNet-Lite0 looks at")
    parser.add_argument("--every", type=int, default=375)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--sheet", type=pathlib.Path, default=SHEET)
    options = parser.parse_args()
    extractor = open_extractor(size=options.size)
    real = real_features(recipe_of(options.runs[0]), extractor, options.count)
    found: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "extractor": extractor.name,
        "real": f"the first {options.count} test images",
        "runs": {recipe_of(run).name: curve(run, real, options.count, options.every) for run in options.runs},
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    shared = sorted(set.intersection(*({point["step"] for point in points} for points in found["runs"].values())))
    picture = sheet(options.runs, shared)
    save_png(picture.permute(1, 2, 0).numpy(), options.sheet)
    if options.output == RESULTS:
        show(found, DOCS)


if __name__ == "__main__":
    main()
