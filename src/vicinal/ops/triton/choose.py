"""Which tiles to use: the cut with the least modelled cost, counted exactly from the tables.

A plain function of the tables, the head dims, the dtype and the device, without trial runs. Cost is counted in
multiply-adds of a matrix unit. What a visit to a tile costs besides its products are round numbers, reasoned from the
data sheets of the devices and not fitted to measurements so far.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vicinal.ops.tiling import AxisTiles, cut_evenly
from vicinal.ops.triton.plan import PASSES, Choice, Tiles, block, box
from vicinal.pattern.bounds import Bounds, Member
from vicinal.pattern.counting import member_pairs
from vicinal.pattern.table import AxisTable

Integers: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = npt.NDArray[Any]

PROGRAM, VISIT = 2_000_000.0, 400_000.0
"""What a program costs besides its tiles, and a visit to a tile besides its arithmetic: latency, mostly."""

LOAD, SCORE, MASK = 64.0, 256.0, 64.0
"""What a number loaded costs, a score's softmax, and one axis of its mask where a tile is partial."""

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 128)
_LEAST_FILLED = 0.6
"""Blocks of which less is used are not considered where a smaller one would do."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a choice depends on: the vendor's target, such as ("cuda", 90), and shared memory for one program."""

    kind: str
    capability: int
    shared_bytes: int


DEVICES = {
    "sm80": Device("cuda", 80, 166_912),
    "sm89": Device("cuda", 89, 101_376),
    "sm90": Device("cuda", 90, 232_448),
    "sm100": Device("cuda", 100, 232_448),
    "gfx942": Device("hip", 942, 65_536),
}
"""The devices that kernels are compiled for in tests; sm89 stands for all with little shared memory."""


def this_device() -> Device:
    """The device that this process uses; an ordinary one where it uses none, as with fake tensors."""
    return _device(torch.cuda.current_device()) if torch.cuda.is_initialized() else DEVICES["sm80"]


