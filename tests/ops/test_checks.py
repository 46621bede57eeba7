"""Bad input: a `ValueError` that names the argument, what came and what is allowed, before any work is done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vicinal
from vicinal.pattern import Bounds, Full, Grid, Near, Window, bounds, heads, union

Q = torch.zeros(2, 6, 9, 4, 8)
EXTRA = torch.zeros(2, 3, 4, 8)
META = torch.zeros(2, 6, 9, 4, 8, device="meta")
TRANSPOSED = bounds(Near(3), (6, 9)).transpose()
GROUPS = heads(Near(3), Full())


def numbers(*values: Any) -> torch.Tensor:
    return torch.tensor(values)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    # query, key, value
    "query-list": ({"query": [1.0]}, "query must be a torch.Tensor, got list"),
    "query-int": ({"query": Q.int()}, "query must be float32, float16, bfloat16 or float64, got torch.int32"),
    "query-complex": ({"query": Q.to(torch.complex64)}, "query must be float32, .* got torch.complex64"),
    "query-sparse": ({"query": Q.to_sparse()}, "query must be a dense .* tensor, got layout torch.sparse_coo"),
    "query-3-axes": ({"query": Q[0, 0]}, r"query must have 4 or 5 or 6 axes .*got 3: \(9, 4, 8\)"),
    "query-7-axes": ({"query": Q[None, None]}, r"query must have 4 or 5 or 6 axes .*got 7"),
    "query-no-heads": ({"query": Q[..., :0, :]}, r"query must have no empty axis but the batch, got \(2, 6, 9, 0, 8\)"),
    "query-no-dim": ({"query": Q[..., :0], "key": Q[..., :0]}, "query must have no empty axis but the batch"),
    "query-empty-grid": ({"query": Q[:, :0], "key": Q[:, :0], "value": Q[:, :0]}, "query must have no empty axis"),
    "key-none": ({"key": None}, "key must be a torch.Tensor, got NoneType"),
    "key-dtype": ({"key": Q.double()}, r"key must have the dtype of query \(torch.float32\), got torch.float64"),
    "key-device": ({"key": META}, r"key must be on the device of query \(cpu\), got meta"),
    "key-axes": ({"key": Q[:, 0]}, r"key must have 5 axes like query, got 4: \(2, 9, 4, 8\)"),
    "key-batch": ({"key": Q[:1]}, r"key must have the batch of query \(2\), got 1"),
    "key-dim": ({"key": Q[..., :7]}, r"key must have the head_dim of query \(8\), got 7"),
    "key-heads": ({"key": Q[..., :3, :]}, r"key must have a number of heads that divides the query's \(4\), got 3"),
    "key-more-heads": (
        {"query": Q[..., :2, :]},
        r"key must have a number of heads that divides the query's \(2\), got 4",
    ),
    "key-empty": ({"key": Q[:, :, :0], "value": Q[:, :, :0]}, "key must have no empty axis but the batch"),
    "value-none": ({"value": None}, "value must be a torch.Tensor, got NoneType"),
    "value-grid": ({"value": Q[:, :5]}, r"value must have the grid and heads of key \(6, 9, 4\), got \(5, 9, 4\)"),
    "value-heads": (
        {"value": Q[..., :2, :]},
        r"value must have the grid and heads of key \(6, 9, 4\), got \(6, 9, 2\)",
    ),
    "value-dim": ({"value": Q[..., :0]}, "value must have no empty axis but the batch"),
    "value-dtype": ({"value": Q.half()}, r"value must have the dtype of query \(torch.float32\), got torch.float16"),
    # scale
    "scale-nan": ({"scale": float("nan")}, "scale must be None or a finite number, got nan"),
    "scale-inf": ({"scale": float("inf")}, "scale must be None or a finite number, got inf"),
    "scale-text": ({"scale": "1"}, "scale must be None or a finite number, got '1'"),
    "scale-flag": ({"scale": True}, "scale must be None or a finite number, got True"),
    "scale-tensor": ({"scale": torch.ones(2)}, "scale must be None or a finite number, got tensor"),
    # bias
    "bias-list-of-numbers": ({"bias": 3.0}, "bias must be a tensor, got float"),
    "bias-shape": ({"bias": torch.zeros(4, 5, 4)}, r"bias must have shape \(4, 5, 5\) .*got \(4, 5, 4\)"),
    "bias-heads": ({"bias": torch.zeros(1, 5, 5)}, r"bias must have shape \(4, 5, 5\) .*got \(1, 5, 5\)"),
    "bias-dtype": ({"bias": torch.zeros(4, 5, 5).half()}, "bias must be float32 or have the dtype of query"),
    "bias-int": ({"bias": torch.zeros(4, 5, 5).int()}, "bias must be float32, float16"),
    "bias-device": (
        {"bias": torch.zeros(4, 5, 5, device="meta")},
        r"bias must be on the device of query \(cpu\), got meta",
    ),
    "bias-two-tables": ({"bias": (torch.zeros(4, 5, 5),) * 2}, "bias must be a .*1 tensors?.* got 2"),
    "bias-union": (
        {"pattern": union(Near(3), Near(5)), "bias": torch.zeros(4, 5, 5)},
        "bias must be None for this pattern: a union",
    ),
    "bias-transposed": ({"pattern": TRANSPOSED, "bias": torch.zeros(4, 5, 5)}, "bias must be None for this pattern"),
    "bias-one-for-groups": (
        {"pattern": GROUPS, "bias": torch.zeros(4, 5, 5)},
        "bias must be a tuple of 2 tensors, one per group .*got Tensor",
    ),
    "bias-groups-count": (
        {"pattern": GROUPS, "bias": (torch.zeros(2, 5, 5),)},
        "bias must be a tuple of 2 tensors, one per group of heads, got 1",
    ),
    "bias-groups-shape": (
        {"pattern": GROUPS, "bias": (torch.zeros(2, 5, 5), torch.zeros(2, 5, 5))},
        r"bias\[1\] must have shape \(2, 11, 17\)",
    ),
    "bias-groups-union": (
        {"pattern": heads(Near(3), union(Near(3), Full())), "bias": (torch.zeros(2, 5, 5), torch.zeros(2, 5, 5))},
        r"bias\[1\] must be None for this pattern: a union",
    ),
    # extra tokens
    "extra-key-alone": ({"extra_key": EXTRA}, "extra_value must be given too"),
    "extra-value-alone": ({"extra_value": EXTRA}, "extra_key must be given too"),
    "extra-key-type": ({"extra_key": 3, "extra_value": EXTRA}, "extra_key must be a torch.Tensor, got int"),
    "extra-key-axes": ({"extra_key": EXTRA[0], "extra_value": EXTRA}, r"extra_key must have shape .*got \(3, 4, 8\)"),
    "extra-key-batch": (
        {"extra_key": EXTRA[:1], "extra_value": EXTRA},
        r"extra_key must have shape .*got \(1, 3, 4, 8\)",
    ),
    "extra-key-heads": (
        {"extra_key": EXTRA[:, :, :2], "extra_value": EXTRA},
        r"extra_key must have shape .*got \(2, 3, 2, 8\)",
    ),
    "extra-value-dim": (
        {"extra_key": EXTRA, "extra_value": EXTRA[..., :4]},
        r"extra_value must have shape .*got \(2, 3, 4, 4\)",
    ),
    "extra-value-tokens": (
        {"extra_key": EXTRA, "extra_value": EXTRA[:, :2]},
        r"extra_value must have as many tokens as extra_key \(3\), got 2",
    ),
    "extra-key-dtype": ({"extra_key": EXTRA.double(), "extra_value": EXTRA}, "extra_key must have the dtype of query"),
    "lengths-alone": ({"extra_lengths": numbers(1, 2)}, "extra_lengths must be None where extra_key is None"),
    "lengths-type": (
        {"extra_key": EXTRA, "extra_value": EXTRA, "extra_lengths": [1, 2]},
        "extra_lengths must be an int64 tensor, got list",
    ),
    "lengths-dtype": (
        {"extra_key": EXTRA, "extra_value": EXTRA, "extra_lengths": numbers(1, 2).int()},
        "extra_lengths must be an int64 tensor, got torch.int32",
    ),
    "lengths-shape": (
        {"extra_key": EXTRA, "extra_value": EXTRA, "extra_lengths": numbers(1, 2, 3)},
        r"extra_lengths must have shape \(2,\), got \(3,\)",
    ),
    "lengths-too-long": (
        {"extra_key": EXTRA, "extra_value": EXTRA, "extra_lengths": numbers(1, 4)},
        r"extra_lengths must lie in 0\.\.3, got \[1, 4\]",
    ),
    "lengths-negative": (
        {"extra_key": EXTRA, "extra_value": EXTRA, "extra_lengths": numbers(-1, 0)},
        r"extra_lengths must lie in 0\.\.3, got \[-1, 0\]",
    ),
    "extra-query-axes": ({"extra_query": EXTRA[0]}, r"extra_query must have shape .*got \(3, 4, 8\)"),
    "extra-query-heads": ({"extra_query": EXTRA[:, :, :2]}, r"extra_query must have shape .*got \(2, 3, 2, 8\)"),
    "extra-query-batch": ({"extra_query": EXTRA[:1]}, r"extra_query must have shape .*got \(1, 3, 4, 8\)"),
    "extra-query-dtype": ({"extra_query": EXTRA.double()}, "extra_query must have the dtype of query"),
    "extra-query-type": ({"extra_query": "cls"}, "extra_query must be a torch.Tensor, got str"),
    # padded batches
    "grids-type": ({"grids": [[6, 9], [1, 1]]}, "grids must be an int64 tensor, got list"),
    "grids-dtype": ({"grids": numbers((6, 9), (1, 1)).int()}, "grids must be an int64 tensor, got torch.int32"),
    "grids-shape": ({"grids": numbers(6, 9)}, r"grids must have shape \(2, 2\), got \(2,\)"),
    "grids-too-large": (
        {"grids": numbers((6, 9), (7, 1))},
        r"grids\[1\] must lie between 1 and the padded grid \(6, 9\), got \(7, 1\)",
    ),
    "grids-zero": ({"grids": numbers((6, 0), (1, 1))}, r"grids\[0\] must lie between 1 and .*got \(6, 0\)"),
    "grids-two-grids": (
        {"query": Q[:, :3], "grids": numbers((3, 9), (1, 1))},
        r"grids must be None where the grid \(3, 9\) and the key grid \(6, 9\) differ",
    ),
    "grids-bounds": (
        {"pattern": bounds(Near(3), (6, 9)), "grids": numbers((6, 9), (1, 1))},
        "grids must be None where pattern is a Bounds",
    ),
    "grids-kind": (
        {"pattern": Grid(3), "grids": numbers((6, 9), (4, 9))},
        r"grids\[1\] = \(4, 9\) does not suit Grid\(3\): size must divide the axis, 3 does not divide 4",
    ),
    "grids-wrap": (
        {"pattern": (Near(3, dilation=2, border="wrap"), Near(3)), "grids": numbers((6, 9), (5, 9))},
        r"grids\[1\] = \(5, 9\) does not suit .*dilation that divides",
    ),
    # patterns
    "pattern-number": ({"pattern": 7}, "pattern must be an axis kind or a tuple of 1 to 3 axis kinds, got 7"),
    "pattern-class": ({"pattern": Near}, r"pattern must be an axis kind .*write Near\(...\)"),
    "pattern-text": ({"pattern": "Near(3)"}, "pattern must be an axis kind"),
    "pattern-list": ({"pattern": [Near(3), Near(3)]}, "pattern must be an axis kind"),
    "pattern-mixed": ({"pattern": (Near(3), 5)}, "pattern must be an axis kind"),
    "pattern-none": ({"pattern": None}, "pattern must be an axis kind"),
    "pattern-rank": ({"pattern": (Near(3),) * 3}, r"query must have 6 axes .*got 5"),
    "pattern-heads": (
        {"pattern": heads(Near(3), Near(5), Full())},
        "pattern: 4 heads do not divide into 3 equal groups",
    ),
    "pattern-sizes": (
        {"pattern": heads(Near(3), Full(), sizes=(1, 2))},
        r"pattern: heads\(..., sizes=\(1, 2\)\) is for 3 heads, the query has 4",
    ),
    "pattern-grid": ({"pattern": Grid(4)}, r"Grid\(4\) does not fit an axis of length 6: size must divide the axis"),
    "pattern-wrap": ({"pattern": Near(3, dilation=4, border="wrap")}, "does not fit an axis of length 6"),
    "pattern-two-grids": (
        {"query": Q[:, :3], "pattern": Window(3)},
        r"Window\(3\) does not fit an axis of 3 queries and 6 keys",
    ),
    "pattern-two-grids-dilated": (
        {"query": Q[:, :3], "pattern": Near(3, dilation=2)},
        "between two grids Near takes dilation 1",
    ),
    "pattern-bounds-grid": ({"pattern": bounds(Near(3), (6, 8))}, r"this Bounds has grid \(6, 8\), got \(6, 9\)"),
    "pattern-bounds-key-grid": (
        {"pattern": bounds(Near(3), (6, 9)).shift(0, 0, 5)},
        r"this Bounds has key_grid \(5, 9\), got \(6, 9\)",
    ),
    "pattern-bounds-rank": ({"pattern": bounds(Near(3), (9,))}, "query must have 4 axes"),
    # back ends
    "backend-unknown": ({"backend": "fast"}, "backend must be None or one of .*tiled.*, got 'fast'"),
    "backend-number": ({"backend": 3}, "backend must be None or one of .*, got 3"),
    "backend-list": ({"backend": ["tiled"]}, r"backend must be None or one of .*, got \['tiled'\]"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_before_any_work(mistake: str) -> None:
    given, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        vicinal.attention(**{"query": Q, "key": Q, "value": Q, "pattern": Near(3), **given})


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_explain_names_the_same_mistake(mistake: str) -> None:
    given, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        vicinal.explain(**{"query": Q, "key": Q, "value": Q, "pattern": Near(3), **given})


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel_size": (3,)}, r"kernel_size must be one value or 2 values, got 1: \(3,\)"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be one value or 2 values, got 3"),
        ({"kernel_size": 0}, "kernel_size must be .*at least 1, got 0"),
        ({"kernel_size": -3}, "kernel_size must be .*at least 1, got -3"),
        ({"kernel_size": 3.0}, "kernel_size must be an integer of at least 1, got 3.0"),
        ({"kernel_size": True}, "kernel_size must be an integer of at least 1, got True"),
        ({"kernel_size": None}, "kernel_size must be given"),
        ({"kernel_size": "3"}, "kernel_size must be an integer of at least 1, got '3'"),
        ({"dilation": 0}, "dilation must be .*at least 1, got 0"),
        ({"dilation": (1, 2, 3)}, "dilation must be one value or 2 values, got 3"),
        ({"stride": 0}, "stride must be .*at least 1, got 0"),
        ({"stride": 4}, r"stride must be at most kernel_size \(3\), got 4"),
        ({"stride": (1, 4)}, r"stride must be at most kernel_size \(3\), got 4"),
        ({"is_causal": 1}, "causal must be True or False, got 1"),
        ({"is_causal": (True,)}, "is_causal must be one value or 2 values, got 1"),
        ({"additional_keys": EXTRA}, "additional_values must be given too: additional_keys and additional_values"),
        ({"additional_values": EXTRA}, "additional_keys must be given too"),
        ({"additional_keys": EXTRA[:1], "additional_values": EXTRA}, "additional_keys must have shape"),
        (
            {"additional_keys": EXTRA, "additional_values": EXTRA[:, :2]},
            "additional_values must have as many tokens as",
        ),
        ({"query": Q[:, 0]}, "query must have 5 axes"),
    ],
)
def test_natten_names_name_the_mistake(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicinal.na2d(**{"query": Q, "key": Q, "value": Q, "kernel_size": 3, **given})


def test_numpy_and_torch_integers_are_integers() -> None:
    kernel = (np.int64(3), torch.tensor(5))
    out = vicinal.na2d(Q, Q, Q, kernel, dilation=np.int32(2))
    assert out.shape == Q.shape
    assert vicinal.attention(Q, Q, Q, Near(3), scale=np.float64(0.5)).shape == Q.shape


def test_mistake_in_one_call_does_not_spoil_the_next() -> None:
    """What is remembered between calls must not remember a failure."""
    for _ in range(2):
        with pytest.raises(ValueError, match="does not fit"):
            vicinal.attention(Q, Q, Q, Grid(4))
    assert vicinal.attention(Q, Q, Q, Grid(3)).shape == Q.shape


def test_bounds_that_nobody_keeps_still_serves() -> None:
    """A table is found by its fingerprint; the call must hold on to it."""

    def fresh() -> Bounds:
        return bounds(Near(3), (6, 9)).slice(0, 1, 4)

    out = vicinal.attention(Q[:, 1:4], Q, Q, fresh())
    assert vicinal.attention(Q[:, 1:4], Q, Q, fresh()).shape == out.shape


def test_a_call_like_one_before_is_still_checked() -> None:
    query = torch.randn(1, 6, 6, 2, 8)
    for _ in range(2):
        vicinal.attention(query, query, query, Near(3), scale=1.0)
        vicinal.na2d(query, query, query, 3)
        with pytest.raises(ValueError, match="scale must be"):
            vicinal.attention(query, query, query, Near(3), scale=True)
        with pytest.raises(ValueError, match="kernel_size"):
            vicinal.na2d(query, query, query, 3.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="dtype of query"):
            vicinal.attention(query, query, query.double(), Near(3), scale=1.0)
        with pytest.raises(ValueError, match="backend must be"):
            vicinal.attention(query, query, query, Near(3), scale=1.0, backend="none")
