"""Bounds: steps along their axes against the same steps on the mask, and bounds as values."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from vicinal.pattern import Bounds, Full, Grid, Near, Same, Window, bounds, heads, union
from vicinal.pattern.bounds import bounds_of_key

PATTERNS = [
    Near(3),
    (Near(3), Window(4, shift=1)),
    (Grid(3), Near(4, dilation=2)),
    heads((Full(), Window(2)), (Window(2), Full()), sizes=(1, 3)),
    union((Same(), Full()), (Full(), Same())),
    heads(Near(3), union(Near(3), Near(3, dilation=2))),
]


def mask_of(table: Bounds) -> np.ndarray:
    """The mask of every group over flattened grids, from the axes' own masks."""
    groups = []
    for group in table.groups:
        seen = np.zeros((np.prod(table.grid), np.prod(table.key_grid)), dtype=bool)
        for member in group.members:
            axes = [axis.mask() for axis in member]
            seen |= np.kron(axes[0], axes[1]) if len(axes) == 2 else axes[0]
        groups.append(seen.reshape(*table.grid, *table.key_grid))
    return np.stack(groups)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_bounds_commute_with_their_mask(pattern):
    table = bounds(pattern, (6, 9))
    seen = mask_of(table)
    assert (mask_of(table.transpose()) == seen.transpose(0, 3, 4, 1, 2)).all()
    assert (mask_of(table.slice(1, 2, 7)) == seen[:, :, 2:7]).all()
    assert (mask_of(table.slice(-2, 2, 3)) == seen[:, 2:3]).all()
    assert (mask_of(table.shift(0, 1, 4)) == seen[:, :, :, 1:5]).all()
    assert (mask_of(table.shift(-1, 4, 5)) == seen[..., 4:]).all()
    both = table.slice(0, 1, 5).shift(1, 2, 6).transpose()
    assert (both.grid, both.key_grid) == ((6, 6), (4, 9))
    assert (mask_of(both) == seen[:, 1:5, :, :, 2:8].transpose(0, 3, 4, 1, 2)).all()
    assert [group.heads for group in both.groups] == [group.heads for group in table.groups]


def test_bounds_refuse_an_axis_they_do_not_have():
    table = bounds(Near(3), (6, 9))
    with pytest.raises(ValueError, match=r"slice: axis must be in -2..1, got 2"):
        table.slice(2, 0, 1)
    with pytest.raises(ValueError, match=r"shift: axis must be in -2..1, got -3"):
        table.shift(-3, 0)


def test_bounds_are_values():
    table = bounds(Near(3), (6, 9))
    assert table == bounds((Near(3), Near(3)), [6, 9])
    assert hash(table) == hash(bounds((Near(3), Near(3)), (6, 9)))
    assert table == table.slice(0, 0, 6).shift(1, 0)
    assert table != bounds(Near(3), (9, 6))
    assert table != bounds(heads(Near(3), Near(3)), (6, 9))
    assert bounds(heads(Near(3), sizes=(2,)), (6,)) != bounds(Near(3), (6,))
    assert repr(bounds(heads(Near(3), Full()), (6,))) == "Bounds(grid=(6,), key_grid=(6,), groups=2)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.groups = ()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copied_bounds_are_equal_and_found_by_their_key(again):
    table = again(bounds(Near(3), (7,)).slice(0, 1, 5))
    assert table == bounds(Near(3), (7,)).slice(0, 1, 5)
    assert bounds_of_key(table.key, table.grid, table.key_grid) == table


@pytest.mark.parametrize("dropped", [0, 1], ids=["first", "second"])
def test_bounds_are_found_by_their_key_as_long_as_an_equal_one_lives(dropped):
    pair = [bounds(Near(3), (7,)).slice(0, 2, 5) for _ in range(2)]
    del pair[dropped]
    assert bounds_of_key(pair[0].key, (3,), (7,)) == pair[0]


def test_bounds_refuse_members_that_do_not_fit_together():
    group = bounds(Near(3), (6,)).groups[0]
    other = bounds(Near(3), (7,)).groups[0]
    with pytest.raises(ValueError, match="at least one group"):
        Bounds(())
    with pytest.raises(ValueError, match="one grid and one key grid"):
        Bounds((group, other))
    with pytest.raises(ValueError, match="for every group or for none"):
        Bounds((group, dataclasses.replace(group, heads=2)))
