"""OneFormer on DiNAT."""

from __future__ import annotations

from vicinal.models import nat
from vicinal.models.family import Family, Published
from vicinal.models.oneformer.config import OneFormerConfig
from vicinal.models.oneformer.layouts import layouts
from vicinal.models.oneformer.model import OneFormer
from vicinal.models.oneformer.sets import FILES, published_file


def options(dilations: str, kernel_size: int = 11) -> dict[str, object]:
    """What the backbone's configuration has there.

    >>> options("seg640")["kernel_size"]
    11
    """
    return {"dilations": dilations, "kernel_size": kernel_size, "drop_path_rate": 0.3}


_1280 = {"backbone_options": options("oneformer1280")}

VARIANTS = {
    "oneformer_dinat_large_ade20k": OneFormerConfig("dinat_large", options("seg640"), 250, 150),
    "oneformer_dinat_large_cityscapes": OneFormerConfig("dinat_large", options("cityscapes", 7), 250, 19),
    "oneformer_dinat_large_coco": OneFormerConfig("dinat_large", options("seg640"), 150, 133),
    "oneformer_dinat_large_mapillary": OneFormerConfig("dinat_large", options("seg640"), 250, 65),
}

_HUB = "shi-labs/oneformer_"

FAMILY = Family(
    VARIANTS,
    OneFormer,
    layouts({"published": nat.PUBLISHED_LAYOUT, "transformers": nat.TRANSFORMERS_LAYOUT}, ("transformers",)),
    {
        "oneformer_dinat_large_ade20k": (
            published_file("dinat_l", "ade20k"),
            Published(f"{FILES}ade20k/896x896_250_16_dinat_l_oneformer_ade20k_160k.pth", num_classes=150),
            Published(
                f"{FILES}ade20k/1280x1280_250_16_dinat_l_oneformer_ade20k_160k.pth", num_classes=150, changes=_1280
            ),
            Published(
                f"{FILES}ade20k/coco_pretrain_1280x1280_150_16_dinat_l_oneformer_ade20k_160k.pth",
                num_classes=150,
                changes={**_1280, "num_queries": 150},
            ),
            Published(f"{_HUB}ade20k_dinat_large", "transformers", 150),
        ),
        "oneformer_dinat_large_cityscapes": (
            published_file("dinat_l", "cityscapes"),
            Published(f"{_HUB}cityscapes_dinat_large", "transformers", 19),
        ),
        "oneformer_dinat_large_coco": (
            published_file("dinat_l", "coco"),
            Published(f"{_HUB}coco_dinat_large", "transformers", 133),
        ),
        "oneformer_dinat_large_mapillary": (published_file("dinat_l", "mapillary"),),
    },
    kind="segmenter",
    classifier="decoder.classes.",
    extra_classes=1,
)
