"""Objects for made scenes: signs of a free typeface, coins cut out of a photograph, and painted balls.

Each kind has objects for training and others for testing. The typeface is DejaVu Sans, which comes with matplotlib
under a free licence (Bitstream Vera's, its additions in the public domain); the coins are from scikit-image's
photograph of Greek coins (Brooklyn Museum, no known copyright restrictions).
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import DataMissing, Split
from vicinal.data.picture import pillow

SIDE = 72
"""Pixels of a sprite before it is shrunk."""

SIGNS: dict[str, dict[Split, str]] = {
    "star": {"train": "★✩✬✭✯✦✷✸✹", "test": "✫✮✰✵✺"},
    "arrow": {"train": "➔➘➙➛➜➞➠➢➤➥➨", "test": "➚➡➣➦➧➩"},
    "chess piece": {"train": "♔♖♘♙♚♜♞♟", "test": "♕♗♛♝"},
    "flower": {"train": "✿❀❃✾✻✤❊", "test": "❁✽✼✥❉"},
}

KINDS = ("ball", "coin", *SIGNS)
"""What a scene holds one by one."""

COINS: dict[Split, tuple[tuple[int, int, int], ...]] = {
    "train": (
        *((44, 335, 28), (51, 155, 22), (51, 215, 22), (52, 276, 19), (54, 44, 19), (56, 100, 18)),
        *((119, 271, 24), (124, 45, 19), (125, 336, 19), (126, 102, 18), (187, 347, 31), (193, 212, 23)),
        *((194, 274, 21), (196, 102, 21), (260, 46, 27), (261, 172, 25)),
    ),
    "test": (
        *((124, 205, 19), (127, 154, 18), (197, 44, 18), (198, 154, 19)),
        *((263, 301, 24), (263, 244, 23), (266, 114, 20), (268, 358, 21)),
    ),
}
"""Row, column and radius of every coin in the photograph."""

_STRIPES: dict[Split, tuple[str, ...]] = {"train": ("plain", "halves", "band"), "test": ("rings", "quarters")}

Gray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sprite:
    """An object `[SIDE, SIDE]`: where it is (0 .. 1) and how bright it is painted (0 .. 1), before it gets a color."""

    cover: Gray
    paint: Gray
    is_colored: bool = True


@lru_cache(maxsize=2)
def sprites(split: Split) -> dict[str, tuple[Sprite, ...]]:
    """All objects of a split by kind.

    >>> {kind: len(found) for kind, found in sprites("test").items()}
    {'ball': 2, 'coin': 8, 'star': 5, 'arrow': 6, 'chess piece': 4, 'flower': 5}
    """
    made = {"ball": tuple(_ball(stripes) for stripes in _STRIPES[split]), "coin": _coins(split)}
    return {**made, **{kind: tuple(map(_sign, signs[split])) for kind, signs in SIGNS.items()}}


def _sign(sign: str) -> Sprite:
    """A sign of the typeface with its holes filled: ink and filling differ in brightness."""
    from PIL import ImageDraw, ImageFont

    module = pillow()
    picture = module.new("L", (2 * SIDE, 2 * SIDE), 0)
    font = ImageFont.truetype(str(_font()), round(1.4 * SIDE))
    left, top, right, bottom = font.getbbox(sign)
    draw = ImageDraw.Draw(picture)
    draw.text((SIDE - (left + right) / 2, SIDE - (top + bottom) / 2), sign, font=font, fill=255)
    outside = picture.point(lambda value: 255 * (value > 127))
    ImageDraw.floodfill(outside, (0, 0), 128)
    filled = outside.point(lambda value: 255 * (value != 128))
    reach = max(right - left, bottom - top) / 2 + 2
    box = tuple(round(SIDE + side * reach) for side in (-1, -1, 1, 1))
    ink, cover = (_shrunk(one.crop(box)) for one in (picture, filled))
    paint = 1 - 0.6 * ink
    paint *= 0.85 / paint[cover > 0.5].mean()  # else a sign that is all ink would always be dark
    return Sprite(cover, paint.clip(0, 1))


def _font() -> Path:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise DataMissing("the objects of scenes need matplotlib's typeface: pip install vicinal[demo]") from None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _shrunk(picture: Any) -> Gray:
    small = picture.resize((SIDE, SIDE), pillow().Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


def _grid() -> tuple[Gray, Gray]:
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    return axis[:, None] * np.ones_like(axis), np.ones_like(axis)[:, None] * axis


def _disk() -> Gray:
    down, right = _grid()
    radius = np.sqrt(down**2 + right**2)
    return np.clip((0.97 - radius) * SIDE / 2, 0, 1).astype(np.float32)


def _ball(stripes: str) -> Sprite:
    down, right = _grid()
    radius = np.sqrt(down**2 + right**2)
    light = np.sqrt(np.clip(1 - (down + 0.35) ** 2 - (right + 0.35) ** 2, 0.02, 1))
    dark = {
        "plain": np.zeros_like(down, dtype=bool),
        "halves": down > 0.1,
        "band": np.abs(right) < 0.3,
        "rings": (radius > 0.35) & (radius < 0.65),
        "quarters": (down > 0) ^ (right > 0),
    }[stripes]
    return Sprite(_disk(), (light * np.where(dark, 0.55, 1.0)).astype(np.float32))


def _coins(split: Split) -> tuple[Sprite, ...]:
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise DataMissing("the coins of scenes come with scikit-image: pip install vicinal[demo]") from None
    photograph = data.coins()
    made = []
    for row, column, radius in COINS[split]:
        square = photograph[row - radius : row + radius + 1, column - radius : column + radius + 1]
        picture = pillow().fromarray(square).resize((SIDE, SIDE), pillow().Resampling.BICUBIC)
        made.append(Sprite(_disk(), np.asarray(picture, np.float32) / np.float32(255), is_colored=False))
    return tuple(made)


def painted(sprite: Sprite, size: int, random: np.random.Generator) -> tuple[Gray, npt.NDArray[np.float32]]:
    """A sprite turned, shrunk to `size` pixels and colored: cover `[size, size]` and colors `[size, size, 3]` in 0..1.

    >>> cover, colors = painted(sprites("test")["star"][0], 20, np.random.default_rng(0))
    >>> cover.shape, colors.shape
    ((20, 20), (20, 20, 3))
    """
    module = pillow()
    angle, hue = float(random.uniform(-180, 180)), float(random.random())
    saturation, value = float(random.uniform(0.35, 1.0)), float(random.uniform(0.55, 1.0))
    shade, tilt = float(random.uniform(0, 0.35)), float(random.uniform(-1, 1))
    parts = []
    for layer in (sprite.cover, sprite.paint):
        turned = module.fromarray(layer).rotate(angle, module.Resampling.BILINEAR, expand=False)
        parts.append(np.asarray(turned.resize((size, size), module.Resampling.BOX), np.float32))
    cover, paint = parts
    down, right = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    shaded = paint * (1 - shade * (0.5 + 0.5 * (down + tilt * right) / 2))
    if sprite.is_colored:
        color = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    else:
        color = np.array(colorsys.hsv_to_rgb(0.08 + 0.06 * hue, 0.4 * saturation, 1.0))
    return cover, (shaded[..., None] * color).astype(np.float32)
