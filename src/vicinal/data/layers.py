"""Pictures with their panoptic truth in one array, so that everything that moves pixels moves the truth with them.

A layered picture is uint8 `[height, width, 6]`: red, green, blue, class, and the number of the instance in two bytes,
low and high. Class 255 is void, instance 0 belongs to classes that are not counted, and the highest bit of the last
byte marks a crowd.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import DataMissing, Image

VOID = 255
CROWD = 128
MOST_INSTANCES = 2**15 - 1
CHANNELS = 6


def layered(
    picture: Image,
    labels: npt.NDArray[np.integer],
    instances: npt.NDArray[np.integer],
    is_crowd: npt.NDArray[np.bool_] | None = None,
    *,
    classes: int = VOID,
    name: str = "a picture",
) -> Image:
    """A picture `[height, width, 3]` with maps `[height, width]` of classes (255: void), instances and crowds.

    >>> flat = np.zeros((4, 5), np.int64)
    >>> layered(np.zeros((4, 5, 3), np.uint8), flat, flat + 300).shape
    (4, 5, 6)
    """
    for which, part in (("classes", labels), ("instances", instances)):
        if part.shape != picture.shape[:2]:
            raise DataMissing(f"{name}: the picture is {picture.shape[:2]}, but the map of {which} is {part.shape}")
    odd = labels[(labels != VOID) & ((labels < 0) | (labels >= classes))]
    if odd.size:
        raise DataMissing(f"{name}: labels must be in 0 .. {classes - 1} or {VOID} for void, got {int(odd[0])}")
    if instances.size and not 0 <= int(instances.min()) <= int(instances.max()) <= MOST_INSTANCES:
        raise DataMissing(f"{name}: instances must be in 0 .. {MOST_INSTANCES}, got {int(instances.max())}")
    high = instances >> 8
    if is_crowd is not None:
        high = high + CROWD * is_crowd
    truth = np.stack([labels, instances & 255, high], -1).astype(np.uint8)
    return np.concatenate([picture, truth], -1)


def of_masks(
    picture: Image, masks: npt.NDArray[np.bool_], labels: npt.NDArray[np.integer], name: str = "a picture"
) -> Image:
    """A layered picture from masks `[segments, height, width]` that do not overlap, with classes `[segments]`.

    >>> of_masks(np.zeros((2, 2, 3), np.uint8), np.eye(2, dtype=bool)[None], np.array([4]))[..., 3].tolist()
    [[4, 255], [255, 4]]
    """
    covered = masks.sum(0)
    if masks.size and covered.max() > 1:
        row, column = np.argwhere(covered > 1)[0].tolist()
        raise DataMissing(
            f"{name}: masks overlap in {int((covered > 1).sum())} pixels, such as ({row}, {column}) of masks "
            f"{' and '.join(map(str, np.flatnonzero(masks[:, row, column])))}; panoptic truth has one segment a pixel"
        )
    classes, instances = np.full(picture.shape[:2], VOID), np.zeros(picture.shape[:2], np.int64)
    for number, (mask, label) in enumerate(zip(masks, labels, strict=True)):
        classes[mask], instances[mask] = label, number + 1
    return layered(picture, classes, instances, name=name)
