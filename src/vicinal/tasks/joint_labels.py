"""What each of the three tasks has to find, all derived from one panoptic truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from vicinal.data.chance import sample_random
from vicinal.data.layers import CROWD, VOID
from vicinal.metrics import Segments
from vicinal.tasks.protocol import Moment

TaskName = Literal["panoptic", "semantic", "instance"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)

_TASK_USE = 1 << 29
"""Added to a step, so that the tasks of a batch are drawn by themselves."""


def segments(layers: torch.Tensor) -> Segments:
    """The segments of the truth `[3, height, width]` of a layered picture, in the order of class and instance.

    >>> segments(torch.tensor([[[4, 4, 255]], [[1, 2, 0]], [[0, 128, 0]]], dtype=torch.uint8)).is_crowd.tolist()
    [False, True]
    """
    labels, low, high = layers.long()
    keys = torch.where(labels == VOID, -1, labels * 65536 + high * 256 + low)
    found, places = torch.unique(torch.cat([keys.new_full((1,), -1), keys.flatten()]), return_inverse=True)
    numbers = places[1:].view(labels.shape)
    return Segments(numbers, found[1:] // 65536, (found[1:] // 256 % 256) >= CROWD)


def class_map(truth: Segments) -> torch.Tensor:
    """Classes `[height, width]`, 255 for void; crowds count.

    >>> class_map(Segments(torch.tensor([[0, 1]]), torch.tensor([7]))).tolist()
    [[255, 7]]
    """
    return torch.cat([truth.labels.new_tensor([VOID]), truth.labels])[truth.numbers]


def target(truth: Segments, task: TaskName, things: Sequence[int]) -> dict[str, torch.Tensor]:
    """`labels` `[segments]` and `masks` bool `[segments, height, width]` to be found for a task.

    Panoptic is every segment, instance the things alone, semantic one mask for each class. Crowds are left out, as in
    the official code.

    >>> truth = Segments(torch.tensor([[1, 2, 3]]), torch.tensor([5, 5, 6]))
    >>> [target(truth, task, things=[5])["labels"].tolist() for task in TASKS]
    [[5, 5, 6], [5, 6], [5, 5]]
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    chosen = ~truth.crowd
    if task == "instance":
        chosen &= torch.isin(truth.labels, torch.tensor(sorted(things), device=truth.labels.device))
    labels, masks = truth.labels[chosen], truth.masks()[chosen]
    if task == "semantic":
        classes, places = torch.unique(labels, return_inverse=True)
        merged = torch.zeros(len(classes), *masks.shape[1:], dtype=torch.long, device=masks.device)
        return {"labels": classes, "masks": merged.index_add_(0, places, masks.long()) > 0}
    return {"labels": labels, "masks": masks}


def draw_tasks(rows: torch.Tensor, moment: Moment, allowed: Sequence[TaskName] = TASKS) -> list[TaskName]:
    """The task of each image of a batch, drawn evenly; it depends on the step and the image's row alone.

    >>> draw_tasks(torch.arange(4), Moment(step=0, total=10, seed=0), ["instance"])
    ['instance', 'instance', 'instance', 'instance']
    """
    epoch = _TASK_USE + moment.step
    return [allowed[int(sample_random(moment.seed, epoch, row).integers(len(allowed)))] for row in rows.tolist()]
