"""Tables as values: what breaks their invariant is refused, equal ones are equal, copies stay frozen."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from vicinal.pattern import AxisTable, Full, Near

GOOD = dict(start=[0, 1, 2], count=[2, 2, 2], step=1, length=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(start=[1, 0, 2]), "first key must not decrease .* falls from 1 to 0 between queries 0 and 1"),
        (dict(count=[3, 1, 2]), "last key must not decrease .* falls from 2 to 1 between queries 0 and 1"),
        (dict(count=[2, -1, 2]), "count must not be negative, got -1 at query 1"),
        (dict(start=[-1, 0, 1]), "keys must lie in 0..3"),
        (dict(length=3), "keys must lie in 0..2"),
        (dict(start=[0, 1]), r"two vectors of one length >= 1, got \(2,\), \(3,\)"),
        (dict(start=[], count=[]), "two vectors of one length >= 1"),
        (dict(start=[[0, 1, 2]], count=[[2, 2, 2]]), "two vectors"),
        (dict(start=[0.0, 0.5, 1.0]), "start must hold integers, got float64"),
        (dict(count=[True, True, True]), "count must hold integers, got bool"),
        (dict(step=0), "step must be at least 1, got 0"),
        (dict(step=1.5), "step must be an integer of at least 1, got 1.5"),
        (dict(length=0), "length must be at least 1, got 0"),
        (dict(center=[0, 1]), r"center must have the shape of start \(3,\), got \(2,\)"),
        (dict(center=[0, 1, 2], bias_length=2), "bias_length must be odd .* got 2"),
        (dict(center=[0, 1, 2], bias_length=0), "bias_length must be at least 1, got 0"),
        (dict(bias_length=3), "stand beside a center"),
        (dict(center=[0, 1, 2], bias_length=1), "at most 0 steps of 1 from the query's center"),
        (dict(center=[1, 1, 4], bias_length=3), "at most 1 steps of 1"),
        (dict(start=[0, 1, 3], count=[1, 1, 1], step=2, length=8), "congruent modulo step 2"),
        (dict(start=[0, 2, 2], count=[1, 1, 1], step=2, length=8), "two residue classes modulo step 2"),
        (dict(start=[0, 3, 6], count=[1, 1, 1], step=2, length=7, wraps=True), "needs step to divide 7, got 2"),
        (dict(count=[4, 5, 5], wraps=True), "sees a key twice"),
        (dict(start=[8, 9, 10], wraps=True), r"wrapping start must lie in -4\.\.7"),
        (dict(start=[-5, -4, -3], wraps=True), r"wrapping start must lie in -4\.\.7"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_table_that_breaks_the_invariant_is_refused(change, message):
    AxisTable(**GOOD)
    with pytest.raises(ValueError, match=f"AxisTable: .*{message}"):
        AxisTable(**{**GOOD, **change})


def test_a_query_that_sees_nothing_is_ordinary():
    table = AxisTable(start=[0, 2, 2, 4], count=[2, 0, 2, 0], step=1, length=4)
    assert table.mask().sum(1).tolist() == [2, 0, 2, 0]
    assert (table.transpose().mask() == table.mask().T).all()
    assert not table.shift(90, 2).mask().any()
    assert not table.shift(90, 2).transpose().mask().any()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 2), (0, 6), (5, 9)])
def test_slice_outside_the_axis_is_refused(start, stop):
    with pytest.raises(ValueError, match=f"slice: need 0 <= start < stop <= 5, got start {start}, stop {stop}"):
        AxisTable.of(Near(3), 5).slice(start, stop)


def test_shift_to_no_keys_is_refused():
    with pytest.raises(ValueError, match="shift: length must be at least 1, got 0"):
        AxisTable.of(Near(3), 5).shift(0, 0)


def test_tables_are_equal_when_what_they_hold_is():
    table = AxisTable.of(Near(3), 8)
    assert table == AxisTable.of(Near(3, border="shift"), 8)
    assert hash(table) == hash(AxisTable.of(Near(3), 8))
    assert table == AxisTable(**{field.name: getattr(table, field.name) for field in dataclasses.fields(table)})
    assert table == AxisTable.of(Near(3), np.int64(8))
    assert table.shift(1, np.int64(4)) == table.shift(1, 4)
    for other in (
        AxisTable.of(Near(3), 9),
        AxisTable.of(Near(4), 8),
        AxisTable.of(Near(3, border="wrap"), 8),
        dataclasses.replace(table, bias_length=7),
        dataclasses.replace(table, bias_length=None),
        dataclasses.replace(table, length=9),
        "AxisTable",
    ):
        assert table != other
    wide = dataclasses.replace(table, bias_length=15)
    assert wide != dataclasses.replace(wide, center=table.center[::-1])
    assert wide != dataclasses.replace(wide, center=None, bias_length=None)
    assert len({table, AxisTable.of(Near(3), 8), AxisTable.of(Near(5), 8)}) == 2


def test_tables_say_what_they_are():
    assert repr(AxisTable.of(Near(3, dilation=2, border="wrap"), 8)) == "AxisTable(8 queries, 8 keys, step 2, wraps)"
    assert repr(AxisTable.of(Full(), 3, 5)) == "AxisTable(3 queries, 5 keys, step 1)"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_tables_are_frozen_and_stay_so_when_copied(again):
    given = np.arange(4)
    table = again(AxisTable(start=given, count=given * 0 + 1, step=1, length=4, center=given))
    given += 1
    assert table == AxisTable(start=np.arange(4), count=np.ones(4, int), step=1, length=4, center=np.arange(4))
    for array in (table.start, table.count, table.center):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.step = 2
