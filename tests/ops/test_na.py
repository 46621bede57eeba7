"""NATTEN's names against NATTEN's rule, written out query by query."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import vicinal
from vicinal.pattern import Near

FUNCTIONS = (vicinal.na1d, vicinal.na2d, vicinal.na3d)


def keys(query: int, length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> list[int]:
    """What a query sees along one axis, by NATTEN's rule; defined where kernel_size * dilation <= length."""
    group, place = query % dilation, query // dilation
    members = len(range(group, length, dilation))
    if is_causal:
        leader = min((place // stride) * stride + stride - 1, members - 1)
        first, end = max(leader - kernel_size + 1, 0), place + 1
    else:
        left, right = kernel_size // 2, kernel_size // 2 + kernel_size % 2 - 1
        leader = min((place // stride) * stride + stride // 2, members - 1)
        center = min(max(leader, left), members - 1 - right)
        first, end = center - left, center + right + 1
    return [group + dilation * at for at in range(first, end)]


def by_hand(
    tensors: tuple[torch.Tensor, ...], window: list[tuple[Any, ...]], extra: tuple[torch.Tensor, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention one query at a time, over the keys it sees and the additional ones."""
    query, key, value = tensors
    grid, shared = query.shape[1:-2], query.shape[-2] // key.shape[-2]
    key, value = (tensor.repeat_interleave(shared, -2) for tensor in (key, value))
    out, lse = query.new_zeros(*query.shape[:-1], value.shape[-1]), query.new_zeros(query.shape[:-1])
    for place in itertools.product(*map(range, grid)):
        seen = [keys(at, length, *kind) for at, length, kind in zip(place, grid, window, strict=True)]
        where = list(itertools.product(*seen))
        own_key = torch.stack([key[(slice(None), *at)] for at in where], 1)
        own_value = torch.stack([value[(slice(None), *at)] for at in where], 1)
        if extra is not None:
            own_key = torch.cat([own_key, extra[0].repeat_interleave(shared, -2)], 1)
            own_value = torch.cat([own_value, extra[1].repeat_interleave(shared, -2)], 1)
        here = (slice(None), *place)
        scores = torch.einsum("bhd,bkhd->bhk", query[here], own_key) * query.shape[-1] ** -0.5
        out[here] = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), own_value)
        lse[here] = scores.logsumexp(-1)
    return out, lse


PROBLEMS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((17,), {"kernel_size": 5}),
    ((17,), {"kernel_size": 17}),
    ((18,), {"kernel_size": 4, "stride": 3, "dilation": 3}),
    ((19,), {"kernel_size": 6, "stride": 2, "dilation": 2, "is_causal": True}),
    ((9, 11), {"kernel_size": 3}),
    ((9, 11), {"kernel_size": (4, 3), "stride": (2, 1), "dilation": (1, 3)}),
    ((10, 8), {"kernel_size": (5, 2), "stride": (5, 2), "is_causal": (False, True)}),
    ((5, 12), {"kernel_size": [5, 6], "stride": 4, "dilation": [1, 2], "is_causal": [True, False]}),
    ((4, 5, 6), {"kernel_size": 2}),
    (
        (7, 4, 5),
        {"kernel_size": (3, 2, 4), "stride": (2, 1, 3), "dilation": (2, 2, 1), "is_causal": (True, False, False)},
    ),
]


def each_axis(rank: int, value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value] * rank


@pytest.mark.parametrize("extra_tokens", [0, 3])
@pytest.mark.parametrize(
    ("grid", "window"), PROBLEMS, ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None
)
def test_natten_names_follow_nattens_rule(grid: tuple[int, ...], window: dict[str, Any], extra_tokens: int) -> None:
    rank = len(grid)
    query = torch.randn(2, *grid, 4, 3, dtype=torch.float64)
    key, value = torch.randn(2, *grid, 2, 3, dtype=torch.float64), torch.randn(2, *grid, 2, 5, dtype=torch.float64)
    extra = None
    additional = {}
    if extra_tokens:
        extra = torch.randn(2, extra_tokens, 2, 3).double(), torch.randn(2, extra_tokens, 2, 5).double()
        additional = {"additional_keys": extra[0], "additional_values": extra[1]}
    defaults: dict[str, Any] = {"stride": 1, "dilation": 1, "is_causal": False} | window
    per_axis = zip(
        *(each_axis(rank, defaults[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")), strict=True
    )
    wanted, wanted_lse = by_hand((query, key, value), list(per_axis), extra)
    out, lse = FUNCTIONS[rank - 1](query, key, value, **window, **additional, return_lse=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


def test_natten_arguments_may_stand_in_nattens_order() -> None:
    query, key, value = torch.randn(3, 1, 12, 10, 2, 4).unbind(0)
    extra = torch.randn(1, 2, 2, 4)
    by_place = vicinal.na2d(query, key, value, (4, 3), 2, (1, 3), (True, False), 0.3, extra, extra)
    by_name = vicinal.na2d(
        query, key, value, kernel_size=(4, 3), stride=2, dilation=(1, 3), is_causal=(True, False), scale=0.3,
        additional_keys=extra, additional_values=extra,
    )  # fmt: skip
    assert torch.equal(by_place, by_name)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_names_equal_attention_under_near(rank: int) -> None:
    grid = (5, 6, 7)[:rank]
    query, key, value = torch.randn(3, 1, *grid, 2, 4).unbind(0)
    bias = torch.randn(2, *(5,) * rank)
    out = FUNCTIONS[rank - 1](query, key, value, 3, bias=bias)
    assert torch.equal(out, vicinal.attention(query, key, value, Near(3), bias=bias))


@pytest.mark.parametrize("kernel_size", [1, 9, (1, 20)], ids=str)
def test_windows_nattens_functions_refuse_are_ordinary(kernel_size: Any) -> None:
    """A kernel of 1, one that is larger than the axis, an axis of length 1."""
    query, key, value = torch.randn(3, 1, 1, 6, 2, 4).unbind(0)
    out = vicinal.na2d(query, key, value, kernel_size)
    wide = kernel_size if isinstance(kernel_size, int) else kernel_size[1]
    if wide == 1:
        torch.testing.assert_close(out, value)
    else:
        full = torch.nn.functional.scaled_dot_product_attention(*(t[:, 0].transpose(1, 2) for t in (query, key, value)))
        torch.testing.assert_close(out[:, 0], full.transpose(1, 2))


def test_scale_of_zero_is_zero() -> None:
    """`scale or default` would turn it into the default, as NATTEN does."""
    query, key, value = torch.randn(3, 1, 7, 1, 4).unbind(0)
    torch.testing.assert_close(
        vicinal.na1d(query, key, value, 7, scale=0.0), value.mean(1, keepdim=True).expand(1, 7, 1, 4)
    )


def test_kernel_and_stride_that_divide_the_axis_are_windows() -> None:
    query, key, value = torch.randn(3, 1, 12, 8, 2, 4).unbind(0)
    blocks = vicinal.attention(query, key, value, vicinal.Window(4))
    torch.testing.assert_close(vicinal.na2d(query, key, value, 4, stride=4), blocks)
