"""Pattern words: patterns that wait for a grid, such as "as dilated as fits", and what a layer asks of a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from vicinal.pattern.axis import AxisKind, Grid, Halo, Near, Window
from vicinal.pattern.compose import Heads, Pattern, Union, pattern_parts


@runtime_checkable
class Word(Protocol):
    """A pattern that is known when the grid is."""

    def at(self, grid: Sequence[int]) -> Pattern:
        """The pattern on a grid."""


AnyPattern: TypeAlias = Pattern | Word


@dataclass(frozen=True)
class NearWord:
    """The word that `near` makes."""

    kernel_size: int
    dilation: int | Literal["max"] = 1

    def at(self, grid: Sequence[int]) -> Pattern:
        """`Near` with the dilation that fits each axis."""
        if self.dilation != "max":
            return Near(self.kernel_size, dilation=self.dilation)
        return tuple(Near(self.kernel_size, dilation=max(1, length // self.kernel_size)) for length in grid)


@dataclass(frozen=True)
class WindowWord:
    """The word that `window` makes."""

    size: int
    shift: int = 0

    def at(self, grid: Sequence[int]) -> Pattern:
        """`Window`, unshifted everywhere where one axis is no longer than it, and no longer than its axis."""
        shift = self.shift if min(grid) > self.size else 0
        return tuple(Window(min(self.size, length), shift=shift) for length in grid)


def near(kernel_size: int, dilation: int | Literal["max"] = 1) -> NearWord:
    """Neighborhood attention whose dilation may wait for the grid: `"max"` is length // kernel_size, axis by axis.

    >>> near(7, dilation="max").at((56, 30))
    (Near(7, dilation=8), Near(7, dilation=4))
    """
    if dilation != "max" and not isinstance(dilation, int):
        raise ValueError(f'near: dilation must be a whole number or "max", got {dilation!r}')
    Near(kernel_size, dilation=1 if dilation == "max" else dilation)  # its checks, now rather than in a forward pass
    return NearWord(kernel_size, dilation)


def window(size: int, shift: int = 0) -> WindowWord:
    """Swin's windows: on a grid with an axis no longer than the window, no axis is shifted, and that one is not padded.

    >>> window(7, shift=3).at((14, 14)), window(7, shift=3).at((7, 14))
    ((Window(7, shift=3), Window(7, shift=3)), (Window(7), Window(7)))
    """
    Window(size, shift)
    return WindowWord(size, shift)


def at(pattern: AnyPattern, grid: Sequence[int]) -> Pattern:
    """The pattern that a pattern or a word is on `grid`.

    >>> at(near(3, dilation="max"), (12,)), at(Window(4), (12,))
    ((Near(3, dilation=4),), Window(4))
    """
    if isinstance(pattern, AxisKind | tuple | Union | Heads):
        return pattern
    if not isinstance(pattern, Word):
        raise ValueError(f"pattern must be a pattern or a word such as near(7), got {pattern!r}")
    return pattern.at(grid)


def table_shapes(pattern: AnyPattern, grid: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The shape of each head group's position bias, without its heads; `grid` matters to `Full` alone.

    >>> table_shapes(near(7, dilation="max"), (56, 56)), table_shapes(Full(), (14, 7))
    (((13, 13),), ((27, 13),))
    """
    shapes = []
    for members in pattern_parts(at(pattern, grid), len(grid))[0]:
        if len(members) > 1:
            raise ValueError(f"a union has no position bias, got {pattern!r}")
        sizes = [kind.bias_length(length) for kind, length in zip(members[0], grid, strict=True)]
        if None in sizes:
            raise ValueError(f"{pattern!r} has no position bias")
        shapes.append(tuple(size for size in sizes if size is not None))
    return tuple(shapes)


def padded(pattern: Pattern, grid: Sequence[int]) -> tuple[int, ...]:
    """The grid that published code of `pattern` pads to, before it attends: whole windows, whole dilated kernels.

    >>> padded(Near(7, dilation=4), (20, 30)), padded(Window(7), (20, 5)), padded(Grid(4), (9, 8))
    ((28, 30), (21, 7), (12, 8))
    """
    lengths = list(grid)
    for members in pattern_parts(pattern, len(grid))[0]:
        for kinds in members:
            for axis, kind in enumerate(kinds):
                lengths[axis] = max(lengths[axis], _padded_length(kind, grid[axis]))
    return tuple(lengths)


def _padded_length(kind: AxisKind, length: int) -> int:
    if isinstance(kind, Near):
        return max(length, kind.kernel_size * kind.dilation)
    if isinstance(kind, Window | Grid):
        return -(-length // kind.size) * kind.size
    return length


def window_area(pattern: Pattern, grid: Sequence[int]) -> float:
    """Keys per query as papers count them, the windows whole; a mean over head groups that differ.

    >>> window_area(Near(7), (56, 56)), window_area(Full(), (4, 5))
    (49.0, 20.0)
    """
    parts, sizes = pattern_parts(pattern, len(grid))
    weights = sizes or (1,) * len(parts)
    areas = []
    for members in parts:
        area = 0
        for kinds in members:
            keys = 1
            for kind, length in zip(kinds, grid, strict=True):
                keys *= _nominal_keys(kind, length)
            area += keys
        areas.append(area)
    return sum(weight * area for weight, area in zip(weights, areas, strict=True)) / sum(weights)


def _nominal_keys(kind: AxisKind, length: int) -> int:
    if isinstance(kind, Near):
        return min(kind.kernel_size, length)
    if isinstance(kind, Window | Grid):
        return min(kind.size, length)
    if isinstance(kind, Halo):
        return min(kind.block + 2 * kind.halo, length)
    table = kind.bias_length(length)
    return length if table is None else min(length, (table + 1) // 2)
