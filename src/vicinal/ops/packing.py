"""The tables as the registered operators take them: one int32 tensor, and a short list of host integers.

A row of the tensor holds one record per (head group, union member, axis), in that order:
`step, length, wraps, queries, start[n], count[n], center[n]`, where n is the length of the query axis. There is
one row for the whole batch, or one row per sample where samples differ in size (`grids`); then `queries` and
`length` are the sample's own sizes and queries beyond them have count 0. What a kernel must know on the host
before it looks at the tensor is the `Layout`.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vicinal.pattern.bounds import Bounds, Member
from vicinal.pattern.compose import Pattern, pattern_parts, split_heads
from vicinal.pattern.table import AxisTable

HEADER = 4


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made here are ordinary ones, whatever tracer, fake mode or inference mode is on, so they can be kept."""
    no_dispatch, no_functions = torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction()
    # export would write the switching of gradients down as an operation of the program
    with no_dispatch, no_functions, torch.inference_mode(False), torch.no_grad():
        yield


@dataclasses.dataclass(frozen=True)
class AxisLayout:
    """One record on the host: the step (0 where samples differ), wrapping, and the largest count."""

    step: int
    wraps: bool
    most: int


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """A head group on the host: its heads, the records of its members, and its bias table's shape."""

    heads: int
    members: tuple[tuple[AxisLayout, ...], ...]
    bias_shape: tuple[int, ...] | None

    @property
    def window(self) -> int:
        """Entries a query has in window order, over all members."""
        total = 0
        for member in self.members:
            size = 1
            for axis in member:
                size *= axis.most
            total += size
        return total


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the host knows of a packed table, and whatever the chosen back end planned by the pattern."""

    rank: int
    groups: tuple[GroupLayout, ...]
    plan: tuple[int, ...] = ()

    @property
    def heads(self) -> int:
        """Heads of all groups."""
        return sum(group.heads for group in self.groups)

    @property
    def window(self) -> int:
        """The widest group's window."""
        return max(group.window for group in self.groups)

    @property
    def bias_sizes(self) -> tuple[int, ...]:
        """Numbers in each group's bias tables, all heads together."""
        return tuple(
            0 if group.bias_shape is None else group.heads * int(np.prod(group.bias_shape)) for group in self.groups
        )

    @functools.cached_property
    def packed(self) -> tuple[int, ...]:
        """The layout as plain integers."""
        numbers = [self.rank, len(self.groups)]
        for group in self.groups:
            bias = (0,) * self.rank if group.bias_shape is None else group.bias_shape
            numbers += [group.heads, len(group.members), *bias]
            numbers += itertools.chain.from_iterable(
                (axis.step, int(axis.wraps), axis.most) for member in group.members for axis in member
            )
        return (*numbers, *self.plan)

    @functools.cached_property
    def words(self) -> array.array[int]:
        """`packed` in memory, for kernels that take an address."""
        return array.array("q", self.packed)

    @functools.cached_property
    def address(self) -> tuple[int, int]:
        """Where `words` lie, and how many."""
        return self.words.buffer_info()

    @staticmethod
    def unpack(numbers: Sequence[int]) -> Layout:
        """The layout whose `packed` these are."""
        return _unpack(tuple(numbers))


@functools.lru_cache(maxsize=512)
def _unpack(numbers: tuple[int, ...]) -> Layout:
    stream = iter(numbers)
    rank, num_groups = next(stream), next(stream)
    groups = []
    for _ in range(num_groups):
        num_heads, num_members = next(stream), next(stream)
        bias = tuple(itertools.islice(stream, rank))
        members = tuple(
            tuple(AxisLayout(next(stream), bool(next(stream)), next(stream)) for _ in range(rank))
            for _ in range(num_members)
        )
        groups.append(GroupLayout(num_heads, members, bias if bias[0] else None))
    return Layout(rank, tuple(groups), tuple(stream))


