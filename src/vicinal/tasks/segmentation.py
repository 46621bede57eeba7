"""Segmentation: one model for panoptic, semantic and instance, the task told by text; or for some of them alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vicinal.data.batch import Batch
from vicinal.data.dataset import DataMissing, Info
from vicinal.data.layers import CHANNELS
from vicinal.layers.block import Block
from vicinal.metrics import AveragePrecision, Detections, Instances, MeanIoU, PanopticQuality, Segments
from vicinal.metrics.tally import across_processes
from vicinal.models.checkpoint import read
from vicinal.models.oneformer import OneFormer, OneFormerConfig, OneFormerOutput
from vicinal.models.oneformer.losses import LossConfig, SegmentationLoss
from vicinal.models.registry import create_model
from vicinal.tasks import postprocess
from vicinal.tasks.classification import Normalize
from vicinal.tasks.joint_labels import TASKS, TaskName, class_map, draw_tasks, segments, target
from vicinal.tasks.overlay import overlay
from vicinal.tasks.postprocess import Rules
from vicinal.tasks.prompts import Prompts
from vicinal.tasks.protocol import Losses, Moment, Panel, Turn, WithoutHooks

_METRICS: Mapping[TaskName, str] = {"panoptic": "pq", "semantic": "miou", "instance": "ap"}


@dataclass(frozen=True)
class Segmentation:
    """A OneFormer (its `num_classes` is taken from the data), trained for `tasks` drawn evenly for every image.

    `stem` is a weights file to take the backbone from before the first step: of a `Stem`'s run, or of another
    OneFormer. `freeze_stem` leaves the backbone as it is.
    """

    model: OneFormerConfig
    tasks: tuple[TaskName, ...] = TASKS
    loss: LossConfig = field(default_factory=LossConfig)
    rules: Rules = field(default_factory=Rules)
    stem: str | None = None
    freeze_stem: bool = False

    def __post_init__(self) -> None:
        odd = [task for task in self.tasks if task not in TASKS]
        if odd or not self.tasks:
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {', '.join(odd) or 'none'}")

    def build(self, info: Info) -> SegmentationTask:
        """The task, with fresh weights."""
        if not set(info.things) <= set(info.classes):
            raise ValueError(f"things of {info.name} are not among its classes: {set(info.things) - set(info.classes)}")
        return SegmentationTask(self, info, OneFormer(replace(self.model, num_classes=len(info.classes))))


class SegmentationObjective(nn.Module):
    """A batch of layered pictures to its loss."""

    def __init__(self, config: Segmentation, info: Info, model: OneFormer) -> None:
        super().__init__()
        self.model, self.config, self.info = model, config, info
        self.normalize = Normalize(info.mean, info.std)
        self.loss = SegmentationLoss(config.loss)
        self.things = [info.classes.index(name) for name in info.things]
        self._prompts: Prompts | None = None

    def forward(self, batch: Batch, moment: Moment) -> Losses:
        """The sum of all terms; by name those of all layers together."""
        check_layers(batch)
        tasks = draw_tasks(batch.rows, moment, self.config.tasks)
        truths = [segments(layers) for layers in batch.images[:, 3:]]
        targets = [target(truth, task, self.things) for truth, task in zip(truths, tasks, strict=True)]
        output: OneFormerOutput = self.model(
            self.normalize(batch.images[:, :3]), tasks, self.texts(targets, tasks, batch.images.device)
        )
        terms = self.loss(output, targets)
        named: dict[str, torch.Tensor] = {}
        for name, term in terms.items():
            kind = name.partition("_")[0]
            named[kind] = named.get(kind, term.new_zeros(())) + term.detach()
        return torch.stack(list(terms.values())).sum(), named

    def texts(
        self, targets: Sequence[Mapping[str, torch.Tensor]], tasks: Sequence[TaskName], device: torch.device
    ) -> torch.Tensor | None:
        """Token ids `[batch, texts, length]` of what is in the pictures; None without a text branch."""
        text = self.config.model.text
        if text is None:
            return None
        if self._prompts is None:  # reads the vocabulary, which nothing but training needs
            self._prompts = Prompts(self.info.classes, text, self.config.model.num_queries - text.contexts)
        rows = [self._prompts(one["labels"].tolist(), task) for one, task in zip(targets, tasks, strict=True)]
        return torch.stack(rows).to(device)


def check_layers(batch: Batch) -> None:
    """Refuse pictures without truth."""
    if batch.images.shape[1] != CHANNELS:
        raise DataMissing(
            f"segmentation learns from layered pictures of {CHANNELS} channels (see vicinal.data.layers), got "
            f"{batch.images.shape[1]}; choose data such as scenes, ade20k, cityscapes or coco_panoptic"
        )


class SegmentationTask(WithoutHooks):
    """A OneFormer under training.

    >>> from vicinal.models.compact import CompactConfig
    >>> backbone = CompactConfig(dim=16, depths=(0, 1, 1, 1, 1), kernel_size=3, in_channels=3)
    >>> config = Segmentation(OneFormerConfig(backbone, num_queries=5, dim=16, num_heads=2, decoder_layers=1))
    >>> task = config.build(Info("made", ("a", "b"), 3, (0.5,), (0.5,), things=("a",)))
    >>> [turn.name for turn in task.turns], task.best
    (['segment'], ('pq', True))
    """

    def __init__(self, config: Segmentation, info: Info, model: OneFormer) -> None:
        self.config, self.info, self.model = config, info, model
        self.objective = SegmentationObjective(config, info, model)
        self.turns: tuple[Turn, ...] = (Turn("segment", self.objective),)
        if config.freeze_stem:
            model.backbone.requires_grad_(False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.nan_to_num)  # as published

    @property
    def best(self) -> tuple[str, bool]:
        """Panoptic quality where panoptic is among the tasks."""
        return _METRICS[min(self.config.tasks, key=TASKS.index)], True

    def units(self) -> list[nn.Module]:
        """The blocks of the backbone and the layers of the decoders."""
        layers = [*self.model.pixel_decoder.layers, *self.model.decoder.layers]
        return [*(module for module in self.model.backbone.modules() if isinstance(module, Block)), *layers]

    def logits(self, images: torch.Tensor, task: TaskName) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits and mask logits, at the size of the images, of bytes `[batch, 3, height, width]`."""
        with torch.no_grad():
            output = self.model(self.objective.normalize(images), [task] * len(images))
        masks = nn.functional.interpolate(output.mask_logits.float(), images.shape[-2:], mode="bilinear")
        return output.class_logits.float(), masks

    def found(self, images: torch.Tensor, task: TaskName) -> list[Any]:
        """What is in each picture: `Segments`, a class map or `Instances`, by the task."""
        things, rules = self.objective.things, self.config.rules
        result: list[Any] = []
        for classes, masks in zip(*self.logits(images, task), strict=True):
            if task == "panoptic":
                result.append(postprocess.panoptic(classes, masks, things, rules)[0])
            elif task == "semantic":
                result.append(postprocess.class_scores(classes, masks).argmax(0))
            else:
                result.append(postprocess.instances(classes, masks, things, rules))
        return result

    def evaluation(self) -> SegmentationEvaluation:
        """The metric of every task that the model was trained for, as it is now."""
        return SegmentationEvaluation(self)

    def draw(self, batch: Batch) -> list[Panel]:
        """Each image with its truth, and with what is found for every task."""
        panels = []
        for layers in batch.images[:6].cpu():
            picture, truth = np.ascontiguousarray(layers[:3].permute(1, 2, 0)), segments(layers[3:])
            panels.append(Panel(overlay(picture, truth, self.info, names=False), "truth"))
            for task in self.config.tasks:
                found = self.found(layers[None, :3].to(batch.images.device), task)[0]
                panels.append(Panel(overlay(picture, as_segments(found), self.info, names=False), task))
        return panels

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Take the backbone from the stem's file."""
        if self.config.stem is not None:
            load_stem(self.model, Path(self.config.stem))


