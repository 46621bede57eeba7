"""Tar shards as webdataset writes them, read at random places: headers are indexed once, pictures read when asked for.

A sample is the files of one stem: a picture and its label as `stem.cls` (a number) or `stem.json` (with "label").
Because every sample has a number, a run that is resumed goes on with exactly the sample it would have read.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import DataMissing, Image, Info
from vicinal.data.folders import IMAGENET_MEAN, IMAGENET_STD
from vicinal.data.picture import SUFFIXES, pillow, read_picture


@dataclass(frozen=True)
class Place:
    """Where a sample is: the shard, and offset and length of the picture in it, and the label."""

    shard: int
    offset: int
    length: int
    label: int


class ShardDataset:
    """The samples of shards, in the order of the shards' names.

    `window` shards are shuffled together: reading stays within so many files at a time.
    """

    def __init__(
        self, shards: Sequence[Path], classes: tuple[str, ...], channels: int = 3, window: int = 8, name: str = "shards"
    ) -> None:
        self.shards = sorted(shards)
        if not self.shards:
            raise DataMissing("there are no shards (.tar) here")
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        self.window = window
        self.places = [place for number, path in enumerate(self.shards) for place in index_of(path, number)]
        outside = next((place for place in self.places if not 0 <= place.label < len(classes)), None)
        if outside is not None:
            where = self.shards[outside.shard]
            raise DataMissing(f"{where} has the label {outside.label}, but there are {len(classes)} classes")
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.25,))
        self.info = Info(name, classes, channels, mean, std)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> tuple[Image, int]:
        """Image and label of a sample."""
        place = self.places[index]
        path = self.shards[place.shard]
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
        except OSError as error:  # in a process that reads ahead it would come back as a traceback
            raise DataMissing(f"{path} cannot be read ({error.strerror or error})") from None
        return read_picture(content, self.info.channels, f"{path} at byte {place.offset}"), place.label

    def order(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Shards in random order, `window` of them at a time, their samples mixed."""
        shard_of = np.array([place.shard for place in self.places])
        chosen = random.permutation(len(self.shards))
        pieces = []
        for start in range(0, len(chosen), self.window):
            inside = np.flatnonzero(np.isin(shard_of, chosen[start : start + self.window]))
            pieces.append(random.permutation(inside))
        return np.concatenate(pieces)


def index_of(path: Path, shard: int) -> list[Place]:
    """The samples of a shard, in the order in which they stand there.

    The index is kept beside the shard (`.index.json`) where the folder may be written to, and made again when the
    shard's size or time differs from what the index was made of.
    """
    if not path.is_file():
        raise DataMissing(f"there is no shard {path}")
    cache = path.with_suffix(".index.json")
    state = path.stat()
    mark = [state.st_size, state.st_mtime_ns]
    try:
        kept = json.loads(cache.read_text())
        if kept["of"] == mark:
            return [Place(shard, *entry) for entry in kept["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no index, or one that a full disk or another program left damaged: it is made again
    samples = _scan(path, shard)
    _keep(cache, {"of": mark, "samples": [[place.offset, place.length, place.label] for place in samples]})
    return samples


def _keep(cache: Path, content: object) -> None:
    part = cache.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content))
        part.replace(cache)
    except OSError:  # a folder that is read-only, or full: without an index the scan is merely repeated next time
        part.unlink(missing_ok=True)


def _scan(path: Path, shard: int) -> list[Place]:
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
                if suffix in SUFFIXES:
                    pictures[key] = (member.offset_data, member.size)
                elif suffix in (".cls", ".json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    text = content.read().decode()
                    labels[key] = int(text) if suffix == ".cls" else int(json.loads(text)["label"])
    except (tarfile.TarError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataMissing(f"{path} cannot be read as a shard ({error}); fetch or write it again") from None
    lonely = sorted(set(pictures) ^ set(labels))
    if lonely:
        raise DataMissing(f"{path}: {lonely[0].lstrip('/')} has no {'label' if lonely[0] in pictures else 'picture'}")
    return [Place(shard, *pictures[key], labels[key]) for key in pictures]


def write_shards(samples: Iterable[tuple[Image, int]], folder: Path, per_shard: int = 1000) -> list[Path]:
    """Write samples as shards `shard-00000.tar`, ... of PNG pictures; returns their paths."""
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1, got {per_shard}")
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    archive: tarfile.TarFile | None = None
    for number, (image, label) in enumerate(samples):
        if number % per_shard == 0:
            if archive is not None:
                archive.close()
            paths.append(folder / f"shard-{len(paths):05d}.tar")
            archive = tarfile.open(paths[-1], "w")  # noqa: SIM115 - it stays open over many samples
        assert archive is not None
        encoded = io.BytesIO()
        pillow().fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, "PNG")
        for suffix, content in (("png", encoded.getvalue()), ("cls", str(label).encode())):
            member = tarfile.TarInfo(f"{number:08d}.{suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if archive is not None:
        archive.close()
    return paths
