"""Generators from files: our own runs, which say what they are, and weights in any layout that is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vicinal.data.dataset import DataMissing, Split
from vicinal.data.stream import Stream
from vicinal.metrics import Extractor
from vicinal.models import loading, registry
from vicinal.models.checkpoint import find, read
from vicinal.models.layout import Fit
from vicinal.models.stylenat import StyleNAT
from vicinal.tasks.adversarial import Adversarial
from vicinal.tasks.image_distance import Comparison, Features, compare
from vicinal.tasks.sampling import Announce, Sampler
from vicinal.training.recipe import Recipe
from vicinal.training.trained import metadata_of
from vicinal.training.written import from_plain

AT_ONCE = 50
"""Pictures that go through an extractor together."""


@dataclass(frozen=True)
class Generator:
    """A generator ready to be drawn from: the model, its or its recipe's name, and where its weights are from.

    `recipe` is the one it was trained by, where its file tells.
    """

    model: StyleNAT
    name: str
    weights: str
    recipe: Recipe | None = None


def open_generator(
    weights: str | Path | None,
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Generator:
    """A generator from a file of weights in any known layout, or a run folder; the file tells a `name` not given.

    Without `weights` the model is fresh and makes noise, which shows what it costs. `overrides` are fields of its
    configuration, and need a name.

    >>> open_generator(None, "stylenat_fashion32").model.image_size
    32
    """
    if name is not None:
        registry.config_of(name)  # an unknown name is told with its nearest
        if registry.families()[name].kind != "generator":
            raise ValueError(f"{name} makes no pictures; generators are {', '.join(generators())}")
    if name is None and (weights is None or overrides):
        raise ValueError(f"which model? generators are {', '.join(generators())}")
    path = None if weights is None else weights_file(weights)
    place = _device(device)
    recipe = None if path is None or name is not None else recipe_of(path)
    with torch.random.fork_rng():  # fresh weights are the same each time too, and nobody else's draws change
        torch.manual_seed(0)
        if path is not None and recipe is not None:
            name, model = recipe.name, _of_recipe(path, recipe)
        else:
            name = generator_of(path) if name is None and path is not None else str(name)
            made = registry.create_model(name, path, **dict(overrides or {}))
            assert isinstance(made, StyleNAT)
            model = made
    model.eval().requires_grad_(False).to(place)
    return Generator(model, name, "none" if path is None else str(path), recipe)


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of a file that `vicinal train` wrote; None of any other."""
    written = metadata_of(path).get("recipe") if path.suffix == ".safetensors" else None
    if written is None:
        return None
    recipe = from_plain(json.loads(written))
    assert isinstance(recipe, Recipe)
    return recipe


def _of_recipe(path: Path, recipe: Recipe) -> StyleNAT:
    """The generator by its file's own account: weights do not tell dilations."""
    if not isinstance(recipe.task, Adversarial):
        raise ValueError(f"{path} is of a {type(recipe.task).__name__}, which makes no pictures")
    model = StyleNAT(recipe.task.generator)
    loading.load(model, read(path).state, registry.families()["stylenat_fashion32"])
    return model


def measure(
    generator: Generator,
    extractor: Extractor,
    recipe: Recipe | None = None,
    *,
    count: int = 10_000,
    split: Split = "test",
    announce: Announce = lambda done: None,
) -> Comparison:
    """How far its first `count` pictures are from as many of the data that its recipe names, prepared as there.

    Published distances are those of 50,000 pictures from all of the training split. `recipe` replaces its own.
    """
    recipe = generator.recipe if recipe is None else recipe
    if recipe is None:
        raise ValueError(f"{generator.weights} does not say which data it learned from; compare folders instead")
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    real, made = Features(extractor), Features(extractor)
    stream = Stream(recipe.data.open(split), recipe.test_steps, batch_size=AT_ONCE)
    for batch in stream.evaluation():
        left = count - len(real)
        if left <= 0:
            break
        real.add(batch.images[:left])
        announce(len(real))
    sampler = Sampler(generator.model)
    for part in sampler.batches(range(count), AT_ONCE):
        made.add(part)
        announce(len(real) + len(made))
    return compare(real, made)


def generators() -> list[str]:
    """The names of models that make pictures.

    >>> "stylenat_ffhq256" in generators()
    True
    """
    return sorted(name for name, family in registry.families().items() if family.kind == "generator")


def generator_of(path: Path) -> str:
    """The name of the generator that a checkpoint is of."""
    state = read(path).state
    found: dict[str, Fit] = {}
    for name in generators():
        with torch.device("meta"):
            model = registry.create_model(name)
        _, _, fit = loading.match(state, model, registry.families()[name])
        if fit.is_exact:
            return name
        found[name] = fit
    nearest = min(found, key=lambda name: _problems(found[name]))
    raise ValueError(
        f"{path} is of no generator known here; the nearest is {nearest}: {found[nearest]}. Where the configuration is "
        "one of your own, give the model's name and the changes; `vicinal weights FILE` knows other models"
    )


def _problems(fit: Fit) -> int:
    return len(fit.missing) + len(fit.extra) + len(fit.misshapen)


def weights_file(weights: str | Path) -> Path:
    """The file that a path, a run folder or an address names."""
    path = Path(weights).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if path.is_file() or "://" in str(weights):
        return find(path if path.is_file() else weights)
    raise DataMissing(f"there is no file of weights {path}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or the like, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no CUDA here")
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"device must be cpu, cuda, mps or xpu, got {name!r}")
    return device
