"""Trained segmentation models asked about pictures of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vicinal.data.augment import resized
from vicinal.data.dataset import Image, Info
from vicinal.data.folders import IMAGENET_MEAN, IMAGENET_STD
from vicinal.data.panoptic_files import CITYSCAPES
from vicinal.metrics import Segments
from vicinal.models.oneformer import OneFormer
from vicinal.models.registry import config_of, create_model
from vicinal.tasks import postprocess
from vicinal.tasks.joint_labels import TASKS, TaskName
from vicinal.tasks.postprocess import PUBLISHED, Rules
from vicinal.tasks.segmentation import Segmentation, SegmentationTask, as_segments
from vicinal.training.trained import opened

SIZES = {"ade20k": (640, 2560), "cityscapes": (1024, 2048), "coco_panoptic": (800, 1333), "mapillary": (1024, 2048)}
"""The short side that pictures get, and the most that the long side may have, as published."""

_MULTIPLE = 32
_MOST, _MOST_SCALE = 8192, 8
"""A slip of the finger beyond these would ask for more memory than there is."""

_LARGEST = 2048
"""Pixels of the long side at which masks are decided; larger pictures get the nearest of these."""


@dataclass(frozen=True)
class Segmenter:
    """A model with the names of its classes; `short` and `most` are the sides that pictures are made fit."""

    info: Info
    task: SegmentationTask
    path: Path
    short: int
    most: int


@dataclass(frozen=True)
class Found:
    """What is in a picture: segments to draw, whole masks `[segments, height, width]`, labels, and scores if any."""

    segments: Segments
    masks: npt.NDArray[np.bool_]
    labels: list[int]
    scores: list[float] | None


def load_segmenter(place: str | Path) -> Segmenter:
    """The segmentation model in a run folder, or in a weights file of `vicinal train`."""
    _, info, task, path = opened(place)
    if not isinstance(task, SegmentationTask):
        raise ValueError(f"{path} is of a {type(task).__name__}, which finds no segments; give weights of a OneFormer")
    task.objective.eval()
    short, most = SIZES.get(info.name, (info.image_size[0] if info.image_size else 640, 2560))
    return Segmenter(info, task, path, short, max(most, short))


def load_published(name: str, weights: str | Path, names: Sequence[str] = (), things: Sequence[str] = ()) -> Segmenter:
    """A published checkpoint as the model `name`; classes other than those of Cityscapes have to be given."""
    data = name.rpartition("_")[2].replace("coco", "coco_panoptic")
    if not names and data == "cityscapes":
        names = tuple(CITYSCAPES.values())
        things = tuple(CITYSCAPES[number] for number in CITYSCAPES if number >= 24)
    config = config_of(name)
    classes = getattr(config, "num_classes", 0)
    if len(names) != classes:
        raise ValueError(
            f"{name} has {classes} classes, but {len(names)} names are given: "
            + ("name them in a file, one a line" if not names else "these weights are of another data set")
        )
    model = create_model(name, str(weights))
    if not isinstance(model, OneFormer) or model.task is None:
        raise ValueError(f"{name} is no OneFormer, so it cannot be told its task")
    info = Info(data, tuple(names), 3, IMAGENET_MEAN, IMAGENET_STD, None, tuple(things))
    task = SegmentationTask(Segmentation(model.config, rules=PUBLISHED.get(data, Rules())), info, model)
    task.objective.eval()
    short, most = SIZES.get(data, (640, 2560))
    return Segmenter(info, task, Path(weights), short, most)


def with_least_score(segmenter: Segmenter, least_score: float) -> Segmenter:
    """The same with another threshold."""
    config = segmenter.task.config
    task = SegmentationTask(
        replace(config, rules=replace(config.rules, least_score=least_score)), segmenter.info, segmenter.task.model
    )
    task.objective.eval()
    return replace(segmenter, task=task)


def segment(
    segmenter: Segmenter,
    picture: Image,
    task: TaskName = "panoptic",
    *,
    size: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Found:
    """What is in a picture `[height, width, 3]`.

    `size` is what its short side is made, `scales` and `flip` add views at other sizes and mirrored, which are averaged
    for the semantic task; queries of the others stand for other segments in each view, so they take one view.
    """
    check(segmenter, picture, task, size, scales, flip)
    views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
    out = _decided(picture.shape[0], picture.shape[1])
    if task == "semantic":
        total = torch.zeros(len(segmenter.info.classes), *out)
        for scale, mirrored in views:
            classes, masks = _logits(segmenter, picture, task, size, scale, mirrored, out)
            total += postprocess.class_scores(classes, masks)
        return _semantic(total.argmax(0), picture)
    classes, masks = _logits(segmenter, picture, task, size, scales[0], flip, out)
    things, rules = segmenter.task.objective.things, segmenter.task.config.rules
    if task == "panoptic":
        cut, scores = postprocess.panoptic(classes, masks, things, rules)
        cut = Segments(_grown(cut.numbers, picture), cut.labels)
        return Found(cut, cut.masks().numpy(), cut.labels.tolist(), scores.tolist())
    found = postprocess.instances(classes, masks, things, rules)
    assert found.scores is not None
    shown = found.scores >= rules.least_score
    kept = replace(found, masks=found.masks[shown], labels=found.labels[shown], scores=found.scores[shown])
    grown = torch.stack([_grown(mask.long(), picture) > 0 for mask in kept.masks]) if len(kept) else None
    whole = torch.zeros(0, *picture.shape[:2], dtype=torch.bool) if grown is None else grown
    kept = replace(kept, masks=whole)
    assert kept.scores is not None
    return Found(as_segments(kept, 0.0), whole.numpy(), kept.labels.tolist(), kept.scores.tolist())


def check(
    segmenter: Segmenter, picture: Image, task: str, size: int | None, scales: Sequence[float], flip: bool
) -> None:
    """Refuse what cannot be done."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if task not in segmenter.task.config.tasks:
        raise ValueError(f"{segmenter.path} was trained for {', '.join(segmenter.task.config.tasks)} alone, not {task}")
    if picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size:
        raise ValueError(f"picture must be [height, width, 3], got {picture.shape}")
    if size is not None and not _MULTIPLE <= size <= _MOST:
        raise ValueError(f"size must be at least {_MULTIPLE} and at most {_MOST}, got {size}")
    if not scales or not all(0 < scale <= _MOST_SCALE for scale in scales):
        raise ValueError(f"scales must be above 0 and at most {_MOST_SCALE}, got {tuple(scales)}")
    if task != "semantic" and (len(scales) > 1 or flip):
        raise ValueError(f"several scales and flip are for the semantic task, not for {task}")


