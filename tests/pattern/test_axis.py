"""Every axis kind against its definition, what it refuses, and kinds of a user's own."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from vicinal.pattern import AxisKind, AxisTable, Full, Grid, Near, Same, Window, mask

from .definitions import by_length, defined, dilations, keys_of, natten_keys, near_keys, near_kinds, other_kinds


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