def this_gpu() -> str | None:
    """The name of the GPU that this process uses, if any; measured tiles are for one kind of GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else None


@functools.cache
def _device(number: int) -> Device:
    properties = torch.cuda.get_device_properties(number)
    if torch.version.hip is not None:
        return DEVICES["gfx942"]
    shared = getattr(properties, "shared_memory_per_block_optin", 101_376)
    return Device("cuda", 10 * properties.major + properties.minor, int(shared))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a choice of tiles comes to for one head: exact counts, and the modelled cost."""

    tiles: Tiles
    programs: int
    visited: int
    full: int
    pairs_needed: int
    modelled: float

    @property
    def pairs_computed(self) -> int:
        """Scores that are computed, padding included."""
        return self.visited * self.tiles.block_queries * self.tiles.block_keys

    def to_dict(self) -> dict[str, object]:
        """As plain values."""
        counts = {"programs": self.programs, "visited": self.visited, "full": self.full}
        waste = round(self.pairs_computed / max(self.pairs_needed, 1), 3)
        return {**self.tiles.to_dict(), **counts, "waste": waste, "modelled": round(self.modelled)}


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Cuts of one axis: outer tiles of `pitch` and `phase`, inner ones of `size`, and how many visits each makes."""

    pitch: Integers
    phase: Integers
    size: Integers
    tiles: Integers
    visits: Integers
    full: Integers


def count_axis(tiles: AxisTiles, size: int) -> tuple[int, int]:
    """Inner tiles of `size` that the tiles of an axis visit, and how many of those are full.

    >>> count_axis(cut_evenly(AxisTable.of(Near(5), 12), 4), 4)
    (6, 0)
    """
    low = np.where(tiles.is_query, tiles.low, 0).max(1)
    high = np.where(tiles.is_query, tiles.high, np.iinfo(np.int64).max).min(1)
    full = np.maximum(high // size - -(-low // size), 0)
    visits = -(-tiles.size // size)
    return int(visits.sum()), int(np.minimum(full, visits).sum())


def _phases(table: AxisTable, pitch: int) -> set[int]:
    """Phases worth comparing: that of the axis, and that of the first place where the window changes."""
    start, count = table.start[:: table.step], table.count[:: table.step]
    changes = np.flatnonzero((np.diff(start) != 0) | (np.diff(count) != 0))
    return {0} if not len(changes) else {0, int(-(changes[0] + 1) % pitch)}


@functools.lru_cache(maxsize=64)
def _axis(table: AxisTable, most: int) -> _Axis:
    """All cuts of an axis worth comparing, with blocks of at most `most`."""
    members = -(-len(table) // table.step)
    found: list[tuple[int, int, AxisTiles]] = []
    for pitch in sorted({min(size, members) for size in (*_SIZES, members) if min(size, members) <= most}):
        cuts = [(phase, cut_evenly(table, pitch, phase)) for phase in _phases(table, pitch)]
        phase, tiles = min(cuts, key=lambda cut: (int(cut[1].size.sum()), cut[0]))
        found.append((pitch, phase, tiles))
    widest = max(tiles.keys for _, _, tiles in found)
    sizes = sorted({min(size, widest) for size in (*_SIZES, widest) if min(size, widest) <= most})
    counts = np.array([[count_axis(tiles, size) for size in sizes] for _, _, tiles in found], dtype=np.int64)
    return _Axis(
        pitch=np.array([pitch for pitch, _, _ in found]),
        phase=np.array([phase for _, phase, _ in found]),
        size=np.array(sizes),
        tiles=np.array([tiles.num_tiles for _, _, tiles in found]),
        visits=counts[:, :, 0],
        full=counts[:, :, 1],
    )


def _boxes(sizes: Sequence[Integers], most: int) -> tuple[Integers, Integers]:
    """Boxes of these sizes that fill a block of at most `most`: their indices `[boxes, axes]`, and blocks."""
    index = np.array(list(itertools.product(*(range(len(axis)) for axis in sizes))), dtype=np.int64)
    tokens = np.prod([axis[index[:, number]] for number, axis in enumerate(sizes)], axis=0)
    blocks = np.maximum(16, 1 << np.ceil(np.log2(tokens)).astype(np.int64))
    widest = np.all(index == [len(axis) - 1 for axis in sizes], axis=1)
    keep = (blocks <= most) & ((tokens >= _LEAST_FILLED * blocks) | (blocks == 16) | widest)
    return index[keep], blocks[keep]


@functools.lru_cache(maxsize=1024)
def choose(
    member: Member,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: Device,
    name: str,
    *,
    is_heavy: bool = False,
) -> Cost:
    """The tiles of one pass (see `PASSES`) over one union member.

    `is_heavy` where a score has more to it than a product: a bias, or keys to leave out.

    >>> member = bounds(Window(7), (56, 56)).groups[0].members[0]
    >>> found = choose(member, 32, 32, torch.float16, DEVICES["sm90"], "forward")
    >>> found.tiles.query, found.visited
    ((1, 7, 7), 64)
    """
    return candidates(member, head_dim, value_dim, dtype, device, name, is_heavy=is_heavy)[0]


def candidates(
    member: Member,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: Device,
    name: str,
    *,
    is_heavy: bool = False,
    most: int = 1,
) -> list[Cost]:
    """The choices of the least modelled cost, the least first."""
    turned = _transposed(member) if name == "key" else member
    most_outer, most_inner = _most(head_dim, value_dim, dtype, device, name)
    if is_heavy:
        room = 64 if device.kind == "cuda" and dtype != torch.float32 else 32
        most_outer, most_inner = min(most_outer, room), min(most_inner, room)
    cuts = [_axis(table, max(most_outer, most_inner)) for table in turned]
    outer, outer_blocks = _boxes([cut.pitch for cut in cuts], most_outer)
    inner, inner_blocks = _boxes([cut.size for cut in cuts], most_inner)
    programs = np.prod([cut.tiles[outer[:, number]] for number, cut in enumerate(cuts)], axis=0)
    visited = np.ones((len(outer), len(inner)))
    full = visited.copy()
    for number, cut in enumerate(cuts):
        where = (outer[:, number][:, None], inner[:, number][None])
        visited *= cut.visits[where]
        full *= cut.full[where]
    inner_sizes = np.prod([cut.size[inner[:, number]] for number, cut in enumerate(cuts)], axis=0)
    partial = visited - np.where(inner_sizes == inner_blocks, full, 0)
    blocks = (outer_blocks[:, None], inner_blocks[None])
    dims = (head_dim, value_dim)
    modelled = _modelled(programs[:, None], visited, partial, blocks, dims, name, len(member))
    best = [int(modelled.argmin())] if most == 1 else np.argsort(modelled, axis=None, kind="stable")[:most].tolist()
    found = []
    for best_outer, best_inner in zip(*np.unravel_index(best, modelled.shape), strict=True):
        pitch = [int(cut.pitch[at]) for cut, at in zip(cuts, outer[best_outer], strict=True)]
        phase = [int(cut.phase[at]) for cut, at in zip(cuts, outer[best_outer], strict=True)]
        size = [int(cut.size[at]) for cut, at in zip(cuts, inner[best_inner], strict=True)]
        query, key = (box(size), box(pitch)) if name == "key" else (box(pitch), box(size))
        warps, stages = launch_options(query, key, head_dim, value_dim, dtype, device, name)
        cost = Cost(
            tiles=Tiles(query, box(phase, 0), key, min(2 * warps, 8) if is_heavy else warps, stages),
            programs=int(programs[best_outer]),
            visited=int(visited[best_outer, best_inner]),
            full=int(full[best_outer, best_inner]),
            pairs_needed=member_pairs(member),
            modelled=float(modelled[best_outer, best_inner]),
        )
        found.append(cost)
    return found


def cost_of(member: Member, tiles: Tiles, head_dim: int, value_dim: int, name: str) -> Cost:
    """What tiles that were not chosen here come to.

    >>> member = bounds(Window(7), (56, 56)).groups[0].members[0]
    >>> tiles = Tiles(query=(1, 8, 8), phase=(0, 0, 0), key=(1, 8, 8), warps=4, stages=2)
    >>> cost_of(member, tiles, 32, 32, "forward").visited
    196
    """
    turned = _transposed(member) if name == "key" else member
    pitches, sizes = (tiles.key, tiles.query) if name == "key" else (tiles.query, tiles.key)
    skipped = len(pitches) - len(member)
    programs = visited = full = 1
    for axis, table in enumerate(turned, skipped):
        cut = cut_evenly(table, pitches[axis], tiles.phase[axis])
        own_visited, own_full = count_axis(cut, sizes[axis])
        programs, visited, full = programs * cut.num_tiles, visited * own_visited, full * own_full
    outer, inner = block(math.prod(pitches)), block(math.prod(sizes))
    partial = visited - (full if math.prod(sizes) == inner else 0)
    blocks = (np.asarray(outer), np.asarray(inner))
    counts = (np.asarray(programs), np.asarray(visited), np.asarray(partial))
    modelled = _modelled(*counts, blocks, (head_dim, value_dim), name, len(member))
    return Cost(tiles, programs, visited, full, member_pairs(member), float(modelled))


def _transposed(member: Member) -> Member:
    """Who sees me; for a part of a wrapping table that cannot be turned round, the table itself, which is like it."""
    try:
        return tuple(table.transpose() for table in member)
    except ValueError:
        return member


def _modelled(
    programs: Numbers,
    visited: Numbers,
    partial: Numbers,
    blocks: tuple[Numbers, Numbers],
    dims: tuple[int, int],
    name: str,
    axes: int,
) -> Numbers:
    """The modelled cost of one head for every choice; the arrays broadcast. `blocks` are the outer and inner ones."""
    outer, inner = blocks
    width, value_width = map(block, dims)
    moved = width + value_width
    products = {"forward": moved, "query": moved + width, "key": 2 * moved}[name]
    visit = VISIT + inner * moved * LOAD + outer * inner * (products + SCORE)
    program = PROGRAM + outer * moved * LOAD
    return np.asarray(programs * program + visited * visit + partial * outer * inner * MASK * axes)


def _most(head_dim: int, value_dim: int, dtype: torch.dtype, device: Device, name: str) -> tuple[int, int]:
    """The largest blocks, outer and inner: what accumulators and operands leave room for."""
    width = max(block(head_dim), block(value_dim))
    if dtype == torch.float32:  # products without matrix units: as compiled, larger blocks spill
        most = (64, 64) if width <= 64 else (32, 32) if width <= 128 else (16, 16)
        if name != "forward":
            most = (min(most[0], 32), min(most[1], 32))
    elif name == "forward":
        most = (128, 128) if width <= 64 else (128, 64) if width <= 128 else (64, 32)
    elif name == "query":
        most = (128, 64) if width <= 64 else (64, 64) if width <= 128 else (32, 32)
    else:  # two accumulators: as compiled, larger blocks keep part of them in memory
        most = (64, 64) if width <= 64 else (64, 32) if width <= 128 else (32, 32)
        if device.kind == "cuda" and device.capability < 90:  # before Hopper all operands pass through registers
            most = (min(most[0], 64 if width <= 64 else 32), 32)
    if device.kind == "hip":  # as compiled, larger blocks do not stay in registers
        if name == "forward":
            return min(most[0], 128 if width <= 64 else 64), min(most[1], 64 if width <= 128 else 16)
        return min(most[0], 64 if name == "query" else 32), min(most[1], 32 if width <= 128 else 16)
    return most


def launch_options(
    query: Sequence[int],
    key: Sequence[int],
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: Device,
    name: str,
) -> tuple[int, int]:
    """Warps and pipeline stages."""
    rows, columns = block(math.prod(query)), block(math.prod(key))
    width, value_width = block(head_dim), block(value_dim)
    held = {
        "forward": rows * (columns + value_width),
        "query": rows * (2 * columns + width),
        "key": columns * (2 * rows + width + value_width),
    }[name]
    held *= dtype.itemsize // 2
    warps = 1 if held <= 1024 else 2 if held <= 4096 else 4 if held <= (12288 if name == "key" else 12287) else 8
    if name == "key" and width + value_width > 256:  # two wide accumulators
        warps = min(2 * warps, 8)
    loaded = columns if name != "key" else rows
    kept = rows if name != "key" else columns
    stages = 1
    for more in (2,) if name == "key" else (3, 2):
        # the tiles of one step for each stage, what stays, and scores on their way between two products
        numbers = (loaded * more + kept) * (width + value_width) + 2 * rows * columns
        if device.kind == "cuda" and numbers * dtype.itemsize <= 0.8 * device.shared_bytes:
            stages = more
            break
    if device.kind == "hip":
        stages = 2 if (loaded + kept) * (width + value_width) * dtype.itemsize < device.shared_bytes // 2 else 1
    return warps, stages


def choose_all(
    bounds: Bounds, head_dim: int, value_dim: int, dtype: torch.dtype, device: Device, *, has_bias: bool = False
) -> list[tuple[Cost, Cost, Cost]]:
    """For each member of each group what the passes do."""
    found = []
    for group in bounds.groups:
        for number, member in enumerate(group.members):
            is_heavy = has_bias or number > 0
            forward, query, key = (
                choose(member, head_dim, value_dim, dtype, device, name, is_heavy=is_heavy) for name in PASSES
            )
            found.append((forward, query, key))
    return found


def choices(costs: Sequence[tuple[Cost, Cost, Cost]]) -> list[Choice]:
    """The tiles alone."""
    return [(forward.tiles, query.tiles, key.tiles) for forward, query, key in costs]
