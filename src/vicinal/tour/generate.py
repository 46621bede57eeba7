"""The row of StyleNAT: clothes that a small generator makes just now, and where its groups of heads look."""

from __future__ import annotations

from pathlib import Path

import torch

from vicinal.data.dataset import DataMissing
from vicinal.data.saving import enlarged
from vicinal.recipes import distances
from vicinal.recipes.shipped import GENERATOR, shipped_generator
from vicinal.tasks.head_maps import group_panels
from vicinal.tasks.protocol import Panel
from vicinal.tasks.sampling import Sampler, latents_of
from vicinal.tour.systems import Outcome
from vicinal.training.drawing import save_panels
from vicinal.training.generator import Generator, open_generator

SHOWN = 24
TIMED = 64
UNTRAINED = "stylenat_fashion32"


def show_stylenat(folder: Path) -> Outcome:
    """StyleNAT's row; of fresh weights, and saying so, where no trained ones come with the library."""
    generator, is_trained = _generator()
    sampler = Sampler(generator.model)
    drawn = dict(sampler.draw(range(TIMED)))
    samples = [Panel(enlarged(drawn[seed].permute(1, 2, 0).numpy(), 2), f"seed {seed}") for seed in range(SHOWN)]
    looks = group_panels(generator.model, sampler.mapped(latents_of([0], generator.model.latent_size)))
    picture = folder / "stylenat.png"
    save_panels([*samples, *looks], picture)
    measured = distances.read() if is_trained else None
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return Outcome(
        picture,
        number=None if measured is None else round(measured.ours, 1),
        baseline=None if measured is None else round(measured.baseline, 1),
        unit="Fréchet distance, lower is better",
        baseline_name="all heads in one local window",
        note=f"{_weights(is_trained)} {_distances(measured)} {sampler.pictures_per_second:.0f} images/s on "
        f"{threads}. Below: where the middle query (red) looks, group of heads by group.",
    )


def _generator() -> tuple[Generator, bool]:
    try:
        return open_generator(shipped_generator()), True
    except DataMissing:
        return open_generator(None, UNTRAINED), False


def _weights(is_trained: bool) -> str:
    if is_trained:
        return f"Clothes after Fashion-MNIST, small weights trained by the recipe {GENERATOR}."
    return "No trained weights come with this version: what is shown is an untrained generator's noise."


def _distances(measured: distances.Measured | None) -> str:
    if measured is None:
        return "Its distance was not measured."
    return f"Distances by {measured.extractor}, of {measured.pictures} pictures each, measured when it was trained."
