"""What the training loop asks of a task.

A step is a list of turns. Each turn is a module that takes a batch to losses, and an optimizer that moves the
module's parameters. One turn is a classifier. Two with optimizers of their own are a GAN, a third with `every=16` is
its lazy penalty. Frozen parts (a base model, the opponent) are held by a turn without being its submodules, so that
they are neither moved nor wrapped. A task that prunes works in `prepare` and `after_step`; one that solves for
thresholds after training works in `finish`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vicinal.data.batch import Batch
from vicinal.data.dataset import Info

Losses: TypeAlias = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""What is differentiated, a mean over the batch; and named parts of it for the log, detached."""


@dataclass(frozen=True)
class Moment:
    """Where training is: the step from 0, how many there will be, and the run's seed.

    All that is drawn in a step is drawn from these, never from what was drawn before.
    """

    step: int
    total: int
    seed: int


@dataclass(frozen=True)
class Turn:
    """One optimizer's share of a step.

    `objective` maps `(batch, moment)` to `Losses`; its parameters that require gradients are moved. Turns with the
    same `optimizer` share one. A turn is taken at every step that `every` divides. `is_clipped` says whether the
    recipe's limit on the gradient's norm holds for it; a lazy penalty is meant to be as strong as it comes.
    """

    name: str
    objective: nn.Module
    optimizer: str = "main"
    every: int = 1
    is_clipped: bool = True


@dataclass(frozen=True)
class Panel:
    """A picture `[height, width, channels]` uint8 with a caption; `is_right` colors it, None does not."""

    image: npt.NDArray[np.uint8]
    caption: str
    is_right: bool | None = None


class Evaluation(Protocol):
    """Metrics over a stream of batches."""

    def add(self, batch: Batch) -> None:
        """Take up a batch, without gradients."""

    def values(self) -> dict[str, float]:
        """The metrics over all batches of all processes; every process asks."""


class Task(Protocol):
    """A model with its losses and metrics. All that a checkpoint has to hold is a parameter or buffer of `model`."""

    @property
    def model(self) -> nn.Module:
        """What is trained, averaged, saved and exported."""

    @property
    def turns(self) -> Sequence[Turn]:
        """What a step consists of, in order."""

    @property
    def best(self) -> tuple[str, bool]:
        """The metric that chooses the best checkpoint, and whether more of it is better."""

    def units(self) -> Sequence[nn.Module]:
        """Parts of the model of about equal size: what is sharded, and recomputed in the backward, as one."""

    def evaluation(self) -> Evaluation:
        """A fresh evaluation of the model as it is now."""

    def draw(self, batch: Batch) -> list[Panel]:
        """What a person wants to see of a batch."""

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Before the first step of a fresh run; `batches` are training batches."""

    def after_step(self, moment: Moment) -> None:
        """After the optimizers moved."""

    def finish(self, batches: Iterator[Batch]) -> None:
        """After the last step, on the weights that are exported; again where a finished run is resumed."""


class WithoutHooks:
    """The hooks of a task that has nothing to do before its training, between its steps or after them."""

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Nothing."""

    def after_step(self, moment: Moment) -> None:
        """Nothing."""

    def finish(self, batches: Iterator[Batch]) -> None:
        """Nothing."""


class TaskConfig(Protocol):
    """A task's description, as it stands in a recipe."""

    def build(self, info: Info) -> Task:
        """The task for data of this kind, with fresh weights."""
