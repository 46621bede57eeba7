"""Recipes for a CPU and minutes: real data, small models."""

from __future__ import annotations

from dataclasses import replace

from vicinal.data.augment import Flip, Shift
from vicinal.data.sources import Digits, FashionMnist
from vicinal.models.compact import CompactConfig, Mixer, build, of_equal_cost
from vicinal.tasks.classification import Classification
from vicinal.training.recipe import AdamW, Cosine, Loop, Recipe

COMPACT = CompactConfig("dinat", dim=32, depths=(2, 2, 1), kernel_size=3)
"""14x14, 7x7 and 4x4 tokens; every second layer of a stage is dilated to see the whole map, three keys an axis."""


def digits() -> Recipe:
    """A minute of DiNAT on scikit-learn's digits.

    >>> digits().data
    Digits()
    """
    return Recipe(
        name="digits",
        status="run: see docs/training.md",
        data=Digits(),
        task=Classification(CompactConfig("dinat", dim=32, depths=(2, 2), kernel_size=3), label_smoothing=0.05),
        train_steps=(Shift(1),),
        optimizers={"main": AdamW(learning_rate=4e-3)},
        schedule=Cosine(warmup=2),
        loop=Loop(epochs=30, batch_size=128, ema_decay=0.98, clip_norm=5.0, evaluate_every=3, log_every=5),
    )


def dinat_fashion_mnist() -> Recipe:
    """A small DiNAT on Fashion-MNIST, a quarter of an hour on one core.

    >>> dinat_fashion_mnist().task.model.mixer
    'dinat'
    """
    return Recipe(
        name="dinat_fashion_mnist",
        status="run: see docs/training.md",
        data=FashionMnist(),
        task=Classification(replace(COMPACT, depths=(1, 2, 1), value_kernel=3, conv_stem=True), label_smoothing=0.05),
        train_steps=(Flip(), Shift(1)),
        optimizers={"main": AdamW(learning_rate=4e-3)},
        schedule=Cosine(warmup=0.5),
        loop=Loop(
            epochs=12,
            batch_size=128,
            precision="bfloat16",
            clip_norm=5.0,
            ema_decay=0.998,
            threads=1,
            checkpoint_every=100,
        ),
    )


def nat_fashion_mnist() -> Recipe:
    """A small NAT on Fashion-MNIST, two epochs.

    >>> nat_fashion_mnist().loop.epochs
    2
    """
    base = dinat_fashion_mnist()
    model = replace(COMPACT, mixer="nat", value_kernel=3)
    return replace(
        base,
        name="nat_fashion_mnist",
        task=Classification(model, label_smoothing=0.05),
        loop=replace(base.loop, epochs=2, ema_decay=0.99),
    )


def mixer_fashion_mnist(mixer: Mixer = "nat") -> Recipe:
    """One of six mixers on Fashion-MNIST: the same pyramid, cost and short budget for each.

    >>> [mixer_fashion_mnist(mixer).task.model.mlp_ratio for mixer in ("nat", "dinat")]
    [2.0, 2.0]
    """
    goal = replace(COMPACT, mixer="nat")
    model = replace(COMPACT, mixer=mixer)
    if mixer not in ("nat", "dinat"):
        model = of_equal_cost(model, 28, build(goal).cost(28).nominal)
    base = dinat_fashion_mnist()
    return replace(
        base,
        status="run: see docs/training.md",
        name=f"{mixer}_fashion_mnist_short",
        task=Classification(model, label_smoothing=0.05),
        loop=replace(base.loop, epochs=0.5, ema_decay=0.98, evaluate_every=1),
    )


RECIPES = (digits, dinat_fashion_mnist, nat_fashion_mnist, mixer_fashion_mnist)
