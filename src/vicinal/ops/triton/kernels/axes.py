"""What the tables say about a tile: the queries it has, the keys it needs, and which pairs of them count.

A query tile is a box of one residue class on each axis. Within a class neither the first nor the last key decreases,
so the tables of a tile's first and last query say everything: the keys needed run from the first key of the first
query to the last key of the last one, and what every query sees from the first key of the last query to the last key
of the first one. A key tile that lies within the latter is *full* and takes no mask.
"""

import triton
import triton.language as tl

HEADER = tl.constexpr(4)
FAR = tl.constexpr(1 << 29)


@triton.jit
def record_words(length, IS_THERE: tl.constexpr):
    """Words of an axis's record; none where the grid has no such axis."""
    words = 0
    if IS_THERE:
        words = HEADER + 3 * length
    return words


@triton.jit
def record_offsets(o_member, n_0, n_1, RANK: tl.constexpr):
    """Where the records of a member's three axes begin."""
    o_1 = o_member + record_words(n_0, RANK == 3)
    return o_member, o_1, o_1 + record_words(n_1, RANK >= 2)


@triton.jit
def header(p_row, o_record, IS_THERE: tl.constexpr):
    """Step, keys and queries of an axis, as the sample has them."""
    step, keys, queries = 1, 1, 1
    if IS_THERE:
        step = tl.load(p_row + o_record)
        keys = tl.load(p_row + o_record + 1)
        queries = tl.load(p_row + o_record + 3)
    return step, keys, queries


@triton.jit
def tiles_of_axis(step, queries, PITCH: tl.constexpr, PHASE: tl.constexpr):
    """How many residue classes an axis has, and how many tiles each of them."""
    return tl.minimum(step, queries), tl.cdiv(tl.cdiv(queries, step) + PHASE, PITCH)


@triton.jit
def cut_class(step, queries, classes, per_class, tile, PITCH: tl.constexpr, PHASE: tl.constexpr):
    """The tile's class, where it begins there, and how many members the class has."""
    residue = tile // per_class
    begin = tile % per_class * PITCH - PHASE
    members = tl.cdiv(queries - residue, step)
    return residue, begin, members


@triton.jit
def needed_keys(
    p_row, o_record, n, step, keys, residue, begin, members, PITCH: tl.constexpr, WRAPS: tl.constexpr,
    IS_THERE: tl.constexpr,
):  # fmt: skip
    """First key needed, how many, and the first and last key that all queries of the tile see."""
    first, size, inner_first, inner_last = 0, 1, 0, 0
    if IS_THERE:
        p_start = p_row + o_record + HEADER
        query = residue + step * tl.minimum(tl.maximum(begin, 0), members - 1)
        last_query = residue + step * (tl.minimum(begin + PITCH, members) - 1)
        first = tl.load(p_start + query)
        inner_last = first + step * (tl.load(p_start + n + query) - 1)
        inner_first = tl.load(p_start + last_query)
        last = inner_first + step * (tl.load(p_start + n + last_query) - 1)
        if not WRAPS:  # a query that sees nothing may have any first key
            first = tl.where(first < 0, first + tl.cdiv(-first, step) * step, first)
            beyond = last - (keys - 1)
            last = tl.where(beyond > 0, last - tl.cdiv(beyond, step) * step, last)
        is_empty = (begin >= members) | (last < first)
        size = tl.where(is_empty, 0, (last - first) // step + 1)
    return first, size, inner_first, inner_last


@triton.jit
def slots(BLOCK: tl.constexpr, SIZE_0: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr):
    """The places of a box in a block of `BLOCK`, and which slots of the block have one."""
    slot = tl.arange(0, BLOCK)
    return slot // (SIZE_1 * SIZE_2), slot // SIZE_2 % SIZE_1, slot % SIZE_2, slot < SIZE_0 * SIZE_1 * SIZE_2


@triton.jit
def next_tile(at_0, at_1, at_2, count_1, count_2):
    """The tile that follows, last axis fastest."""
    at_2 += 1
    carry = at_2 == count_2
    at_2 = tl.where(carry, 0, at_2)
    at_1 = tl.where(carry, at_1 + 1, at_1)
    carry = at_1 == count_1
    at_1 = tl.where(carry, 0, at_1)
    at_0 = tl.where(carry, at_0 + 1, at_0)
    return at_0, at_1, at_2


@triton.jit
def on_axis(coordinate, last, length, WRAPS: tl.constexpr):
    """Coordinates to read from: none outside what is needed, none outside the axis."""
    inside = tl.minimum(coordinate, last)
    if WRAPS:
        inside = (inside + length) % length
    return inside


@triton.jit
def window_of(p_row, o_record, n, coordinate, step, IS_THERE: tl.constexpr):
    """First and last key of each query of a block."""
    first, last = coordinate * 0, coordinate * 0
    if IS_THERE:
        p_start = p_row + o_record + HEADER + coordinate
        first = tl.load(p_start)
        last = first + step * (tl.load(p_start + n) - 1)
    return first, last


@triton.jit
def across(values, AXIS: tl.constexpr):
    """A vector along one axis of a matrix."""
    return tl.expand_dims(values, 1 - AXIS)


@triton.jit
def hide(scores, first, last, place, is_full, OUTER: tl.constexpr, IS_THERE: tl.constexpr):
    """-inf where `place`, along the other axis, is not between `first` and `last`, which lie along axis `OUTER`."""
    if IS_THERE:
        if not is_full:
            places = across(place, 1 - OUTER)
            seen = (places >= across(first, OUTER)) & (places <= across(last, OUTER))
            scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def seen_on_axis(p_row, o_record, n, query, key, QUERY_AXIS: tl.constexpr, WRAPS: tl.constexpr, IS_THERE: tl.constexpr):
    """Whether queries see keys along an axis, by arithmetic on any table; for the other members of a union."""
    seen = (across(query, QUERY_AXIS) >= 0) & (across(key, 1 - QUERY_AXIS) >= 0)
    if IS_THERE:
        step = tl.load(p_row + o_record)
        p_start = p_row + o_record + HEADER + query
        first = across(tl.load(p_start), QUERY_AXIS)
        span = across(tl.load(p_start + n) * step, QUERY_AXIS)
        distance = across(key, 1 - QUERY_AXIS) - first
        if WRAPS:
            keys = tl.load(p_row + o_record + 1)
            turned = (distance + 2 * keys) % keys
            distance = tl.where(tl.load(p_row + o_record + 2) != 0, turned, distance)
        seen = (distance >= 0) & (distance < span) & (distance % step == 0)
    return seen


@triton.jit
def leave_out(
    scores, p_row, o_group, member_words, n_0, n_1, n_2, query_0, query_1, query_2, key_0, key_1, key_2,
    QUERY_AXIS: tl.constexpr, EARLIER: tl.constexpr, RANK: tl.constexpr, WRAPS: tl.constexpr,
):  # fmt: skip
    """-inf for every pair that one of the union's first `EARLIER` members has."""
    for member in tl.static_range(EARLIER):
        o_0, o_1, o_2 = record_offsets(o_group + member * member_words, n_0, n_1, RANK)
        seen = seen_on_axis(p_row, o_2, n_2, query_2, key_2, QUERY_AXIS, WRAPS, True)
        seen &= seen_on_axis(p_row, o_1, n_1, query_1, key_1, QUERY_AXIS, WRAPS, RANK >= 2)
        seen &= seen_on_axis(p_row, o_0, n_0, query_0, key_0, QUERY_AXIS, WRAPS, RANK == 3)
        scores = tl.where(seen, float("-inf"), scores)
    return scores
