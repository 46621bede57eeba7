"""A key tile against the query tiles that see it: the gradients of key and value, over inverse neighborhoods."""

import triton
import triton.language as tl

from vicinal.ops.triton.kernels.axes import (
    FAR,
    HEADER,
    header,
    hide,
    leave_out,
    next_tile,
    record_offsets,
    slots,
    tiles_of_axis,
)
from vicinal.ops.triton.kernels.tile import LOG2_E, add_bias, is_inside, load_rows, queries_on_axis, store_rows
from vicinal.ops.triton.kernels.watchers import TURNS


@triton.jit
def key_tile_on_axis(
    p_row, o_record, p_watch, m, tile, place, PITCH: tl.constexpr, PHASE: tl.constexpr, IS_THERE: tl.constexpr
):
    """A key tile along one axis.

    Returns step, keys of the axis, the residue of the tile's keys and of the queries that see them, the number of
    queries of that class, first and last key of the tile, the block's keys and which of them there are.
    """
    step, keys, _ = header(p_row, o_record, IS_THERE)
    _, per_class = tiles_of_axis(step, keys, PITCH, PHASE)
    residue = tile // per_class
    begin = tile % per_class * PITCH - PHASE
    members = tl.cdiv(keys - residue, step)
    key, inside = queries_on_axis(residue, step, begin, members, place)
    first = residue + step * tl.minimum(tl.maximum(begin, 0), members - 1)
    last = residue + step * (tl.minimum(begin + PITCH, members) - 1)
    query_residue = 0
    if IS_THERE:
        query_residue = tl.load(p_watch + first)
    return step, keys, residue, query_residue, first, last, key, inside


@triton.jit
def watchers_in_turn(p_watch, m, first, last, key, turn, IS_THERE: tl.constexpr):
    """Queries that see a key tile in a turn: first place, how many, then what all keys have, then each key's own."""
    begin, size, inner_first, inner_last = 0, 1, 0, 0
    low, high = key * 0, key * 0
    if IS_THERE:
        p_begin = p_watch + (1 + 2 * turn) * m
        begin = tl.load(p_begin + first)
        inner_last = tl.load(p_begin + m + first) - 1
        inner_first = tl.load(p_begin + last)
        size = tl.maximum(tl.load(p_begin + m + last) - begin, 0)
        low = tl.load(p_begin + key)
        high = tl.load(p_begin + m + key) - 1
    return begin, size, inner_first, inner_last, low, high


@triton.jit
def count_watchers(p_watch, m, first, last, Q: tl.constexpr, WRAPS: tl.constexpr, HAS_TURNS: tl.constexpr,
                   IS_THERE: tl.constexpr):  # fmt: skip
    """How many query tiles see a key tile along an axis, all turns together."""
    count = 1
    if IS_THERE:
        if WRAPS:
            count = 0
            for turn in tl.static_range(TURNS):
                p_begin = p_watch + (1 + 2 * turn) * m
                count += tl.cdiv(tl.maximum(tl.load(p_begin + m + last) - tl.load(p_begin + first), 0), Q)
        else:
            p_begin = p_watch + (3 if HAS_TURNS else 1) * m
            count = tl.cdiv(tl.maximum(tl.load(p_begin + m + last) - tl.load(p_begin + first), 0), Q)
    return count


@triton.jit
def find_turn(p_watch, m, first, last, at, Q: tl.constexpr):
    """The turn that a query tile of a wrapping axis belongs to, and its number there."""
    found, number = 0, 0
    for turn in tl.static_range(TURNS):
        p_begin = p_watch + (1 + 2 * turn) * m
        count = tl.cdiv(tl.maximum(tl.load(p_begin + m + last) - tl.load(p_begin + first), 0), Q)
        is_here = (at >= 0) & (at < count)
        found = tl.where(is_here, turn, found)
        number = tl.where(is_here, at, number)
        at = tl.where(is_here, -1, at - count)
    return found, number


@triton.jit
def bias_column(p_row, o_record, n, coordinate, step, residue, IS_THERE: tl.constexpr):
    """Where along an axis the queries of a block stand in the bias, in steps."""
    column = coordinate * 0
    if IS_THERE:
        column = (residue - tl.load(p_row + o_record + HEADER + 2 * n + coordinate)) // step
    return column


