"""Small runs for the tests: a tiny model on digits, in this process or in one that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import vicinal
from vicinal.data import Digits
from vicinal.data.augment import Shift
from vicinal.models.compact import CompactConfig
from vicinal.tasks import Classification
from vicinal.training import AdamW, Cosine, Loop, Recipe
from vicinal.training.checkpoint import Store

SOURCE = Path(vicinal.__file__).parent.parent


def tiny(**loop) -> Recipe:
    """Eleven steps an epoch, a few milliseconds each; with drop path, so that steps draw random numbers."""
    settings = {
        "epochs": 2,
        "batch_size": 128,
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    model = CompactConfig("dinat", dim=16, depths=(1, 1), kernel_size=3, drop_path_rate=0.2)
    return Recipe(
        name="tiny",
        status="for tests",
        data=Digits(),
        task=Classification(model, label_smoothing=0.1),
        train_steps=(Shift(1),),
        optimizers={"main": AdamW(learning_rate=4e-3)},
        schedule=Cosine(warmup=1),
        loop=Loop(**{**settings, **loop}),
    )


def steady(**loop) -> Recipe:
    """Without drop path, whose draws differ from process to process."""
    recipe = tiny(**loop)
    return replace(recipe, task=replace(recipe.task, model=replace(recipe.task.model, drop_path_rate=0.0)))


def tensors(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors in a checkpoint, by name."""
    store = Store(folder / "checkpoints")
    step = store.steps()[-1] if step is None else step
    whole = folder / "whole.pt"
    dcp_to_torch_save(store.path(step), whole)
    found: dict[str, torch.Tensor] = {}
    _flatten(torch.load(whole, weights_only=True), "", found)
    whole.unlink()
    return found


def _flatten(content, name, found):
    if isinstance(content, torch.Tensor):
        found[name] = content
    elif isinstance(content, dict):
        for key, value in content.items():
            _flatten(value, f"{name}.{key}", found)


def start(folder: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs a script of this room's tests, in a session of its own."""
    here = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(SOURCE), here)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
