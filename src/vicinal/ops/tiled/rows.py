"""Moving rows between tensors and tiles: a row is one token of one head, and a tile's rows lie head by head."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from vicinal.ops.packing import ordinary_tensors


@dataclasses.dataclass(frozen=True)
class GroupHeads:
    """Which heads of the tensors a head group computes.

    `query[g]` are the query heads that read key head `key[g]`; tensors have `num_query` and `num_key` heads in all.
    """

    query: tuple[tuple[int, ...], ...]
    key: tuple[int, ...]
    num_query: int
    num_key: int

    @functools.cached_property
    def shared(self) -> int:
        """How many query heads read one key head."""
        return len(self.query[0])

    @functools.cached_property
    def count(self) -> int:
        """Query heads of the group."""
        return len(self.query) * self.shared

    @functools.cached_property
    def span(self) -> slice:
        """The query heads of the group as a slice."""
        return slice(self.query[0][0], self.query[-1][-1] + 1)


@functools.lru_cache(maxsize=256)
def group_heads(sizes: tuple[int, ...], num_key: int) -> tuple[GroupHeads, ...]:
    """The heads of groups of the given sizes; a group that splits a shared key head reads it once per query head.

    >>> first, second = group_heads((1, 3), 2)
    >>> first.query, first.key, second.query, second.key
    (((0,),), (0,), ((1,), (2,), (3,)), (0, 1, 1))
    """
    total = sum(sizes)
    shared = total // num_key
    groups = []
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        begin = end - size
        own = shared if begin % shared == 0 and end % shared == 0 else 1
        query = tuple(tuple(range(head, head + own)) for head in range(begin, end, own))
        groups.append(GroupHeads(query, tuple(heads[0] // shared for heads in query), total, num_key))
    return tuple(groups)


class TileRows:
    """The rows that the tiles of a chunk take, and the way back.

    `index` are row numbers, in the order in which the tiles hold them; `kept` are the places of `index` that count,
    where some are padding. With `lasts`, this is used again and again, so that sorting the rows pays.
    """

    def __init__(self, index: torch.Tensor, *, kept: torch.Tensor | None = None, lasts: bool) -> None:
        self.index = index.to(torch.int32) if lasts and int(index.max()) < 1 << 31 else index
        self.kept, self.lasts = kept, lasts

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """What stands in the rows, tile by tile."""
        return rows.index_select(0, self.index)

    def unsorted(self, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What tiles found for their rows, without padding, and the rows' numbers."""
        if self.kept is None:
            return found, self.index.long()
        return found.index_select(0, self.kept), self.index.index_select(0, self.kept).long()

    def summed(self, found: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """What tiles found for each of `rows`, summed, in a new tensor or in one that is there."""
        order, begins, _ = self._sorted
        if begins is None:
            return torch.index_select(found, 0, order, out=out)
        # to an embedding a bag is some rows to be summed; adding rows to others one by one takes much longer
        sums = torch.embedding_bag(found, order, begins, False, 0, False, None, True)[0]
        return sums if out is None else out.copy_(sums)

    @property
    def rows(self) -> torch.Tensor | slice:
        """The rows that are taken, each once and in order; a slice where they follow each other."""
        return self._sorted[2]

    @functools.cached_property
    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | slice]:
        """Places of `index` in the order of rows; where each row's begin, unless all have one; the rows."""
        with ordinary_tensors():
            index = self.index if self.kept is None else self.index.index_select(0, self.kept)
            numbers, order = index.sort(stable=True)
            order = (order if self.kept is None else self.kept.index_select(0, order)).to(index.dtype)
            rows, counts = torch.unique_consecutive(numbers, return_counts=True)
            begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(index.dtype)
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            follow = span.stop - span.start == len(rows)
            return order, None if len(rows) == len(order) else begins, span if follow else rows.long()


class RowSums:
    """Rows of a new tensor, summed up chunk by chunk; with `come_once` each is written by one chunk, once."""

    def __init__(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, come_once: bool) -> None:
        self._like, self._shape, self._dtype, self._come_once = like, shape, dtype, come_once
        self._rows: torch.Tensor | None = None
        self._filled = 0
        """Rows from this one on hold nothing yet."""

    def add(self, where: TileRows, found: torch.Tensor) -> None:
        """Add what tiles found for the rows they took."""
        if found.dtype != self._dtype:
            found = found.to(self._dtype)
        if not where.lasts:
            found, rows = where.unsorted(found)
            self._add_rows(rows, found)
        elif isinstance(where.rows, slice):
            self._add_span(where.rows, where, found)
        else:
            self._add_rows(where.rows, where.summed(found))

    def _add_rows(self, rows: torch.Tensor, found: torch.Tensor) -> None:
        if self._come_once:
            self._memory().index_copy_(0, rows, found)
        else:
            self.finished().index_add_(0, rows, found)

    def _add_span(self, span: slice, where: TileRows, found: torch.Tensor) -> None:
        if self._rows is None and span == slice(0, self._shape[0]):
            self._rows, self._filled = where.summed(found), span.stop
        elif self._come_once:
            where.summed(found, out=self._memory()[span])
        elif span.start >= self._filled:
            self._memory()[self._filled : span.start] = 0
            where.summed(found, out=self._memory()[span])
            self._filled = span.stop
        else:
            found, begin = where.summed(found), min(self._filled, span.stop)
            self._memory()[span.start : begin] += found[: begin - span.start]
            self._memory()[begin : span.stop] = found[begin - span.start :]
            self._filled = max(self._filled, span.stop)

    def _memory(self) -> torch.Tensor:
        if self._rows is None:
            self._rows = self._like.new_empty(self._shape, dtype=self._dtype)
        return self._rows

    def finished(self) -> torch.Tensor:
        """All rows; zeros where no tile came."""
        rows = self._memory()
        if not self._come_once and self._filled < self._shape[0]:
            rows[self._filled :] = 0
            self._filled = self._shape[0]
        return rows