@triton.jit
def key_tile(
    tile, sample, kv_head, p_query, p_key, p_value, p_grad_key, p_grad_value, p_lse, p_grad, p_delta, p_row, p_watch,
    p_bias, scale, bias_0, bias_1, bias_2, o_group, member_words, o_watch_1, o_watch_2, n_0, n_1, n_2, m_0, m_1, m_2,
    heads, kv_heads, shared, first_head, group_heads, s_query, s_query_head, s_key, s_value, s_grad, s_grad_head,
    RANK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_0: tl.constexpr, Q_1: tl.constexpr, Q_2: tl.constexpr,
    K_0: tl.constexpr, K_1: tl.constexpr, K_2: tl.constexpr,
    PHASE_0: tl.constexpr, PHASE_1: tl.constexpr, PHASE_2: tl.constexpr,
    WRAPS_0: tl.constexpr, WRAPS_1: tl.constexpr, WRAPS_2: tl.constexpr, HAS_TURNS: tl.constexpr,
    EARLIER: tl.constexpr, EARLIER_WRAPS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    PRECISION: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One key tile of one key head of one sample, over the query heads that share it."""
    o_0, o_1, o_2 = record_offsets(o_group + EARLIER * member_words, n_0, n_1, RANK)
    p_watch_0, p_watch_1, p_watch_2 = p_watch, p_watch + o_watch_1, p_watch + o_watch_2
    step_1, all_1, _ = header(p_row, o_1, RANK >= 2)
    step_2, all_2, _ = header(p_row, o_2, True)
    classes_1, per_class_1 = tiles_of_axis(step_1, all_1, K_1, PHASE_1)
    classes_2, per_class_2 = tiles_of_axis(step_2, all_2, K_2, PHASE_2)
    tiles_1, tiles_2 = classes_1 * per_class_1, classes_2 * per_class_2
    u_0, u_1, u_2, is_key = slots(BLOCK_N, K_0, K_1, K_2)
    step_0, keys_0, residue_0, class_0, first_0, last_0, key_0, inside_0 = key_tile_on_axis(
        p_row, o_0, p_watch_0, m_0, tile // (tiles_1 * tiles_2), u_0, K_0, PHASE_0, RANK == 3
    )
    step_1, keys_1, residue_1, class_1, first_1, last_1, key_1, inside_1 = key_tile_on_axis(
        p_row, o_1, p_watch_1, m_1, tile // tiles_2 % tiles_1, u_1, K_1, PHASE_1, RANK >= 2
    )
    step_2, keys_2, residue_2, class_2, first_2, last_2, key_2, inside_2 = key_tile_on_axis(
        p_row, o_2, p_watch_2, m_2, tile % tiles_2, u_2, K_2, PHASE_2, True
    )
    is_key = is_key & inside_0 & inside_1 & inside_2
    key_token = (key_0 * m_1 + key_1) * m_2 + key_2
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_key = load_rows(p_key, key_token, s_key, d, D, BLOCK_D, IS_WIDE)
    b_value = load_rows(p_value, key_token, s_value, dv, DV, BLOCK_DV, IS_WIDE)
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    TURN: tl.constexpr = 1 if HAS_TURNS else 0
    from_0, size_0, in_0, end_0, low_0, high_0 = watchers_in_turn(
        p_watch_0, m_0, first_0, last_0, key_0, TURN, RANK == 3
    )
    from_1, size_1, in_1, end_1, low_1, high_1 = watchers_in_turn(
        p_watch_1, m_1, first_1, last_1, key_1, TURN, RANK >= 2
    )
    from_2, size_2, in_2, end_2, low_2, high_2 = watchers_in_turn(p_watch_2, m_2, first_2, last_2, key_2, TURN, True)
    count_0 = count_watchers(p_watch_0, m_0, first_0, last_0, Q_0, WRAPS_0, HAS_TURNS, RANK == 3)
    count_1 = count_watchers(p_watch_1, m_1, first_1, last_1, Q_1, WRAPS_1, HAS_TURNS, RANK >= 2)
    count_2 = count_watchers(p_watch_2, m_2, first_2, last_2, Q_2, WRAPS_2, HAS_TURNS, True)
    turn_0, turn_1, turn_2 = 1, 1, 1
    i_0, i_1, i_2, is_slot = slots(BLOCK_M, Q_0, Q_1, Q_2)
    HAS_TAIL: tl.constexpr = Q_0 * Q_1 * Q_2 < BLOCK_M
    begin_head = tl.maximum(kv_head * shared, first_head)
    end_head = tl.minimum((kv_head + 1) * shared, first_head + group_heads)
    for head in range(begin_head, end_head):
        p_own_query = p_query + head * s_query_head
        p_own_grad = p_grad + head * s_grad_head
        o_lse = sample.to(tl.int64) * n_0 * n_1 * n_2 * heads + head
        at_0, at_1, at_2 = 0, 0, 0
        for _ in range(count_0 * count_1 * count_2):
            number_0, number_1, number_2 = at_0, at_1, at_2
            if WRAPS_0:
                turn_0, number_0 = find_turn(p_watch_0, m_0, first_0, last_0, at_0, Q_0)
                from_0, size_0, in_0, end_0, low_0, high_0 = watchers_in_turn(
                    p_watch_0, m_0, first_0, last_0, key_0, turn_0, True
                )
            if WRAPS_1:
                turn_1, number_1 = find_turn(p_watch_1, m_1, first_1, last_1, at_1, Q_1)
                from_1, size_1, in_1, end_1, low_1, high_1 = watchers_in_turn(
                    p_watch_1, m_1, first_1, last_1, key_1, turn_1, True
                )
            if WRAPS_2:
                turn_2, number_2 = find_turn(p_watch_2, m_2, first_2, last_2, at_2, Q_2)
                from_2, size_2, in_2, end_2, low_2, high_2 = watchers_in_turn(
                    p_watch_2, m_2, first_2, last_2, key_2, turn_2, True
                )
            begin_0, begin_1, begin_2 = from_0 + number_0 * Q_0, from_1 + number_1 * Q_1, from_2 + number_2 * Q_2
            place_0, place_1, place_2 = begin_0 + i_0, begin_1 + i_1, begin_2 + i_2
            query_0 = class_0 + step_0 * tl.minimum(place_0, from_0 + size_0 - 1)
            query_1 = class_1 + step_1 * tl.minimum(place_1, from_1 + size_1 - 1)
            query_2 = class_2 + step_2 * tl.minimum(place_2, from_2 + size_2 - 1)
            query_token = (query_0 * n_1 + query_1) * n_2 + query_2
            b_query = load_rows(p_own_query, query_token, s_query, d, D, BLOCK_D, IS_WIDE)
            b_grad = load_rows(p_own_grad, query_token, s_grad, dv, DV, BLOCK_DV, IS_WIDE).to(b_query.dtype)
            lse = tl.load(p_lse + o_lse + query_token * heads)
            delta = tl.load(p_delta + o_lse + query_token * heads)
            scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * scale
            if HAS_BIAS:
                row = (key_0 + (turn_0 - 1) * keys_0 - residue_0) // step_0 + bias_0 // 2
                row = row * bias_1 + (key_1 + (turn_1 - 1) * keys_1 - residue_1) // step_1 + bias_1 // 2
                row = row * bias_2 + (key_2 + (turn_2 - 1) * keys_2 - residue_2) // step_2 + bias_2 // 2
                column = bias_column(p_row, o_0, n_0, query_0, step_0, residue_0, RANK == 3)
                column = column * bias_1 + bias_column(p_row, o_1, n_1, query_1, step_1, residue_1, RANK >= 2)
                column = column * bias_2 + bias_column(p_row, o_2, n_2, query_2, step_2, residue_2, True)
                p_own_bias = p_bias + (head - first_head) * (bias_0 * bias_1 * bias_2)
                scores = add_bias(scores, p_own_bias, row, column, bias_0 * bias_1 * bias_2, 0)
            if HAS_TAIL:
                place_2 = tl.where(is_slot, place_2, FAR)
            full_2 = is_inside(begin_2, 1, in_2, end_2, Q_2) & (not HAS_TAIL)
            scores = hide(scores, low_2, high_2, place_2, full_2, 0, True)
            scores = hide(scores, low_1, high_1, place_1, is_inside(begin_1, 1, in_1, end_1, Q_1), 0, RANK >= 2)
            scores = hide(scores, low_0, high_0, place_0, is_inside(begin_0, 1, in_0, end_0, Q_0), 0, RANK == 3)
            scores = leave_out(
                scores, p_row, o_group, member_words, n_0, n_1, n_2, query_0, query_1, query_2, key_0, key_1, key_2,
                1, EARLIER, RANK, EARLIER_WRAPS,
            )  # fmt: skip
            weights = tl.math.exp2(scores - lse[None, :])
            grad_value = tl.dot(weights.to(b_grad.dtype), b_grad, grad_value, input_precision=PRECISION)
            slopes = tl.dot(b_value, tl.trans(b_grad), input_precision=PRECISION)
            slopes = weights * (slopes - delta[None, :])
            grad_key = tl.dot(slopes.to(b_query.dtype), b_query, grad_key, input_precision=PRECISION)
            at_0, at_1, at_2 = next_tile(at_0, at_1, at_2, count_1, count_2)
    grad_key = grad_key * (scale / LOG2_E)
    o_rows = sample.to(tl.int64) * m_0 * m_1 * m_2 * kv_heads + kv_head
    if ADDS:  # to what other groups and members found
        grad_key += load_rows(p_grad_key + o_rows * D, key_token, kv_heads * D, d, D, BLOCK_D, IS_WIDE)
        grad_value += load_rows(p_grad_value + o_rows * DV, key_token, kv_heads * DV, dv, DV, BLOCK_DV, IS_WIDE)
    store_rows(p_grad_key + o_rows * D, key_token, kv_heads * D, d, grad_key, is_key, D, IS_WIDE)
    store_rows(p_grad_value + o_rows * DV, key_token, kv_heads * DV, dv, grad_value, is_key, DV, IS_WIDE)


@triton.jit
def key_pass(
    p_query, p_key, p_value, p_grad_key, p_grad_value, p_lse, p_grad, p_delta, p_tables, p_watchers, p_bias,
    scale, programs, row_words, watcher_words, bias_0, bias_1, bias_2, o_group, member_words, o_watch_1, o_watch_2,
    n_0, n_1, n_2, m_0, m_1, m_2, heads, kv_heads, shared, first_head, group_heads, first_kv_head, group_kv_heads,
    s_query_sample, s_query, s_query_head, s_key_sample, s_key, s_key_head, s_value_sample, s_value, s_value_head,
    s_grad_sample, s_grad, s_grad_head,
    RANK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_0: tl.constexpr, Q_1: tl.constexpr, Q_2: tl.constexpr,
    K_0: tl.constexpr, K_1: tl.constexpr, K_2: tl.constexpr,
    PHASE_0: tl.constexpr, PHASE_1: tl.constexpr, PHASE_2: tl.constexpr,
    WRAPS_0: tl.constexpr, WRAPS_1: tl.constexpr, WRAPS_2: tl.constexpr, HAS_TURNS: tl.constexpr,
    EARLIER: tl.constexpr, EARLIER_WRAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr,
    ADDS: tl.constexpr, PRECISION: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """All key tiles of a head group under one union member: `programs` programs for each of its key heads and samples.

    With `HAS_ROWS` samples have tables of their own, and a program takes as many tiles as its sample needs.
    """
    program = tl.program_id(0)
    tile = program % programs
    kv_head = first_kv_head + program // programs % group_kv_heads
    sample = program // programs // group_kv_heads
    wide = sample.to(tl.int64)
    p_query += wide * s_query_sample
    p_grad += wide * s_grad_sample
    p_key += wide * s_key_sample + kv_head * s_key_head
    p_value += wide * s_value_sample + kv_head * s_value_head
    p_row, p_watch = p_tables, p_watchers
    end = tile + 1
    if HAS_ROWS:
        p_row += wide * row_words
        p_watch += wide * watcher_words
        o_0, o_1, o_2 = record_offsets(o_group + EARLIER * member_words, n_0, n_1, RANK)
        step_0, all_0, _ = header(p_row, o_0, RANK == 3)
        step_1, all_1, _ = header(p_row, o_1, RANK >= 2)
        step_2, all_2, _ = header(p_row, o_2, True)
        classes_0, per_class_0 = tiles_of_axis(step_0, all_0, K_0, PHASE_0)
        classes_1, per_class_1 = tiles_of_axis(step_1, all_1, K_1, PHASE_1)
        classes_2, per_class_2 = tiles_of_axis(step_2, all_2, K_2, PHASE_2)
        end = classes_0 * per_class_0 * classes_1 * per_class_1 * classes_2 * per_class_2
    for number in range(tile, end, programs):
        key_tile(
            number, sample, kv_head, p_query, p_key, p_value, p_grad_key, p_grad_value, p_lse, p_grad, p_delta, p_row,
            p_watch, p_bias, scale, bias_0, bias_1, bias_2, o_group, member_words, o_watch_1, o_watch_2,
            n_0, n_1, n_2, m_0, m_1, m_2, heads, kv_heads, shared, first_head, group_heads, s_query, s_query_head,
            s_key, s_value, s_grad, s_grad_head, RANK, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, Q_0, Q_1, Q_2,
            K_0, K_1, K_2, PHASE_0, PHASE_1, PHASE_2, WRAPS_0, WRAPS_1, WRAPS_2, HAS_TURNS, EARLIER, EARLIER_WRAPS,
            HAS_BIAS, ADDS, PRECISION, IS_WIDE,
        )  # fmt: skip
