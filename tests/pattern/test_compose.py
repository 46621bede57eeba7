"""Patterns as values: how they print and are read back, what they equal, and the nonsense they refuse."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vicinal.pattern import (
    AxisKind,
    Full,
    Grid,
    Halo,
    Heads,
    Near,
    Same,
    Union,
    Window,
    bounds,
    heads,
    parse,
    union,
)
from vicinal.pattern.bounds import bounds_of_key
from vicinal.pattern.compose import pattern_key, pattern_of_key, pattern_rank, split_heads

WRITTEN = [
    "Near(7)",
    "Near(7, dilation=2)",
    "Near(7, dilation=2, stride=3)",
    "Near(7, stride=7, causal=True)",
    "Near(4, border='crop')",
    "Near(4, dilation=2, border='wrap')",
    "Window(7)",
    "Window(7, shift=3)",
    "Halo(8, 3)",
    "Halo(8, 0)",
    "Grid(7)",
    "Full()",
    "Full(causal=True)",
    "Same()",
    "(Near(7),)",
    "(Full(causal=True), Near(7), Window(4, shift=2))",
    "union(Near(3))",
    "union((Same(), Full()), (Full(), Same()))",
    "heads(Near(3))",
    "heads(Near(7), (Full(), Window(4)))",
    "heads((Full(), Window(4)), (Window(4), Full()), sizes=(1, 3))",
    "heads(union(Near(3), Near(3, dilation=4)), Window(2), sizes=(2, 2))",
]

axis_kinds = st.one_of(
    st.integers(1, 9).flatmap(
        lambda size: st.builds(
            Near,
            st.just(size),
            st.integers(1, 9),
            st.integers(1, size),
            st.booleans(),
            st.sampled_from(["shift", "crop"]),
        )
    ),
    st.builds(Near, st.integers(1, 9), st.integers(1, 9), border=st.just("wrap")),
    st.integers(1, 9).flatmap(lambda size: st.builds(Window, st.just(size), st.integers(0, size - 1))),
    st.builds(Halo, st.integers(1, 9), st.integers(0, 9)),
    st.builds(Grid, st.integers(1, 9)),
    st.builds(Full, st.booleans()),
    st.builds(Same),
)
products = st.one_of(axis_kinds, st.tuples(axis_kinds, axis_kinds))
unions = st.lists(products, min_size=1, max_size=3).map(lambda members: union(*members))


@st.composite
def head_groups(draw):
    groups = draw(st.lists(st.one_of(products, unions), min_size=1, max_size=3))
    exact = st.lists(st.integers(1, 9), min_size=len(groups), max_size=len(groups))
    return heads(*groups, sizes=draw(st.one_of(st.none(), exact)))


patterns = st.one_of(products, unions, head_groups())


@pytest.mark.parametrize("text", WRITTEN)
def test_a_pattern_prints_as_it_is_written(text):
    assert repr(parse(text)) == text
    assert repr(eval(text)) == text
    assert eval(text) == parse(text)


@given(patterns)
def test_any_pattern_comes_back_from_its_text_and_from_its_key(pattern):
    for again in (
        eval(repr(pattern)),
        parse(repr(pattern)),
        parse(f"  {pattern!r}\n"),
        pattern_of_key(pattern_key(pattern)),
        copy.deepcopy(pattern),
        pickle.loads(pickle.dumps(pattern)),
    ):
        assert again == pattern
        assert type(again) is type(pattern)
        assert hash(again) == hash(pattern)
        assert repr(again) == repr(pattern)
        assert hash(pattern_key(again)) == hash(pattern_key(pattern))


@given(patterns, patterns)
def test_patterns_have_equal_keys_exactly_when_they_are_equal(left, right):
    assert (pattern_key(left) == pattern_key(right)) == (left == right)


def plain(key: object) -> bool:
    if isinstance(key, tuple):
        return all(map(plain, key))
    return key is None or isinstance(key, int | str | bool | type)


@given(patterns)
def test_a_pattern_key_is_nested_tuples_of_plain_values(pattern):
    assert plain(pattern_key(pattern))


@dataclasses.dataclass(frozen=True, repr=False)
class Sink(AxisKind):
    """A kind of a user's own."""

    size: int
    name: str = "sink"

    def rows(self, center, length, xp):
        return 0 * center, 0 * center + self.size


