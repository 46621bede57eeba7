"""The small generator that comes with the library."""

from __future__ import annotations

from pathlib import Path

from vicinal.data.dataset import DataMissing
from vicinal.recipes.shipped import FOLDER

NAME = "stylenat_fashion_mnist"
"""Of its recipe, its weights and its card."""


def shipped_generator() -> Path:
    """The file of its weights."""
    path = FOLDER / f"{NAME}.safetensors"
    if not path.is_file():
        raise DataMissing(
            f"no generator's weights come with this version of the library: train some (vicinal train {NAME}) or give "
            "a file of your own"
        )
    return path
