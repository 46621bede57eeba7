"""Weights that come with the library, and the test images they are shown on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vicinal.data.dataset import DataMissing
from vicinal.data.memory import InMemory
from vicinal.training.trained import Trained, load

FOLDER = Path(__file__).with_name("weights")

GENERATOR = "stylenat_fashion_mnist"
"""The recipe of the generator that comes with the library."""
SEGMENTER = "scenes_oneformer"
"""The segmentation model among them."""

SINGLE_TASK_PQ = {200: 0.3917, 40: 0.3946}
"""Panoptic quality of `scenes_panoptic` on so many of the first test scenes (benchmarks/results/segmentation.json)."""

LINEAR_BASELINE = {10_000: 0.8118, 500: 0.83}
"""Accuracy of a linear classifier on Fashion-MNIST's pixels (ridge regression on one-hot labels, penalty 1e-3 a
sample), on all test images and on those that come with the library."""


def shipped(name: str) -> Trained:
    """A model by the name of its recipe; `weights/NAME.md` is its card.

    >>> shipped("nat_fashion_mnist").recipe.task.model.mixer
    'nat'
    """
    return load(FOLDER / f"{name}.safetensors")


def sample(model: Trained) -> InMemory:
    """The first 500 test images of Fashion-MNIST (MIT licence), which come with the library.

    >>> len(sample(shipped("nat_fashion_mnist")))
    500
    """
    with np.load(FOLDER / "fashion_mnist_sample.npz") as held:
        return InMemory(model.info, held["images"][..., None], held["labels"])


def shipped_generator() -> Path:
    """The weights of a small generator; `weights/NAME.md` is their card."""
    path = FOLDER / f"{GENERATOR}.safetensors"
    if not path.is_file():
        raise DataMissing(
            "no generator's weights come with this version of the library: train some (vicinal train "
            f"{GENERATOR}) or give a file of your own"
        )
    return path
