"""`vicinal distance`: how far the pictures in one folder are from those in another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from rich.console import Console

from vicinal.cli.counting import counting
from vicinal.cli.terminal import console
from vicinal.tasks.image_distance import Comparison, compare, folder_features, open_extractor, picture_files


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    extractor = open_extractor(options.inception, options.size)
    numbers = [len(picture_files(folder)) for folder in (options.real, options.generated)]
    start = time.perf_counter()
    with counting(sum(numbers), "pictures", quiet=options.json) as announce:
        real = folder_features(extractor, options.real, options.batch_size, lambda done, _: announce(done))
        generated = folder_features(
            extractor, options.generated, options.batch_size, lambda done, _: announce(numbers[0] + done)
        )
    speed = sum(numbers) / (time.perf_counter() - start)
    found = compare(real, generated, options.k)
    if options.json:
        print(json.dumps({**dataclasses.asdict(found), "images_per_second": round(speed, 2)}, indent=2))
        return
    out = console()
    print_comparison(found, out)
    out.print(f"{speed:.1f} images/s")


def print_comparison(found: Comparison, out: Console) -> None:
    """A line for each figure, the extractor first."""
    out.print(f"features: {found.extractor}")
    out.print(f"pictures: {found.real} real, {found.generated} generated")
    out.print(f"Fréchet distance: {found.frechet:.3f}")
    out.print(f"precision: {found.precision:.4f} (k={found.k})")
    out.print(f"recall: {found.recall:.4f} (k={found.k})")
    if found.caution:
        out.print(found.caution, soft_wrap=True)
