"""Tables as patterns: parts of a grid, halos, streams, and queries that see nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Bounds, Near, Window, bounds

every_backend = pytest.mark.parametrize("backend", backends.usable())


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def half_blind(length: int = 8) -> Bounds:
    """The first queries of a row see keys, the others none."""
    return bounds(Near(3), (length,)).shift(0, -length, length + 2)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_query_without_keys_gives_zero_minus_infinity_and_zero_gradients(dtype: torch.dtype, backend: str) -> None:
    table = half_blind()
    sees = table.groups[0].members[0][0].count > 0
    assert 0 < sees.sum() < len(sees)
    blind = torch.from_numpy(~sees)
    query = normal(2, 8, 2, 4).to(dtype).requires_grad_()
    key, value = (normal(2, 10, 2, 4).to(dtype).requires_grad_() for _ in range(2))
    out, lse = vicinal.attention(query, key, value, table, return_lse=True, backend=backend)
    grads = torch.autograd.grad(
        (out, lse), (query, key, value), (normal(*out.shape).to(dtype), normal(*lse.shape).to(lse.dtype))
    )
    assert (out[:, blind] == 0).all()
    assert (lse[:, blind] == -torch.inf).all()
    assert lse[:, ~blind].isfinite().all()
    assert (grads[0][:, blind] == 0).all()
    assert (grads[0][:, ~blind] != 0).any()
    unseen = torch.ones(10, dtype=torch.bool)
    for first, count in zip(table.groups[0].members[0][0].start, table.groups[0].members[0][0].count, strict=True):
        unseen[first : first + count] = False
    assert unseen.any()
    for grad in grads[1:]:
        assert (grad[:, unseen] == 0).all()
        assert grad.isfinite().all()


@every_backend
def test_grid_where_no_query_sees_any_key_gives_zeros(backend: str) -> None:
    table = bounds(Near(3), (6, 5)).shift(0, 40, 4)
    query = normal(1, 6, 5, 2, 4).requires_grad_()
    key, value = (normal(1, 4, 5, 2, 4).requires_grad_() for _ in range(2))
    out, lse = vicinal.attention(query, key, value, table, return_lse=True, backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad((out, lse), (query, key, value), (torch.ones_like(out), torch.ones_like(lse)))
    assert not any(grad.any() for grad in grads)


@every_backend
def test_sliced_bounds_with_bias_equal_the_rows_of_the_whole(backend: str) -> None:
    query, key, value = normal(3, 2, 9, 10, 2, 4, dtype=torch.float64).unbind(0)
    pattern = (Near(3, dilation=2), Window(4, shift=1))
    bias = normal(2, 5, 7, dtype=torch.float64)
    whole, lse = vicinal.attention(query, key, value, pattern, bias=bias, return_lse=True, backend=backend)
    table = bounds(pattern, (9, 10)).slice(0, 2, 7).slice(1, 3, 4)
    part, part_lse = vicinal.attention(
        query[:, 2:7, 3:4], key, value, table, bias=bias, return_lse=True, backend=backend
    )
    torch.testing.assert_close(part, whole[:, 2:7, 3:4])
    torch.testing.assert_close(part_lse, lse[:, 2:7, 3:4])


@every_backend
@pytest.mark.parametrize("border", ["shift", "crop", "wrap"])
def test_halo_rank_with_bias_equals_its_rows_of_the_whole(border: Any, backend: str) -> None:
    """What a rank of a sharded grid does: its own queries against its own keys and a halo, also around the seam."""
    query, key, value = normal(3, 1, 16, 3, 2, 4, dtype=torch.float64).unbind(0)
    pattern = (Near(5, border=border), Near(3))
    bias = normal(2, 9, 5, dtype=torch.float64)
    whole = vicinal.attention(query, key, value, pattern, bias=bias, backend=backend)
    for begin in range(0, 16, 4):
        reach = [row % 16 for row in range(begin - 2, begin + 6)] if border == "wrap" else range(max(begin - 2, 0), 16)
        table = bounds(pattern, (16, 3)).slice(0, begin, begin + 4)
        table = table.shift(0, begin - 2, 8) if border == "wrap" else table.shift(0, reach[0], len(reach))
        if border == "shift" and begin == 12:  # the last windows are moved inward and reach further
            continue
        rows = list(reach)
        part = vicinal.attention(
            query[:, begin : begin + 4], key[:, rows], value[:, rows], table, bias=bias, backend=backend
        )
        torch.testing.assert_close(part, whole[:, begin : begin + 4])


@every_backend
def test_streamed_keys_equal_the_whole_under_a_causal_pattern(backend: str) -> None:
    query, key, value = normal(3, 1, 12, 3, 2, 4, dtype=torch.float64).unbind(0)
    pattern = (Near(4, causal=True), Near(3))
    whole = vicinal.attention(query, key, value, pattern, backend=backend)
    for step in range(12):
        forgotten = max(step - 3, 0)
        table = bounds(pattern, (12, 3)).slice(0, step, step + 1).shift(0, forgotten, step + 1 - forgotten)
        kept = slice(forgotten, step + 1)
        out = vicinal.attention(query[:, step : step + 1], key[:, kept], value[:, kept], table, backend=backend)
        torch.testing.assert_close(out, whole[:, step : step + 1])
