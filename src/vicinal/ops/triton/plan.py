"""Which tiles the passes use, and how that travels: as plain integers at the end of a `Layout`.

Tiles are chosen on the host, where the pattern is known. The operator gets tensors and integers only, so that a
compiled or exported program carries the choice with it and nothing has to be read back from the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from vicinal.ops.packing import Layout

Box = tuple[int, int, int]
"""One number for each axis (time, height, width); 1 (or 0) where the grid has no such axis."""

PASSES = ("forward", "query", "key")
"""The forward, the gradient of the query, the gradients of key and value."""

_WORDS = 11


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one pass.

    A query tile is `query` queries of one residue class on each axis, a key tile `key` keys of a class. In the passes
    over queries the grid is cut into query tiles, which begin `phase` before the first query so that their edges can
    fall where windows change, and key tiles begin where a query tile's needs begin. In the pass over keys it is the
    other way round.
    """

    query: Box
    phase: Box
    key: Box
    warps: int
    stages: int

    @property
    def block_queries(self) -> int:
        """Queries of a block: a power of two, of which the tile fills most."""
        return block(math.prod(self.query))

    @property
    def block_keys(self) -> int:
        """Keys of a block."""
        return block(math.prod(self.key))

    def to_dict(self) -> dict[str, object]:
        """As plain values."""
        return {**dataclasses.asdict(self), "block": [self.block_queries, self.block_keys]}


def block(tokens: int) -> int:
    """The block that holds so many tokens; matrix products take at least 16."""
    return max(16, 1 << (tokens - 1).bit_length())


Choice = tuple[Tiles, Tiles, Tiles]
"""The tiles of each of the `PASSES`."""


def pack(choices: Sequence[Choice]) -> tuple[int, ...]:
    """Choices, one for each member of each group, as integers."""
    numbers: list[int] = []
    for choice in choices:
        for tiles in choice:
            numbers += [*tiles.query, *tiles.phase, *tiles.key, tiles.warps, tiles.stages]
    return tuple(numbers)


def unpack(numbers: Sequence[int], layout: Layout) -> list[list[Choice]]:
    """For each group the choices of its members; ordinary ones where the layout comes without."""
    members = [len(group.members) for group in layout.groups]
    if not numbers:
        return [[(ordinary(layout.rank),) * 3] * count for count in members]
    assert len(numbers) == _WORDS * len(PASSES) * sum(members)
    found = []
    for begin in range(0, len(numbers), _WORDS):
        part = numbers[begin : begin + _WORDS]
        query, phase, key = (_box(part[at : at + 3]) for at in (0, 3, 6))
        found.append(Tiles(query, phase, key, part[9], part[10]))
    stream = iter(found)
    return [[(next(stream), next(stream), next(stream)) for _ in range(count)] for count in members]


def _box(numbers: Sequence[int]) -> Box:
    first, second, third = numbers
    return first, second, third


def box(sizes: Sequence[int], filling: int = 1) -> Box:
    """Sizes of the axes there are, filled up to three."""
    return _box((*(filling,) * (3 - len(sizes)), *sizes))


def ordinary(rank: int) -> Tiles:
    """Tiles for a program that was made without a choice."""
    cubes = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}[rank]
    return Tiles(box(cubes), (0, 0, 0), box(cubes), warps=4, stages=1)
