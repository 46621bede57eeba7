"""The data sets of the published models: how many classes they have, and where the weights are."""

from __future__ import annotations

from vicinal.models.family import Published

CLASSES = {"ade20k": 150, "cityscapes": 19, "coco": 133, "mapillary": 65}
"""Classes of panoptic ground truth."""

FILES = "https://shi-labs.com/projects/oneformer/"

_ENDINGS = {"ade20k": "160k", "cityscapes": "90k", "coco": "100ep", "mapillary": "300k"}


def published_file(backbone: str, data: str) -> Published:
    """The plain file of a backbone and a data set.

    >>> published_file("dinat_l", "coco").source.rpartition("/")[2]
    '150_16_dinat_l_oneformer_coco_100ep.pth'
    """
    queries = 150 if data == "coco" else 250
    file = f"{queries}_16_{backbone}_oneformer_{data}_{_ENDINGS[data]}.pth"
    return Published(f"{FILES}{data}/{file}", num_classes=CLASSES[data])