def _semantic(labels: torch.Tensor, picture: Image) -> Found:
    cut = as_segments(labels)
    cut = Segments(_grown(cut.numbers, picture), cut.labels)
    return Found(cut, cut.masks().numpy(), cut.labels.tolist(), None)


def _decided(height: int, width: int) -> tuple[int, int]:
    factor = min(1.0, _LARGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _grown(numbers: torch.Tensor, picture: Image) -> torch.Tensor:
    """A map at the picture's size."""
    if tuple(numbers.shape) == picture.shape[:2]:
        return numbers
    large = nn.functional.interpolate(numbers[None, None].double(), picture.shape[:2], mode="nearest")
    return large[0, 0].long()


def _logits(
    segmenter: Segmenter,
    picture: Image,
    task: TaskName,
    size: int | None,
    scale: float,
    mirrored: bool,
    out: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits `[queries, classes + 1]` and mask logits `[queries, *out]` of one view."""
    short = segmenter.short if size is None else size
    most = max(segmenter.most, short) * scale
    factor = min(short * scale / min(picture.shape[:2]), most / max(picture.shape[:2]))
    height, width = (max(1, round(length * factor)) for length in picture.shape[:2])
    pixels = resized(picture, height, width, "BILINEAR")
    if mirrored:
        pixels = pixels[:, ::-1]
    rows, columns = (-(-length // _MULTIPLE) * _MULTIPLE for length in (height, width))
    padded = np.empty((rows, columns, 3), np.uint8)
    padded[:] = np.round(np.array(segmenter.info.mean) * 255)
    padded[:height, :width] = pixels
    classes, masks = segmenter.task.logits(torch.from_numpy(padded).permute(2, 0, 1)[None], task)
    inside = masks[..., :height, :width]
    inside = inside.flip(-1) if mirrored else inside
    return classes[0], nn.functional.interpolate(inside, out, mode="bilinear")[0]
