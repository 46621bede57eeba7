"""Gradients that sum over all queries: of the extra tokens, and of the position bias.

Each program sums a fixed share of the queries in a fixed order and writes its own partial result; the few partial
results are added up afterwards. Nothing is added atomically, so the bits are the same every time.
"""

import triton
import triton.language as tl

from vicinal.ops.triton.kernels.axes import HEADER, header, record_offsets
from vicinal.ops.triton.kernels.tile import LOG2_E, load_rows


@triton.jit
def own_queries(p_row, o_0, o_1, o_2, RANK: tl.constexpr):
    """The sample's own grid."""
    _, _, own_0 = header(p_row, o_0, RANK == 3)
    _, _, own_1 = header(p_row, o_1, RANK >= 2)
    _, _, own_2 = header(p_row, o_2, True)
    return own_0, own_1, own_2


@triton.jit
def extra_pass(
    p_query, p_extra_key, p_extra_value, p_grad_key, p_grad_value, p_lse, p_grad, p_delta, p_tables, p_extra_lengths,
    scale, row_words, extra_tokens, splits, samples, n_0, n_1, n_2, heads, kv_heads, shared,
    s_query_sample, s_query, s_query_head, s_grad_sample, s_grad, s_grad_head,
    s_extra_key_sample, s_extra_key, s_extra_key_head, s_extra_value_sample, s_extra_value, s_extra_value_head,
    RANK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Partial gradients of a block of extra tokens over one share of the queries."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    kv_head = tl.program_id(1) % kv_heads
    sample = (tl.program_id(1) // kv_heads).to(tl.int64)
    p_row = p_tables
    if HAS_ROWS:
        p_row += sample * row_words
    o_0, o_1, o_2 = record_offsets(0, n_0, n_1, RANK)
    own_0, own_1, own_2 = own_queries(p_row, o_0, o_1, o_2, RANK)
    length = extra_tokens
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(p_extra_lengths + sample).to(tl.int32), 0), extra_tokens)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_there = token < length
    p_extra_key += sample * s_extra_key_sample + kv_head * s_extra_key_head
    p_extra_value += sample * s_extra_value_sample + kv_head * s_extra_value_head
    b_key = tl.load(
        p_extra_key + (token * s_extra_key)[:, None] + d[None, :], mask=is_there[:, None] & (d < D)[None, :], other=0.0
    )
    b_value = tl.load(
        p_extra_value + (token * s_extra_value)[:, None] + dv[None, :],
        mask=is_there[:, None] & (dv < DV)[None, :],
        other=0.0,
    )
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    p_query += sample * s_query_sample + kv_head * shared * s_query_head
    p_grad += sample * s_grad_sample + kv_head * shared * s_grad_head
    queries = own_0 * own_1 * own_2
    for own_head in range(shared):
        o_lse = sample * n_0 * n_1 * n_2 * heads + kv_head * shared + own_head
        for begin in range(split * BLOCK_M, queries, splits * BLOCK_M):
            number = begin + tl.arange(0, BLOCK_M)
            is_query = number < queries
            number = tl.minimum(number, queries - 1)
            query_token = number // (own_1 * own_2) * n_1 + number // own_2 % own_1
            query_token = query_token * n_2 + number % own_2
            b_query = load_rows(p_query + own_head * s_query_head, query_token, s_query, d, D, BLOCK_D, IS_WIDE)
            b_grad = load_rows(p_grad + own_head * s_grad_head, query_token, s_grad, dv, DV, BLOCK_DV, IS_WIDE)
            b_grad = b_grad.to(b_query.dtype)
            lse = tl.load(p_lse + o_lse + query_token * heads)
            delta = tl.load(p_delta + o_lse + query_token * heads)
            scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * scale
            seen = is_there[:, None] & is_query[None, :]
            weights = tl.where(seen, tl.math.exp2(scores - lse[None, :]), 0.0)
            grad_value = tl.dot(weights.to(b_grad.dtype), b_grad, grad_value, input_precision=PRECISION)
            slopes = tl.dot(b_value, tl.trans(b_grad), input_precision=PRECISION)
            slopes = weights * (slopes - delta[None, :])
            grad_key = tl.dot(slopes.to(b_query.dtype), b_query, grad_key, input_precision=PRECISION)
    row = ((split * samples + sample) * extra_tokens + token) * kv_heads + kv_head
    keep = (token < extra_tokens)[:, None]
    p_grad_key += row[:, None] * D + d[None, :]
    tl.store(p_grad_key, grad_key * (scale / LOG2_E), mask=keep & (d < D)[None, :])
    tl.store(p_grad_value + row[:, None] * DV + dv[None, :], grad_value, mask=keep & (dv < DV)[None, :])


