"""Frames of video files and of animated pictures, and writing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vicinal.data.dataset import DataMissing, Image
from vicinal.data.picture import pillow

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif")
"""`.gif` needs pillow alone, the others PyAV."""


class Video:
    """A video: `len` frames as far as its file tells (0: unknown), `rate` a second, read one after the other.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "two.gif"
    ...     with Writer(path, rate=5) as writer:
    ...         for shade in (0, 200):
    ...             writer.add(np.full((8, 6, 3), shade, np.uint8))
    ...     video = Video(path)
    ...     (video.frames, video.rate, [frame.shape for frame in video])
    (2, 5.0, [(8, 6, 3), (8, 6, 3)])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataMissing(f"there is no video {path}")
        self.is_animation = path.suffix.lower() == ".gif"
        self.frames, self.rate = self._animation() if self.is_animation else self._stream()

    def _animation(self) -> tuple[int, float]:
        try:
            with pillow().open(self.path) as picture:
                length = float(picture.info.get("duration", 0)) or 100.0
                return int(getattr(picture, "n_frames", 1)), 1000 / length
        except (OSError, SyntaxError, ValueError) as error:
            raise self._broken(error) from None

    def _stream(self) -> tuple[int, float]:
        av = _av()
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise DataMissing(f"{self.path} has no video in it")
                stream = container.streams.video[0]
                return int(stream.frames), float(stream.average_rate or 25)
        except av.FFmpegError as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> DataMissing:
        return DataMissing(f"{self.path} cannot be read as a video ({error}); repair or remove it")

    def __iter__(self) -> Iterator[Image]:
        if self.is_animation:
            yield from self._pictures()
            return
        av = _av()
        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    yield _upright(frame)
        except av.FFmpegError as error:
            raise self._broken(error) from None

    def _pictures(self) -> Iterator[Image]:
        from PIL import ImageSequence

        try:
            with pillow().open(self.path) as picture:
                for frame in ImageSequence.Iterator(picture):
                    yield np.asarray(frame.convert("RGB"), np.uint8)
        except (OSError, SyntaxError, ValueError) as error:
            raise self._broken(error) from None


def _upright(frame: Any) -> Image:
    """A frame as it is to be looked at: telephones store the turn beside the pixels."""
    pixels: Image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90)))


class Writer:
    """Writes frames of one size as `.gif`, or as `.mp4` with PyAV; use it as a context."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self.held: list[Any] = []
        self.container: Any = None
        self.stream: Any = None

    def __enter__(self) -> Writer:
        if self.path.suffix.lower() != ".gif":
            self.container = _av().open(str(self.path), "w")
        return self

    def add(self, frame: Image) -> None:
        """One more frame."""
        if self.container is None:
            self.held.append(pillow().fromarray(frame))
            return
        from fractions import Fraction

        # its codecs want even sides
        frame = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
        if self.stream is None:
            self.stream = self.container.add_stream("mpeg4", rate=Fraction(self.rate).limit_denominator(1001))
            self.stream.height, self.stream.width, self.stream.pix_fmt = *frame.shape[:2], "yuv420p"
            self.stream.bit_rate = max(1_000_000, 4 * frame.shape[0] * frame.shape[1])
        for packet in self.stream.encode(_av().VideoFrame.from_ndarray(frame, format="rgb24")):
            self.container.mux(packet)

    def __exit__(self, *details: Any) -> None:
        if self.container is not None:
            if self.stream is not None:
                for packet in self.stream.encode():
                    self.container.mux(packet)
            self.container.close()
        elif self.held:
            first, *others = self.held
            first.save(self.path, save_all=True, append_images=others, duration=round(1000 / self.rate), loop=0)


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise DataMissing("video files need PyAV: pip install vicinal[video]; a .gif needs nothing more") from None
    return av
