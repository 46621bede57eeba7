"""The unfused operators: window order written out by loops, values, gradients, and what stands beside a window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vicinal
from vicinal.pattern import Bounds, Full, Grid, Halo, Near, Same, Window, bounds, heads, union

from .oracle import dense, eager
from .problems import CRISS_CROSS, MIXED, Problem, arguments, draw, near
from .tolerance import FACTOR, largest

PROBLEMS = (
    Problem((11,), Near(4)),
    Problem((12,), Near(3, dilation=2, border="wrap"), batch=2),
    Problem((13,), Near(4, dilation=3, border="crop"), value_dim=3),
    Problem((9,), Full(causal=True)),
    Problem((6, 7), near((3, 4), causal=(True, False)), heads=4, kv_heads=2),
    Problem((7, 9), (Window(4, shift=1), Halo(3, 1)), batch=2, value_dim=5),
    Problem((6, 4), (Grid(3), Same())),
    Problem((5, 3, 4), (Near(3), Near(2), Window(3)), heads=1),
    Problem((9, 10), heads(Near(3), Near(5, dilation=2), Same(), sizes=(1, 2, 1)), heads=4, kv_heads=2),
    Problem((7, 6), CRISS_CROSS),
    Problem((8, 6), MIXED, heads=4, kv_heads=2),
    Problem((17,), union(Near(5), Near(3))),
    Problem((10, 6), near((3, 2)), key_grid=(4, 9)),
    Problem((8,), bounds(Near(3), (8,)).shift(0, -6, 9), key_grid=(9,)),
    Problem((4,), bounds(Near(3), (4,)).shift(0, 9, 5), key_grid=(5,)),
    Problem((1, 1), Near(5)),
    Problem((300,), Near(3), batch=3, heads=1),
)

by_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def window_keys(table: Bounds, group: int, query: tuple[int, ...]) -> Iterator[tuple[int, ...] | None]:
    """The keys of a query's window in the documented order; None where there is no key."""
    earlier: set[tuple[int, ...]] = set()
    for member in table.groups[group].members:
        boxes = [range(int(axis.count.max())) for axis in member]
        own = set()
        for place in itertools.product(*boxes):
            inside = all(at < axis.count[i] for at, axis, i in zip(place, member, query, strict=True))
            key = tuple(
                int(axis.start[i] + axis.step * at) % axis.length
                for at, axis, i in zip(place, member, query, strict=True)
            )
            seen = inside and key not in earlier
            yield key if seen else None
            if seen:
                own.add(key)
        earlier |= own


def window_index(problem: Problem) -> torch.Tensor:
    """Flat key number of every window entry, -1 where there is none: int64 `[heads, queries, window]`."""
    table = bounds(problem.pattern, problem.grid, problem.key_grid)
    rows: list[list[list[int]]] = []
    for group in range(len(table.groups)):
        rows.append([])
        for query in itertools.product(*map(range, problem.grid)):
            keys = window_keys(table, group, query)
            rows[-1].append([-1 if key is None else flat(key, problem.keys) for key in keys])
    widest = max(len(row) for group in rows for row in group)
    padded = [[row + [-1] * (widest - len(row)) for row in group] for group in rows]
    whole = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), len(rows[0]), widest)
    return whole.repeat_interleave(torch.tensor(table.split(problem.heads)), 0)


def flat(key: tuple[int, ...], grid: tuple[int, ...]) -> int:
    place = 0
    for at, length in zip(key, grid, strict=True):
        place = place * length + at
    return place


