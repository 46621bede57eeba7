"""What follows from a pattern on a grid: its mask, its cost, how far a stack of layers sees."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vicinal.pattern.axis import AxisKind
from vicinal.pattern.bounds import AnyPattern, Bounds, Group, Member, bounds
from vicinal.pattern.compose import split_heads
from vicinal.pattern.numbers import as_integer

Booleans: TypeAlias = npt.NDArray[np.bool_]
Schedule: TypeAlias = AnyPattern | Sequence[AnyPattern]
"""One pattern, or a list of them, one per layer. (A tuple of axis kinds is one pattern.)"""


def mask(pattern: AnyPattern, grid: Sequence[int] | None = None, key_grid: Sequence[int] | None = None) -> torch.Tensor:
    """Who sees whom, written out: bool `[*grid, *key_grid]`, with one more axis first for `heads` groups.

    >>> mask(Near(3), (4,)).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    """
    table = bounds(pattern, grid, key_grid)
    groups = [group_mask(group).reshape(*table.grid, *table.key_grid) for group in table.groups]
    return torch.from_numpy(groups[0] if len(groups) == 1 else np.stack(groups))


def group_mask(group: Group) -> Booleans:
    """The mask of one head group over flattened grids: `[queries, keys]`."""
    return functools.reduce(operator.or_, map(member_mask, group.members))


def member_mask(member: Member) -> Booleans:
    """The mask of one union member over flattened grids: `[queries, keys]`."""
    whole = np.ones((1, 1), dtype=np.bool_)
    for table in member:
        axis = table.mask()
        queries, keys = whole.shape[0] * axis.shape[0], whole.shape[1] * axis.shape[1]
        whole = (whole[:, None, :, None] & axis[None, :, None, :]).reshape(queries, keys)
    return whole


def group_pairs(group: Group) -> int:
    """How many (query, key) pairs one head of the group has."""
    if len(group.members) == 1:
        return member_pairs(group.members[0])
    # a union counts a key once: by inclusion and exclusion the axes would stay apart, but 2^members terms;
    # counting row by row of the leading axis keeps memory small and is exact for any overlap
    return sum(int(_union_row(group, query).sum()) for query in range(len(group.members[0][0])))


def member_pairs(member: Member) -> int:
    """How many (query, key) pairs a member has: the product over the axes of the sum of counts."""
    return functools.reduce(operator.mul, (int(table.count.sum()) for table in member))


def _union_row(group: Group, query: int) -> Booleans:
    """The group's mask for the queries with the given leading coordinate."""
    rows = []
    for member in group.members:
        sliced = (member[0].slice(query, query + 1), *member[1:])
        rows.append(member_mask(sliced))
    return functools.reduce(operator.or_, rows)


@functools.lru_cache(maxsize=256)
def _group_pairs(table: Bounds) -> tuple[int, ...]:
    return tuple(map(group_pairs, table.groups))


def count(
    pattern: AnyPattern,
    grid: Sequence[int] | None = None,
    key_grid: Sequence[int] | None = None,
    *,
    heads: int | None = None,
) -> int:
    """How many (query, key) pairs the pattern has.

    With `heads` the pairs of that many heads together. Without it those of one head, and for
    `vicinal.heads(...)` of one head per group (or of the `sizes` it was given).

    >>> count(Near(7), (56, 56)), count(Near(7), (56, 56), heads=2)
    (153664, 307328)
    """
    table = bounds(pattern, grid, key_grid)
    fixed = tuple(group.heads for group in table.groups if group.heads is not None)
    if heads is None:
        sizes = fixed or (1,) * len(table.groups)
    else:
        sizes = split_heads(as_integer("count", "heads", heads, 1), len(table.groups), fixed or None)
    return sum(size * pairs for size, pairs in zip(sizes, _group_pairs(table), strict=True))


def attention_flops(pairs: int, head_dim: int, value_dim: int, *, backward: bool = False) -> int:
    """Floating-point operations of attention over so many pairs; the backward costs 2.5 times the forward."""
    forward = 2 * pairs * (head_dim + value_dim)
    return forward * 5 // 2 if backward else forward


