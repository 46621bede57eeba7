"""ADE20K, Cityscapes and COCO panoptic as their makers lay them out, read as layered pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import DataMissing, Image, Info, Look, Split
from vicinal.data.folders import IMAGENET_MEAN, IMAGENET_STD
from vicinal.data.layers import VOID, layered
from vicinal.data.picture import pillow, read_picture

Map = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scene:
    """Where a picture and its truth are; `segments` describes those of a panoptic map."""

    picture: Path
    truth: Path
    segments: tuple[dict[str, Any], ...] = ()


class PanopticFiles:
    """Numbered scenes on disk, read when they are asked for."""

    def __init__(self, name: str, classes: tuple[str, ...], things: tuple[str, ...], scenes: Sequence[Scene]) -> None:
        self.info = Info(name, classes, 3, IMAGENET_MEAN, IMAGENET_STD, None, things)
        self.scenes = list(scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def order(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Any order."""
        return random.permutation(len(self))

    def read(self, index: int) -> tuple[Image, int]:
        """A layered picture, and its number; a file that cannot be read is named."""
        scene = self.scenes[index]
        picture = read_picture(scene.picture, 3)
        labels, instances, is_crowd = self.truth(scene)
        return layered(
            picture, labels, instances, is_crowd, classes=len(self.info.classes), name=str(scene.picture)
        ), index

    def truth(self, scene: Scene) -> tuple[Map, Map, npt.NDArray[np.bool_]]:
        """Maps of classes, instances and crowds."""
        raise NotImplementedError


