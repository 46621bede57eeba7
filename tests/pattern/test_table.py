"""Tables: `slice`, `shift` and `transpose` against the same steps on the written-out mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vicinal.pattern import AxisTable, Full, Grid, Halo, Near, Same, Window

LENGTH = 12

PLAIN = [
    Near(1),
    Near(3),
    Near(4),
    Near(5, dilation=2),
    Near(4, dilation=3),
    Near(3, dilation=5),
    Near(2, dilation=20),
    Near(4, stride=4),
    Near(5, stride=2),
    Near(4, dilation=2, stride=3),
    Near(30),
    Near(4, border="crop"),
    Near(3, dilation=4, border="crop"),
    Near(3, stride=3, border="crop"),
    Near(4, causal=True),
    Near(3, dilation=2, causal=True),
    Near(4, stride=3, causal=True),
    Window(4),
    Window(5),
    Window(5, shift=2),
    Window(20, shift=3),
    Halo(4, 1),
    Halo(5, 3),
    Halo(2, 9),
    Grid(1),
    Grid(3),
    Grid(12),
    Full(),
    Full(causal=True),
    Same(),
]
WRAPPING = [
    Near(1, border="wrap"),
    Near(3, border="wrap"),
    Near(4, border="wrap"),
    Near(12, border="wrap"),
    Near(30, border="wrap"),
    Near(3, dilation=2, border="wrap"),
    Near(2, dilation=4, border="wrap"),
    Near(3, dilation=4, border="wrap"),
    Near(1, dilation=12, border="wrap"),
]

REFUSALS = ("both ends", "seam", "different keys")
"""What a wrapping table says where its keys cannot be laid out in one line."""


def shifted(seen: np.ndarray, offset: int, length: int) -> np.ndarray:
    """The mask against the keys `offset <= j < offset + length`; beyond the axis there is nothing to see."""
    result = np.zeros((len(seen), length), dtype=bool)
    for key in range(length):
        if 0 <= key + offset < seen.shape[1]:
            result[:, key] = seen[:, key + offset]
    return result


def turned(seen: np.ndarray, offset: int, length: int) -> np.ndarray:
    """The same on an axis that is a circle."""
    return seen[:, (np.arange(length) + offset) % seen.shape[1]]


@pytest.mark.parametrize("kind", PLAIN + WRAPPING, ids=repr)
def test_mask_and_sees_are_the_table_written_out(kind):
    table = AxisTable.of(kind, LENGTH)
    seen = np.zeros((LENGTH, LENGTH), dtype=bool)
    for query in range(LENGTH):
        for place in range(int(table.count[query])):
            seen[query, (int(table.start[query]) + place * table.step) % LENGTH] = True
    assert (table.mask() == seen).all()
    assert (table.sees(np.arange(LENGTH)[:, None], np.arange(LENGTH)) == seen).all()
    assert (seen.sum(1) == table.count).all()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 12, 13])
@pytest.mark.parametrize("kind", PLAIN + WRAPPING, ids=repr)
def test_transpose_equals_the_transposed_mask(kind, length):
    if kind.refusal(length):
        return
    table = AxisTable.of(kind, length)
    transpose = table.transpose()
    assert (transpose.mask() == table.mask().T).all()
    assert (transpose.transpose().mask() == table.mask()).all()
    assert transpose.bias_length is None
    assert transpose.center is None


@pytest.mark.parametrize("key_length", [1, 2, 5, 12, 31])
@pytest.mark.parametrize("kind", [Near(1), Near(3), Near(4), Near(4, border="crop"), Near(20), Full()], ids=repr)
def test_transpose_on_two_grids_equals_the_transposed_mask(kind, key_length):
    table = AxisTable.of(kind, LENGTH, key_length)
    assert (table.transpose().mask() == table.mask().T).all()
    assert (table.transpose().transpose().mask() == table.mask()).all()


@pytest.mark.parametrize("kind", PLAIN + WRAPPING, ids=repr)
def test_slice_equals_the_rows_of_the_mask(kind):
    table = AxisTable.of(kind, LENGTH)
    for start in range(LENGTH):
        for stop in range(start + 1, LENGTH + 1):
            part = table.slice(start, stop)
            assert (part.mask() == table.mask()[start:stop]).all(), (start, stop)
            assert part.center.tolist() == list(range(start, stop))
            assert part.bias_length == table.bias_length


@pytest.mark.parametrize("kind", PLAIN, ids=repr)
def test_shift_equals_the_columns_of_the_mask(kind):
    table = AxisTable.of(kind, LENGTH)
    for offset in range(-LENGTH - 3, LENGTH + 4):
        for length in (1, 2, 5, LENGTH, LENGTH + 9):
            part = table.shift(offset, length)
            assert (part.mask() == shifted(table.mask(), offset, length)).all(), (offset, length)
            assert part.length == length
            assert part.bias_length == table.bias_length
        assert table.shift(offset) == table.shift(offset, LENGTH)
    assert table.shift(0) == table


@pytest.mark.parametrize("kind", PLAIN + WRAPPING, ids=repr)
def test_shift_keeps_each_keys_place_in_the_bias(kind):
    table = AxisTable.of(kind, LENGTH)
    for start, stop, offset, length in ((0, 3, -6, 12), (4, 8, 1, 11), (9, 12, 5, 12), (5, 6, 3, 5)):
        part = table.slice(start, stop)
        try:
            moved = part.shift(offset, length)
        except ValueError:
            assert table.wraps
            continue
        for query in range(stop - start):
            place = {
                int(key + offset) % LENGTH if table.wraps else int(key + offset): int(key - moved.center[query])
                for key in moved.start[query] + moved.step * np.arange(moved.count[query])
            }
            original = {
                int(key) % LENGTH if table.wraps else int(key): int(key - part.center[query])
                for key in part.start[query] + part.step * np.arange(part.count[query])
            }
            assert place.items() <= original.items()


@pytest.mark.parametrize("kind", WRAPPING, ids=repr)
def test_a_wrapping_shift_is_right_or_refused(kind):
    table = AxisTable.of(kind, LENGTH)
    right = 0
    for start in range(LENGTH):
        for stop in range(start + 1, LENGTH + 1):
            for offset in (-25, -LENGTH, -4, -1, 0, 1, 5, LENGTH, 40):
                for length in (1, 3, 7, LENGTH):
                    try:
                        part = table.slice(start, stop).shift(offset, length)
                    except ValueError as error:
                        assert "both ends" in str(error)
                        continue
                    right += 1
                    assert not part.wraps
                    assert (part.mask() == turned(table.mask()[start:stop], offset, length)).all()
    assert right > 500  # most are laid out
    with pytest.raises(ValueError, match="no range of 13 different keys"):
        table.shift(0, LENGTH + 1)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_rank_with_its_halo_of_a_wrapping_axis_is_never_refused(kernel_size, dilation):
    table = AxisTable.of(Near(kernel_size, dilation, border="wrap"), 24)
    before, after = dilation * (kernel_size // 2), dilation * ((kernel_size - 1) // 2)
    for start in range(0, 24, 6):
        part = table.slice(start, start + 6).shift(start - before, 6 + before + after)
        assert (part.mask() == turned(table.mask()[start : start + 6], start - before, part.length)).all()
        assert (part.count == kernel_size).all()
        assert (part.transpose().mask() == part.mask().T).all()


@pytest.mark.parametrize("kind", WRAPPING, ids=repr)
def test_a_sliced_wrapping_transpose_is_right_or_refused(kind):
    table = AxisTable.of(kind, LENGTH)
    for start in range(LENGTH):
        for stop in range(start + 1, LENGTH + 1):
            part = table.slice(start, stop)
            try:
                transpose = part.transpose()
            except ValueError as error:
                assert "seam" in str(error)
                assert (part.start < 0).any() or (part.last >= LENGTH).any()
                continue
            assert (transpose.mask() == part.mask().T).all(), (start, stop)


@pytest.mark.parametrize("transpose_first", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("kind", PLAIN, ids=repr)
def test_a_streaming_step_sees_only_what_is_in_the_cache(kind, transpose_first):
    table = AxisTable.of(kind, LENGTH)
    table = table.transpose() if transpose_first else table
    for query in range(LENGTH):
        for cached in (1, 4):
            step = table.slice(query, query + 1).shift(query + 1 - cached, cached)
            assert (step.mask()[0] == shifted(table.mask(), query + 1 - cached, cached)[query]).all()


@st.composite
def kinds(draw, length: int):
    """Any axis kind that stands on an axis of this length."""
    size = st.integers(1, length + 3)
    divisors = st.sampled_from([number for number in range(1, length + 1) if length % number == 0])
    match draw(st.sampled_from(["near", "wrap", "window", "halo", "grid", "full", "same"])):
        case "near":
            kernel_size = draw(size)
            return Near(
                kernel_size,
                draw(st.integers(1, length + 2)),
                draw(st.integers(1, kernel_size)),
                draw(st.booleans()),
                draw(st.sampled_from(["shift", "crop"])),
            )
        case "wrap":
            return Near(draw(size), draw(divisors), border="wrap")
        case "window":
            window = draw(size)
            return Window(window, draw(st.integers(0, window - 1)))
        case "halo":
            return Halo(draw(size), draw(st.integers(0, length)))
        case "grid":
            return Grid(draw(divisors))
        case "full":
            return Full(draw(st.booleans()))
    return Same()


@st.composite
def free_tables(draw):
    """Any table at all that satisfies the invariant and does not wrap, also one that no kind gives."""
    queries, keys, step = draw(st.integers(1, 10)), draw(st.integers(1, 10)), draw(st.integers(1, 5))
    residues = draw(st.permutations(range(step)))
    start, count = np.zeros(queries, dtype=int), np.zeros(queries, dtype=int)
    for cls in range(min(step, queries)):
        residue = residues[cls]
        members, places = len(range(cls, queries, step)), len(range(residue, keys, step))
        # first and end (one past the last), both rising, first <= end
        pairs = sorted(
            draw(
                st.lists(st.tuples(st.integers(0, places), st.integers(0, places)), min_size=members, max_size=members)
            )
        )
        first = np.array([min(pair) for pair in pairs])
        end = np.maximum.accumulate([max(pair) for pair in pairs])
        first = np.maximum.accumulate(first)
        start[cls::step], count[cls::step] = residue + step * first, np.maximum(end - first, 0)
    return AxisTable(start, count, step, keys)


@st.composite
def tables_of_kinds(draw):
    length = draw(st.integers(1, 14))
    return AxisTable.of(draw(kinds(length)), length)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("slice"), st.integers(0, 12), st.integers(1, 12)),
        st.tuples(st.just("shift"), st.integers(-15, 15), st.integers(1, 15)),
        st.tuples(st.just("transpose")),
    ),
    max_size=6,
)


def follow(table: AxisTable, seen: np.ndarray, step: tuple) -> tuple[AxisTable, np.ndarray]:
    """One step on a table and on its mask."""
    match step:
        case ("slice", start, number):
            start = start % len(table)
            stop = min(start + number, len(table))
            return table.slice(start, stop), seen[start:stop]
        case ("shift", offset, length):
            move = turned if table.wraps else shifted
            return table.shift(offset, length), move(seen, offset, length)
    return table.transpose(), seen.T


@given(st.one_of(tables_of_kinds(), free_tables()), steps)
def test_any_steps_on_a_table_equal_the_same_steps_on_its_mask(table, steps):
    seen = table.mask()
    for step in steps:
        if table.wraps:
            try:
                table, seen = follow(table, seen, step)
            except ValueError as error:
                assert any(part in str(error) for part in REFUSALS), error
                return
        else:
            table, seen = follow(table, seen, step)
        assert (table.mask() == seen).all(), step
        queries, keys = np.arange(len(table)), np.arange(table.length)
        assert (table.sees(queries[:, None], keys) == seen).all()


@st.composite
def free_wrapping_tables(draw):
    """A wrapping table that no kind gives: any starts that rise within a turn or two, any counts that fit."""
    step, places = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    length = step * places
    queries = draw(st.sampled_from([length, draw(st.integers(1, 12))]))
    residues = draw(st.permutations(range(step)))
    start, count = np.zeros(queries, dtype=int), np.zeros(queries, dtype=int)
    for cls in range(min(step, queries)):
        members = len(range(cls, queries, step))
        first = np.sort(draw(st.lists(st.integers(-places, 2 * places - 1), min_size=members, max_size=members)))
        number = np.array(draw(st.lists(st.integers(0, places), min_size=members, max_size=members)))
        end = np.maximum.accumulate(first + number)
        assume((end - first <= places).all())
        start[cls::step], count[cls::step] = residues[cls] + step * first, end - first
    return AxisTable(start, count, step, length, wraps=True)


@given(free_wrapping_tables())
def test_transpose_of_any_wrapping_table_is_right_or_refused(table):
    try:
        transpose = table.transpose()
    except ValueError as error:
        assert "seam" in str(error)
        return
    assert (transpose.mask() == table.mask().T).all()


@given(free_wrapping_tables(), st.integers(-30, 30), st.integers(1, 18))
def test_shift_of_any_wrapping_table_is_right_or_refused(table, offset, length):
    try:
        part = table.shift(offset, length)
    except ValueError as error:
        assert "both ends" in str(error) or "different keys" in str(error)
        return
    assert (part.mask() == turned(table.mask(), offset, length)).all()