def flops(
    pattern: AnyPattern,
    grid: Sequence[int] | None = None,
    key_grid: Sequence[int] | None = None,
    *,
    head_dim: int,
    value_dim: int | None = None,
    heads: int | None = None,
    batch: int = 1,
    backward: bool = False,
) -> int:
    """Floating-point operations of attention under the pattern, forward or (with `backward`) backward.

    >>> flops(Near(7), (56, 56), head_dim=32, heads=2)
    39337984
    """
    pairs = batch * count(pattern, grid, key_grid, heads=heads)
    return attention_flops(pairs, head_dim, head_dim if value_dim is None else value_dim, backward=backward)


def bias_shape(
    pattern: AnyPattern, grid: Sequence[int] | None = None, key_grid: Sequence[int] | None = None
) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """The shape of a relative position bias, without the leading axis of heads; one shape per `heads` group.

    >>> bias_shape(Near(7), (56, 56)), bias_shape(heads(Near(3), Full()), (8,))
    ((13, 13), ((5,), (15,)))
    """
    shapes = tuple(map(_group_bias_shape, bounds(pattern, grid, key_grid).groups))
    return shapes[0] if len(shapes) == 1 else shapes


def _group_bias_shape(group: Group) -> tuple[int, ...]:
    if len(group.members) > 1:
        raise ValueError("bias: a union takes no bias: a key seen by two members has no single relative position")
    lengths = [table.bias_length for table in group.members[0]]
    if any(length is None for length in lengths):
        raise ValueError("bias: this pattern has no relative positions (a transposed Bounds, or an own axis kind)")
    return tuple(length for length in lengths if length is not None)


def receptive_field(
    pattern: Schedule, grid: Sequence[int] | None = None, key_grid: Sequence[int] | None = None
) -> torch.Tensor:
    """Which inputs can reach which outputs through a stack of layers: bool `[*grid, *grid]`.

    `pattern` is one pattern or a list with one per layer, first layer first. Heads are joined after each
    layer. With `key_grid` the first layer reads from that grid (bool `[*grid, *key_grid]`).

    >>> field = receptive_field([Near(3), Near(3, dilation=3)], (27,))
    >>> int(field[13].sum())
    9
    """
    layers: list[AnyPattern] = list(pattern) if _is_schedule(pattern) else [pattern]  # type: ignore[arg-type,list-item]
    if not layers:
        raise ValueError("receptive_field: the list of patterns is empty")
    tables = [bounds(layer, grid, key_grid if depth == 0 else None) for depth, layer in enumerate(layers)]
    reach = _reach(tables)
    return torch.from_numpy(reach.reshape(*tables[-1].grid, *tables[0].key_grid))


def _is_schedule(pattern: Schedule) -> bool:
    if isinstance(pattern, list):
        return True
    return isinstance(pattern, tuple) and not all(isinstance(kind, AxisKind) for kind in pattern)


def _reach(tables: list[Bounds]) -> Booleans:
    """Compose layers; per axis as long as every layer is one product, over the whole grid otherwise."""
    if all(len(table.groups) == 1 and len(table.groups[0].members) == 1 for table in tables):
        whole = np.ones((1, 1), dtype=np.bool_)
        for axis in range(tables[0].rank):
            reach = _chain([table.groups[0].members[0][axis].mask() for table in tables])
            queries, keys = whole.shape[0] * reach.shape[0], whole.shape[1] * reach.shape[1]
            whole = (whole[:, None, :, None] & reach[None, :, None, :]).reshape(queries, keys)
        return whole
    return _chain([functools.reduce(operator.or_, map(group_mask, table.groups)) for table in tables])


def _chain(masks: list[Booleans]) -> Booleans:
    reach = masks[0]
    for step in masks[1:]:
        reach = (step.astype(np.float32) @ reach.astype(np.float32)) > 0
    return reach
