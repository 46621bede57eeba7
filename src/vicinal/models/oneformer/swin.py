"""OneFormer on Swin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from vicinal.models import swin
from vicinal.models.family import Family, Published
from vicinal.models.layout import Layout, Rule
from vicinal.models.oneformer.config import OneFormerConfig
from vicinal.models.oneformer.layouts import layouts
from vicinal.models.oneformer.model import OneFormer
from vicinal.models.oneformer.sets import FILES, published_file

_LARGE = {"window_size": 12, "drop_path_rate": 0.3, "always_partition": True}
_TINY = {"drop_path_rate": 0.3, "always_partition": True}

VARIANTS = {
    "oneformer_swin_tiny_ade20k": OneFormerConfig("swin_tiny", _TINY, 150, 150),
    "oneformer_swin_large_ade20k": OneFormerConfig("swin_large", _LARGE, 250, 150),
    "oneformer_swin_large_cityscapes": OneFormerConfig("swin_large", _LARGE, 250, 19),
    "oneformer_swin_large_coco": OneFormerConfig("swin_large", _LARGE, 150, 133),
    "oneformer_swin_large_mapillary": OneFormerConfig("swin_large", _LARGE, 250, 65),
}

_NORM = "layernorm."
"""The norm before the classifier, which the backbones of transformers 5 keep and do not use."""


def _as_backbone(layout: Layout) -> Layout:
    """The names inside a backbone of transformers 5, which holds a whole model beside the norms of its maps."""

    def inside(name: str) -> str:
        return name if name.startswith("hidden_states_norms") else layout.prefix + name

    def unused(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = {name: tensor for name, tensor in state.items() if "hidden_states_norms.stage4." in name}
        there = f"{layout.prefix}{_NORM}"
        fresh = {name.replace("hidden_states_norms.stage4.", there): tensor for name, tensor in last.items()}
        return {name: torch.full_like(one, float(name.endswith("weight"))) for name, one in fresh.items()}

    rules = tuple(Rule(one.ours, tuple(inside(name) for name in one.theirs), one.how) for one in layout.rules)
    return replace(layout, rules=rules, ignored=f"{layout.ignored}|{layout.prefix}{_NORM}", derived=unused)


BACKBONES = {**swin.LAYOUTS, "transformers": _as_backbone(swin.LAYOUTS["transformers"])}

_HUB = "shi-labs/oneformer_"

FAMILY = Family(
    VARIANTS,
    OneFormer,
    layouts(BACKBONES, ("transformers", "hub")),
    {
        "oneformer_swin_tiny_ade20k": (Published(f"{_HUB}ade20k_swin_tiny", "hub", 150),),
        "oneformer_swin_large_ade20k": (
            published_file("swin_l", "ade20k"),
            Published(f"{FILES}ade20k/896x896_250_16_swin_l_oneformer_ade20k_160k.pth", num_classes=150),
            Published(f"{FILES}ade20k/1280x1280_250_16_swin_l_oneformer_ade20k_160k.pth", num_classes=150),
            Published(f"{_HUB}ade20k_swin_large", "hub", 150),
        ),
        "oneformer_swin_large_cityscapes": (
            published_file("swin_l", "cityscapes"),
            Published(f"{_HUB}cityscapes_swin_large", "hub", 19),
        ),
        "oneformer_swin_large_coco": (
            published_file("swin_l", "coco"),
            Published(f"{_HUB}coco_swin_large", "hub", 133),
        ),
        "oneformer_swin_large_mapillary": (published_file("swin_l", "mapillary"),),
    },
    kind="segmenter",
    classifier="decoder.classes.",
    extra_classes=1,
)
