"""Mask2Former on DiNAT: the same model without a task, one set of weights per task."""

from __future__ import annotations

from dataclasses import replace

from vicinal.models import nat
from vicinal.models.family import Family, Published
from vicinal.models.oneformer.config import OneFormerConfig
from vicinal.models.oneformer.dinat import options
from vicinal.models.oneformer.layouts import layouts
from vicinal.models.oneformer.model import OneFormer

_LARGE = OneFormerConfig("dinat_large", options("mask2former"), 200, task=False, dropout=0.0)

_CLASSES = {
    "coco_panoptic": 133,
    "coco_instance": 80,
    "ade20k_panoptic": 150,
    "ade20k_instance": 100,
    "ade20k_semantic": 150,
    "cityscapes_panoptic": 19,
    "cityscapes_instance": 8,
    "cityscapes_semantic": 19,
}

VARIANTS = {
    f"mask2former_dinat_large_{name}": replace(
        _LARGE, num_classes=classes, num_queries=100 if name.endswith("semantic") else 200
    )
    for name, classes in _CLASSES.items()
}

_FILES = "https://shi-labs.com/projects/dinat/checkpoints/m2f/"

FAMILY = Family(
    VARIANTS,
    OneFormer,
    layouts(
        {"published": nat.PUBLISHED_LAYOUT, "transformers": nat.TRANSFORMERS_LAYOUT},
        ("transformers",),
        has_task=False,
    ),
    {name: (Published(f"{_FILES}{name}.pth", num_classes=config.num_classes),) for name, config in VARIANTS.items()},
    kind="segmenter",
    classifier="decoder.classes.",
    extra_classes=1,
)
