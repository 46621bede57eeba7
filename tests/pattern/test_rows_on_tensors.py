"""The rows of a kind on tensors of lengths, as padded batches need them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from vicinal.pattern import AxisKind, AxisTable, Full, Grid, Halo, Near, Same, Window


def kinds_for_tensors(lengths: range) -> Iterator[AxisKind]:
    for kernel_size, dilation in itertools.product((1, 2, 3, 4, 7, 12), (1, 2, 3)):
        for stride in sorted({1, 2, kernel_size} & set(range(1, kernel_size + 1))):
            yield Near(kernel_size, dilation, stride)
            yield Near(kernel_size, dilation, stride, border="crop")
            yield Near(kernel_size, dilation, stride, causal=True)
        yield Near(kernel_size, dilation, border="wrap")
    yield from (Full(), Full(causal=True), Same())
    for size in (1, 2, 3, 4, 7):
        yield Grid(size)
        yield from (Window(size, shift) for shift in range(size))
        yield from (Halo(size, halo) for halo in (0, 1, 5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_on_tensors_of_lengths_equal_those_of_each_length(dtype):
    lengths = range(1, 14)
    center = torch.arange(max(lengths), dtype=dtype)
    for kind in kinds_for_tensors(lengths):
        fitting = [length for length in lengths if kind.refusal(length) is None]
        batch = torch.tensor(fitting, dtype=dtype)[:, None]
        rows = [values.expand(len(fitting), -1) for values in kind.rows(center, batch, torch)]
        assert {values.dtype for values in rows} == {dtype}, kind
        steps = (kind.step(batch) + 0 * batch).ravel().tolist()
        for sample, length in enumerate(fitting):
            table = AxisTable.of(kind, length)
            assert steps[sample] == table.step, kind
            for values, expected in zip(rows, (table.start, table.count), strict=True):
                assert values[sample, :length].tolist() == expected.tolist(), (kind, length)


def test_rows_on_tensors_take_a_plain_length():
    for kind in kinds_for_tensors(range(12, 13)):
        if kind.refusal(12) is None:
            table = AxisTable.of(kind, 12)
            start, count = kind.rows(torch.arange(12), 12, torch)
            assert (start.tolist(), count.tolist()) == (table.start.tolist(), table.count.tolist()), kind
