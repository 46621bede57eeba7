"""The published full-size recipes, for a cluster and ImageNet. Nobody has run them here: each says "not run".

ImageNet is expected as shards (`data.folder=...`), as webdataset writes them.
"""

from __future__ import annotations

from dataclasses import replace

from vicinal.data.augment import CenterCrop, ColorJitter, Erase, Flip, RandAugment, Resize, ResizedCrop
from vicinal.data.sources import Shards
from vicinal.tasks.classification import Classification, Named
from vicinal.tasks.mixing import Mixing
from vicinal.training.recipe import AdamW, Cosine, Loop, Poly, Recipe

NOT_RUN = "not run: published settings, written down; no such data or machine was at hand"
IMAGENET = Shards("imagenet-shards")


def _imagenet(name: str) -> Recipe:
    """NAT's training on ImageNet-1k: 300 epochs and 10 to cool down, 1024 images a step."""
    return Recipe(
        name=f"{name}_imagenet",
        status=NOT_RUN,
        data=IMAGENET,
        task=Classification(Named(name), label_smoothing=0.1, mixing=Mixing(mixup=0.8, cutmix=1.0, switch=0.5)),
        train_steps=(ResizedCrop(224), Flip(), RandAugment("rand-m9-mstd0.5-inc1"), ColorJitter(0.4), Erase(0.25)),
        test_steps=(Resize(256), CenterCrop(224)),
        optimizers={"main": AdamW(learning_rate=1e-3, weight_decay=0.05)},
        schedule=Cosine(warmup=20, start=1e-3, final=5e-3, cooldown=10),
        loop=Loop(
            epochs=310,
            batch_size=1024,
            precision="float16",
            clip_norm=5.0,
            workers=8,
            checkpoint_every=1000,
            log_every=50,
        ),
    )


def nat_mini_imagenet() -> Recipe:
    """NAT-Mini on ImageNet-1k; published: 81.8 % top-1."""
    return _imagenet("nat_mini")


def nat_tiny_imagenet() -> Recipe:
    """NAT-Tiny on ImageNet-1k; published: 83.2 % top-1."""
    return _imagenet("nat_tiny")


def nat_small_imagenet() -> Recipe:
    """NAT-Small on ImageNet-1k; published: 83.7 % top-1."""
    return _imagenet("nat_small")


def nat_base_imagenet() -> Recipe:
    """NAT-Base on ImageNet-1k; published: 84.3 % top-1."""
    return _imagenet("nat_base")


def dinat_mini_imagenet() -> Recipe:
    """DiNAT-Mini on ImageNet-1k; published: 81.8 % top-1."""
    return _imagenet("dinat_mini")


def dinat_tiny_imagenet() -> Recipe:
    """DiNAT-Tiny on ImageNet-1k; published: 82.7 % top-1."""
    return _imagenet("dinat_tiny")


def dinat_small_imagenet() -> Recipe:
    """DiNAT-Small on ImageNet-1k; published: 83.8 % top-1."""
    return _imagenet("dinat_small")


def dinat_base_imagenet() -> Recipe:
    """DiNAT-Base on ImageNet-1k; published: 84.4 % top-1."""
    return _imagenet("dinat_base")


def dinat_large_22k_to_1k() -> Recipe:
    """DiNAT-Large from ImageNet-22k to 1k at 224 pixels; published: 86.6 % top-1. `pretrained` has to be given.

    >>> dinat_large_22k_to_1k().loop.batch_size
    512
    """
    base = _imagenet("dinat_large")
    return replace(
        base,
        name="dinat_large_22k_to_1k",
        task=Classification(
            Named("dinat_large", pretrained="dinat_large_in22k_224.pth"), label_smoothing=0.1, mixing=None
        ),
        optimizers={"main": AdamW(learning_rate=5e-5, weight_decay=1e-4)},
        schedule=Poly(power=1.0),
        loop=replace(base.loop, epochs=30, batch_size=512, activation_checkpointing=True),
    )


def dinat_large_22k_to_1k_384() -> Recipe:
    """The same at 384 pixels, dilations for that size; published: 87.4 % top-1.

    >>> dinat_large_22k_to_1k_384().task.model.overrides
    {'dilations': 'cls384'}
    """
    base = dinat_large_22k_to_1k()
    model = Named("dinat_large", {"dilations": "cls384"}, "dinat_large_in22k_224.pth")
    return replace(
        base,
        name="dinat_large_22k_to_1k_384",
        task=Classification(model, label_smoothing=0.1, mixing=None),
        train_steps=(ResizedCrop(384), *base.train_steps[1:]),
        test_steps=(Resize(384), CenterCrop(384)),
        optimizers={"main": AdamW(learning_rate=5e-5, weight_decay=1e-10)},
    )


RECIPES = (
    nat_mini_imagenet,
    nat_tiny_imagenet,
    nat_small_imagenet,
    nat_base_imagenet,
    dinat_mini_imagenet,
    dinat_tiny_imagenet,
    dinat_small_imagenet,
    dinat_base_imagenet,
    dinat_large_22k_to_1k,
    dinat_large_22k_to_1k_384,
)
