"""A query tile against the key tiles that its queries see: the forward, and the gradient of the query.

The forward is an online softmax in powers of two. The gradient makes the weights anew from the log-sum-exp. Key tiles
begin at the first key that the query tile needs. Members of a union run one after the other: the forward goes on from
what the members before left, the gradient adds to it.
"""

import triton
import triton.language as tl

from vicinal.ops.triton.kernels.axes import FAR, hide, leave_out, next_tile, on_axis, record_offsets, slots, window_of
from vicinal.ops.triton.kernels.tile import (
    LOG2_E,
    add_bias,
    bias_row,
    count_tiles,
    is_inside,
    load_rows,
    queries_on_axis,
    store_rows,
    tile_on_axis,
)


@triton.jit
def absorb(
    scores, b_key, b_value, b_grad, lse, delta, total, top, summed, IS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr
):
    """Take the scores of a key tile in."""
    if IS_GRADIENT:
        weights = tl.math.exp2(scores - lse[:, None])
        slopes = tl.dot(b_grad, tl.trans(b_value), input_precision=PRECISION)
        slopes = weights * (slopes - delta[:, None])
        summed = tl.dot(slopes.to(b_key.dtype), b_key, summed, input_precision=PRECISION)
    else:
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
        weights = tl.math.exp2(scores - base[:, None])
        shrink = tl.math.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None]
        summed = tl.dot(weights.to(b_value.dtype), b_value, summed, input_precision=PRECISION)
        top = new_top
    return total, top, summed


