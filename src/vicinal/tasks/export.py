"""Segments as files: label maps, COCO's panoptic and instance formats, and plain JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import Image, Info


def rle(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """A mask in COCO's run-length form, not packed: runs of 0 and 1 down the columns, the first of 0.

    >>> rle(np.array([[False, True], [True, True]]))
    {'size': [2, 2], 'counts': [1, 3]}
    """
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"size": list(mask.shape), "counts": runs.tolist()}


def mask_of(coded: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """The mask of `rle`.

    >>> mask_of({"size": [2, 2], "counts": [1, 3]}).tolist()
    [[False, True], [True, True]]
    """
    values = np.arange(len(coded["counts"])) % 2 == 1
    flat = np.repeat(values, coded["counts"])
    return flat.reshape(coded["size"], order="F")


def box_of(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Left, top, width and height of a mask; zeros of an empty one.

    >>> box_of(np.array([[False, True], [False, True]]))
    [1, 0, 1, 2]
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1]


def number_colors(numbers: npt.NDArray[np.integer]) -> Image:
    """Numbers of segments as colors, red + 256 green + 65536 blue: COCO's panoptic maps.

    >>> number_colors(np.array([[300]])).tolist()
    [[[44, 1, 0]]]
    """
    return np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16 & 255], -1).astype(np.uint8)


def described(
    masks: npt.NDArray[np.bool_], labels: list[int], scores: list[float] | None, info: Info
) -> list[dict[str, Any]]:
    """What JSON says of each segment `[segments, height, width]`; numbers count from 1, as in the maps."""
    result = []
    for number, (mask, label) in enumerate(zip(masks, labels, strict=True), start=1):
        one: dict[str, Any] = {
            "id": number,
            "category_id": label,
            "category": info.classes[label],
            "isthing": info.classes[label] in info.things,
            "area": int(mask.sum()),
            "bbox": box_of(mask),
        }
        if scores is not None:
            one["score"] = round(scores[number - 1], 4)
        result.append(one)
    return result
