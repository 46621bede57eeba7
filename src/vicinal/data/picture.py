"""Reading one picture, whatever its format, depth and colors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from vicinal.data.dataset import DataMissing, Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def pillow() -> Any:
    """The module `PIL.Image`."""
    try:
        import PIL.Image as module
    except ModuleNotFoundError:
        raise DataMissing("reading pictures needs pillow: pip install vicinal[plot]") from None
    return module


def read_picture(source: Path | bytes, channels: int, name: str = "") -> Image:
    """Pixels `[height, width, channels]`; gray becomes color or color gray, 16 bits become 8, alpha is put on white.

    What a camera took on its side is turned.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     pillow().new("L", (5, 4), 128).save(file.name)
    ...     read_picture(Path(file.name), channels=3).shape
    (4, 5, 3)
    """
    module = pillow()
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    try:
        with module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            picture.load()
            return _pixels(_eight_bits(_upright(picture), module), channels, module)
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        place = name or str(source if isinstance(source, Path) else "a picture")
        if isinstance(error, FileNotFoundError):
            raise DataMissing(f"there is no picture {place}") from None
        raise DataMissing(f"{place} cannot be read as a picture ({error}); repair or remove it") from None


def _upright(picture: Any) -> Any:
    """As it is to be looked at: cameras store the turn beside the pixels."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _eight_bits(picture: Any, module: Any) -> Any:
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)  # 16-bit gray, which `convert` would cut off at 255
    top = 65535.0 if picture.mode.startswith("I") else 1.0
    return module.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def _pixels(picture: Any, channels: int, module: Any) -> Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = module.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = module.alpha_composite(white, picture)
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.uint8)
    return pixels[..., None] if channels == 1 else pixels