def test_a_users_own_kind_comes_back_from_its_key():
    pattern = heads((Sink(3), Sink(2, name="drain")), union(Sink(1), Near(3)))
    assert pattern_of_key(pattern_key(pattern)) == pattern
    assert repr(pattern) == "heads((Sink(3), Sink(2, name='drain')), union(Sink(1), Near(3)))"


def test_bounds_come_back_from_the_key_of_their_pattern():
    pattern = heads(Near(3), union(Same(), Window(2)))
    table = bounds(pattern, (6, 5))
    assert bounds_of_key(pattern_key(pattern), (6, 5), (6, 5)) == table
    assert bounds_of_key(table.key, (6, 5), (6, 5)) == table


def test_different_patterns_are_not_equal():
    different = [parse(text) for text in WRITTEN]
    assert len(set(different)) == len(different)
    assert Near(3) != Window(3)
    assert Halo(3, 1) != Window(3, 1)
    assert heads(Near(3)) != union(Near(3))
    assert heads(Near(3), Full()) != heads(Full(), Near(3))
    assert union(Near(3), Full()) != union(Full(), Near(3))
    assert heads(Near(3), Full()) != heads(Near(3), Full(), sizes=(1, 1))
    assert Near(3) != (Near(3),)


def test_patterns_are_frozen():
    for pattern, field in ((Near(3), "kernel_size"), (union(Near(3)), "members"), (heads(Near(3)), "groups")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(pattern, field, 1)


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), np.int32(3), torch.tensor(3), np.array(3)], ids=repr)
def test_integers_of_other_libraries_are_kept_as_int(number):
    for kind in (
        Near(number, number, number),
        Window(number, number - 1),
        Halo(number, number),
        Grid(number),
    ):
        for field in dataclasses.fields(kind):
            if field.type == "int":
                assert type(getattr(kind, field.name)) is int
    assert repr(Near(number, dilation=number)) == "Near(3, dilation=3)"
    assert Near(number) == Near(3)
    assert hash(Window(number)) == hash(Window(3))
    sizes = heads(Near(3), Full(), sizes=[number, 1]).sizes
    assert sizes == (3, 1)
    assert type(sizes[0]) is int


