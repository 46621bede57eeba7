"""OneFormer on ConvNeXt."""

from __future__ import annotations

from vicinal.models import convnext
from vicinal.models.family import Family
from vicinal.models.oneformer.config import OneFormerConfig
from vicinal.models.oneformer.layouts import layouts
from vicinal.models.oneformer.model import OneFormer
from vicinal.models.oneformer.sets import published_file

_OPTIONS = {"layer_scale": 1.0, "drop_path_rate": 0.4}

VARIANTS = {
    "oneformer_convnext_large_ade20k": OneFormerConfig("convnext_large", _OPTIONS, 250, 150),
    "oneformer_convnext_large_cityscapes": OneFormerConfig("convnext_large", _OPTIONS, 250, 19),
    "oneformer_convnext_large_coco": OneFormerConfig("convnext_large", _OPTIONS, 150, 133),
    "oneformer_convnext_large_mapillary": OneFormerConfig("convnext_large", _OPTIONS, 250, 65),
}

FAMILY = Family(
    VARIANTS,
    OneFormer,
    layouts({"published": convnext.PUBLISHED_LAYOUT, "transformers": convnext.TRANSFORMERS_LAYOUT}, ("transformers",)),
    {
        f"oneformer_convnext_large_{data}": (published_file("convnext_l", data),)
        for data in ("ade20k", "cityscapes", "mapillary")  # none for COCO
    },
    kind="segmenter",
    classifier="decoder.classes.",
    extra_classes=1,
)