def load_stem(model: OneFormer, path: Path) -> None:
    """Put a file's backbone into a model: that of a stem, of a OneFormer, or a published file of the backbone alone."""
    if not path.is_file():
        raise ValueError(f"there is no stem {path}; train one with `vicinal train scenes_stem`, or set task.stem=none")
    backbone, own = model.config.backbone, model.backbone.state_dict()
    part = read(path).state  # of a larger model its backbone
    if set(part) != set(own) and isinstance(backbone, str):
        options = dict(model.config.backbone_options)
        alone = create_model(backbone, str(path), features_only=True, use_norms=True, **options)
        part = dict(alone.state_dict())
    wrong = [name for name, tensor in own.items() if name not in part or part[name].shape != tensor.shape]
    if wrong or len(part) != len(own):
        raise ValueError(
            f"{path} holds another backbone than the model's: {len(wrong)} of {len(own)} parameters do not fit, "
            f"such as {next(iter(wrong or set(part) - set(own)))}"
        )
    model.backbone.load_state_dict(part)


def as_segments(found: Segments | Instances | torch.Tensor, least_score: float = 0.5) -> Segments:
    """Anything that a task finds as segments to draw; of instances those from `least_score`, the best on top.

    >>> as_segments(torch.tensor([[4, 4, 7]])).labels.tolist()
    [4, 7]
    """
    if isinstance(found, Segments):
        return found
    if isinstance(found, torch.Tensor):
        labels, numbers = found.unique(return_inverse=True)
        return Segments(numbers + 1, labels)
    assert found.scores is not None
    shown = found.scores >= least_score
    numbers = torch.zeros(found.masks.shape[1:], dtype=torch.long, device=found.masks.device)
    for number in reversed(range(int(shown.sum()))):
        numbers[found.masks[shown][number]] = number + 1
    return Segments(numbers, found.labels[shown])


