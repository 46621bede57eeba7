"""`Bounds`: a pattern on a grid, written out as one small integer table per axis."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

from vicinal.pattern.compose import Pattern, check_pattern, pattern_of_key, pattern_parts, split_heads
from vicinal.pattern.numbers import as_grid
from vicinal.pattern.table import AxisTable

Member: TypeAlias = tuple[AxisTable, ...]
"""One table per axis; a query sees the product of what the axes see."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The ordered members of one group of heads; a later member leaves out what an earlier one sees.

    `heads` is the number of heads where the pattern fixes it, else None: all groups are equally large.
    """

    members: tuple[Member, ...]
    heads: int | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Bounds:
    """Who sees whom on a given grid: head groups, their union members, and one table per axis.

    A value: frozen, hashable, equal when the tables are. Closed under `slice` (a range of queries),
    `shift` (the key grid starts elsewhere) and `transpose` (who sees me). It stands wherever a pattern does.

    >>> table = bounds(Near(3), (8, 8))
    >>> table, table.slice(0, 2, 5).shift(0, 1, 5)
    (Bounds(grid=(8, 8), key_grid=(8, 8)), Bounds(grid=(3, 8), key_grid=(5, 8)))
    """

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not self.groups or not all(group.members for group in self.groups):
            raise ValueError("Bounds: at least one group with at least one member is needed")
        grids = {
            (tuple(len(table) for table in member), tuple(table.length for table in member))
            for group in self.groups
            for member in group.members
        }
        if len(grids) != 1:
            raise ValueError(f"Bounds: all members must be for one grid and one key grid, got {sorted(grids)}")
        if len({group.heads is None for group in self.groups}) != 1:
            raise ValueError("Bounds: heads must be given for every group or for none")
        # the first of equal bounds is found by key, and lives as long as any of them
        first = _KNOWN.setdefault(self.key[1], self)
        if first is not self:
            object.__setattr__(self, "_first", first)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bounds, (self.groups,)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.groups[0].members[0])

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the queries."""
        return tuple(len(table) for table in self.groups[0].members[0])

    @property
    def key_grid(self) -> tuple[int, ...]:
        """The grid of the keys."""
        return tuple(table.length for table in self.groups[0].members[0])

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """The bounds as plain values: what a compiler can hold as a constant."""
        fingerprint = hashlib.blake2b(digest_size=16)
        for group in self.groups:
            fingerprint.update(repr((group.heads, len(group.members))).encode())
            for member in group.members:
                for table in member:
                    fingerprint.update(table.digest)
        return (Bounds, fingerprint.hexdigest())

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        groups = f", groups={len(self.groups)}" if len(self.groups) > 1 else ""
        return f"Bounds(grid={self.grid}, key_grid={self.key_grid}{groups})"

    def split(self, num_heads: int) -> tuple[int, ...]:
        """How many heads each group has, of `num_heads` in all."""
        sizes = tuple(group.heads for group in self.groups if group.heads is not None)
        return split_heads(num_heads, len(self.groups), sizes or None)

    def slice(self, axis: int, start: int, stop: int) -> Bounds:
        """The bounds of the queries `start <= i < stop` of an axis."""
        return self._on_axis("slice", axis, lambda table: table.slice(start, stop))

    def shift(self, axis: int, offset: int, length: int | None = None) -> Bounds:
        """The bounds against the keys `offset <= j < offset + length` of an axis, renumbered from 0."""
        return self._on_axis("shift", axis, lambda table: table.shift(offset, length))

    def transpose(self) -> Bounds:
        """Who sees me: queries and keys change places. The result takes no bias."""
        return self._map(lambda _, table: table.transpose())

    def _on_axis(self, where: str, axis: int, change: Any) -> Bounds:
        if not -self.rank <= axis < self.rank:
            raise ValueError(f"{where}: axis must be in {-self.rank}..{self.rank - 1}, got {axis}")
        chosen = axis % self.rank
        return self._map(lambda position, table: change(table) if position == chosen else table)

    def _map(self, change: Any) -> Bounds:
        return Bounds(
            tuple(
                Group(
                    tuple(
                        tuple(change(position, table) for position, table in enumerate(member))
                        for member in group.members
                    ),
                    group.heads,
                )
                for group in self.groups
            )
        )


_KNOWN: weakref.WeakValueDictionary[str, Bounds] = weakref.WeakValueDictionary()

AnyPattern: TypeAlias = Pattern | Bounds
"""A pattern, or a pattern already on a grid."""


def bounds(pattern: AnyPattern, grid: Sequence[int] | None = None, key_grid: Sequence[int] | None = None) -> Bounds:
    """The tables of a pattern on a grid, and (if it differs) against a key grid.

    >>> bounds(heads(Near(3), Window(4)), (16,)).groups[1].members[0][0].start.tolist()
    [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    """
    if isinstance(pattern, Bounds):
        _check_grid("grid", grid, pattern.grid)
        _check_grid("key_grid", key_grid, pattern.key_grid)
        return pattern
    check_pattern("pattern", pattern)
    if grid is None:
        raise ValueError("bounds: grid is needed, unless the pattern is a Bounds")
    queries = as_grid("bounds", "grid", grid)
    keys = queries if key_grid is None else as_grid("bounds", "key_grid", key_grid)
    if len(keys) != len(queries):
        raise ValueError(f"bounds: key_grid must have {len(queries)} axes like grid, got {keys}")
    return _bounds(pattern, queries, keys)


def bounds_of_key(key: tuple[Any, ...], grid: tuple[int, ...], key_grid: tuple[int, ...]) -> Bounds:
    """The bounds of a pattern given as its `key`."""
    if key[0] is Bounds:
        return bounds(_KNOWN[key[1]], grid, key_grid)
    return _bounds(pattern_of_key(key), grid, key_grid)


@functools.lru_cache(maxsize=128)
def _bounds(pattern: Pattern, grid: tuple[int, ...], key_grid: tuple[int, ...]) -> Bounds:
    parts, sizes = pattern_parts(pattern, len(grid))
    groups = (tuple(tuple(map(AxisTable.of, kinds, grid, key_grid)) for kinds in part) for part in parts)
    heads = sizes or (None,) * len(parts)
    return Bounds(tuple(Group(members, size) for members, size in zip(groups, heads, strict=True)))


def _check_grid(name: str, given: Sequence[int] | None, own: tuple[int, ...]) -> None:
    if given is not None and as_grid("pattern", name, given) != own:
        raise ValueError(f"pattern: this Bounds has {name} {own}, got {tuple(given)}")
