"""Every axis kind against its definition, written a second time in plain Python.

The definitions here say which keys are nearest, in the same block, or in the same place of another block;
the library says where a range starts and how long it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from vicinal.pattern import AxisKind, AxisTable, Full, Grid, Halo, Near, Same, Window, bounds, mask

LENGTHS = range(1, 18)
COMPLETE = 11
"""Up to this length every dilation is tried; beyond it a few, so that the whole stays within seconds."""

by_length = pytest.mark.parametrize("length", LENGTHS, ids=lambda length: f"n{length}")


def dilations(length: int) -> list[int]:
    return list(range(1, length + 3)) if length <= COMPLETE else [1, 2, 3, 5, length - 1, length]


def near_kinds(length: int) -> Iterator[Near]:
    """Every kernel up to larger than the axis, every stride, every dilation, and what stands at the border."""
    for dilation, kernel_size in itertools.product(dilations(length), range(1, length + 3)):
        for stride in range(1, kernel_size + 1):
            yield Near(kernel_size, dilation, stride)
            yield Near(kernel_size, dilation, stride, border="crop")
            yield Near(kernel_size, dilation, stride, causal=True)
        if length % dilation == 0:
            yield Near(kernel_size, dilation, border="wrap")


def other_kinds(length: int) -> Iterator[AxisKind]:
    yield from (Full(), Full(causal=True), Same())
    for size in range(1, length + 3):
        yield from (Window(size, shift) for shift in range(size))
        yield from (Halo(size, halo) for halo in range(length + 2))
        if length % size == 0:
            yield Grid(size)


def natten_keys(query: int, length: int, kind: Near) -> list[int]:
    """NATTEN's rule, as its reference kernel computes it; defined where kernel_size * dilation <= length."""
    kernel_size, stride, dilation = kind.kernel_size, kind.stride, kind.dilation
    residue, place = query % dilation, query // dilation
    members = length // dilation + (1 if residue < length % dilation else 0)
    if kind.causal:
        leader = min((place // stride) * stride + stride - 1, members - 1)
        first, end = max(leader - kernel_size + 1, 0), place + 1
    else:
        left = kernel_size // 2
        right = kernel_size // 2 + kernel_size % 2 - 1
        leader = min((place // stride) * stride + stride // 2, members - 1)
        center = min(max(leader, left), members - 1 - right)
        first, end = center - left, center + right + 1
    return [residue + dilation * at for at in range(first, end)]


def nearest(places: range, leader: int, number: int) -> list[int]:
    """The `number` places nearest to the leader; of two equally near ones the left one comes first."""
    return sorted(sorted(places, key=lambda place: (abs(place - leader), place > leader))[:number])


def near_keys(query: int, length: int, kind: Near) -> list[int]:
    """The nearest keys among those a dilation apart from the query; unwrapped, for `wrap`."""
    group = range(query % kind.dilation, length, kind.dilation)
    place = group.index(query)
    siblings = [at for at in range(len(group)) if at // kind.stride == place // kind.stride]
    inside = range(len(group))
    endless = range(-2 * len(group) - kind.kernel_size, 3 * len(group) + kind.kernel_size)
    if kind.causal:
        leader = siblings[-1]
        chosen = [at for at in range(leader - kind.kernel_size + 1, place + 1) if at in inside]
    else:
        full_group = range(siblings[0], siblings[0] + kind.stride)
        leader = min(full_group[len(full_group) // 2], len(group) - 1)
        if kind.border == "shift":
            chosen = nearest(inside, leader, kind.kernel_size)
        elif kind.border == "crop":
            chosen = [at for at in nearest(endless, leader, kind.kernel_size) if at in inside]
        else:
            chosen = nearest(endless, leader, min(kind.kernel_size, len(group)))
    return [group[0] + kind.dilation * at for at in chosen]


def keys_of(table: AxisTable) -> list[list[int]]:
    """The unwrapped keys of every query, in order."""
    rows = zip(table.start.tolist(), table.count.tolist(), strict=True)
    return [list(range(start, start + table.step * count, table.step)) for start, count in rows]


def defined(query: int, length: int, kind: AxisKind) -> list[int]:
    """The keys of one query by the definition of its kind."""
    match kind:
        case Near():
            return near_keys(query, length, kind)
        case Window(size, shift):
            edges = {0, length} if length <= size else {0, length, *range(shift, length, size)}
            return [
                key for key in range(length) if not any(min(query, key) < edge <= max(query, key) for edge in edges)
            ]
        case Halo(block, halo):
            low, high = query // block * block - halo, (query // block + 1) * block + halo
            return [key for key in range(length) if low <= key < high]
        case Grid(size):
            return [key for key in range(length) if (key - query) % (length // size) == 0]
        case Full(causal):
            return [key for key in range(length) if not causal or key <= query]
        case Same():
            return [query]
    raise NotImplementedError(kind)


@by_length
def test_near_equals_nattens_rule_wherever_that_is_defined(length):
    kinds = [
        kind for kind in near_kinds(length) if kind.border == "shift" and kind.kernel_size * kind.dilation <= length
    ]
    assert kinds
    for kind in kinds:
        expected = [natten_keys(query, length, kind) for query in range(length)]
        assert keys_of(AxisTable.of(kind, length)) == expected, kind


@by_length
def test_near_sees_the_nearest_keys_for_every_argument(length):
    for kind in near_kinds(length):
        expected = [near_keys(query, length, kind) for query in range(length)]
        assert keys_of(AxisTable.of(kind, length)) == expected, kind


@pytest.mark.parametrize(
    ("kind", "length", "query", "keys"),
    [
        (Near(4), 9, 4, [2, 3, 4, 5]),  # even: one more key on the left
        (Near(4), 9, 0, [0, 1, 2, 3]),
        (Near(4), 9, 8, [5, 6, 7, 8]),
        (Near(4, border="crop"), 9, 8, [6, 7, 8]),
        (Near(4, border="crop"), 9, 0, [0, 1]),
        (Near(4, border="wrap"), 9, 0, [-2, -1, 0, 1]),
        (Near(4, stride=4), 10, 8, [6, 7, 8, 9]),  # the last block slides in
        (Near(4, stride=2, causal=True), 8, 4, [2, 3, 4]),  # the leader is the next query
        (Near(3, dilation=2), 7, 6, [2, 4, 6]),
        (Near(3, dilation=3), 7, 1, [1, 4]),  # a group of two
        (Near(9), 4, 1, [0, 1, 2, 3]),
        (Near(3, dilation=9), 4, 2, [2]),
    ],
    ids=repr,
)
def test_near_sees_these_keys(kind, length, query, keys):
    assert keys_of(AxisTable.of(kind, length))[query] == keys


@by_length
def test_causal_near_sees_itself_and_nothing_later_whatever_the_border(length):
    for kind in near_kinds(length):
        if kind.causal:
            table = AxisTable.of(kind, length)
            assert table.last.tolist() == list(range(length)), kind
            for border in ("crop", "wrap"):
                if kind.stride == 1 or border == "crop":
                    assert AxisTable.of(dataclasses.replace(kind, border=border), length) == table, kind


@by_length
def test_near_of_kernel_one_sees_the_same(length):
    expected = AxisTable.of(Same(), length).mask()
    for dilation in dilations(length):
        for border in ("shift", "crop", "wrap"):
            if border != "wrap" or length % dilation == 0:
                assert (AxisTable.of(Near(1, dilation, border=border), length).mask() == expected).all()
        assert (AxisTable.of(Near(1, dilation, causal=True), length).mask() == expected).all()


@by_length
def test_near_of_the_whole_axis_sees_everything(length):
    for kernel_size in range(length, length + 4):
        for border in ("shift", "wrap"):
            assert AxisTable.of(Near(kernel_size, border=border), length).mask().all()
        causal = AxisTable.of(Near(kernel_size, causal=True), length).mask()
        assert (causal == AxisTable.of(Full(causal=True), length).mask()).all()


@by_length
def test_near_with_wrap_equals_circular_padding(length):
    for dilation in (size for size in dilations(length) if length % size == 0):
        for kernel_size in range(1, length // dilation + 1):
            pad = dilation * kernel_size
            padded = np.pad(np.arange(length), pad, mode="wrap")
            seen = np.zeros((length, length), dtype=bool)
            for query in range(length):
                first = query + pad - dilation * (kernel_size // 2)
                seen[query, padded[first : first + dilation * kernel_size : dilation]] = True
            table = AxisTable.of(Near(kernel_size, dilation, border="wrap"), length)
            assert (table.mask() == seen).all(), (kernel_size, dilation)
            assert (seen.sum(1) == kernel_size).all()


def swin_mask(grid: tuple[int, ...], size: int, shift: int) -> np.ndarray:
    """Who sees whom in (shifted) Swin: roll, partition into windows, mask what the roll brought together."""
    if shift and min(grid) <= size:
        shift = 0
    dims = tuple(range(len(grid)))
    tokens = torch.arange(np.prod(grid)).reshape(grid)
    regions = torch.zeros(grid, dtype=torch.int64)
    if shift:
        cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
        for label, region in enumerate(itertools.product(cuts, repeat=len(grid))):
            regions[region] = label
        tokens = torch.roll(tokens, shifts=(-shift,) * len(grid), dims=dims)
    seen = np.zeros((tokens.numel(), tokens.numel()), dtype=bool)

    def windows(values: torch.Tensor) -> torch.Tensor:
        for dim in dims:
            values = values.unfold(dim, size, size)
        return values.reshape(-1, size ** len(grid))

    for members, labels in zip(windows(tokens), windows(regions), strict=True):
        same_region = labels[:, None] == labels[None, :]
        seen[np.ix_(members, members)] = same_region.numpy()
    return seen


@by_length
def test_window_equals_roll_partition_and_mask(length):
    for size in (size for size in range(1, length + 1) if length % size == 0):
        for shift in range(size):
            assert (AxisTable.of(Window(size, shift), length).mask() == swin_mask((length,), size, shift)).all()


@pytest.mark.parametrize(
    ("grid", "size"), [((8, 12), 4), ((6, 9), 3), ((4, 6, 4), 2), ((4, 4), 4)], ids=lambda value: f"{value}"
)
def test_window_on_a_grid_equals_roll_partition_and_mask(grid, size):
    tokens = int(np.prod(grid))
    for shift in range(size):
        seen = mask(Window(size, shift), grid).numpy().reshape(tokens, tokens)
        assert (seen == swin_mask(grid, size, shift)).all()


@by_length
def test_other_kinds_see_what_their_definition_says(length):
    for kind in other_kinds(length):
        expected = [defined(query, length, kind) for query in range(length)]
        assert keys_of(AxisTable.of(kind, length)) == expected, kind


def test_window_cuts_its_first_and_last_block():
    blocks = [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [10]]
    assert keys_of(AxisTable.of(Window(4, shift=2), 11)) == [block for block in blocks for _ in block]


def test_window_ignores_its_shift_where_one_block_holds_the_axis():
    for length in range(1, 6):
        assert AxisTable.of(Window(5, shift=2), length).mask().all()
    assert not AxisTable.of(Window(5, shift=2), 6).mask().all()


@by_length
def test_every_query_sees_itself(length):
    for kind in itertools.chain(near_kinds(length), other_kinds(length)):
        assert AxisTable.of(kind, length).sees(np.arange(length), np.arange(length)).all(), kind


GRID_PAIRS = [(queries, keys) for queries in range(1, 10) for keys in range(1, 10)]


def center_of(query: int, query_length: int, key_length: int) -> int:
    """The key whose cell holds the middle of the query's cell."""
    middle = Fraction(2 * query + 1, 2) / query_length
    return int(middle * key_length)


def test_two_grids_center_each_query_on_the_key_below_it():
    for query_length, key_length in GRID_PAIRS:
        table = AxisTable.of(Near(1), query_length, key_length)
        centers = [center_of(query, query_length, key_length) for query in range(query_length)]
        assert keys_of(table) == [[center] for center in centers]
        assert table.center.tolist() == centers


def test_two_grids_near_sees_the_nearest_keys_of_its_center():
    for query_length, key_length in GRID_PAIRS:
        for kernel_size in range(1, key_length + 3):
            for border in ("shift", "crop"):
                kind = Near(kernel_size, border=border)
                expected = [
                    near_keys(center_of(query, query_length, key_length), key_length, kind)
                    for query in range(query_length)
                ]
                assert keys_of(AxisTable.of(kind, query_length, key_length)) == expected, (kind, query_length)


def test_two_grids_full_sees_every_key():
    for query_length, key_length in GRID_PAIRS:
        seen = AxisTable.of(Full(), query_length, key_length).mask()
        assert seen.shape == (query_length, key_length)
        assert seen.all()


@pytest.mark.parametrize(
    "kind",
    [
        Near(3, dilation=2),
        Near(3, stride=2),
        Near(3, causal=True),
        Near(3, border="wrap"),
        Window(2),
        Halo(2, 1),
        Grid(2),
        Same(),
    ],
    ids=repr,
)
def test_two_grids_are_refused_where_they_are_not_defined(kind):
    assert len(AxisTable.of(kind, 8, 8)) == 8
    for query_length, key_length in ((4, 8), (8, 4)):
        with pytest.raises(ValueError, match=rf"{query_length} queries and {key_length} keys"):
            AxisTable.of(kind, query_length, key_length)
    with pytest.raises(ValueError, match="4 queries and 8 keys"):
        bounds((Full(), kind), (6, 4), (6, 8))


@pytest.mark.parametrize(
    ("kind", "length", "reason"),
    [
        (Grid(3), 8, "size must divide the axis, 3 does not divide 8"),
        (Grid(9), 8, "9 does not divide 8"),
        (Near(3, dilation=3, border="wrap"), 8, "needs a dilation that divides the axis, 3 does not divide 8"),
        (Near(3, dilation=9, border="wrap"), 8, "9 does not divide 8"),
    ],
    ids=repr,
)
def test_a_kind_refuses_an_axis_it_does_not_divide(kind, length, reason):
    with pytest.raises(ValueError, match=reason):
        AxisTable.of(kind, length)


@pytest.mark.parametrize(
    ("kind", "length", "bias_length"),
    [
        (Near(7), 12, 13),
        (Near(7, dilation=3, stride=2), 12, 13),
        (Near(20), 12, 39),
        (Near(4, border="wrap"), 12, 7),
        (Near(4, causal=True), 12, 7),
        (Window(4, shift=1), 12, 7),
        (Grid(4), 12, 7),
        (Halo(4, 3), 12, 13),
        (Halo(4, 0), 12, 7),
        (Full(), 12, 23),
        (Full(causal=True), 12, 23),
        (Same(), 12, 1),
    ],
    ids=repr,
)
def test_bias_length_is_the_published_one(kind, length, bias_length):
    assert AxisTable.of(kind, length).bias_length == bias_length


def check_bias(table: AxisTable, where: object) -> None:
    for center, keys in zip(table.center.tolist(), keys_of(table), strict=True):
        distances = [key - center for key in keys]
        assert not any(distance % table.step for distance in distances), where
        index = [distance // table.step + (table.bias_length - 1) // 2 for distance in distances]
        assert all(0 <= at < table.bias_length for at in index), where
        assert len(set(index)) == len(keys), where


@by_length
def test_bias_index_stays_inside_its_table(length):
    for kind in itertools.chain(near_kinds(length), other_kinds(length)):
        table = AxisTable.of(kind, length)
        assert table.center.tolist() == list(range(length))
        check_bias(table, kind)


def test_bias_index_on_two_grids_stays_inside_its_table():
    for query_length, key_length in GRID_PAIRS:
        for kind in (Full(), *(Near(k, border=b) for k in range(1, key_length + 3) for b in ("shift", "crop"))):
            check_bias(AxisTable.of(kind, query_length, key_length), (kind, query_length, key_length))


def test_bias_index_reaches_both_ends_of_its_table():
    for kind in (Near(5), Near(5, dilation=2), Near(4, stride=4), Window(4), Grid(4), Full()):
        table = AxisTable.of(kind, 20)
        index = {(key - at) // table.step for at, keys in enumerate(keys_of(table)) for key in keys}
        assert (min(index), max(index)) == (-(table.bias_length // 2), table.bias_length // 2), kind


def kinds_for_tensors(lengths: range) -> Iterator[AxisKind]:
    for kernel_size, dilation in itertools.product((1, 2, 3, 4, 7, 12), (1, 2, 3)):
        for stride in sorted({1, 2, kernel_size} & set(range(1, kernel_size + 1))):
            yield Near(kernel_size, dilation, stride)
            yield Near(kernel_size, dilation, stride, border="crop")
            yield Near(kernel_size, dilation, stride, causal=True)
        yield Near(kernel_size, dilation, border="wrap")
    yield from (Full(), Full(causal=True), Same())
    for size in (1, 2, 3, 4, 7):
        yield Grid(size)
        yield from (Window(size, shift) for shift in range(size))
        yield from (Halo(size, halo) for halo in (0, 1, 5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_on_tensors_of_lengths_equal_those_of_each_length(dtype):
    lengths = range(1, 14)
    center = torch.arange(max(lengths), dtype=dtype)
    for kind in kinds_for_tensors(lengths):
        fitting = [length for length in lengths if kind.refusal(length) is None]
        batch = torch.tensor(fitting, dtype=dtype)[:, None]
        rows = [values.expand(len(fitting), -1) for values in kind.rows(center, batch, torch)]
        assert {values.dtype for values in rows} == {dtype}, kind
        steps = (kind.step(batch) + 0 * batch).ravel().tolist()
        for sample, length in enumerate(fitting):
            table = AxisTable.of(kind, length)
            assert steps[sample] == table.step, kind
            for values, expected in zip(rows, (table.start, table.count), strict=True):
                assert values[sample, :length].tolist() == expected.tolist(), (kind, length)


def test_rows_on_tensors_take_a_plain_length():
    for kind in kinds_for_tensors(range(12, 13)):
        if kind.refusal(12) is None:
            table = AxisTable.of(kind, 12)
            start, count = kind.rows(torch.arange(12), 12, torch)
            assert (start.tolist(), count.tolist()) == (table.start.tolist(), table.count.tolist()), kind


@dataclasses.dataclass(frozen=True, repr=False)
class Sink(AxisKind):
    """A kind of a user's own: the first `size` keys of the axis."""

    size: int

    def check(self) -> None:
        self.take_integer("size", 1)

    def rows(self, center, length, xp):
        return 0 * center, xp.where(length < self.size + 0 * center, length, self.size)


def test_a_users_own_kind_becomes_a_table():
    table = AxisTable.of(Sink(3), 5)
    assert keys_of(table) == [[0, 1, 2]] * 5
    assert table.bias_length is None
    assert repr(Sink(3)) == "Sink(3)"
    with pytest.raises(ValueError, match="Sink: size must be at least 1, got 0"):
        Sink(0)
    with pytest.raises(ValueError, match="defined on one grid only"):
        AxisTable.of(Sink(3), 5, 6)


def test_a_kind_without_rows_says_what_is_missing():
    class Empty(AxisKind):
        pass

    with pytest.raises(NotImplementedError, match="Empty does not define rows"):
        AxisTable.of(Empty(), 5)
