"""Recipes for segmentation: small ones on made scenes for a CPU and minutes, and the published ones."""

from __future__ import annotations

from vicinal.data.augment import ColorJitter, Flip
from vicinal.data.jitter import OnColors
from vicinal.data.scenes import Scenes
from vicinal.models.compact import CompactConfig
from vicinal.tasks.stem import Stem
from vicinal.training.recipe import AdamW, Cosine, Loop, Recipe

BACKBONE = CompactConfig("dinat", dim=16, depths=(0, 2, 2, 2, 1), kernel_size=5, value_kernel=3, in_channels=3)
"""Maps of strides 4 to 32; every other layer of the first three is dilated to the whole map."""

_STEPS = (Flip(), OnColors(ColorJitter(0.3)))


def scenes_stem() -> Recipe:
    """The backbone of the small OneFormers: classes of pixels and middles of things on made scenes.

    >>> scenes_stem().task.backbone.mixer
    'dinat'
    """
    return Recipe(
        name="scenes_stem",
        status="run: see docs/segmentation.md",
        data=Scenes(),
        task=Stem(BACKBONE),
        train_steps=_STEPS,
        optimizers={"main": AdamW(learning_rate=3e-3)},
        schedule=Cosine(warmup=0.1),
        loop=Loop(
            epochs=3, batch_size=16, clip_norm=5.0, evaluate_every=0.5, threads=1, checkpoint_every=100, log_every=20
        ),
    )


RECIPES = (scenes_stem,)
