"""Batches of a data set: which samples a step takes is a function of the step, so any step can come next.

Nothing is remembered: not by the stream, not by its workers. That is why a resumed run goes on exactly, with
another number of workers or of processes if need be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from vicinal.data.augment import Step
from vicinal.data.batch import Batch
from vicinal.data.chance import order_random, sample_random
from vicinal.data.dataset import DataMissing, Dataset


@dataclass(frozen=True)
class Share:
    """Which part of each batch a process takes, and in how many pieces."""

    rank: int = 0
    processes: int = 1
    pieces: int = 1


@dataclass(frozen=True)
class _Wanted:
    """A sample that is wanted: its number, in which epoch, at which row of the batch; weight 0 only fills up."""

    epoch: int
    index: int
    row: int
    weight: float = 1.0


_Sample = tuple[torch.Tensor, int, _Wanted]


class _Samples(torch.utils.data.Dataset[_Sample | DataMissing]):
    """What a worker holds: the data set and the steps; it is asked with all that a sample depends on."""

    def __init__(self, dataset: Dataset, steps: Sequence[Step], seed: int) -> None:
        self.dataset, self.steps, self.seed = dataset, tuple(steps), seed

    def __getitem__(self, wanted: _Wanted) -> _Sample | DataMissing:
        try:
            image, label = self.dataset.read(wanted.index)
        except DataMissing as error:  # handed over as a value: torch would wrap it in the traceback of a worker
            return error
        random = sample_random(self.seed, wanted.epoch, wanted.index)
        for step in self.steps:
            image = step(image, random)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label, wanted


def _collate(samples: list[_Sample | DataMissing]) -> Batch | DataMissing:
    good = [sample for sample in samples if not isinstance(sample, DataMissing)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, DataMissing))
    images, labels, wanted = zip(*good, strict=True)
    if len({image.shape for image in images}) > 1:
        sizes = sorted({tuple(image.shape) for image in images})
        return DataMissing(f"images of one batch differ in size: {sizes}; add a Resize and a CenterCrop to the steps")
    return Batch(
        torch.stack(images),
        torch.tensor(labels),
        torch.tensor([one.index for one in wanted]),
        torch.tensor([one.weight for one in wanted]),
        torch.tensor([one.row for one in wanted]),
    )


class Stream:
    """Batches of a data set for training and for evaluation.

    >>> from vicinal.data import Digits
    >>> stream = Stream(Digits().open("train"), (), batch_size=64, seed=0)
    >>> next(stream.training(start=40)).images.shape, stream.steps_per_epoch
    (torch.Size([64, 1, 8, 8]), 22)

    Args:
        dataset: numbered samples.
        steps: changes to each image, in order.
        batch_size: samples of a step, in all processes together.
        seed: of the order and of the changes.
        share: the part of each batch that this process takes.
        workers: processes that read ahead; 0 reads in this one. The batches are the same.
    """

    def __init__(
        self,
        dataset: Dataset,
        steps: Sequence[Step],
        *,
        batch_size: int,
        seed: int = 0,
        share: Share | None = None,
        workers: int = 0,
    ) -> None:
        self.share = Share() if share is None else share
        parts = self.share.processes * self.share.pieces
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulation = {self.share.processes} x "
                f"{self.share.pieces}, got {batch_size}"
            )
        if not len(dataset):
            raise DataMissing(f"{dataset.info.name} is empty")
        self.dataset, self.batch_size, self.seed, self.workers = dataset, batch_size, seed, workers
        self.samples = _Samples(dataset, steps, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; what is left over is left out, other samples each time."""
        return len(self.dataset) // self.batch_size

    def training(self, start: int = 0) -> Iterator[Batch]:
        """This process's pieces of batch `start`, `start + 1`, ..., without end: `share.pieces` for each step."""
        if self.steps_per_epoch == 0:
            raise DataMissing(
                f"{self.dataset.info.name} has {len(self.dataset)} samples, fewer than one batch of {self.batch_size}"
            )
        return self._batches(self._training_rows(start))

    def evaluation(self) -> Iterator[Batch]:
        """Every sample once, dealt out to the processes; each gets as many batches, filled up with weight 0."""
        return self._batches(self._evaluation_rows())

    @property
    def evaluation_batches(self) -> int:
        """How many batches `evaluation` gives each process."""
        return -(-len(self.dataset) // self.batch_size)

    def _batches(self, rows: Iterator[list[_Wanted]]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self.samples,
            batch_sampler=rows,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # else it would draw from torch's own
        )
        for batch in loader:
            if isinstance(batch, DataMissing):
                raise batch
            yield batch

    def _training_rows(self, start: int) -> Iterator[list[_Wanted]]:
        step = start
        epoch, order = -1, np.empty(0, np.int64)
        part = self.batch_size // self.share.processes
        piece = part // self.share.pieces
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
            begin = self.share.rank * part
            at = (step % self.steps_per_epoch) * self.batch_size
            for first in range(begin, begin + part, piece):
                yield [_Wanted(epoch, int(order[at + row]), row) for row in range(first, first + piece)]
            step += 1

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return self.dataset.order(order_random(self.seed, epoch))

    def _evaluation_rows(self) -> Iterator[list[_Wanted]]:
        total, part = len(self.dataset), self.batch_size // self.share.processes
        for batch in range(self.evaluation_batches):
            first = batch * self.batch_size + self.share.rank * part
            yield [
                _Wanted(0, min(number, total - 1), number - batch * self.batch_size, float(number < total))
                for number in range(first, first + part)
                if number < total or self.share.processes > 1
            ]