@pytest.mark.parametrize(
    ("make", "name", "least"),
    [
        (Near, "Near: kernel_size", 1),
        (lambda value: Near(3, dilation=value), "Near: dilation", 1),
        (lambda value: Near(3, stride=value), "Near: stride", 1),
        (Window, "Window: size", 1),
        (lambda value: Window(5, shift=value), "Window: shift", 0),
        (lambda value: Halo(value, 1), "Halo: block", 1),
        (lambda value: Halo(4, value), "Halo: halo", 0),
        (Grid, "Grid: size", 1),
        (lambda value: heads(Near(3), sizes=(value,)), r"heads: sizes\[0\]", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_a_number_that_is_no_whole_count_is_refused(make, name, least):
    for nonsense in ("3", 3.0, np.float32(3), True, False, np.True_, None, (3,), [3], 3 + 0j, Near(3)):
        with pytest.raises(ValueError, match=f"^{name} must be an integer of at least {least}, got ") as caught:
            make(nonsense)
        assert str(caught.value).endswith(f"got {nonsense!r}")
    for low in (-7, least - 1, np.int64(-1)):
        with pytest.raises(ValueError, match=f"^{name} must be at least {least}, got {low}$"):
            make(low)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Near(3, stride=4), r"stride must be at most kernel_size \(3\), got 4"),
        (lambda: Near(3, stride=2, border="wrap"), 'border="wrap" needs stride 1, got stride 2'),
        (lambda: Near(3, border="zero"), "border must be .* got 'zero'"),
        (lambda: Near(3, border=None), "border must be .* got None"),
        (lambda: Near(3, border=True), "border must be .* got True"),
        (lambda: Near(3, border=["shift"]), "border must be .* got"),
        (lambda: Near(3, causal=1), "Near: causal must be True or False, got 1"),
        (lambda: Near(3, causal=None), "Near: causal must be True or False, got None"),
        (lambda: Full(causal="yes"), "Full: causal must be True or False, got 'yes'"),
        (lambda: Full(7), "Full: causal must be True or False, got 7"),
        (lambda: Window(4, shift=4), r"shift must be below size \(4\), got 4"),
        (lambda: Window(4, shift=-1), "shift must be at least 0, got -1"),
        (heads, "heads: at least one pattern is needed"),
        (union, "union: at least one pattern is needed"),
        (lambda: heads(Near), r"heads: pattern 0 must be an axis kind .* write Near\(\.\.\.\)"),
        (lambda: heads(Near(3), 7), "heads: pattern 1 must be an axis kind .* got 7"),
        (lambda: heads("Near(3)"), "heads: pattern 0 .* got 'Near"),
        (lambda: heads([Near(3), Full()]), r"heads: pattern 0 .* got \[Near\(3\), Full\(\)\]"),
        (lambda: heads((Near(3), 7)), "heads: pattern 0 must be an axis kind or a tuple"),
        (lambda: heads(()), "heads: pattern 0 must be an axis kind or a tuple of 1 to 3"),
        (lambda: heads((Near(3),) * 4), "heads: pattern 0 must be an axis kind or a tuple of 1 to 3"),
        (lambda: heads(heads(Near(3))), "heads: pattern 0 .* always outermost"),
        (lambda: heads((Near(3), heads(Near(3)))), "heads: pattern 0 must be"),
        (lambda: heads(bounds(Near(3), (4,))), "heads: pattern 0 must be"),
        (lambda: union(heads(Near(3))), "union: pattern 0 .* always outermost"),
        (lambda: union(Near(3), union(Near(3))), "union: pattern 1 must be"),
        (lambda: union(Near), r"union: pattern 0 .* write Near\(\.\.\.\)"),
        (lambda: union(None), "union: pattern 0 must be"),
        (lambda: heads((Near(3), Near(3)), (Near(3),)), "same number of axes, got 2 and 1"),
        (lambda: union((Near(3),) * 3, Near(3), (Near(3),)), "same number of axes, got 3 and 1"),
        (lambda: heads(union((Same(), Full())), (Near(3),)), "same number of axes, got 2 and 1"),
        (lambda: heads(Near(3), Full(), sizes=(1,)), r"sizes must have one number per pattern \(2\), got \(1,\)"),
        (lambda: heads(Near(3), sizes=()), r"sizes must have one number per pattern \(1\), got \(\)"),
        (lambda: heads(Near(3), sizes=1), r"sizes must have one number per pattern \(1\), got 1"),
        (lambda: Heads("ab"), "heads: pattern 0 .* got 'a'"),
        (lambda: Heads((Near(3),), (0,)), r"sizes\[0\] must be at least 1, got 0"),
        (lambda: Union((Near(3), "Near(3)")), "union: pattern 1 .* got 'Near"),
        (lambda: bounds(Near, (8,)), r"pattern must be an axis kind .* write Near\(\.\.\.\)"),
        (lambda: bounds(7, (8,)), "pattern must be an axis kind .* got 7"),
        (lambda: bounds("Near(3)", (8,)), "pattern must be an axis kind .* got 'Near"),
        (lambda: bounds(None, (8,)), "pattern must be an axis kind .* got None"),
        (lambda: bounds([Near(3)], (8,)), "pattern must be an axis kind"),
        (lambda: bounds((), (8,)), "pattern must be an axis kind or a tuple of 1 to 3"),
        (lambda: bounds((Near(3), Near(3)), (8,)), "is for 2 axes, the grid has 1"),
        (lambda: bounds(heads((Near(3),)), (8, 8)), "is for 1 axes, the grid has 2"),
        (lambda: bounds(Near(3)), "grid is needed"),
        (lambda: bounds(Near(3), 8), "grid must be a tuple of 1 to 3 axis lengths, got 8"),
        (lambda: bounds(Near(3), "8"), "grid must be a tuple of 1 to 3 axis lengths, got '8'"),
        (lambda: bounds(Near(3), ()), "grid must be a tuple of 1 to 3"),
        (lambda: bounds(Near(3), (2, 2, 2, 2)), "grid must be a tuple of 1 to 3"),
        (lambda: bounds(Near(3), (8, 0)), r"grid\[1\] must be at least 1, got 0"),
        (lambda: bounds(Near(3), (8.0,)), r"grid\[0\] must be an integer of at least 1, got 8.0"),
        (lambda: bounds(Near(3), (True,)), r"grid\[0\] must be an integer of at least 1, got True"),
        (lambda: bounds(Near(3), (8,), (8, 8)), r"key_grid must have 1 axes like grid, got \(8, 8\)"),
        (lambda: bounds(Near(3), (8,), (-8,)), r"key_grid\[0\] must be at least 1, got -8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_nonsense_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_heads_and_union_made_directly_hold_tuples():
    assert Heads([Near(3), Full()], [1, 2]) == heads(Near(3), Full(), sizes=(1, 2))
    assert hash(Heads([Near(3)])) == hash(heads(Near(3)))
    assert Union([Near(3)]) == union(Near(3))


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [
        (Near(3), None),
        ((Near(3),), 1),
        ((Near(3), Full()), 2),
        (union(Near(3)), None),
        (union(Near(3), (Same(), Same(), Full())), 3),
        (heads(Near(3), union(Full(), (Same(), Same()))), 2),
    ],
    ids=repr,
)
def test_pattern_rank_is_that_of_its_tuples(pattern, rank):
    assert pattern_rank(pattern) == rank


def test_heads_are_split_evenly_or_as_given():
    assert split_heads(6, 3, None) == (2, 2, 2)
    assert split_heads(4, 2, (1, 3)) == (1, 3)
    assert bounds(heads(Near(3), Full(), sizes=(1, 3)), (8,)).split(4) == (1, 3)
    assert bounds(heads(Near(3), Full()), (8,)).split(4) == (2, 2)
    assert bounds(Near(3), (8,)).split(5) == (5,)
    with pytest.raises(ValueError, match=r"sizes=\(1, 3\)\) is for 4 heads, the query has 5"):
        bounds(heads(Near(3), Full(), sizes=(1, 3)), (8,)).split(5)
    with pytest.raises(ValueError, match="5 heads do not divide into 2 equal groups"):
        bounds(heads(Near(3), Full()), (8,)).split(5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("Near(3", "cannot read 'Near"),
        ("Near", r"write Near\(\.\.\.\)"),
        ("heads", "cannot read 'heads'; allowed are Near, Window"),
        ("Near()", "Near: missing 1 required positional argument: 'kernel_size'"),
        ("Near(3, size=4)", "Near: got an unexpected keyword argument 'size'"),
        ("Near(3, kernel_size=4)", "Near: got multiple values"),
        ("Near(0)", "Near: kernel_size must be at least 1, got 0"),
        ("Near(-3)", "cannot read '-3'"),
        ("Near(3.5)", "cannot read '3.5'"),
        ("Near(3, causal=None)", "cannot read 'None'"),
        ("Near(*(3,))", r"cannot read '\*\(3,\)'"),
        ("Near(3, **4)", "unexpected keyword argument"),
        ("Near(kernel)", "cannot read 'kernel'"),
        ("Near(1 + 2)", r"cannot read '1 \+ 2'"),
        ("Nearby(3)", r"cannot read 'Nearby\(3\)'"),
        ("__import__('os').getcwd()", "cannot read"),
        ("(lambda: Near(3))()", "cannot read"),
        ("Near(3); Near(4)", "cannot read"),
        ("7", "pattern must be an axis kind .* got 7"),
        ("'Near(3)'", "pattern must be an axis kind"),
        ("()", "pattern must be an axis kind or a tuple of 1 to 3"),
        ("(Near(3), 4)", "pattern must be an axis kind"),
        ("heads(heads(Near(3)))", "always outermost"),
        ("heads(Near(3), sizes=1)", "sizes must have one number per pattern"),
        ("Near(Near(3))", "kernel_size must be an integer of at least 1, got Near"),
        (None, "parse reads text, got None"),
        (Near(3), r"parse reads text, got Near\(3\)"),
    ],
)
def test_parse_says_what_it_cannot_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_parse_takes_double_quotes_and_lists_of_sizes():
    assert parse('Near(3, border="crop")') == Near(3, border="crop")
    assert parse("heads(Near(3), Full(), sizes=[1, 2])") == heads(Near(3), Full(), sizes=(1, 2))