def layout_of(bounds: Bounds, num_heads: int) -> Layout:
    """The host's view of bounds."""
    groups = []
    for group, heads in zip(bounds.groups, bounds.split(num_heads), strict=True):
        members = tuple(
            tuple(AxisLayout(table.step, table.wraps, int(table.count.max())) for table in member)
            for member in group.members
        )
        lengths = tuple(table.bias_length for table in group.members[0])
        groups.append(_group_layout(heads, members, lengths))
    return Layout(bounds.rank, tuple(groups))


def layout_of_padded(pattern: Pattern, grid: tuple[int, ...], num_heads: int) -> Layout:
    """The host's view of a pattern on a batch padded to the key grid `grid`: samples have tables of their own."""
    parts, sizes = pattern_parts(pattern, len(grid))
    groups = []
    for part, heads in zip(parts, split_heads(num_heads, len(parts), sizes), strict=True):
        members = tuple(
            tuple(AxisLayout(0, kind.wraps, length) for kind, length in zip(kinds, grid, strict=True)) for kinds in part
        )
        lengths = tuple(kind.bias_length(length) for kind, length in zip(part[0], grid, strict=True))
        groups.append(_group_layout(heads, members, lengths))
    return Layout(len(grid), tuple(groups))


def _group_layout(
    heads: int, members: tuple[tuple[AxisLayout, ...], ...], lengths: tuple[int | None, ...]
) -> GroupLayout:
    shape = tuple(length for length in lengths if length is not None)
    takes_bias = len(members) == 1 and len(shape) == len(lengths)
    return GroupLayout(heads, members, shape if takes_bias else None)


def pack_tables(bounds: Bounds) -> npt.NDArray[np.int32]:
    """The tables of bounds, packed: int32 `[1, words]`."""
    words: list[npt.NDArray[np.int64]] = []
    for table in _records(bounds):
        header = [table.step, table.length, int(table.wraps), len(table)]
        center = np.zeros(len(table), dtype=np.int64) if table.center is None else table.center
        words += [np.array(header), table.start, table.count, center]
    return np.concatenate(words).astype(np.int32)[None]


def _records(bounds: Bounds) -> list[AxisTable]:
    return [table for group in bounds.groups for member in group.members for table in member]


def pack_sample_tables(pattern: Pattern, grid: tuple[int, ...], grids: torch.Tensor) -> torch.Tensor:
    """One row per sample of a padded batch, made on the device of `grids` without a synchronisation.

    `grid` is the padded grid, `grids` int64 `[batch, rank]`. Plain torch operations on whole vectors.
    """
    columns = []
    zero = grids[:, :1] * 0
    parts, _ = pattern_parts(pattern, len(grid))
    for part in parts:
        for kinds in part:
            for axis, kind in enumerate(kinds):
                length = grids[:, axis, None].clamp(1, grid[axis])
                query = torch.arange(grid[axis], device=grids.device)[None] + zero
                start, count = kind.rows(query, length, torch)
                inside = query < length
                step, wraps = kind.step(length) + zero, zero + int(kind.wraps)
                columns += [step, length, wraps, length, start * inside, count * inside, query]
    return torch.cat(columns, 1).to(torch.int32)


def unpack_row(row: npt.NDArray[np.int32], layout: Layout, grid: Sequence[int]) -> tuple[tuple[Member, ...], ...]:
    """One row read back: for each group its members, cut to the sizes that the row states."""
    groups = []
    position = 0
    for group in layout.groups:
        members = []
        for member in group.members:
            tables = []
            for axis in range(len(member)):
                length = grid[axis]
                header = row[position : position + HEADER]
                body = row[position + HEADER : position + HEADER + 3 * length].reshape(3, length).astype(np.int64)
                queries = int(header[3])
                tables.append(
                    AxisTable(
                        start=body[0, :queries],
                        count=body[1, :queries],
                        step=int(header[0]),
                        length=int(header[1]),
                        wraps=bool(header[2]),
                        center=body[2, :queries],
                        bias_length=None if group.bias_shape is None else group.bias_shape[axis],
                    )
                )
                position += HEADER + 3 * length
            members.append(tuple(tables))
        groups.append(tuple(members))
    return tuple(groups)
