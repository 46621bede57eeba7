"""Writing pictures and films: PNG that is the same for the same pixels, sheets of many, MP4, GIF and animated PNG."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vicinal.data.dataset import DataMissing, Image
from vicinal.data.picture import pillow

FILMS = (".mp4", ".gif", ".png")


def save_png(image: Image, path: Path) -> None:
    """Write pixels `[height, width, 1 or 3]`, whole or not at all."""
    held = io.BytesIO()
    _picture(image).save(held, format="PNG")
    _write_whole(path, held.getvalue())


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that nobody finds a half of it, even where the disk is full."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def sheet(images: Sequence[Image], columns: int, gap: int = 0) -> Image:
    """Pictures of one size in rows, with white between them.

    >>> sheet([np.zeros((8, 6, 1), np.uint8)] * 5, columns=3, gap=2).shape
    (18, 22, 1)
    """
    if not len(images) or columns < 1:
        raise ValueError(f"a sheet needs pictures and columns, got {len(images)} and {columns}")
    height, width, channels = images[0].shape
    rows = -(-len(images) // columns)
    made = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        made[top : top + height, left : left + width] = image
    return made


def enlarged(image: Image, times: int) -> Image:
    """Every pixel as a square.

    >>> enlarged(np.zeros((2, 3, 1), np.uint8), 4).shape
    (8, 12, 1)
    """
    if times < 1:
        raise ValueError(f"times must be at least 1, got {times}")
    return image.repeat(times, 0).repeat(times, 1)


def save_film(frames: Sequence[Image], path: Path, frames_per_second: float = 24) -> None:
    """Write frames of one size as .mp4 (needs PyAV), .gif or animated .png, by the ending of `path`."""
    check_film(path)
    if not 1 <= frames_per_second <= 120:
        raise ValueError(f"frames_per_second must be in 1 .. 120, got {frames_per_second}")
    if not len(frames):
        raise ValueError("a film needs frames, got none")
    if path.suffix.lower() == ".mp4":
        _write_whole(path, _mp4(frames, frames_per_second))
        return
    held = io.BytesIO()
    first, *others = [_picture(frame) for frame in frames]
    kind = {".gif": "GIF", ".png": "PNG"}[path.suffix.lower()]
    first.save(held, format=kind, save_all=True, append_images=others, duration=round(1000 / frames_per_second), loop=0)
    _write_whole(path, held.getvalue())


def check_film(path: Path) -> None:
    """Refuse a name that no film can be written under here, before anything is made for it."""
    if path.suffix.lower() not in FILMS:
        raise ValueError(f"a film must end in {', '.join(FILMS)}, got {path.name!r}")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise DataMissing("writing .mp4 needs PyAV: pip install vicinal[video], or let the film end in .gif or .png")


def _mp4(frames: Sequence[Image], frames_per_second: float) -> bytes:
    import av

    height, width, _ = frames[0].shape
    held = io.BytesIO()
    with av.open(held, "w", format="mp4") as film:
        stream: Any = film.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1001))
        # H.264 stores color at half the size, so sizes have to be even
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        stream.options = {"crf": "18", "threads": "1"}
        for frame in frames:
            colors = np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else frame
            even = np.pad(colors, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))
        film.mux(stream.encode())
    return held.getvalue()


def _picture(image: Image) -> Any:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"pixels must be uint8 [height, width, 1 or 3], got {image.dtype} {list(image.shape)}")
    return pillow().fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))
