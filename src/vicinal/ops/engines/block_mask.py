"""Block lists for FlexAttention, from the tables: tokens in tile order, and who visits which tile."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from vicinal.ops.packing import Layout, ordinary_tensors, unpack_row
from vicinal.ops.tile_order import TileOrder, axis_classes
from vicinal.ops.tiling import Booleans
from vicinal.pattern.bounds import Member
from vicinal.pattern.table import AxisTable

BLOCK = 128
"""Tokens of a tile: what FlexAttention's kernels divide by on every device they run on."""

MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class AxisTest:
    """Whether queries see keys on one axis, for positions: what a mask function reads."""

    start: torch.Tensor
    reach: torch.Tensor
    key: torch.Tensor
    step: int
    length: int
    wraps: bool

    def __call__(self, query: Any, key: Any) -> Any:
        """Whether the query at a position sees the key at a position."""
        distance = self.key[key] - self.start[query]
        if self.wraps:
            distance = distance % self.length
        seen = (distance >= 0) & (distance < self.reach[query])
        return seen & (distance % self.step == 0) if self.step > 1 else seen


@dataclasses.dataclass(frozen=True, eq=False)
class MemberBlocks:
    """One member of a head group, ready for FlexAttention: both orders, the block mask, and the extra keys' place."""

    queries: TileOrder
    keys: TileOrder
    block_mask: Any
    visited: int
    full: int
    extra_tokens: int
    """Places behind the grid's keys for the extra ones, whole tiles."""
    compiled: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    """FlexAttention compiled for this mask, by kind of tensors."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What of a member's tiles is visited: bool `[query tiles, key tiles]` each."""

    touched: Booleans
    whole: Booleans


def blocks(member: Member, queries: TileOrder, keys: TileOrder, *, is_masked: bool = False) -> Blocks:
    """Which tiles of the keys each tile of the queries visits, and which it sees whole.

    With `is_masked` none counts as whole, because something else is left out as well.

    >>> found = blocks(bounds(Window(4), (8,)).groups[0].members[0], *[TileOrder((8,), (4,), (1,))] * 2)
    >>> found.touched.tolist(), found.whole.tolist()
    ([[True, False], [False, True]], [[True, False], [False, True]])
    """
    touched, whole = np.ones((1, 1), dtype=np.bool_), np.ones((1, 1), dtype=np.bool_)
    for axis, table in enumerate(member):
        classes = axis_classes(table, queries.tile[axis], keys.tile[axis], queries.step[axis], keys.step[axis])
        touched, whole = (np.kron(some, own) for some, own in zip((touched, whole), classes, strict=True))
    return Blocks(touched, whole & (not is_masked))


def chosen_orders(member: Member, block: int = BLOCK) -> tuple[TileOrder, TileOrder]:
    """The tile shapes that visit the fewest pairs of tiles; each residue class is cut by itself.

    >>> queries, keys = chosen_orders(bounds(Near(7), (56, 56)).groups[0].members[0], 64)
    >>> queries.tile, keys.tile
    ((4, 16), (8, 8))
    """
    grid, key_grid = tuple(len(table) for table in member), tuple(table.length for table in member)
    step = tuple(table.step for table in member)
    sides = [tuple(box) for box in _boxes(block, len(member))]
    costs = {
        (axis, query_side, key_side): _visits(table, query_side, key_side)
        for axis, table in enumerate(member)
        for query_side, key_side in {(q[axis], k[axis]) for q in sides for k in sides}
    }

    def cost(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, int]:
        query, key = pair
        # among equals the roundest tiles: a longer side loses more wherever the tables change
        visited = math.prod(costs[axis, query[axis], key[axis]] for axis in range(len(member)))
        return visited, sum(query) + sum(key)

    query, key = min(itertools.product(sides, sides), key=cost)
    return TileOrder(grid, query, step), TileOrder(key_grid, key, step)


def _visits(table: AxisTable, query_side: int, key_side: int) -> int:
    if len(table) * table.length > _MOST_PLACES * query_side * key_side:
        return len(table) * table.length  # a tile of a few tokens on a long axis: not worth counting
    return int(axis_classes(table, query_side, key_side, table.step, table.step)[0].sum())


_MOST_PLACES = 1 << 22


def _boxes(volume: int, rank: int) -> Iterator[tuple[int, ...]]:
    sides = [1 << power for power in range(volume.bit_length())]
    return (box for box in itertools.product(sides, repeat=rank) if math.prod(box) == volume)


