"""Generators from files: our own runs, which say what they are, and weights in any layout that is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vicinal.data.dataset import DataMissing
from vicinal.models import loading, registry
from vicinal.models.checkpoint import find, read
from vicinal.models.layout import Fit
from vicinal.models.stylenat import StyleNAT
from vicinal.tasks.adversarial import Adversarial
from vicinal.training.recipe import Recipe
from vicinal.training.trained import metadata_of
from vicinal.training.written import from_plain


@dataclass(frozen=True)
class Generator:
    """A generator ready to be drawn from: the model, its or its recipe's name, and where its weights are from."""

    model: StyleNAT
    name: str
    weights: str


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
        if registry.families()[name].is_backbone:
            raise ValueError(f"{name} makes no pictures; generators are {', '.join(generators())}")
    if name is None and (weights is None or overrides):
        raise ValueError(f"which model? generators are {', '.join(generators())}")
    path = None if weights is None else _file(weights)
    place = _device(device)
    with torch.random.fork_rng():  # fresh weights are the same each time too, and nobody else's draws change
        torch.manual_seed(0)
        told = None if name is not None or path is None else _of_recipe(path)
        if told is not None:
            name, model = told
        else:
            name = generator_of(path) if name is None and path is not None else str(name)
            model = registry.create_model(name, path, **dict(overrides or {}))
    assert isinstance(model, StyleNAT)
    return Generator(model.eval().requires_grad_(False).to(place), name, "none" if path is None else str(path))


def _of_recipe(path: Path) -> tuple[str, nn.Module] | None:
    """The generator of a file that `vicinal train` wrote, by its own account: weights do not tell dilations."""
    written = metadata_of(path).get("recipe") if path.suffix == ".safetensors" else None
    if written is None:
        return None
    recipe = from_plain(json.loads(written))
    if not isinstance(recipe, Recipe) or not isinstance(recipe.task, Adversarial):
        raise ValueError(f"{path} is of a {type(recipe.task).__name__}, which makes no pictures")
    model = StyleNAT(recipe.task.generator)
    loading.load(model, read(path).state, registry.families()["stylenat_fashion32"])
    return recipe.name, model


def generators() -> list[str]:
    """The names of models that make pictures.

    >>> "stylenat_ffhq256" in generators()
    True
    """
    return sorted(name for name, family in registry.families().items() if not family.is_backbone)


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


def _file(weights: str | Path) -> Path:
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
