"""Classification: one label per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vicinal.data.batch import Batch
from vicinal.data.dataset import Info
from vicinal.layers.block import Block
from vicinal.metrics import Calibration, Tallies, TopK
from vicinal.models import compact
from vicinal.models.compact import CompactConfig
from vicinal.models.registry import create_model
from vicinal.tasks.mixing import Mixing
from vicinal.tasks.protocol import Losses, Moment, Panel, Turn, WithoutHooks


@dataclass(frozen=True)
class Named:
    """A model of `create_model`, with fields of its configuration overridden; `pretrained` is a checkpoint."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    pretrained: str | None = None


def make_model(config: Named | CompactConfig, info: Info) -> nn.Module:
    """The model of a description, for the classes and channels of the data.

    >>> info = Info("made", ("a", "b", "c"), 1, (0.5,), (0.5,))
    >>> make_model(CompactConfig("nat", dim=16, depths=(1,)), info)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """
    classes, channels = len(info.classes), info.channels
    if isinstance(config, CompactConfig):
        return compact.build(replace(config, num_classes=classes, in_channels=channels))
    overrides = {"in_channels": channels, **config.overrides}
    return create_model(config.name, config.pretrained, num_classes=classes, **overrides)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy on labels, smoothed and mixed if asked for."""

    model: Named | CompactConfig
    label_smoothing: float = 0.0
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in 0 <= s < 1, got {self.label_smoothing}")

    def build(self, info: Info) -> ClassificationTask:
        """The task, with fresh weights."""
        return ClassificationTask(self, info, make_model(self.model, info))


class Normalize(nn.Module):
    """Bytes to numbers: uint8 `[batch, channels, height, width]` to float32 with the data's mean and deviation out.

    >>> Normalize((0.5,), (0.5,))(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist()
    [-1.0, 1.0]
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return (images.float() / 255 - self.mean) / self.std


class ClassificationObjective(nn.Module):
    """A batch to its loss."""

    def __init__(self, config: Classification, info: Info, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(info.mean, info.std)
        self.mixing, self.smoothing, self.classes = config.mixing, config.label_smoothing, len(info.classes)

    def forward(self, batch: Batch, moment: Moment) -> Losses:
        """The mean cross-entropy, by itself and by name."""
        images, labels = self.normalize(batch.images), batch.labels
        if self.mixing is not None:
            images, labels = self.mixing(images, nn.functional.one_hot(labels, self.classes).float(), moment)
        loss = nn.functional.cross_entropy(self.model(images).float(), labels, label_smoothing=self.smoothing)
        return loss, {"loss": loss.detach()}


class ClassificationTask(WithoutHooks):
    """A classifier under training.

    >>> info = Info("made", ("a", "b"), 1, (0.5,), (0.5,))
    >>> task = Classification(CompactConfig(dim=16, depths=(1,))).build(info)
    >>> [turn.name for turn in task.turns], len(task.units())
    (['classify'], 1)
    """

    best = ("accuracy", True)

    def __init__(self, config: Classification, info: Info, model: nn.Module) -> None:
        self.config, self.info, self.model = config, info, model
        self.objective = ClassificationObjective(config, info, model)
        self.turns: tuple[Turn, ...] = (Turn("classify", self.objective),)

    def units(self) -> list[nn.Module]:
        """The blocks."""
        return [module for module in self.model.modules() if isinstance(module, Block)]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]` of bytes `[batch, channels, height, width]`."""
        result: torch.Tensor = self.model(self.objective.normalize(images)).float()
        return result

    def evaluation(self) -> ClassificationEvaluation:
        """Accuracy, calibration error and loss of the model as it is now."""
        return ClassificationEvaluation(self)

    def draw(self, batch: Batch) -> list[Panel]:
        """Each image with what the model takes it for, and what it is where that differs."""
        with torch.no_grad():
            chances = self.logits(batch.images).softmax(1)
        panels = []
        for image, chance, label in zip(batch.images.cpu(), chances.cpu(), batch.labels.tolist(), strict=True):
            best = int(chance.argmax())
            caption = f"{self.info.classes[best]} {chance[best]:.0%}"
            if best != label:
                caption += f"\nis {self.info.classes[label]}"
            panels.append(Panel(image.permute(1, 2, 0).numpy(), caption, best == label))
        return panels


class ClassificationEvaluation:
    """Sums over test images."""

    def __init__(self, task: ClassificationTask) -> None:
        self.task = task
        metrics: dict[str, Any] = {"accuracy": TopK(1), "calibration_error": Calibration(15, from_logits=True)}
        if len(task.info.classes) > 5:
            metrics["top5"] = TopK(5)
        self.tallies = Tallies({**metrics, "loss": CrossEntropy()})

    def add(self, batch: Batch) -> None:
        """Take up a batch."""
        with torch.no_grad():
            self.tallies.add(self.task.logits(batch.images), batch.labels, batch.weights)

    def values(self) -> dict[str, float]:
        """The metrics by name."""
        return self.tallies.values()


class CrossEntropy:
    """The mean cross-entropy of logits, as a metric.

    >>> metric = CrossEntropy()
    >>> round(metric.value(metric.tally(torch.zeros(3, 2), torch.tensor([0, 1, 1]))), 4)
    0.6931
    """

    def tally(self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """`[loss summed, samples]`."""
        losses = nn.functional.cross_entropy(outputs.double(), targets, reduction="none")
        weights = torch.ones_like(losses) if weights is None else weights.double()
        return torch.stack([(losses * weights).sum(), weights.sum()])

    def value(self, tally: torch.Tensor) -> float:
        """The mean."""
        return float(tally[0] / tally[1])