def member_blocks(
    member: Member,
    earlier: tuple[Member, ...],
    orders: tuple[TileOrder, TileOrder],
    extra_tokens: int,
    device: torch.device,
) -> MemberBlocks:
    """Everything FlexAttention needs for one member, made on the device.

    Keys that an earlier member has are left out. Extra keys stand behind the grid's, in tiles of their own that every
    query visits.
    """
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = orders
    found = blocks(member, queries, keys, is_masked=bool(earlier))
    touched, whole = found.touched, found.whole
    extra_tiles = -(-extra_tokens // keys.volume)
    if extra_tiles:
        added = np.ones((len(touched), extra_tiles), dtype=np.bool_)
        is_full = (np.arange(extra_tiles) + 1) * keys.volume <= extra_tokens
        touched = np.concatenate([touched, added], 1)
        whole = np.concatenate([whole, added & is_full], 1)
    places = keys.num_positions + extra_tiles * keys.volume
    with ordinary_tensors():
        partial_list, whole_list = (_block_list(some, device) for some in (touched & ~whole, whole))
        block_mask = BlockMask.from_kv_blocks(
            *partial_list,
            *whole_list,
            BLOCK_SIZE=(queries.volume, keys.volume),
            mask_mod=_mask_function(member, earlier, orders, extra_tokens, places, device),
            seq_lengths=(queries.num_positions, places),
        )
    return MemberBlocks(queries, keys, block_mask, int(touched.sum()), int(whole.sum()), places - keys.num_positions)


def _block_list(seen: Booleans, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key tiles each query tile visits, and all key tiles, these first: `[1, 1, tiles, key tiles]`."""
    order = np.argsort(~seen, axis=1, kind="stable").astype(np.int32)
    count = seen.sum(1).astype(np.int32)
    return torch.from_numpy(count)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)


def _mask_function(
    member: Member,
    earlier: tuple[Member, ...],
    orders: tuple[TileOrder, TileOrder],
    extra_tokens: int,
    places: int,
    device: torch.device,
) -> MaskFunction:
    """Whether the query at a position sees the key at a position."""
    keys = orders[1]
    own, *others = (_axis_tests(tables, orders, places, device) for tables in (member, *earlier))
    is_key = None
    inside = np.zeros(places, dtype=np.bool_)
    inside[: keys.num_positions] = keys.is_token()
    if any(table.wraps for table in member) and not inside.all():
        is_key = torch.from_numpy(inside).to(device)  # on a wrapping axis no coordinate is out of sight
    first, last = keys.num_positions, keys.num_positions + extra_tokens

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = _all_axes(own, query, key)
        if is_key is not None:
            seen = seen & is_key[key]
        for tests in others:
            seen = seen & ~_all_axes(tests, query, key)
        if last > first:
            seen = seen | ((key >= first) & (key < last))
        return seen

    return mask


def _all_axes(tests: tuple[AxisTest, ...], query: Any, key: Any) -> Any:
    seen = tests[0](query, key)
    for test in tests[1:]:
        seen = seen & test(query, key)
    return seen


def _axis_tests(
    member: Member, orders: tuple[TileOrder, TileOrder], places: int, device: torch.device
) -> tuple[AxisTest, ...]:
    queries, keys = orders
    is_key = keys.is_token()
    tests = []
    for axis, table in enumerate(member):
        query = queries.coordinates(axis)
        key = np.full(places, -1, dtype=np.int32)  # below any start: what fills tiles up is not seen
        key[: len(is_key)] = np.where(is_key, keys.coordinates(axis), -1)
        start, reach = table.start[query].astype(np.int32), (table.step * table.count[query]).astype(np.int32)
        begin, span, place = (torch.from_numpy(array).to(device) for array in (start, reach, key))
        tests.append(AxisTest(begin, span, place, table.step, table.length, table.wraps))
    return tuple(tests)


_ROWS: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
_WORDS: dict[int, bytes] = {}


def row_of(tables: torch.Tensor) -> bytes:
    """The packed tables as bytes; a tensor that was read once is not copied from its device again."""
    number = id(tables)
    if _ROWS.get(number) is not tables:
        for gone in _WORDS.keys() - set(_ROWS.keys()):
            del _WORDS[gone]
        _WORDS[number] = tables[0].cpu().numpy().tobytes()
        _ROWS[number] = tables
    return _WORDS[number]


@functools.lru_cache(maxsize=64)
def plan(
    row: bytes,
    layout: tuple[int, ...],
    grid: tuple[int, ...],
    extra_tokens: int,
    device: torch.device,
    order: TileOrder | None = None,
) -> tuple[tuple[MemberBlocks, ...], ...]:
    """For each head group its members; made once for a pattern on a grid and a device.

    With `order` queries and keys are in that order, else in the one that suits the pattern best.
    """
    groups = unpack_row(np.frombuffer(row, dtype=np.int32), Layout.unpack(layout), grid)
    return tuple(
        tuple(
            member_blocks(
                member,
                members[:number],
                chosen_orders(member) if order is None else (order, order),
                0 if number else extra_tokens,  # they go with the first member, so that each counts once
                device,
            )
            for number, member in enumerate(members)
        )
        for members in groups
    )