def expected_scores(problem: Problem, tensors: dict[str, torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """`[batch, *grid, heads, window]` out of the full matrix of scores."""
    query = tensors["query"].flatten(1, -3).transpose(1, 2)
    key = tensors["key"].flatten(1, -3).transpose(1, 2).repeat_interleave(problem.heads // tensors["key"].shape[-2], 1)
    scores = problem.number * query @ key.transpose(-1, -2)
    found = scores.gather(-1, index.clamp(0).expand(problem.batch, -1, -1, -1)).masked_fill(index < 0, -torch.inf)
    return found.transpose(1, 2).unflatten(1, problem.grid)


def expected_sums(problem: Problem, weights: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    value = value.flatten(1, -3).transpose(1, 2).repeat_interleave(problem.heads // value.shape[-2], 1)
    own = weights.flatten(1, -3).transpose(1, 2).masked_fill(index < 0, 0.0)
    matrix = own.new_zeros(*own.shape[:-1], value.shape[2]).scatter_add(-1, index.clamp(0).expand_as(own), own)
    return (matrix @ value).transpose(1, 2).unflatten(1, problem.grid)


@by_problem
def test_scores_stand_in_window_order(problem: Problem) -> None:
    tensors, index = draw(problem, torch.float64), window_index(problem)
    scores = vicinal.attention_scores(tensors["query"], tensors["key"], problem.pattern)
    torch.testing.assert_close(scores, expected_scores(problem, tensors, index))
    assert torch.equal(scores == -torch.inf, _holes(problem, index))


def _holes(problem: Problem, index: torch.Tensor) -> torch.Tensor:
    holes = (index < 0).transpose(0, 1).unflatten(0, problem.grid)
    return holes.expand(problem.batch, *holes.shape)


@by_problem
def test_weights_in_window_order_sum_values(problem: Problem) -> None:
    """Any weights, negative ones too; those where there is no key are not looked at, even if they are NaN."""
    tensors, index = draw(problem, torch.float64), window_index(problem)
    weights = torch.randn(problem.batch, *problem.grid, problem.heads, index.shape[-1], dtype=torch.float64)
    wanted = expected_sums(problem, weights, tensors["value"], index)
    poisoned = weights.masked_fill(_holes(problem, index), torch.nan)
    torch.testing.assert_close(vicinal.apply_scores(poisoned, tensors["value"], problem.pattern), wanted)


@by_problem
def test_gradients_of_both_steps_equal_those_of_the_written_out_matrices(problem: Problem) -> None:
    tensors, index = draw(problem, torch.float64), window_index(problem)
    weights = torch.randn(problem.batch, *problem.grid, problem.heads, index.shape[-1], dtype=torch.float64)
    for number, (call, expected) in enumerate(
        (
            (
                lambda query, key: vicinal.attention_scores(query, key, problem.pattern),
                lambda query, key: expected_scores(problem, {"query": query, "key": key}, index),
            ),
            (
                lambda weights, value: vicinal.apply_scores(weights, value, problem.pattern),
                lambda weights, value: expected_sums(problem, weights, value, index),
            ),
        )
    ):
        given = (tensors["query"], tensors["key"]) if number == 0 else (weights, tensors["value"])
        ours, theirs = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
        found, wanted = call(*ours), expected(*theirs)
        weight = torch.randn_like(wanted).masked_fill(wanted == -torch.inf, torch.nan)
        grads = torch.autograd.grad(found, ours, weight)
        wanted_grads = torch.autograd.grad(wanted, theirs, weight.nan_to_num(0.0))
        for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.parametrize(
    "problem",
    [
        Problem((9,), Near(4, dilation=2), has_bias=True),
        Problem((8,), Near(3, border="wrap"), has_bias=True),
        Problem((6, 7), (Near(3, causal=True), Window(3, shift=1)), has_bias=True, heads=4, kv_heads=2),
        Problem((6, 8), heads(Near(3), Grid(2), sizes=(1, 3)), has_bias=True, heads=4, kv_heads=2, batch=2),
        Problem((5, 4), Near(3), has_bias=True, extra_tokens=3, heads=4, kv_heads=2),
        Problem((7, 6), CRISS_CROSS, extra_tokens=2),
        Problem((9, 4), (Near(3), Full()), key_grid=(4, 6), has_bias=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_steps_equal_attention_with_bias_and_extra_tokens(problem: Problem, dtype: torch.dtype) -> None:
    drawn = draw(problem, dtype)

    def ours(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        given = arguments(problem, tensors)
        extra_value = given.pop("extra_value", None)
        value, pattern = given.pop("value"), given["pattern"]
        scores = vicinal.attention_scores(**given)
        return vicinal.apply_scores(scores.softmax(-1), value, pattern, extra_value=extra_value)

    def results(call: Any, to: torch.dtype) -> list[torch.Tensor]:
        tensors = {name: tensor.to(to).requires_grad_() for name, tensor in drawn.items()}
        out = call(tensors)
        assert out.dtype == to
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(to).reshape(out.shape)
        return [tensor.detach().double() for tensor in (out, *torch.autograd.grad(out, list(tensors.values()), weight))]

    def oracle(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return dense(problem, tensors, eager)["out"]

    exact, found, plain = results(oracle, torch.float64), results(ours, dtype), results(oracle, dtype)
    for truth, mine, theirs in zip(exact, found, plain, strict=True):
        rounding = 8 * torch.finfo(dtype).eps * largest(truth)
        assert largest(mine - truth) <= FACTOR * largest(theirs - truth) + rounding


def test_scale_of_scores_may_be_zero_and_is_head_dim_to_the_minus_one_half_by_default() -> None:
    query, key = torch.randn(2, 1, 6, 2, 16).unbind(0)
    scores = vicinal.attention_scores(query, key, Near(3))
    torch.testing.assert_close(scores, vicinal.attention_scores(query, key, Near(3), scale=0.25))
    assert not vicinal.attention_scores(query, key, Near(3), scale=0).any()


def test_scores_of_groups_with_windows_of_different_width_are_filled_up_with_minus_infinity() -> None:
    query, key = torch.randn(2, 1, 6, 7, 2, 4).unbind(0)
    scores = vicinal.attention_scores(query, key, heads(Near(3), Same()))
    assert scores.shape == (1, 6, 7, 2, 9)
    assert scores[..., 0, :].isfinite().all()
    assert torch.equal(scores[..., 1, :].isfinite(), (torch.arange(9) == 0).expand(1, 6, 7, 9))


def test_scores_of_an_empty_batch_are_empty() -> None:
    query, key, value = (torch.randn(0, 6, 2, 4).requires_grad_() for _ in range(3))
    scores = vicinal.attention_scores(query, key, Near(3))
    assert scores.shape == (0, 6, 2, 3)
    out = vicinal.apply_scores(scores.softmax(-1), value, Near(3))
    assert out.shape == (0, 6, 2, 4)
    out.sum().backward()
    assert query.grad is not None


def test_scores_take_slices_of_one_projection() -> None:
    query, key, value = torch.randn(2, 5, 6, 3, 2, 4).unbind(3)
    scores = vicinal.attention_scores(query, key, Near(3))
    torch.testing.assert_close(scores, vicinal.attention_scores(query.contiguous(), key.contiguous(), Near(3)))
    out = vicinal.apply_scores(scores.transpose(-1, -2).contiguous().transpose(-1, -2), value, Near(3))
    torch.testing.assert_close(out, vicinal.apply_scores(scores, value.contiguous(), Near(3)))


def test_scores_in_many_small_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 3, 9, 8, 4, 8, dtype=torch.float64).unbind(0)
    pattern = heads(Near(3), Window(4), sizes=(1, 3))
    scores = vicinal.attention_scores(query, key[..., :2, :], pattern)
    out = vicinal.apply_scores(scores.softmax(-1), value[..., :2, :], pattern)
    monkeypatch.setattr("vicinal.ops.tiled.parts.CHUNK_BYTES", 4096)
    monkeypatch.setattr("vicinal.ops.tiled.parts.WHOLE_BYTES", 0)
    torch.testing.assert_close(vicinal.attention_scores(query, key[..., :2, :], pattern), scores)
    torch.testing.assert_close(vicinal.apply_scores(scores.softmax(-1), value[..., :2, :], pattern), out)


def test_topk_of_scores_names_the_keys_that_matter() -> None:
    """What the order is for: turning an entry back into a coordinate."""
    query, key = torch.randn(2, 1, 8, 8, 1, 4, dtype=torch.float64).unbind(0)
    scores = vicinal.attention_scores(query, key, Near(3), scale=1)
    table = bounds(Near(3), (8, 8)).groups[0].members[0]
    best = int(scores[0, 7, 0, 0].argmax())
    row, column = int(table[0].start[7]) + best // 3, int(table[1].start[0]) + best % 3
    assert math.isclose(float(query[0, 7, 0, 0] @ key[0, row, column, 0]), float(scores[0, 7, 0, 0].max()))


Q = torch.zeros(2, 5, 6, 4, 8)
WEIGHTS = torch.zeros(2, 5, 6, 4, 9)
EXTRA = torch.zeros(2, 3, 4, 8)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query": Q[0, 0]}, r"query must have 4 or 5 or 6 axes .*got 3: \(6, 4, 8\)"),
        ({"key": Q[..., :3, :]}, r"key must have a number of heads that divides the query's \(4\), got 3"),
        ({"key": Q[..., :5]}, r"key must have the head_dim of query \(8\), got 5"),
        ({"pattern": (Near(3),)}, r"query must have 4 axes"),
        ({"bias": torch.zeros(4, 3, 3)}, r"bias must have shape \(4, 5, 5\)"),
        ({"extra_key": EXTRA[:1]}, r"extra_key must have shape .*got \(1, 3, 4, 8\)"),
        ({"extra_key": EXTRA.double()}, r"extra_key must have the dtype of query \(torch.float32\), got torch.float64"),
        ({"scale": float("nan")}, r"scale must be None or a finite number, got nan"),
    ],
)
def test_scores_refuse_what_does_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicinal.attention_scores(**{"query": Q, "key": Q, "pattern": Near(3), **given})


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": WEIGHTS[0, 0]}, "weights must have"),
        ({"weights": WEIGHTS.long()}, "weights must be float32, float16, bfloat16 or float64, got torch.int64"),
        ({"weights": WEIGHTS[..., :8]}, "weights must have 9 entries in the last axis for this pattern, got 8"),
        ({"weights": WEIGHTS[:, :, :0]}, "weights must have no empty axis but the batch"),
        ({"extra_value": EXTRA}, "weights must have 9 entries .* and 3 for extra_value, got 9"),
        ({"value": Q[:1]}, r"value must be .* batch of weights \(2\)"),
        ({"value": Q[..., :3, :]}, "a number of heads that divides 4"),
        ({"value": Q.double()}, r"value must have the dtype of weights \(torch.float32\), got torch.float64"),
        ({"value": Q[:, :, :0]}, "value must have no empty axis"),
        ({"pattern": (Near(3),)}, "weights must have 4 axes"),
        ({"extra_value": EXTRA[0]}, r"extra_value must have shape .*got \(3, 4, 8\)"),
        ({"extra_value": EXTRA[:, :, :3]}, r"extra_value must have shape .*got \(2, 3, 3, 8\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicinal.apply_scores(**{"weights": WEIGHTS, "value": Q, "pattern": Near(3), **given})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_both_steps_and_their_gradients_keep_their_precision_under_autocast(dtype: torch.dtype) -> None:
    def gradients(is_enabled: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        query, key, value = (torch.randn(1, 6, 7, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_enabled):
            weights = vicinal.attention_scores(query, key, Near(3)).softmax(-1).to(dtype)
            out = vicinal.apply_scores(weights, value, Near(3))
            return out, *torch.autograd.grad(out.square().sum(), [query, key, value])

    for under, outside in zip(gradients(True), gradients(False), strict=True):
        assert under.dtype == dtype
        torch.testing.assert_close(under, outside, rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
