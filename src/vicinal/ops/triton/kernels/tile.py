"""Parts of the kernels: tiles along an axis, rows of tokens, biases."""

import triton
import triton.language as tl

from vicinal.ops.triton.kernels.axes import HEADER, across, cut_class, header, needed_keys, tiles_of_axis

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def count_tiles(
    p_row, o_0, o_1, o_2, Q_0: tl.constexpr, Q_1: tl.constexpr, Q_2: tl.constexpr, PHASE_0: tl.constexpr,
    PHASE_1: tl.constexpr, PHASE_2: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """How many query tiles the sample has along each axis."""
    step_0, _, queries_0 = header(p_row, o_0, RANK == 3)
    step_1, _, queries_1 = header(p_row, o_1, RANK >= 2)
    step_2, _, queries_2 = header(p_row, o_2, True)
    classes_0, per_class_0 = tiles_of_axis(step_0, queries_0, Q_0, PHASE_0)
    classes_1, per_class_1 = tiles_of_axis(step_1, queries_1, Q_1, PHASE_1)
    classes_2, per_class_2 = tiles_of_axis(step_2, queries_2, Q_2, PHASE_2)
    return classes_0 * per_class_0, classes_1 * per_class_1, classes_2 * per_class_2


@triton.jit
def tile_on_axis(
    p_row, o_record, n, tile, PITCH: tl.constexpr, PHASE: tl.constexpr, WRAPS: tl.constexpr, IS_THERE: tl.constexpr
):
    """A tile along one axis.

    Returns step, keys of the axis, residue, begin and members of the class, first key, its number of keys, and the
    first and last key that all of its queries see.
    """
    step, keys, queries = header(p_row, o_record, IS_THERE)
    classes, per_class = tiles_of_axis(step, queries, PITCH, PHASE)
    residue, begin, members = cut_class(step, queries, classes, per_class, tile, PITCH, PHASE)
    first, size, inner_first, inner_last = needed_keys(
        p_row, o_record, n, step, keys, residue, begin, members, PITCH, WRAPS, IS_THERE
    )
    return step, keys, residue, begin, members, first, size, inner_first, inner_last


@triton.jit
def queries_on_axis(residue, step, begin, members, place):
    """Coordinates of a block's queries, an allowed one where there is none; and where there is one."""
    place = place + begin
    inside = (place >= 0) & (place < members)
    return residue + step * tl.minimum(tl.maximum(place, 0), members - 1), inside


@triton.jit
def bias_row(p_row, o_record, n, coordinate, step, first, length, IS_THERE: tl.constexpr):
    """Where along an axis each query reads the bias of the first key its tile needs."""
    row = coordinate * 0
    if IS_THERE:
        center = tl.load(p_row + o_record + HEADER + 2 * n + coordinate)
        row = (first - center) // step + length // 2
    return row


@triton.jit
def add_bias(scores, p_bias, row, column, size, ROW_AXIS: tl.constexpr):
    """Scores with the bias of each pair; what no query sees may get anything."""
    place = across(row, ROW_AXIS) + across(column, 1 - ROW_AXIS)
    bias = tl.load(p_bias + place, mask=(place >= 0) & (place < size), other=0.0)
    return scores + bias.to(tl.float32) * LOG2_E


@triton.jit
def is_inside(low, step, inner_first, inner_last, SIZE: tl.constexpr):
    """Whether every query sees every key of a tile along an axis."""
    return (low >= inner_first) & (low + step * (SIZE - 1) <= inner_last)


@triton.jit
def load_rows(p_rows, token, stride, columns, DIM: tl.constexpr, BLOCK: tl.constexpr, IS_WIDE: tl.constexpr):
    """Rows of some tokens, zero beyond `DIM`."""
    if IS_WIDE:
        token = token.to(tl.int64)
    p_block = p_rows + (token * stride)[:, None] + columns[None, :]
    if DIM == BLOCK:
        block = tl.load(p_block)
    else:
        block = tl.load(p_block, mask=columns[None, :] < DIM, other=0.0)
    return block


@triton.jit
def store_rows(p_rows, token, stride, columns, block, keep, DIM: tl.constexpr, IS_WIDE: tl.constexpr):
    """Store rows of some tokens."""
    if IS_WIDE:
        token = token.to(tl.int64)
    p_block = p_rows + (token * stride)[:, None] + columns[None, :]
    tl.store(p_block, block.to(p_rows.dtype.element_ty), mask=keep[:, None] & (columns[None, :] < DIM))
