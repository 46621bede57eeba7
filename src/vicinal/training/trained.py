"""Trained models: a weights file that knows its recipe, measured and asked about pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicinal.data.chance import sample_random
from vicinal.data.dataset import Image, Info
from vicinal.data.picture import SUFFIXES, read_picture
from vicinal.data.stream import Stream
from vicinal.models.checkpoint import read
from vicinal.tasks.classification import Classification, ClassificationTask, Named
from vicinal.tasks.protocol import Task
from vicinal.training.recipe import Recipe
from vicinal.training.written import from_plain


@dataclass(frozen=True)
class Trained:
    """A recipe, facts about its data, and the task with trained weights."""

    recipe: Recipe
    info: Info
    task: ClassificationTask
    path: Path


@dataclass(frozen=True)
class Prediction:
    """The best classes of a picture with their probabilities, best first."""

    name: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def opened(place: str | Path) -> tuple[Recipe, Info, Task, Path]:
    """Recipe, facts about the data, the task with trained weights, and the file, of a run folder or a weights file."""
    path = Path(place)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"there is no {path}; a run folder has one when its training has ended")
    metadata = metadata_of(path)
    if "recipe" not in metadata or "info" not in metadata:
        raise ValueError(f"{path} does not say which recipe it is of: only files written by `vicinal train` do")
    recipe, info = _written(metadata["recipe"], path), _written(metadata["info"], path)
    assert isinstance(recipe, Recipe)
    task = recipe.task.build(info)
    task.model.load_state_dict(read(path, is_whole=True).state)
    for turn in task.turns:
        turn.objective.eval()
    return recipe, info, task, path


def load(place: str | Path) -> Trained:
    """The classifier in a run folder, or in a `model.safetensors` of one."""
    recipe, info, task, path = opened(place)
    if not isinstance(task, ClassificationTask):
        raise ValueError(f"{path} is of a {type(task).__name__}; only classifiers are asked what a picture is")
    return Trained(recipe, info, task, path)


def _written(text: str, path: Path) -> Any:
    """Part of a recipe from a weights file, without the checkpoint that its training began with: that may be gone."""
    try:
        made = from_plain(json.loads(text))
    except (json.JSONDecodeError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the recipe in {path} is not one of this version of vicinal: {error}") from None
    task = getattr(made, "task", None)
    if isinstance(task, Classification) and isinstance(task.model, Named):
        return replace(made, task=replace(task, model=replace(task.model, pretrained=None)))
    return made


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def evaluate(trained: Trained, changes: Recipe | None = None, *, batch_size: int | None = None) -> dict[str, float]:
    """The task's metrics on the test split; `changes` is another recipe to take data and steps from."""
    return measured(trained.task, trained.info, trained.recipe if changes is None else changes, batch_size)


def measured(task: Task, info: Info, recipe: Recipe, batch_size: int | None = None) -> dict[str, float]:
    """A task's metrics on the test split of a recipe's data, which has to have the classes of its training."""
    size = recipe.loop.batch_size if batch_size is None else batch_size
    data = recipe.data.open("test")
    if data.info.classes != info.classes:
        odd = sorted(set(data.info.classes) ^ set(info.classes))
        raise ValueError(
            f"these weights were trained on {info.name} with {len(info.classes)} classes, but {data.info.name} has "
            f"{len(data.info.classes)}; they differ in {', '.join(odd[:5]) or 'their order'}"
        )
    stream = Stream(data, recipe.test_steps, batch_size=size, workers=recipe.loop.workers)
    evaluation = task.evaluation()
    for batch in stream.evaluation():
        evaluation.add(batch)
    return evaluation.values()


def predict(trained: Trained, images: Sequence[Image], names: Sequence[str] = (), k: int = 3) -> list[Prediction]:
    """The `k` best classes of each picture uint8 `[height, width, channels]`."""
    if k < 1:
        raise ValueError(f"k, the number of classes to name, must be at least 1, got {k}")
    found = []
    names = names or [str(number) for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        pixels = torch.from_numpy(np.array(prepared(trained, image))).permute(2, 0, 1)[None]
        with torch.no_grad():
            chances = trained.task.logits(pixels).softmax(1)[0]
        best = chances.topk(min(k, len(chances)))
        classes = tuple(trained.info.classes[index] for index in best.indices.tolist())
        found.append(Prediction(name, classes, tuple(best.values.tolist())))
    return found


def prepared(trained: Trained, image: Image) -> Image:
    """A picture as the model's test pictures are: by the recipe's steps, or squeezed to the size of its data."""
    from vicinal.data.augment import resized

    if trained.info.image_size is not None and image.shape[:2] != trained.info.image_size:
        image = resized(image, *trained.info.image_size)
    for step in trained.recipe.test_steps:
        image = step(image, sample_random(0, 0, 0))
    return image


def read_pictures(trained: Trained, places: Sequence[str | Path]) -> tuple[list[Image], list[str]]:
    """Pictures and their names, from files and from folders of them."""
    paths: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"{place} holds no picture ({', '.join(SUFFIXES)})")
            paths += inside
        else:
            paths.append(place)
    return [read_picture(path, trained.info.channels) for path in paths], [str(path) for path in paths]
