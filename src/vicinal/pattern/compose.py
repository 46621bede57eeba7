"""Patterns: axis kinds side by side, groups of heads with their own pattern, and unions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

from vicinal.pattern.axis import AxisKind
from vicinal.pattern.numbers import as_integer


@dataclasses.dataclass(frozen=True, repr=False)
class Union:
    """A softmax over the union of what the members see; made by `union`."""

    members: tuple[Product, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if not self.members:
            raise ValueError("union: at least one pattern is needed")
        for position, pattern in enumerate(self.members):
            check_product(f"union: pattern {position}", pattern)
        _check_ranks("union", self.members)

    @property
    def key(self) -> tuple[Any, ...]:
        return (Union, tuple(product_key(member) for member in self.members))

    def __repr__(self) -> str:
        return f"union({', '.join(map(repr, self.members))})"


@dataclasses.dataclass(frozen=True, repr=False)
class Heads:
    """Groups of heads, each with its own pattern; made by `heads`."""

    groups: tuple[Product | Union, ...]
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise ValueError("heads: at least one pattern is needed")
        for position, pattern in enumerate(self.groups):
            if not isinstance(pattern, Union):
                check_product(f"heads: pattern {position}", pattern)
        _check_ranks("heads", self.groups)
        if self.sizes is None:
            return
        if not isinstance(self.sizes, Sequence) or len(self.sizes) != len(self.groups):
            needed = f"one number per pattern ({len(self.groups)})"
            raise ValueError(f"heads: sizes must have {needed}, got {self.sizes!r}")
        sizes = tuple(as_integer("heads", f"sizes[{i}]", size, 1) for i, size in enumerate(self.sizes))
        object.__setattr__(self, "sizes", sizes)

    @property
    def key(self) -> tuple[Any, ...]:
        groups = tuple(group.key if isinstance(group, Union) else product_key(group) for group in self.groups)
        return (Heads, groups, self.sizes)

    def __repr__(self) -> str:
        sizes = "" if self.sizes is None else f", sizes={self.sizes}"
        return f"heads({', '.join(map(repr, self.groups))}{sizes})"


Product: TypeAlias = AxisKind | tuple[AxisKind, ...]
"""One axis kind for every axis, or a tuple of one kind per axis."""

Pattern: TypeAlias = AxisKind | tuple[AxisKind, ...] | Union | Heads
"""Anything that says who sees whom, before a grid is known."""


def heads(*patterns: Product | Union, sizes: tuple[int, ...] | list[int] | None = None) -> Heads:
    """Give groups of heads their own pattern: equal groups, or groups of the given `sizes`.

    >>> heads(Near(7), (Full(), Window(4)), sizes=(1, 3))
    heads(Near(7), (Full(), Window(4)), sizes=(1, 3))
    """
    return Heads(patterns, sizes)  # type: ignore[arg-type]


def union(*patterns: Product) -> Union:
    """See whatever any of the patterns sees, in one softmax; a key two of them see counts once.

    >>> union((Same(), Full()), (Full(), Same()))
    union((Same(), Full()), (Full(), Same()))
    """
    return Union(patterns)


def split_heads(num_heads: int, num_groups: int, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    """How many of `num_heads` heads each group has: the given sizes, or equal shares."""
    if sizes is not None:
        if sum(sizes) != num_heads:
            raise ValueError(f"pattern: heads(..., sizes={sizes}) is for {sum(sizes)} heads, the query has {num_heads}")
        return sizes
    if num_heads % num_groups:
        raise ValueError(
            f"pattern: {num_heads} heads do not divide into {num_groups} equal groups; give heads(..., sizes=)"
        )
    return (num_heads // num_groups,) * num_groups


def check_product(where: str, pattern: Any) -> None:
    """Raise `ValueError` unless `pattern` is one axis kind or a tuple of 1 to 3 of them."""
    if isinstance(pattern, AxisKind):
        return
    if isinstance(pattern, tuple) and 1 <= len(pattern) <= 3 and all(isinstance(kind, AxisKind) for kind in pattern):
        return
    hint = ""
    if isinstance(pattern, Heads):
        hint = "; heads(...) is always outermost"
    elif isinstance(pattern, type) and issubclass(pattern, AxisKind):
        hint = f"; write {pattern.__name__}(...)"
    raise ValueError(f"{where} must be an axis kind or a tuple of 1 to 3 axis kinds, got {pattern!r}{hint}")


def check_pattern(where: str, pattern: Any) -> None:
    """Raise `ValueError` unless `pattern` is a pattern."""
    if not isinstance(pattern, Heads | Union):
        check_product(where, pattern)


def pattern_rank(pattern: Pattern) -> int | None:
    """How many axes the pattern is for, or None where it fits any number."""
    if isinstance(pattern, tuple):
        return len(pattern)
    parts: tuple[Product | Union, ...] = ()
    if isinstance(pattern, Heads):
        parts = pattern.groups
    elif isinstance(pattern, Union):
        parts = pattern.members
    for part in parts:
        rank = pattern_rank(part)
        if rank is not None:
            return rank
    return None


def product_key(pattern: Product) -> Any:
    """The pattern as nested tuples of plain values and classes."""
    return tuple(kind.key for kind in pattern) if isinstance(pattern, tuple) else pattern.key


def pattern_key(pattern: Pattern) -> tuple[Any, ...]:
    """A pattern as plain values: what a compiler can hold as a constant."""
    return pattern.key if isinstance(pattern, Heads | Union) else product_key(pattern)


def pattern_of_key(key: tuple[Any, ...]) -> Pattern:
    """The pattern whose `pattern_key` is `key`."""
    if key[0] is Heads:
        return Heads(tuple(pattern_of_key(group) for group in key[1]), key[2])  # type: ignore[misc]
    if key[0] is Union:
        return Union(tuple(pattern_of_key(member) for member in key[1]))  # type: ignore[misc]
    if isinstance(key[0], tuple):
        return tuple(kind[0](*kind[1:]) for kind in key)
    kind: AxisKind = key[0](*key[1:])
    return kind


def per_axis(product: Product, rank: int) -> tuple[AxisKind, ...]:
    """One kind for each of `rank` axes."""
    if isinstance(product, AxisKind):
        return (product,) * rank
    if len(product) != rank:
        raise ValueError(f"pattern: {product!r} is for {len(product)} axes, the grid has {rank}")
    return product


def pattern_parts(
    pattern: Pattern, rank: int
) -> tuple[tuple[tuple[tuple[AxisKind, ...], ...], ...], tuple[int, ...] | None]:
    """The normal form: for each head group its ordered members, one kind per axis each; and the group sizes."""
    groups = pattern.groups if isinstance(pattern, Heads) else (pattern,)
    sizes = pattern.sizes if isinstance(pattern, Heads) else None
    parts = []
    for group in groups:
        members = group.members if isinstance(group, Union) else (group,)
        parts.append(tuple(per_axis(member, rank) for member in members))
    return tuple(parts), sizes


def _check_ranks(where: str, patterns: tuple[Product | Union, ...]) -> None:
    found: int | None = None
    for pattern in patterns:
        rank = pattern_rank(pattern)
        if rank is not None and found is not None and rank != found:
            raise ValueError(f"{where}: all patterns must be for the same number of axes, got {found} and {rank}")
        found = rank if found is None else found