@triton.jit
def query_tile(
    tile, sample, head, p_query, p_key, p_value, p_out, p_prior, p_lse, p_grad, p_delta, p_row, p_bias, p_extra_key,
    p_extra_value, p_extra_lengths, scale, extra_tokens, bias_0, bias_1, bias_2, o_group, member_words,
    n_0, n_1, n_2, m_1, m_2, heads, s_query, s_key, s_value, s_grad, s_extra_key, s_extra_value,
    RANK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_0: tl.constexpr, Q_1: tl.constexpr, Q_2: tl.constexpr,
    PHASE_0: tl.constexpr, PHASE_1: tl.constexpr, PHASE_2: tl.constexpr,
    K_0: tl.constexpr, K_1: tl.constexpr, K_2: tl.constexpr,
    WRAPS_0: tl.constexpr, WRAPS_1: tl.constexpr, WRAPS_2: tl.constexpr,
    EARLIER: tl.constexpr, EARLIER_WRAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, IS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One query tile of one head of one sample."""
    o_0, o_1, o_2 = record_offsets(o_group + EARLIER * member_words, n_0, n_1, RANK)
    _, tiles_1, tiles_2 = count_tiles(p_row, o_0, o_1, o_2, Q_0, Q_1, Q_2, PHASE_0, PHASE_1, PHASE_2, RANK)
    step_0, keys_0, residue_0, begin_0, members_0, first_0, size_0, in_0, end_0 = tile_on_axis(
        p_row, o_0, n_0, tile // (tiles_1 * tiles_2), Q_0, PHASE_0, WRAPS_0, RANK == 3
    )
    step_1, keys_1, residue_1, begin_1, members_1, first_1, size_1, in_1, end_1 = tile_on_axis(
        p_row, o_1, n_1, tile // tiles_2 % tiles_1, Q_1, PHASE_1, WRAPS_1, RANK >= 2
    )
    step_2, keys_2, residue_2, begin_2, members_2, first_2, size_2, in_2, end_2 = tile_on_axis(
        p_row, o_2, n_2, tile % tiles_2, Q_2, PHASE_2, WRAPS_2, True
    )
    place_0, place_1, place_2, is_query = slots(BLOCK_M, Q_0, Q_1, Q_2)
    query_0, inside_0 = queries_on_axis(residue_0, step_0, begin_0, members_0, place_0)
    query_1, inside_1 = queries_on_axis(residue_1, step_1, begin_1, members_1, place_1)
    query_2, inside_2 = queries_on_axis(residue_2, step_2, begin_2, members_2, place_2)
    is_query = is_query & inside_0 & inside_1 & inside_2
    low_0, high_0 = window_of(p_row, o_0, n_0, query_0, step_0, RANK == 3)
    low_1, high_1 = window_of(p_row, o_1, n_1, query_1, step_1, RANK >= 2)
    low_2, high_2 = window_of(p_row, o_2, n_2, query_2, step_2, True)
    query_token = (query_0 * n_1 + query_1) * n_2 + query_2
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_query = load_rows(p_query, query_token, s_query, d, D, BLOCK_D, IS_WIDE)
    row = query_token * 0
    if HAS_BIAS:
        row = bias_row(p_row, o_0, n_0, query_0, step_0, first_0, bias_0, RANK == 3)
        row = row * bias_1 + bias_row(p_row, o_1, n_1, query_1, step_1, first_1, bias_1, RANK >= 2)
        row = row * bias_2 + bias_row(p_row, o_2, n_2, query_2, step_2, first_2, bias_2, True)
    o_lse = sample.to(tl.int64) * n_0 * n_1 * n_2 * heads + head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    b_grad, lse, delta = b_query, top, total
    if IS_GRADIENT:
        b_grad = load_rows(p_grad, query_token, s_grad, dv, DV, BLOCK_DV, IS_WIDE).to(b_query.dtype)
        lse = tl.load(p_lse + o_lse + query_token * heads)
        delta = tl.load(p_delta + o_lse + query_token * heads)
        summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    elif EARLIER > 0:
        top = tl.load(p_lse + o_lse + query_token * heads) * LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        summed = load_rows(p_prior + o_lse * DV, query_token, heads * DV, dv, DV, BLOCK_DV, IS_WIDE)
    else:
        summed = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    u_0, u_1, u_2, is_key = slots(BLOCK_N, K_0, K_1, K_2)
    HAS_TAIL: tl.constexpr = K_0 * K_1 * K_2 < BLOCK_N
    last_0 = first_0 + step_0 * (size_0 - 1)
    last_1 = first_1 + step_1 * (size_1 - 1)
    last_2 = first_2 + step_2 * (size_2 - 1)
    count_0, count_1, count_2 = tl.cdiv(size_0, K_0), tl.cdiv(size_1, K_1), tl.cdiv(size_2, K_2)
    at_0, at_1, at_2 = 0, 0, 0
    for _ in range(count_0 * count_1 * count_2):
        from_0 = first_0 + step_0 * (at_0 * K_0)
        from_1 = first_1 + step_1 * (at_1 * K_1)
        from_2 = first_2 + step_2 * (at_2 * K_2)
        key_0, key_1, key_2 = from_0 + step_0 * u_0, from_1 + step_1 * u_1, from_2 + step_2 * u_2
        read_0 = on_axis(key_0, last_0, keys_0, WRAPS_0)
        read_1 = on_axis(key_1, last_1, keys_1, WRAPS_1)
        read_2 = on_axis(key_2, last_2, keys_2, WRAPS_2)
        key_token = (read_0 * m_1 + read_1) * m_2 + read_2
        b_key = load_rows(p_key, key_token, s_key, d, D, BLOCK_D, IS_WIDE)
        b_value = load_rows(p_value, key_token, s_value, dv, DV, BLOCK_DV, IS_WIDE)
        scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale
        if HAS_BIAS:
            column = ((at_0 * K_0 + u_0) * bias_1 + at_1 * K_1 + u_1) * bias_2 + at_2 * K_2 + u_2
            scores = add_bias(scores, p_bias, row, column, bias_0 * bias_1 * bias_2, 0)
        if HAS_TAIL:
            key_2 = tl.where(is_key, key_2, FAR)
        full_2 = is_inside(from_2, step_2, in_2, end_2, K_2) & (not HAS_TAIL)
        scores = hide(scores, low_2, high_2, key_2, full_2, 0, True)
        scores = hide(scores, low_1, high_1, key_1, is_inside(from_1, step_1, in_1, end_1, K_1), 0, RANK >= 2)
        scores = hide(scores, low_0, high_0, key_0, is_inside(from_0, step_0, in_0, end_0, K_0), 0, RANK == 3)
        scores = leave_out(
            scores, p_row, o_group, member_words, n_0, n_1, n_2, query_0, query_1, query_2, read_0, read_1, read_2,
            0, EARLIER, RANK, EARLIER_WRAPS,
        )  # fmt: skip
        total, top, summed = absorb(
            scores, b_key, b_value, b_grad, lse, delta, total, top, summed, IS_GRADIENT, PRECISION
        )
        at_0, at_1, at_2 = next_tile(at_0, at_1, at_2, count_1, count_2)
    if HAS_EXTRA:
        length = extra_tokens
        if HAS_LENGTHS:
            length = tl.minimum(tl.maximum(tl.load(p_extra_lengths + sample).to(tl.int32), 0), extra_tokens)
        for begin in range(0, length, BLOCK_N):
            token = begin + tl.arange(0, BLOCK_N)
            read = tl.minimum(token, length - 1)
            b_key = load_rows(p_extra_key, read, s_extra_key, d, D, BLOCK_D, IS_WIDE)
            b_value = load_rows(p_extra_value, read, s_extra_value, dv, DV, BLOCK_DV, IS_WIDE)
            scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale
            scores = tl.where((token < length)[None, :], scores, float("-inf"))
            total, top, summed = absorb(
                scores, b_key, b_value, b_grad, lse, delta, total, top, summed, IS_GRADIENT, PRECISION
            )
    if IS_GRADIENT:
        summed = summed * (scale / LOG2_E)
        if EARLIER > 0:
            summed += load_rows(p_prior + o_lse * D, query_token, heads * D, d, D, BLOCK_D, IS_WIDE)
        store_rows(p_out + o_lse * D, query_token, heads * D, d, summed, is_query, D, IS_WIDE)
    else:
        safe = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(total == 0.0, float("-inf"), (top + tl.math.log2(safe)) / LOG2_E)
        store_rows(p_out + o_lse * DV, query_token, heads * DV, dv, summed / safe[:, None], is_query, DV, IS_WIDE)
        tl.store(p_lse + o_lse + query_token * heads, lse, mask=is_query)


@triton.jit
def query_pass(
    p_query, p_key, p_value, p_out, p_prior, p_lse, p_grad, p_delta, p_tables, p_bias, p_extra_key, p_extra_value,
    p_extra_lengths, scale, programs, row_words, extra_tokens, bias_0, bias_1, bias_2, o_group, member_words,
    n_0, n_1, n_2, m_1, m_2, heads, shared, first_head, group_heads,
    s_query_sample, s_query, s_query_head, s_key_sample, s_key, s_key_head, s_value_sample, s_value, s_value_head,
    s_grad_sample, s_grad, s_grad_head, s_extra_key_sample, s_extra_key, s_extra_key_head,
    s_extra_value_sample, s_extra_value, s_extra_value_head,
    RANK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_0: tl.constexpr, Q_1: tl.constexpr, Q_2: tl.constexpr,
    PHASE_0: tl.constexpr, PHASE_1: tl.constexpr, PHASE_2: tl.constexpr,
    K_0: tl.constexpr, K_1: tl.constexpr, K_2: tl.constexpr,
    WRAPS_0: tl.constexpr, WRAPS_1: tl.constexpr, WRAPS_2: tl.constexpr,
    EARLIER: tl.constexpr, EARLIER_WRAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_ROWS: tl.constexpr, IS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    """All query tiles of a head group under one union member: `programs` programs for each of its heads and samples.

    With `HAS_ROWS` samples have tables of their own, and a program takes as many tiles as its sample needs.
    """
    program = tl.program_id(0)
    tile = program % programs
    own_head = program // programs % group_heads
    sample = program // programs // group_heads
    head = first_head + own_head
    kv_head = head // shared
    wide = sample.to(tl.int64)
    p_query += wide * s_query_sample + head * s_query_head
    p_key += wide * s_key_sample + kv_head * s_key_head
    p_value += wide * s_value_sample + kv_head * s_value_head
    p_row = p_tables
    if IS_GRADIENT:
        p_grad += wide * s_grad_sample + head * s_grad_head
    if HAS_BIAS:
        p_bias += own_head * (bias_0 * bias_1 * bias_2)
    if HAS_EXTRA:
        p_extra_key += wide * s_extra_key_sample + kv_head * s_extra_key_head
        p_extra_value += wide * s_extra_value_sample + kv_head * s_extra_value_head
    end = tile + 1
    if HAS_ROWS:
        p_row += wide * row_words
        o_0, o_1, o_2 = record_offsets(o_group + EARLIER * member_words, n_0, n_1, RANK)
        tiles_0, tiles_1, tiles_2 = count_tiles(
            p_row, o_0, o_1, o_2, Q_0, Q_1, Q_2, PHASE_0, PHASE_1, PHASE_2, RANK
        )  # fmt: skip
        end = tiles_0 * tiles_1 * tiles_2
    for number in range(tile, end, programs):
        query_tile(
            number, sample, head, p_query, p_key, p_value, p_out, p_prior, p_lse, p_grad, p_delta, p_row, p_bias,
            p_extra_key, p_extra_value, p_extra_lengths, scale, extra_tokens, bias_0, bias_1, bias_2, o_group,
            member_words, n_0, n_1, n_2, m_1, m_2, heads, s_query, s_key, s_value, s_grad, s_extra_key, s_extra_value,
            RANK, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, Q_0, Q_1, Q_2, PHASE_0, PHASE_1, PHASE_2, K_0, K_1, K_2,
            WRAPS_0, WRAPS_1, WRAPS_2, EARLIER, EARLIER_WRAPS, HAS_BIAS, HAS_EXTRA, HAS_LENGTHS, IS_GRADIENT,
            PRECISION, IS_WIDE,
        )  # fmt: skip
