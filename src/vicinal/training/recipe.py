"""Recipes: everything a run depends on, as frozen dataclasses. A choice among kinds is a type with its own fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from vicinal.data.augment import Step
from vicinal.data.dataset import Source
from vicinal.tasks.protocol import TaskConfig


@dataclass(frozen=True)
class AdamW:
    """AdamW; `scales` multiplies the learning rate of parameter groups (`"stem"`, `"stage0"`, `"head"`)."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rates(self.learning_rate, self.weight_decay)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in 0 <= beta < 1, got {self.betas}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be above 0, got {self.epsilon}")


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum; `scales` as in `AdamW`."""

    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    use_nesterov: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rates(self.learning_rate, self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in 0 <= m < 1, got {self.momentum}")


def _check_rates(learning_rate: float, weight_decay: float) -> None:
    if not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate must be at least 0 and finite, got {learning_rate}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay}")


class Schedule(Protocol):
    """The learning rate over a run, as a factor of the optimizer's."""

    def factor(self, epoch: float, epochs: float) -> float:
        """At a time in epochs, of a run that long."""


def _warmed(epoch: float, warmup: float, start: float, then: float) -> float:
    return then if epoch >= warmup else start + (1.0 - start) * epoch / warmup


@dataclass(frozen=True)
class Cosine:
    """Half a cosine to `final`, over all but the last `cooldown` epochs, after a linear warm-up from `start`.

    As in timm the warm-up covers the cosine's beginning instead of delaying it.

    >>> [round(Cosine(warmup=1, start=0.1).factor(epoch, 10), 3) for epoch in (0, 0.5, 5, 10)]
    [0.1, 0.55, 0.5, 0.0]
    """

    warmup: float = 0.0
    start: float = 1e-3
    final: float = 0.0
    cooldown: float = 0.0

    def factor(self, epoch: float, epochs: float) -> float:
        """At a time in epochs, of a run that long."""
        share = min(epoch / max(epochs - self.cooldown, 1e-9), 1.0)
        curve = self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2
        return _warmed(epoch, self.warmup, self.start, curve)


@dataclass(frozen=True)
class Poly:
    """`(1 - t) ** power` of the run, after a warm-up; power 1 is linear.

    >>> Poly(power=2).factor(5, 10)
    0.25
    """

    power: float = 1.0
    warmup: float = 0.0
    start: float = 1e-3
    final: float = 0.0

    def factor(self, epoch: float, epochs: float) -> float:
        """At a time in epochs, of a run that long."""
        share = min(epoch / max(epochs, 1e-9), 1.0)
        return _warmed(epoch, self.warmup, self.start, max((1 - share) ** self.power, self.final))


@dataclass(frozen=True)
class Held:
    """Constant over the first `hold` of the run, then linear to `final`.

    >>> [round(Held(hold=0.5).factor(epoch, 10), 3) for epoch in (0, 5, 7.5, 10)]
    [1.0, 1.0, 0.5, 0.0]
    """

    hold: float = 0.775
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.hold < 1:
            raise ValueError(f"hold must be a share of the run in 0 <= h < 1, got {self.hold}")

    def factor(self, epoch: float, epochs: float) -> float:
        """At a time in epochs, of a run that long."""
        share = min(epoch / max(epochs, 1e-9), 1.0)
        return 1.0 - (1.0 - self.final) * max(share - self.hold, 0.0) / (1.0 - self.hold)


@dataclass(frozen=True)
class Steps:
    """Times `gamma` at each of the epochs `at`, after a warm-up; no epochs keep the rate constant.

    >>> [Steps(at=(27, 33)).factor(epoch, 36) for epoch in (26.9, 27, 35)]
    [1.0, 0.1, 0.010000000000000002]
    """

    at: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    start: float = 1e-3

    def factor(self, epoch: float, epochs: float) -> float:
        """At a time in epochs, of a run that long."""
        passed = sum(epoch >= border for border in self.at)
        return _warmed(epoch, self.warmup, self.start, self.gamma**passed)


Precision = Literal["float32", "bfloat16", "float16"]
Parallel = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Loop:
    """How long, how large, how exact, how often.

    `batch_size` counts all processes together; `accumulation` cuts each process's part into so many pieces. The
    average of weights (`ema_decay`) is what is evaluated and exported, where there is one. `timeout_s` is how long
    processes wait for one that does not answer. Zero `threads` leaves torch's number alone.
    """

    epochs: float = 10.0
    batch_size: int = 128
    accumulation: int = 1
    precision: Precision = "float32"
    clip_norm: float | None = None
    ema_decay: float | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Parallel = "ddp"
    seed: int = 0
    workers: int = 0
    threads: int = 0
    evaluate_every: float = 1.0
    checkpoint_every: int = 200
    keep: int = 2
    log_every: int = 10
    pictures: bool = True
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulation", "evaluate_every", "checkpoint_every", "keep", "log_every")
        for name in (*positive, "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"loop.{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("workers", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"loop.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"loop.seed must be in 0 .. 2**32 - 1, got {self.seed}")
        for name, allowed in (("precision", ("float32", "bfloat16", "float16")), ("parallel", ("ddp", "fsdp2"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"loop.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"loop.ema_decay must be in 0 < decay < 1, or None, got {self.ema_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"loop.clip_norm must be above 0, or None, got {self.clip_norm}")


@dataclass(frozen=True)
class Recipe:
    """A run. `status` says in words whether it was ever run, and what came out."""

    name: str
    status: str
    data: Source
    task: TaskConfig
    train_steps: tuple[Step, ...] = ()
    test_steps: tuple[Step, ...] = ()
    optimizers: Mapping[str, AdamW | Sgd] = field(default_factory=lambda: {"main": AdamW()})
    schedule: Schedule = field(default_factory=Cosine)
    loop: Loop = field(default_factory=Loop)
