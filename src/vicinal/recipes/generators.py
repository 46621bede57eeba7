"""Generators: the published ones, which nobody has run here, and small ones for a CPU and minutes."""

from __future__ import annotations

from dataclasses import replace

from vicinal.data.augment import CenterCrop, Flip, Resize
from vicinal.data.sources import FashionMnist, ImageFolders
from vicinal.models.stylenat import VARIANTS
from vicinal.models.wavelet import WaveletConfig
from vicinal.recipes.full import NOT_RUN
from vicinal.tasks.adversarial import Adversarial
from vicinal.training.recipe import AdamW, Held, Loop, Recipe

FFHQ = 70_000
"""Images of FFHQ."""

_BATCH = 32
"""Images a step, as the published average of weights assumes: they say 8 for each GPU, not how many GPUs."""


def lazy(optimizer: AdamW, every: int) -> AdamW:
    """Adam for a network that takes one more step now and then: as far in all as without.

    >>> round(lazy(AdamW(learning_rate=1.7), every=16).learning_rate, 6)
    1.6
    """
    share = every / (every + 1)
    first, second = optimizer.betas
    return replace(optimizer, learning_rate=optimizer.learning_rate * share, betas=(first**share, second**share))


def _adam(learning_rate: float) -> AdamW:
    return AdamW(learning_rate=learning_rate, weight_decay=0.0, betas=(0.0, 0.99))


def _ffhq(image_size: int) -> Recipe:
    """A million steps; the rate of the generator is a quarter of the discriminator's and falls in the last 22.5 %."""
    rate = 2e-4
    return Recipe(
        name=f"stylenat_ffhq{image_size}",
        status=NOT_RUN,
        data=ImageFolders(f"ffhq{image_size}"),
        task=Adversarial(VARIANTS[f"stylenat_ffhq{image_size}"], WaveletConfig(image_size)),
        train_steps=(Resize(image_size), CenterCrop(image_size), Flip()),
        test_steps=(Resize(image_size), CenterCrop(image_size)),
        optimizers={"discriminator": lazy(_adam(rate), 16), "generator": _adam(rate / 4)},
        schedule=Held(0.775),
        loop=Loop(
            epochs=1_000_000 * _BATCH / FFHQ,
            batch_size=_BATCH,
            clip_norm=5.0,
            ema_decay=0.5 ** (32 / 10_000),
            workers=8,
            evaluate_every=10_000 * _BATCH / FFHQ,
            checkpoint_every=10_000,
            log_every=100,
        ),
    )


def stylenat_ffhq256() -> Recipe:
    """StyleNAT on FFHQ at 256 pixels; published: a Frechet distance of 2.05.

    >>> stylenat_ffhq256().optimizers["generator"].learning_rate
    5e-05
    """
    return _ffhq(256)


def stylenat_ffhq1024() -> Recipe:
    """StyleNAT on FFHQ at 1024 pixels; published: a Frechet distance of 4.17.

    >>> stylenat_ffhq1024().task.generator.levels
    9
    """
    return _ffhq(1024)


def stylenat_fashion_mnist() -> Recipe:
    """A small StyleNAT that draws clothes of Fashion-MNIST at 32x32, ten minutes of one core.

    >>> stylenat_fashion_mnist().task.generator.image_size
    32
    """
    generator = VARIANTS["stylenat_fashion32"]
    return Recipe(
        name="stylenat_fashion_mnist",
        status="run: see docs/stylenat.md",
        data=FashionMnist(),
        task=Adversarial(generator, WaveletConfig(32, (96, 96, 48, 32), 1), penalty=1.0, consistency=0.0, samples=1000),
        train_steps=(CenterCrop(32), Flip()),
        test_steps=(CenterCrop(32),),
        optimizers={"discriminator": lazy(_adam(1e-3), 16), "generator": _adam(1e-3)},
        schedule=Held(0.6),
        loop=Loop(
            epochs=0.5,
            batch_size=16,
            clip_norm=5.0,
            ema_decay=0.995,
            threads=1,
            evaluate_every=0.1,
            checkpoint_every=125,
            keep=100,
            log_every=20,
        ),
    )


def stylenat_local_fashion_mnist() -> Recipe:
    """The same with all heads in one local window: what it costs to let none look far.

    >>> stylenat_local_fashion_mnist().task.generator.dilations
    ((1,), (1,), (1, 1), (1, 1))
    """
    base = stylenat_fashion_mnist()
    assert isinstance(base.task, Adversarial)
    groups = base.task.generator.dilations
    generator = replace(base.task.generator, dilations=tuple((1,) * len(group) for group in groups))
    return replace(base, name="stylenat_local_fashion_mnist", task=replace(base.task, generator=generator))


RECIPES = (stylenat_fashion_mnist, stylenat_local_fashion_mnist, stylenat_ffhq256, stylenat_ffhq1024)
