"""Corrupts valid records of the CPU kernels' C interface at random; run by test_cpu_fuzz.py in a process of its own.

    python tests/ops/fuzz_records.py SEED COUNT STRATEGY

Sizes grow by little or beyond all memory: how large a buffer is, a C interface cannot know. Every buffer is much larger
than its tensor, so what is accepted after all stays inside.
"""

from __future__ import annotations

import collections
import ctypes
import random
import sys

import numpy as np
import torch

from vicinal.ops import packing
from vicinal.ops.cpu import library, record
from vicinal.pattern import Full, Near, Window, bounds, heads, union

HUGE = (2**47, 2**60, 2**62, 2**63 - 1)
NEGATIVE = (-1, -2, -(2**31), -(2**63))
SMALL = tuple(range(9))
HEADER = (
    *("version", "dtype", "rank", "batch", "heads", "kv_heads", "head_dim", "value_dim", "extra_tokens"),
    *("grid0", "grid1", "grid2", "key_grid0", "key_grid1", "key_grid2"),
    *("tables", "table_rows", "table_words", "layout", "layout_words", "bias_words", "threads", "strategy", "isa"),
)
SCALE, FIRST_TENSOR, TENSOR_WORDS = len(HEADER), len(HEADER) + 1, 7
POINTERS = ("tables", "layout")
PLACED = (0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14)
"""Of the tensors, those whose addresses may stand beside the record."""

ROOM = 1 << 20

CASES = (
    (Near(3), (9,), 2, False, 0),
    (Near(3, dilation=2), (5, 4), 2, True, 3),
    ((Near(3), Window(2, shift=1), Full()), (3, 4, 2), 2, True, 0),
    (union(Near(3), Near(3, dilation=2), Window(3)), (4, 5), 1, False, 2),
    (heads(Near(3, dilation=2, border="wrap"), Full()), (6, 4), 2, False, 1),
    (Window(2, shift=1), (5, 4), 2, True, 0),
)


class Base:
    """A valid record and the memory it points to."""

    def __init__(self, case: int) -> None:
        pattern, grid, kv_heads, has_bias, extra = CASES[case]
        table = bounds(pattern, grid)
        num_heads, batch, dim = 2, 2, 4
        self.layout = np.full(256, 3, dtype=np.int64)
        layout = packing.layout_of(table, num_heads)
        self.layout_words = len(layout.packed)
        self.layout[: self.layout_words] = layout.packed
        packed = packing.pack_tables(table)
        self.table_words = packed.size
        self.tables = np.zeros(4096, dtype=np.int32)
        self.tables[: packed.size] = packed[0]
        self.held: list[torch.Tensor] = []
        query = self._tensor((batch, *grid, num_heads, dim))
        key = self._tensor((batch, *grid, kv_heads, dim))
        rows = self._tensor((batch, *grid, num_heads))
        bias = self._tensor((sum(layout.bias_sizes),)) if has_bias else None
        token = self._tensor((batch, extra, kv_heads, dim)) if extra else None
        self.lengths = torch.full((ROOM // 8,), 1, dtype=torch.int64)
        lengths = self.lengths[:batch] if extra else None
        tensors = (query, key, key, bias, token, token, lengths, self._like(query), self._like(rows))
        gradients = (query, rows, *map(self._like, (query, key, key, bias, token, token)))
        address = (self.tables.ctypes.data, 1, packed.size)
        words = 0 if bias is None else bias.numel()
        data = record.pack(
            query.shape, key.shape, dim, extra, torch.float32, address, layout, words, 0.5, (*tensors, *gradients)
        )
        self.words = np.frombuffer(data, dtype=np.int64).copy()
        self.words[HEADER.index("layout")] = self.layout.ctypes.data

    def _tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        room = torch.randn(ROOM // 4)
        self.held.append(room)
        return room[: torch.Size(shape).numel()].view(shape)

    def _like(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else self._tensor(tuple(tensor.shape))


def corrupt(base: Base, words: np.ndarray, rng: random.Random) -> None:
    kind = rng.choice(("header", "header", "layout", "tables", "tables", "lengths", "pointer", "stride", "scale"))
    if kind == "header":
        name = rng.choice([name for name in HEADER if name not in POINTERS])
        place = HEADER.index(name)
        words[place] = rng.choice((*SMALL, *HUGE, *NEGATIVE, int(words[place]) + 1, int(words[place]) - 1))
    elif kind == "layout":
        base.layout[rng.randrange(base.layout_words)] = rng.choice((*SMALL, *HUGE, *NEGATIVE, 2**31 - 1))
    elif kind == "tables":
        values = (*SMALL, *range(-9, 0), 2**31 - 1, -(2**31), rng.randrange(-(2**31), 2**31))
        base.tables[rng.randrange(base.table_words)] = rng.choice(values)
    elif kind == "lengths":
        base.lengths[rng.randrange(2)] = rng.choice((*SMALL, *HUGE, *NEGATIVE))
    elif kind == "scale":
        words[SCALE] = np.array(rng.choice((0.0, -1e30, np.inf, np.nan)), dtype=np.float64).view(np.int64)
    else:
        place = FIRST_TENSOR + TENSOR_WORDS * rng.randrange(17)
        if kind == "pointer":
            header = HEADER.index(rng.choice(POINTERS))
            place = rng.choice((place, place, header))
            words[place] = rng.choice((0, int(words[place]) + 1))
        else:
            words[place + rng.randrange(1, TENSOR_WORDS)] = rng.choice((*SMALL, *HUGE, *NEGATIVE))


def taken_out(words: np.ndarray) -> np.ndarray:
    """What of a record is put beside it; the record keeps nonsense in its place."""
    taken = [HEADER.index("threads"), *(FIRST_TENSOR + TENSOR_WORDS * number for number in PLACED)]
    places = words[taken].copy()
    words[taken] = 12345
    return places


def main(seed: int, count: int, strategy: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    loaded, room = library.load(), ctypes.create_string_buffer(512)
    bases = [Base(case) for case in range(len(CASES))]
    outcomes: collections.Counter[int] = collections.Counter()
    for number in range(count):
        base = bases[number % len(bases)]
        kept = (base.layout.copy(), base.tables.copy(), base.lengths.clone())
        words = base.words.copy()
        words[HEADER.index("strategy")] = strategy
        for _ in range(number // len(bases) and rng.choice((1, 1, 1, 2, 3))):  # the first of each base is valid
            corrupt(base, words, rng)
        is_backward, is_elsewhere = rng.random() < 0.5, rng.random() < 0.3
        if is_elsewhere:
            places = taken_out(words)
            function = loaded.attend_backward_at if is_backward else loaded.attend_at
            status = function(words.ctypes.data, places.ctypes.data, room, 512)
        else:
            function = loaded.attend_backward if is_backward else loaded.attend
            status = function(words.ctypes.data, room, 512)
        assert status in (0, 1, 2), (number, status, room.value)
        assert bool(room.value) == bool(status), (number, status, room.value)
        assert status == 0 or number >= len(bases), (number, room.value)
        outcomes[status] += 1
        base.layout[:], base.tables[:], base.lengths[:] = kept
    print(*(outcomes[status] for status in range(3)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