class SegmentationEvaluation:
    """Sums over test pictures."""

    def __init__(self, task: SegmentationTask) -> None:
        self.task, self.tasks = task, task.config.tasks
        classes, things = len(task.info.classes), task.objective.things
        self.miou, self.pq = MeanIoU(classes), PanopticQuality(classes, frozenset(things))
        self.ap = AveragePrecision(classes, task.config.rules.most)
        self.sums: dict[str, torch.Tensor] = {}
        self.detections: Detections = self.ap.tally([], [], [])

    def add(self, batch: Batch) -> None:
        """Take up a batch."""
        check_layers(batch)
        truths = [segments(layers) for layers in batch.images[:, 3:].cpu()]
        images, weights = batch.images[:, :3], batch.weights.cpu()
        if "panoptic" in self.tasks:
            cut = [_on_cpu(found) for found in self.task.found(images, "panoptic")]
            self._take("pq", self.pq.tally(cut, truths, weights))
        if "semantic" in self.tasks:
            maps = torch.stack(self.task.found(images, "semantic")).cpu()
            self._take("miou", self.miou.tally(maps, torch.stack([class_map(truth) for truth in truths]), weights))
        if "instance" in self.tasks:
            things = torch.tensor(self.task.objective.things)
            true = [_true_instances(truth, things) for truth in truths]
            found = self.task.found(images, "instance")
            self.detections = self.detections + self.ap.tally(found, true, batch.indices.tolist(), weights)

    def _take(self, name: str, tally: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + tally if name in self.sums else tally

    def values(self) -> dict[str, float]:
        """The metrics by name."""
        result: dict[str, float] = {}
        if "panoptic" in self.tasks:
            result |= self.pq.values(across_processes(self.sums["pq"]))
        if "semantic" in self.tasks:
            result["miou"] = self.miou.value(across_processes(self.sums["miou"]))
        if "instance" in self.tasks:
            values = self.ap.values(self.detections.gathered())
            result |= {name: values[name] for name in ("ap", "ap50", "ap75")}
        return result


def _on_cpu(found: Segments) -> Segments:
    return Segments(found.numbers.cpu(), found.labels.cpu())


def _true_instances(truth: Segments, things: torch.Tensor) -> Instances:
    chosen = torch.isin(truth.labels, things)
    return Instances(truth.masks()[chosen], truth.labels[chosen], None, truth.crowd[chosen])
