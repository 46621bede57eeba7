"""Batches that are empty or padded, and tokens beside the grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Full, Near, Window, heads

from .problems import Problem, arguments, draw, draw_grads
from .tolerance import run

every_backend = pytest.mark.parametrize("backend", backends.usable())


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@every_backend
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"has_bias": True, "heads": 4, "kv_heads": 2},
        {"extra_tokens": 3, "extra_queries": 2, "extra_lengths": ()},
        {"grids": (), "has_bias": True},
    ],
    ids=["plain", "bias", "extra", "grids"],
)
def test_attention_of_an_empty_batch_is_empty_with_zero_gradients(features: dict[str, Any], backend: str) -> None:
    problem = Problem((5, 6), Near(3), batch=0, value_dim=5, **features)
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.float32).items()}
    given = arguments(problem, tensors)
    given |= {name: torch.zeros(0, dtype=torch.int64) for name in ("extra_lengths",) if name in given}
    given |= {name: torch.zeros(0, 2, dtype=torch.int64) for name in ("grids",) if name in given}
    outs, lses = vicinal.attention(**given, return_lse=True, backend=backend)
    if problem.extra_queries:
        (outs, extra_out), (lses, extra_lse) = outs, lses
        assert extra_out.shape == (0, 2, problem.heads, 5)
        assert extra_lse.shape == (0, 2, problem.heads)
    assert outs.shape == (0, 5, 6, problem.heads, 5)
    assert lses.shape == (0, 5, 6, problem.heads)
    (outs.sum() + lses.sum()).backward()
    for name, tensor in tensors.items():
        if name != "extra_query":
            assert tensor.grad is not None, name
            assert tensor.grad.shape == tensor.shape
            assert not tensor.grad.any()


@every_backend
def test_padded_batch_equals_each_sample_on_its_own_grid(backend: str) -> None:
    own = ((6, 9), (4, 9), (6, 2))
    problem = Problem((6, 9), heads(Near(3, dilation=2), Window(4, shift=1)), batch=3, grids=own, value_dim=5)
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.float64).items()}
    out, lse = vicinal.attention(**arguments(problem, tensors), return_lse=True, backend=backend)
    weights = draw_grads(problem, {"out": out.detach(), "lse": lse.detach()})
    grads = torch.autograd.grad((out, lse), list(tensors.values()), (weights["out"], weights["lse"]))
    for sample, (height, width) in enumerate(own):
        inside = (slice(sample, sample + 1), slice(height), slice(width))
        cropped = leaves(*(tensor[inside] for tensor in tensors.values()))
        wanted, wanted_lse = vicinal.attention(*cropped, problem.pattern, return_lse=True, backend=backend)
        torch.testing.assert_close(out[inside], wanted)
        torch.testing.assert_close(lse[inside], wanted_lse)
        own_weights = (weights["out"][inside], weights["lse"][inside])
        wanted_grads = torch.autograd.grad((wanted, wanted_lse), cropped, own_weights)
        for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(grad[inside], wanted_grad)


@every_backend
def test_padding_holding_nan_gives_zero_minus_infinity_and_zero_gradients(backend: str) -> None:
    problem = Problem((6, 9), Near(3), batch=2, grids=((4, 9), (6, 2)), extra_tokens=2)
    results = run(problem, torch.float32, backend)
    padding = torch.ones(2, 6, 9, dtype=torch.bool)
    padding[0, :4], padding[1, :, :2] = False, False
    assert (results["lse"][padding] == -torch.inf).all()
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert (results[name][padding] == 0).all(), name
        assert results[name].isfinite().all(), name


@every_backend
def test_extra_tokens_beyond_their_length_are_not_read_and_get_zero_gradients(backend: str) -> None:
    problem = Problem((7,), Near(3), batch=3, extra_tokens=4, extra_lengths=(4, 0, 1))
    results = run(problem, torch.float32, backend)
    for sample, length in enumerate((4, 0, 1)):
        for name in ("grad_extra_key", "grad_extra_value"):
            assert (results[name][sample, length:] == 0).all()
            assert (results[name][sample, :length] != 0).all()
    without = Problem((7,), Near(3))
    given = arguments(problem, draw(problem, torch.float32))
    out = vicinal.attention(**given, backend=backend)[1:2]
    plain = [given[name][1:2] for name in ("query", "key", "value")]
    torch.testing.assert_close(out, vicinal.attention(*plain, without.pattern, backend=backend))


@every_backend
@pytest.mark.parametrize("grid", [(7,), (4, 5), (2, 3, 4)], ids=lambda grid: "x".join(map(str, grid)))
def test_prefix_tokens_and_grid_together_equal_one_long_sequence(grid: tuple[int, ...], backend: str) -> None:
    """Class tokens that see and are seen by everything, in front of a grid under full attention."""
    tokens = torch.Size(grid).numel()
    query, key, value = normal(3, 2, 3 + tokens, 4, 8, dtype=torch.float64).unbind(0)
    key, value = key[:, :, :2], value[:, :, :2]
    wanted, wanted_lse = vicinal.attention(query, key, value, Full(), return_lse=True, backend=backend)
    (out, extra_out), (lse, extra_lse) = vicinal.attention(
        *(tensor[:, 3:].unflatten(1, grid) for tensor in (query, key, value)),
        Full(),
        extra_key=key[:, :3],
        extra_value=value[:, :3],
        extra_query=query[:, :3],
        return_lse=True,
        backend=backend,
    )
    torch.testing.assert_close(torch.cat([extra_out, out.flatten(1, -3)], 1), wanted)
    torch.testing.assert_close(torch.cat([extra_lse, lse.flatten(1, -2)], 1), wanted_lse)


@every_backend
@pytest.mark.parametrize("features", [{}, {"grids": ((4, 5), (2, 1))}], ids=["plain", "grids"])
def test_no_extra_tokens_at_all_changes_nothing(features: dict[str, Any], backend: str) -> None:
    problem = Problem((4, 5), Near(3), batch=2, **features)
    tensors = draw(problem, torch.float64)
    given = arguments(problem, tensors)
    empty = tensors["key"].new_empty(2, 0, 2, 8)
    out, extra_out = vicinal.attention(**given, extra_key=empty, extra_value=empty, extra_query=empty, backend=backend)
    assert extra_out.shape == (2, 0, 2, 8)
    torch.testing.assert_close(out, vicinal.attention(**given, backend=backend))
