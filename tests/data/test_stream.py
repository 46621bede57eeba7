"""Batches are a function of the step: not of workers, of processes, of pieces, or of what was read before."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vicinal.data import DataMissing, Info, Share, Stream
from vicinal.data.augment import Flip, Shift
from vicinal.data.memory import InMemory

STEPS = (Flip(), Shift(2))


def made(samples=53):
    """Random pictures, each different."""
    random = np.random.default_rng(7)
    info = Info("made", ("a", "b", "c"), 1, (0.5,), (0.25,), (6, 9))
    return InMemory(info, random.integers(0, 256, (samples, 6, 9, 1), np.uint8), random.integers(0, 3, samples))


def steps(count, start=0, share=None, workers=0, seed=0):
    stream = Stream(made(), STEPS, batch_size=12, seed=seed, share=share, workers=workers)
    pieces = stream.share.pieces
    return list(itertools.islice(stream.training(start), count * pieces))


def test_a_stream_goes_on_exactly_where_it_is_asked_to():
    whole = steps(11)
    for start in (0, 1, 3, 4, 9):
        for ours, theirs in zip(steps(11 - start, start), whole[start:], strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.indices, theirs.indices)


@pytest.mark.parametrize("workers", [1, 2])
def test_augmentation_does_not_depend_on_workers(workers):
    for ours, theirs in zip(steps(5, workers=workers), steps(5), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize(("processes", "pieces"), [(1, 3), (2, 1), (2, 3), (4, 1)])
def test_processes_and_pieces_share_one_batch(processes, pieces):
    parts = [steps(6, share=Share(rank, processes, pieces)) for rank in range(processes)]
    for step, whole in enumerate(steps(6)):
        mine = [piece for part in parts for piece in part[step * pieces : (step + 1) * pieces]]
        assert torch.equal(torch.cat([piece.images for piece in mine]), whole.images)
        assert torch.cat([piece.rows for piece in mine]).tolist() == list(range(12))


def test_every_epoch_has_its_own_order_and_changes():
    first, second = steps(4), steps(4, start=4)
    seen = torch.cat([batch.indices for batch in first])
    assert len(seen.unique()) == len(seen) == 48  # 53 samples are four whole batches
    assert not torch.equal(seen, torch.cat([batch.indices for batch in second]))
    of_one = [batch.images[batch.indices == 5] for batch in steps(40) if (batch.indices == 5).any()]
    assert len({image.numpy().tobytes() for image in of_one}) > 3
    assert not torch.equal(first[0].indices, steps(1, seed=1)[0].indices)


def test_evaluation_reads_every_sample_once_and_changes_none():
    data = made()
    batches = list(Stream(data, (), batch_size=12).evaluation())
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(53))
    assert np.array_equal(torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy(), data.images)


def test_reading_draws_nothing_from_torch():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    steps(2)
    assert torch.equal(torch.rand(2), expected)


class Unreadable(InMemory):
    def read(self, index):
        if index == 20:
            raise DataMissing("20.png cannot be read as a picture (cut off); repair or remove it")
        return super().read(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(workers):
    data = made()
    stream = Stream(Unreadable(data.info, data.images, data.labels), STEPS, batch_size=12, workers=workers)
    with pytest.raises(DataMissing, match=r"^20\.png cannot be read"):
        list(stream.evaluation())


def test_wrong_streams_are_refused():
    with pytest.raises(ValueError, match="multiple of processes"):
        Stream(made(), (), batch_size=12, share=Share(0, 5))
    with pytest.raises(DataMissing, match="fewer than one batch"):
        Stream(made(), (), batch_size=64).training()
    with pytest.raises(DataMissing, match="is empty"):
        Stream(made(0), (), batch_size=4)
    with pytest.raises(ValueError, match="seed"):
        next(Stream(made(), (), batch_size=12, seed=-1).training())


class TwoSizes(InMemory):
    def read(self, index):
        image, label = super().read(index)
        return image[: 6 - index % 2], label


def test_images_of_two_sizes_ask_for_a_crop():
    data = made()
    with pytest.raises(DataMissing, match="CenterCrop"):
        list(Stream(TwoSizes(data.info, data.images, data.labels), (), batch_size=12).evaluation())