def read_map(path: Path, channels: int = 1) -> Map:
    """The numbers in a PNG of labels, `[height, width]` or `[height, width, channels]`.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     pillow().fromarray(np.full((2, 3), 26001, np.uint16)).save(file.name)
    ...     int(read_map(Path(file.name)).max())
    26001
    """
    module = pillow()
    try:
        with module.open(path) as picture:
            numbers = np.asarray(picture).astype(np.int64)
    except FileNotFoundError:
        raise DataMissing(f"there is no label map {path}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataMissing(f"the label map {path} cannot be read ({error}); repair or remove it") from None
    if channels == 1 and numbers.ndim == 2:
        return numbers
    if numbers.ndim == 3 and numbers.shape[-1] >= channels > 1:
        return numbers[..., :channels]
    raise DataMissing(f"the label map {path} should have {channels} channels, got shape {numbers.shape}")


@dataclass(frozen=True)
class CocoPanoptic:
    """COCO panoptic: `annotations/panoptic_train2017.json` with its folder of maps, and `train2017/`; `val2017` tests.

    The names of classes, and which are things, come from the file.
    """

    folder: str = "data/coco"
    year: str = "2017"

    def look(self) -> tuple[Look, ...]:
        """The two splits."""
        return tuple(_look(path) for split in ("train", "val") for path in self._places(split))

    def advice(self) -> str:
        """What to do when nothing is there."""
        return (
            "fetch train2017.zip, val2017.zip and panoptic_annotations_trainval2017.zip from cocodataset.org, unpack "
            "all of them (the maps too) into FOLDER and FOLDER/annotations, and say data.folder=FOLDER"
        )

    def open(self, split: Split) -> PanopticFiles:
        """The data set."""
        part = "train" if split == "train" else "val"
        annotations, maps, pictures = self._places(part)
        return coco_scenes("coco_panoptic", annotations, maps, pictures, self.advice())

    def _places(self, split: str) -> tuple[Path, Path, Path]:
        base, name = Path(self.folder).expanduser(), f"{split}{self.year}"
        return base / "annotations" / f"panoptic_{name}.json", base / "annotations" / f"panoptic_{name}", base / name


def _look(path: Path) -> Look:
    return Look(str(path), "data.folder", path.exists(), "" if path.exists() else "not there")


def coco_scenes(name: str, annotations: Path, maps: Path, pictures: Path, advice: str) -> PanopticFiles:
    """Scenes of any data set in the format of COCO panoptic."""
    for path in (annotations, maps, pictures):
        if not path.exists():
            raise DataMissing(f"there is no {path}; {advice}")
    try:
        content = json.loads(annotations.read_text("utf-8"))
        categories, images = content["categories"], {image["id"]: image for image in content["images"]}
        contiguous = {category["id"]: label for label, category in enumerate(categories)}
        names = tuple(str(category["name"]) for category in categories)
        things = tuple(str(category["name"]) for category in categories if category["isthing"])
        scenes = [
            Scene(
                pictures / images[one["image_id"]]["file_name"],
                maps / one["file_name"],
                tuple({**part, "label": contiguous[part["category_id"]]} for part in one["segments_info"]),
            )
            for one in content["annotations"]
        ]
    except KeyError as error:
        raise DataMissing(
            f"{annotations} is not a complete panoptic file: {error} is missing, or is used but not in its lists"
        ) from None
    except (ValueError, TypeError) as error:
        raise DataMissing(f"{annotations} cannot be read as a panoptic file ({error}); fetch it again") from None
    return CocoFiles(name, names, things, scenes)


class CocoFiles(PanopticFiles):
    """Maps whose colors are numbers of segments, red + 256 green + 65536 blue, with a list of the segments."""

    def truth(self, scene: Scene) -> tuple[Map, Map, npt.NDArray[np.bool_]]:
        """Maps of classes, instances and crowds."""
        numbers = read_map(scene.truth, 3) @ np.array([1, 256, 65536])
        labels, instances = np.full(numbers.shape, VOID), np.zeros(numbers.shape, np.int64)
        is_crowd = np.zeros(numbers.shape, bool)
        listed = {int(segment["id"]) for segment in scene.segments}
        unknown = set(np.unique(numbers).tolist()) - listed - {0}
        if unknown:
            raise DataMissing(f"the label map {scene.truth} has a segment {min(unknown)} that its list does not name")
        for place, segment in enumerate(scene.segments):
            mask = numbers == int(segment["id"])
            labels[mask] = segment["label"]
            if self.info.classes[segment["label"]] in self.info.things:
                instances[mask] = place + 1
            is_crowd[mask] = bool(segment.get("iscrowd", 0))
        return labels, instances, is_crowd


CITYSCAPES: dict[int, str] = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""The classes that are evaluated, by their numbers in the files; the rest is void."""

_FIRST_THING = 24


@dataclass(frozen=True)
class Cityscapes:
    """Cityscapes: `leftImg8bit/train/CITY/*_leftImg8bit.png`, `gtFine/train/CITY/*_gtFine_instanceIds.png`.

    `val` is the test split. As in the official conversion, things that nobody cut apart are crowds.
    """

    folder: str = "data/cityscapes"

    def look(self) -> tuple[Look, ...]:
        """Pictures and truth of the two splits."""
        base = Path(self.folder).expanduser()
        return tuple(_look(base / kind / split) for split in ("train", "val") for kind in ("leftImg8bit", "gtFine"))

    def advice(self) -> str:
        """What to do when nothing is there."""
        return (
            "fetch leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com, unpack both "
            "into FOLDER, and say data.folder=FOLDER"
        )

    def open(self, split: Split) -> PanopticFiles:
        """The data set."""
        base, part = Path(self.folder).expanduser(), "train" if split == "train" else "val"
        pictures = sorted((base / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
        if not pictures:
            raise DataMissing(f"{base / 'leftImg8bit' / part} holds no CITY/*_leftImg8bit.png; {self.advice()}")
        scenes = [Scene(path, _cityscapes_truth(base, part, path)) for path in pictures]
        names = tuple(CITYSCAPES.values())
        things = tuple(name for number, name in CITYSCAPES.items() if number >= _FIRST_THING)
        return CityscapesFiles("cityscapes", names, things, scenes)


def _cityscapes_truth(base: Path, part: str, picture: Path) -> Path:
    name = picture.name.removesuffix("_leftImg8bit.png") + "_gtFine_instanceIds.png"
    return base / "gtFine" / part / picture.parent.name / name


class CityscapesFiles(PanopticFiles):
    """Maps of numbers: a class below 1000, else a thousand times the class plus the instance."""

    def truth(self, scene: Scene) -> tuple[Map, Map, npt.NDArray[np.bool_]]:
        """Maps of classes, instances and crowds."""
        numbers = read_map(scene.truth)
        raw = np.where(numbers < 1000, numbers, numbers // 1000)
        labels = np.full(numbers.shape, VOID)
        for label, number in enumerate(CITYSCAPES):
            labels[raw == number] = label
        is_thing = (raw >= _FIRST_THING) & (labels != VOID)
        is_crowd = is_thing & (numbers < 1000)
        # crowds get a number of their own: an instance may be number 0 of its class
        instances = np.where(is_thing, np.where(is_crowd, 1001, numbers % 1000 + 1), 0)
        return labels, instances, is_crowd


@dataclass(frozen=True)
class Ade20k:
    """ADE20K as in the scene parsing challenge of 2016, with its instances of 2017; `validation` tests.

    Pictures in `images/training`, classes in `annotations/training`, instances in `annotations_instance/training`,
    names in `objectInfo150.txt`, and in `categoryMapping.txt` which classes are things.
    """

    folder: str = "data/ADEChallengeData2016"

    def look(self) -> tuple[Look, ...]:
        """Every part that is needed."""
        base = Path(self.folder).expanduser()
        parts = [f"{kind}/{split}" for split in ("training", "validation") for kind in _ADE_PARTS]
        return tuple(_look(base / part) for part in (*parts, "objectInfo150.txt", "categoryMapping.txt"))

    def advice(self) -> str:
        """What to do when nothing is there."""
        return (
            "fetch ADEChallengeData2016.zip and annotations_instance.tar from the ADE20K scene parsing challenge, put "
            "categoryMapping.txt of its instance track beside objectInfo150.txt, and say data.folder=FOLDER"
        )

    def open(self, split: Split) -> PanopticFiles:
        """The data set."""
        absent = next((look for look in self.look() if not look.found), None)
        if absent is not None:
            raise DataMissing(f"{absent.place} is {absent.detail}; {self.advice()}")
        base, part = Path(self.folder).expanduser(), "training" if split == "train" else "validation"
        names = _ade_names(base / "objectInfo150.txt")
        mapping = _ade_mapping(base / "categoryMapping.txt", len(names))
        pictures = sorted((base / "images" / part).glob("*.jpg"))
        if not pictures:
            raise DataMissing(f"{base / 'images' / part} holds no .jpg; {self.advice()}")
        scenes = [Scene(path, base / "annotations" / part / f"{path.stem}.png") for path in pictures]
        return AdeFiles("ade20k", names, tuple(names[label] for label in sorted(mapping.values())), scenes, mapping)


_ADE_PARTS = ("images", "annotations", "annotations_instance")


def _ade_names(path: Path) -> tuple[str, ...]:
    """The first word of each class: the last column, before its synonyms."""
    lines = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line.strip()]
    names = tuple(columns[-1].split(",")[0].split(";")[0].strip() for columns in lines if columns[0].strip().isdigit())
    if not names:
        raise DataMissing(f"{path} names no class; each line should be a number, columns and a name, set apart by tabs")
    return names


def _ade_mapping(path: Path, classes: int) -> dict[int, int]:
    """Labels by the numbers of the instance track: a line has its number and that of the class."""
    mapping = {}
    for line in path.read_text("utf-8").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0].isdigit() and words[1].isdigit():
            mapping[int(words[0])] = int(words[1]) - 1
    odd = [label for label in mapping.values() if not 0 <= label < classes]
    if not mapping or odd:
        what = f"class {odd[0] + 1} is not in objectInfo150.txt" if odd else "no line holds two numbers"
        raise DataMissing(f"{path} does not say which classes are things: {what}")
    return mapping


class AdeFiles(PanopticFiles):
    """Classes from one map (0: void), things from another: red the class among the things, green the instance."""

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        things: tuple[str, ...],
        scenes: Sequence[Scene],
        mapping: dict[int, int],
    ) -> None:
        super().__init__(name, classes, things, scenes)
        self.mapping = mapping

    def truth(self, scene: Scene) -> tuple[Map, Map, npt.NDArray[np.bool_]]:
        """Maps of classes, instances and crowds; as officially, a thing without an instance is void."""
        classes = read_map(scene.truth)
        folder = scene.truth.parents[1].with_name("annotations_instance") / scene.truth.parent.name
        parts = read_map(folder / scene.truth.name, 3)
        if parts.shape[:2] != classes.shape:
            raise DataMissing(f"{scene.truth} is {classes.shape}, but its instances are {parts.shape[:2]}")
        is_stuff = ~np.isin(classes - 1, list(self.mapping.values())) & (classes > 0)
        labels = np.where(is_stuff, classes - 1, VOID)
        instances = np.zeros(classes.shape, np.int64)
        for number in np.unique(parts[..., 0]).tolist():
            if number and number not in self.mapping:
                raise DataMissing(f"{folder / scene.truth.name} has things of class {number}, which is in no list")
            if number:
                mask = parts[..., 0] == number
                labels[mask], instances[mask] = self.mapping[number], parts[..., 1][mask] + 1
        return labels, instances, np.zeros(classes.shape, bool)
