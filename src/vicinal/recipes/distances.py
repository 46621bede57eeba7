"""How far the pictures of trained generators are from real ones: `python -m vicinal.recipes.distances RUN RUN`.

All are measured in one go, by the same extractor, against the same pictures; the answer says which. Without `--out` it
goes where the tour reads it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vicinal.recipes.shipped import FOLDER, GENERATOR
from vicinal.tasks.image_distance import open_extractor
from vicinal.training.checkpoint import write_whole
from vicinal.training.generator import measure, open_generator

RESULT = FOLDER / f"{GENERATOR}.json"
BASELINE = "stylenat_local_fashion_mnist"
"""The recipe whose heads all share one local window."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Distances of the generator that comes with the library and of its baseline, and how they were measured."""

    ours: float
    baseline: float
    extractor: str
    pictures: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure runs and write the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or files of weights that tell their recipe")
    parser.add_argument("--inception", type=Path, help="pytorch-fid's weights; EfficientNet-Lite0 without")
    parser.add_argument("--size", type=int, default=None, help="pixels a side that EfficientNet-Lite0 looks at")
    parser.add_argument("--count", type=int, default=10_000, help="pictures, and as many real ones")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    extractor = open_extractor(options.inception, options.size)
    found = []
    for run in options.runs:
        generator = open_generator(run)
        found.append(
            {"recipe": generator.name, **dataclasses.asdict(measure(generator, extractor, count=options.count))}
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    write_whole(options.out, json.dumps({"runs": found}, indent=2) + "\n")


def read(path: Path = RESULT) -> Measured | None:
    """What was measured of the shipped generator and its baseline; None where nothing was."""
    if not path.is_file():
        return None
    runs: dict[str, dict[str, Any]] = {run["recipe"]: run for run in json.loads(path.read_text("utf-8"))["runs"]}
    if GENERATOR not in runs or BASELINE not in runs:
        return None
    ours, baseline = runs[GENERATOR], runs[BASELINE]
    if (ours["extractor"], ours["generated"]) != (baseline["extractor"], baseline["generated"]):
        raise ValueError(f"{path}: the generator and its baseline were not measured alike; measure both in one go")
    return Measured(ours["frechet"], baseline["frechet"], ours["extractor"], ours["generated"])


if __name__ == "__main__":
    main()
