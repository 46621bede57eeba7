"""Segments painted over a picture: a color each, borders, names."""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import Image, Info
from vicinal.data.picture import pillow
from vicinal.metrics import Segments

_STEP = 0.61803398875
"""Of hues from one class to the next, as far from each other as they get however many there are."""


def color_of(label: int, number: int = 0) -> tuple[int, int, int]:
    """The color of a class; instances of it are lighter and darker.

    >>> color_of(3) == color_of(3), color_of(3) == color_of(4)
    (True, False)
    """
    hue, value = (0.05 + label * _STEP) % 1, (1.0, 0.75, 0.9, 0.6)[number % 4]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 - 0.25 * (number % 3 == 1), value)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(picture: Image, found: Segments, info: Info, *, names: bool = True, strength: float = 0.55) -> Image:
    """A picture `[height, width, 3]` with its segments in color, and their names where there is room.

    >>> info = Info("made", ("a",), 3, (0.5,), (0.5,))
    >>> cut = Segments(torch.ones(20, 30, dtype=torch.long), torch.tensor([0]))
    >>> overlay(np.zeros((20, 30, 3), np.uint8), cut, info).shape
    (20, 30, 3)
    """
    numbers = found.numbers.cpu().numpy()
    if numbers.shape != picture.shape[:2]:
        raise ValueError(f"segments are {numbers.shape}, but the picture is {picture.shape[:2]}")
    labels = found.labels.tolist()
    places = {label: 0 for label in labels}
    colors = np.zeros((len(labels) + 1, 3), np.float32)
    for number, label in enumerate(labels):
        colors[number + 1] = color_of(label, places[label] if info.classes[label] in info.things else 0)
        places[label] += 1
    shares = np.where(numbers > 0, strength, 0.0)[..., None]
    painted = picture * (1 - shares) + colors[numbers] * shares
    painted[borders(numbers)] = 255
    painted = painted.round().clip(0, 255).astype(np.uint8)
    return _named(painted, numbers, [info.classes[label] for label in labels]) if names else painted


def borders(numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Pixels whose right or lower neighbor is of another segment.

    >>> borders(np.array([[1, 1, 2]])).tolist()
    [[False, True, False]]
    """
    found = np.zeros(numbers.shape, bool)
    found[:, :-1] |= numbers[:, :-1] != numbers[:, 1:]
    found[:-1] |= numbers[:-1] != numbers[1:]
    return found


def _named(painted: Image, numbers: npt.NDArray[np.integer], names: list[str]) -> Image:
    from PIL import ImageDraw, ImageFont

    module = pillow()
    canvas = module.fromarray(painted)
    draw = ImageDraw.Draw(canvas)
    size = max(9, round(min(painted.shape[:2]) / 28))
    font = ImageFont.load_default(size)
    for number, name in enumerate(names, start=1):
        rows, columns = np.nonzero(numbers == number)
        left, top, right, bottom = font.getbbox(name)
        if len(rows) == 0 or len(rows) < 0.5 * (right - left) * (bottom - top):
            continue
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)  # a pixel of the segment
        place = (float(columns[middle]) - (left + right) / 2, float(rows[middle]) - (top + bottom) / 2)
        place = tuple(
            min(max(at, 1.0), limit - extent - 2.0)
            for at, limit, extent in zip(place, (painted.shape[1], painted.shape[0]), (right, bottom), strict=True)
        )
        draw.text(place, name, font=font, fill=(255, 255, 255), stroke_width=max(1, size // 8), stroke_fill=(0, 0, 0))
    return np.asarray(canvas)
