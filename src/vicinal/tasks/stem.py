"""Getting a backbone ready for segmentation: name every pixel's class, and point to the middle of its thing.

A small model that has to learn pictures and segments at once learns neither in minutes; this comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vicinal.data.batch import Batch
from vicinal.data.dataset import Info
from vicinal.layers.block import Block
from vicinal.layers.pyramid import Features
from vicinal.metrics import MeanIoU, Tallies
from vicinal.models import compact
from vicinal.models.compact import CompactConfig
from vicinal.tasks.classification import Normalize
from vicinal.tasks.joint_labels import class_map, segments
from vicinal.tasks.protocol import Losses, Moment, Panel, Turn, WithoutHooks


@dataclass(frozen=True)
class Stem:
    """A compact pyramid with a light decoder of `dim` channels; `offset_weight` is that of pointing."""

    backbone: CompactConfig
    dim: int = 32
    offset_weight: float = 1.0

    def build(self, info: Info) -> StemTask:
        """The task, with fresh weights."""
        return StemTask(self, info)


class PixelModel(nn.Module):
    """A pyramid's maps from stride 4 on, added up at stride 4: class logits and two offsets of each pixel.

    >>> PixelModel(CompactConfig(dim=16, depths=(0, 1, 1), in_channels=3), 5, 8)(torch.zeros(1, 3, 32, 32))[0].shape
    torch.Size([1, 5, 8, 8])
    """

    def __init__(self, backbone: CompactConfig, classes: int, dim: int) -> None:
        super().__init__()
        pyramid = compact.build(backbone)
        self.backbone = Features(pyramid, range(1, len(pyramid.stages)), use_norms=True)
        self.lateral = nn.ModuleList(nn.Conv2d(info.channels, dim, 1) for info in self.backbone.feature_info)
        self.out = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, classes + 2, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits `[batch, classes, height / 4, width / 4]` and offsets `[batch, 2, ...]`."""
        maps = self.backbone(images)
        total = self.lateral[0](maps[0])
        for lateral, features in zip(list(self.lateral)[1:], maps[1:], strict=True):
            total = total + nn.functional.interpolate(lateral(features), total.shape[-2:], mode="bilinear")
        found = self.out(total)
        return found[:, :-2], found[:, -2:]


class StemObjective(nn.Module):
    """A batch to its loss."""

    def __init__(self, config: Stem, info: Info, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.normalize = Normalize(info.mean, info.std)
        self.things = [info.classes.index(name) for name in info.things]

    def forward(self, batch: Batch, moment: Moment) -> Losses:
        """Cross-entropy of classes, and the distance between true and found middles in eighths of the image."""
        logits, offsets = self.model(self.normalize(batch.images[:, :3]))
        truths = [segments(layers) for layers in batch.images[:, 3:]]
        labels = torch.stack([class_map(truth) for truth in truths])
        large = nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear")
        classes = nn.functional.cross_entropy(large, labels, ignore_index=255)
        wanted, counted = zip(*(middles(truth.numbers, truth.labels, self.things) for truth in truths), strict=True)
        error = (offsets - torch.stack(wanted)[:, :, 2::4, 2::4]).abs().sum(1)
        weight = torch.stack(counted)[:, 2::4, 2::4].float()
        pointing = (error * weight).sum() / weight.sum().clamp(min=1)
        parts = {"classes": classes, "offsets": self.config.offset_weight * pointing}
        return classes + parts["offsets"], {name: part.detach() for name, part in parts.items()}


def middles(numbers: torch.Tensor, labels: torch.Tensor, things: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """From each pixel to the middle of its segment `[2, height, width]`, in eighths of the sides; where things are.

    >>> middles(torch.tensor([[1, 1, 1]]), torch.tensor([0]), [0])[0][1].tolist()
    [[2.6666667461395264, 0.0, -2.6666667461395264]]
    """
    grid = torch.meshgrid(*(torch.arange(size, device=numbers.device) for size in numbers.shape), indexing="ij")
    places = torch.stack(grid).float().flatten(1)
    flat = numbers.flatten()
    sums = places.new_zeros(2, len(labels) + 1).index_add_(1, flat, places)
    middle = sums / torch.bincount(flat, minlength=len(labels) + 1).clamp(min=1)
    size = places.new_tensor(numbers.shape)[:, None]
    is_thing = torch.isin(labels, torch.tensor(things, device=labels.device))
    counted = torch.cat([is_thing.new_zeros(1), is_thing])[numbers]
    return (8 * (middle[:, flat] - places) / size).view(2, *numbers.shape), counted


class StemTask(WithoutHooks):
    """A backbone under training."""

    best = ("miou", True)

    def __init__(self, config: Stem, info: Info) -> None:
        self.config, self.info = config, info
        self.model = PixelModel(config.backbone, len(info.classes), config.dim)
        self.objective = StemObjective(config, info, self.model)
        self.turns: tuple[Turn, ...] = (Turn("stem", self.objective),)

    def units(self) -> list[nn.Module]:
        """The blocks."""
        return [module for module in self.model.modules() if isinstance(module, Block)]

    def class_maps(self, batch: Batch) -> torch.Tensor:
        """The best class of each pixel, `[batch, height, width]`."""
        with torch.no_grad():
            logits, _ = self.model(self.objective.normalize(batch.images[:, :3]))
        large = nn.functional.interpolate(logits.float(), batch.images.shape[-2:], mode="bilinear")
        return large.argmax(1)

    def evaluation(self) -> StemEvaluation:
        """Mean intersection over union of the model as it is now."""
        return StemEvaluation(self)

    def draw(self, batch: Batch) -> list[Panel]:
        """Each image beside its classes as shades."""
        panels = []
        for layers, found in zip(batch.images.cpu(), self.class_maps(batch).cpu(), strict=True):
            shades = (found * (255 // len(self.info.classes)))[..., None].expand(-1, -1, 3)
            both = torch.cat([layers[:3].permute(1, 2, 0), shades.to(torch.uint8)], 1)
            panels.append(Panel(np.asarray(both), ""))
        return panels


class StemEvaluation:
    """Sums over test images."""

    def __init__(self, task: StemTask) -> None:
        self.task = task
        self.tallies = Tallies({"miou": MeanIoU(len(task.info.classes))})

    def add(self, batch: Batch) -> None:
        """Take up a batch."""
        truth = torch.stack([class_map(segments(layers)) for layers in batch.images[:, 3:]])
        self.tallies.add(self.task.class_maps(batch), truth, batch.weights)

    def values(self) -> dict[str, float]:
        """The metrics by name."""
        return self.tallies.values()
