"""Who sees me: the transposed tables, made on the device, and what the passes of the backward have in common.

The record of a key axis with m keys is `residue[m]`, then for each turn of the axis `begin[m]`, `end[m]`: the
queries that see the key, as places `begin <= place < end` in the residue class. On a wrapping axis a key stands at
several unwrapped coordinates, one for each of `TURNS` turns, and those that see it at one of them are a range.
"""

import triton
import triton.language as tl

from vicinal.ops.triton.kernels.axes import HEADER
from vicinal.ops.triton.kernels.tile import LOG2_E

TURNS = tl.constexpr(4)


@triton.jit
def first_beyond(p_first, n, residue, step, members, key, bits, IS_LAST: tl.constexpr):
    """For each key the first place in a class whose last key is not before it, or whose first key is behind it."""
    low, high = members * 0, members
    for _ in range(bits):
        middle = (low + high) // 2
        query = residue + step * tl.minimum(middle, tl.maximum(members - 1, 0))
        edge = tl.load(p_first + query)
        if IS_LAST:
            is_beyond = edge + step * (tl.load(p_first + n + query) - 1) >= key
        else:
            is_beyond = edge > key
        searching = low < high
        high = tl.where(searching & is_beyond, middle, high)
        low = tl.where(searching & (is_beyond == 0), middle + 1, low)
    return low


@triton.jit
def watchers_kernel(
    p_tables, p_watchers, row_words, watcher_words, o_0, o_1, o_2, o_watchers_1, o_watchers_2, n_0, n_1, n_2,
    m_0, m_1, m_2, bits, RANK: tl.constexpr, HAS_TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The records of a block of keys, on one axis, for one row of the tables."""
    axis = tl.program_id(1) + 3 - RANK
    p_row = p_tables + tl.program_id(2).to(tl.int64) * row_words
    p_out = p_watchers + tl.program_id(2).to(tl.int64) * watcher_words
    o_record = tl.where(axis == 0, o_0, tl.where(axis == 1, o_1, o_2))
    p_out += tl.where(axis == 0, 0, tl.where(axis == 1, o_watchers_1, o_watchers_2))
    n = tl.where(axis == 0, n_0, tl.where(axis == 1, n_1, n_2))
    m = tl.where(axis == 0, m_0, tl.where(axis == 1, m_1, m_2))
    step = tl.load(p_row + o_record)
    keys = tl.load(p_row + o_record + 1)
    queries = tl.load(p_row + o_record + 3)
    p_first = p_row + o_record + HEADER
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    residue = tl.full([BLOCK], -1, tl.int32)
    for candidate in range(tl.minimum(step, queries)):
        theirs = (tl.load(p_first + candidate) % step + step) % step
        residue = tl.where(key % step == theirs, candidate, residue)
    known = residue >= 0
    residue = tl.maximum(residue, 0)
    members = tl.where(known, tl.cdiv(queries - residue, step), 0)
    keep = key < m
    tl.store(p_out + key, residue, mask=keep)
    for turn in tl.static_range(TURNS if HAS_TURNS else 1):
        unwrapped = key
        if HAS_TURNS:
            # an axis that does not wrap has turn 0 only; the others get nobody
            wraps = tl.load(p_row + o_record + 2) != 0
            unwrapped = tl.where(wraps, key + (turn - 1) * keys, tl.where(turn == 1, key, key * 0 - (1 << 29)))
        begin = first_beyond(p_first, n, residue, step, members, unwrapped, bits, True)
        end = first_beyond(p_first, n, residue, step, members, unwrapped, bits, False)
        tl.store(p_out + (1 + 2 * turn) * m + key, begin, mask=keep)
        tl.store(p_out + (2 + 2 * turn) * m + key, tl.maximum(end, begin), mask=keep)


@triton.jit
def row_sums_kernel(
    p_out, p_grad, p_lse, p_grad_lse, p_lse_2, p_delta, rows, tokens, heads, s_grad_sample, s_grad, s_grad_head,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """What the gradient of every score of a row has in common, and the lse as the passes take it.

    `delta` is the sum of the output times its gradient, less the gradient of the lse. `lse_2` is in powers of two,
    and inf where nothing is seen, which makes every weight 0.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = row < rows
    dv = tl.arange(0, BLOCK_DV)
    mask = keep[:, None] & (dv < DV)[None, :]
    delta = tl.zeros([BLOCK], tl.float32)
    if HAS_GRAD:
        place = row // heads // tokens * s_grad_sample + row // heads % tokens * s_grad + row % heads * s_grad_head
        grad = tl.load(p_grad + place[:, None] + dv[None, :], mask=mask, other=0.0).to(tl.float32)
        out = tl.load(p_out + row[:, None] * DV + dv[None, :], mask=mask, other=0.0).to(tl.float32)
        delta = tl.sum(grad * out, 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(p_grad_lse + row, mask=keep, other=0.0)
    lse = tl.load(p_lse + row, mask=keep, other=0.0)
    tl.store(p_lse_2 + row, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=keep)
    tl.store(p_delta + row, delta, mask=keep)
