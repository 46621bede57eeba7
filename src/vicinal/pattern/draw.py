"""Pictures of a pattern in plain text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vicinal.pattern.bounds import AnyPattern, Group, bounds
from vicinal.pattern.counting import group_mask
from vicinal.pattern.numbers import as_integer

QUERY, SEEN, UNSEEN = "Q", "#", "."


def draw(
    pattern: AnyPattern,
    grid: Sequence[int] | None = None,
    key_grid: Sequence[int] | None = None,
    *,
    query: Sequence[int] | None = None,
) -> str:
    """What one query sees, as text: `Q` the query, `#` a key it sees, `.` one it does not.

    `query` defaults to the middle of the grid. The frames of a 3-D grid follow each other, and so do the
    groups of `heads`, each under its name. On two grids the query's own place is not marked.

    >>> print(draw((Same(), Near(3)), (2, 6), query=(0, 2)))
    .#Q#..
    ......
    """
    table = bounds(pattern, grid, key_grid)
    place = check_query(query, table.grid)
    pictures = []
    for number, group in enumerate(table.groups):
        seen = group_mask(_one_query(group, place)).reshape(table.key_grid)
        picture = _picture(seen, place if table.grid == table.key_grid else None)
        pictures.append(f"group {number}\n{picture}" if len(table.groups) > 1 else picture)
    return "\n\n".join(pictures)


def _one_query(group: Group, place: tuple[int, ...]) -> Group:
    members = (
        tuple(table.slice(at, at + 1) for table, at in zip(member, place, strict=True)) for member in group.members
    )
    return Group(tuple(members))


def check_query(query: Sequence[int] | None, grid: tuple[int, ...]) -> tuple[int, ...]:
    """`query` as a coordinate inside the grid; None is the middle."""
    if query is None:
        return tuple(length // 2 for length in grid)
    if not isinstance(query, Sequence) or len(query) != len(grid):
        raise ValueError(f"draw: query must be a coordinate inside the grid {grid}, got {query!r}")
    place = tuple(as_integer("draw", f"query[{axis}]", coordinate, 0) for axis, coordinate in enumerate(query))
    if any(at >= length for at, length in zip(place, grid, strict=True)):
        raise ValueError(f"draw: query must be a coordinate inside the grid {grid}, got {place}")
    return place


def _picture(seen: npt.NDArray[np.bool_], place: tuple[int, ...] | None) -> str:
    signs = np.where(seen, SEEN, UNSEEN)
    if place is not None:
        signs[place] = QUERY if seen[place] else "q"
    frames = signs.reshape(-1, *signs.shape[-2:]) if signs.ndim > 1 else signs[None, None]
    return "\n\n".join("\n".join("".join(row) for row in frame) for frame in frames)
