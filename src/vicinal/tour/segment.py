"""The row of OneFormer: one picture, three overlays from one small model, on made scenes with objects it never saw."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from vicinal.data.dataset import Image
from vicinal.data.scenes import SceneDataset, Scenes
from vicinal.data.stream import Stream
from vicinal.metrics import PanopticQuality, Segments
from vicinal.recipes.shipped import FOLDER, SEGMENTER, SINGLE_TASK_PQ
from vicinal.tasks.joint_labels import TASKS, TaskName, segments
from vicinal.tasks.overlay import overlay
from vicinal.tasks.protocol import Panel
from vicinal.tasks.segmentation import as_segments
from vicinal.tour.systems import Outcome
from vicinal.training.drawing import save_panels
from vicinal.training.segmenter import Segmenter, load_segmenter

SHOWN = (0, 3)
"""Numbers of the test scenes that are drawn."""

SCENES = 40
"""How many are measured; the first of the test split."""

LARGER = 3
"""How many pixels of the drawing a pixel of a scene has along each side, so that names fit."""


def show_oneformer(folder: Path) -> Outcome:
    """OneFormer's row."""
    model = load_segmenter(FOLDER / f"{SEGMENTER}.safetensors")
    data = Scenes(test=SCENES).open("test")
    panels, times = [], []
    for index in SHOWN:
        picture = np.ascontiguousarray(data.read(index)[0][..., :3])
        panels.append(Panel(large(picture), "a made scene"))
        for task in TASKS:
            painted, seconds = drawn(model, picture, task)
            panels.append(Panel(painted, task))
            times.append(seconds)
    save_panels(panels, folder / "oneformer.png")
    return Outcome(
        folder / "oneformer.png",
        number=100 * measured(model, data),
        baseline=100 * SINGLE_TASK_PQ[SCENES],
        unit="panoptic quality, %",
        baseline_name="trained for panoptic alone, a third of the budget",
        note=f"{SCENES} made scenes with objects that were not in training; small weights trained by the recipe "
        f"{SEGMENTER}, one model that is told its task; {1000 * float(np.median(times)):.0f} ms a picture and task.",
    )


def drawn(model: Segmenter, picture: Image, task: TaskName) -> tuple[Image, float]:
    """A picture with what is found for a task, enlarged, and the seconds that finding took."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    begin = time.perf_counter()
    found = model.task.found(pixels, task)[0]
    seconds = time.perf_counter() - begin
    cut = as_segments(found)
    numbers = cut.numbers.repeat_interleave(LARGER, 0).repeat_interleave(LARGER, 1)
    return overlay(large(picture), Segments(numbers, cut.labels), model.info), seconds


def large(picture: Image) -> Image:
    """A picture whose pixels are squares.

    >>> large(np.zeros((2, 3, 3), np.uint8)).shape
    (6, 9, 3)
    """
    return picture.repeat(LARGER, 0).repeat(LARGER, 1)


def measured(model: Segmenter, data: SceneDataset) -> float:
    """Panoptic quality on scenes."""
    things = model.task.objective.things
    metric = PanopticQuality(len(model.info.classes), frozenset(things))
    total = torch.zeros(len(model.info.classes), 4, dtype=torch.float64)
    for batch in Stream(data, (), batch_size=8).evaluation():
        truths = [segments(layers) for layers in batch.images[:, 3:]]
        total += metric.tally(model.task.found(batch.images[:, :3], "panoptic"), truths)
    return metric.value(total)