@triton.jit
def pair_on_axis(p_row, o_record, n, query, place, length, IS_THERE: tl.constexpr):
    """The key at an entry of the bias along an axis, and whether each query sees it."""
    key, seen = query * 0, query >= 0
    if IS_THERE:
        step = tl.load(p_row + o_record)
        keys = tl.load(p_row + o_record + 1)
        p_start = p_row + o_record + HEADER + query
        first = tl.load(p_start)
        span = step * (tl.load(p_start + n) - 1)
        distance = tl.load(p_start + 2 * n) + step * (place - length // 2) - first
        seen = (distance >= 0) & (distance <= span)
        key = tl.where(seen, (first + distance + keys) % keys, 0)
    return key, seen


@triton.jit
def bias_pass(
    p_query, p_key, p_value, p_grad_bias, p_lse, p_grad, p_delta, p_tables, p_bias, scale, samples, splits, row_words,
    bias_0, bias_1, bias_2, o_group, n_0, n_1, n_2, m_1, m_2, heads, shared, first_head, group_heads,
    s_query_sample, s_query, s_query_head, s_key_sample, s_key, s_key_head, s_value_sample, s_value, s_value_head,
    s_grad_sample, s_grad, s_grad_head,
    RANK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_ROWS: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of one entry of one head's bias, over one share of the queries.

    All pairs of an entry are as far apart as each other: row i of a block of queries meets row i of a block of keys,
    and no matrix product is needed.
    """
    entry, own_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = first_head + own_head
    place_0, place_1, place_2 = entry // (bias_1 * bias_2), entry // bias_2 % bias_1, entry % bias_2
    entries = bias_0 * bias_1 * bias_2
    bias = tl.load(p_bias + own_head * entries + entry).to(tl.float32) * LOG2_E
    o_0, o_1, o_2 = record_offsets(o_group, n_0, n_1, RANK)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    summed = tl.zeros([BLOCK_M], tl.float32)
    for number in range(samples):
        sample = number + entry.to(tl.int64) * 0
        p_row = p_tables
        if HAS_ROWS:
            p_row += sample * row_words
        own_0, own_1, own_2 = own_queries(p_row, o_0, o_1, o_2, RANK)
        queries = own_0 * own_1 * own_2
        p_own_query = p_query + sample * s_query_sample + head * s_query_head
        p_own_grad = p_grad + sample * s_grad_sample + head * s_grad_head
        p_own_key = p_key + sample * s_key_sample + head // shared * s_key_head
        p_own_value = p_value + sample * s_value_sample + head // shared * s_value_head
        o_lse = sample * n_0 * n_1 * n_2 * heads + head
        for begin in range(split * BLOCK_M, queries, splits * BLOCK_M):
            number_in = begin + tl.arange(0, BLOCK_M)
            seen = number_in < queries
            number_in = tl.minimum(number_in, queries - 1)
            query_0, query_1 = number_in // (own_1 * own_2), number_in // own_2 % own_1
            query_2 = number_in % own_2
            key_0, seen_0 = pair_on_axis(p_row, o_0, n_0, query_0, place_0, bias_0, RANK == 3)
            key_1, seen_1 = pair_on_axis(p_row, o_1, n_1, query_1, place_1, bias_1, RANK >= 2)
            key_2, seen_2 = pair_on_axis(p_row, o_2, n_2, query_2, place_2, bias_2, True)
            seen = seen & seen_0 & seen_1 & seen_2
            query_token = (query_0 * n_1 + query_1) * n_2 + query_2
            key_token = (key_0 * m_1 + key_1) * m_2 + key_2
            b_query = load_rows(p_own_query, query_token, s_query, d, D, BLOCK_D, IS_WIDE).to(tl.float32)
            b_key = load_rows(p_own_key, key_token, s_key, d, D, BLOCK_D, IS_WIDE).to(tl.float32)
            scores = tl.sum(b_query * b_key, 1) * scale + bias
            b_grad = load_rows(p_own_grad, query_token, s_grad, dv, DV, BLOCK_DV, IS_WIDE).to(tl.float32)
            b_value = load_rows(p_own_value, key_token, s_value, dv, DV, BLOCK_DV, IS_WIDE).to(tl.float32)
            lse = tl.load(p_lse + o_lse + query_token * heads)
            delta = tl.load(p_delta + o_lse + query_token * heads)
            slopes = tl.math.exp2(scores - lse) * (tl.sum(b_grad * b_value, 1) - delta)
            summed += tl.where(seen, slopes, 0.0)
    tl.store(p_grad_bias + (split * group_heads + own_head) * entries + entry, tl.sum(summed))
