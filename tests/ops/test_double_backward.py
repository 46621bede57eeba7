"""Second derivatives: gradcheck and gradgradcheck in float64, and the gradient penalties that need them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Full, Grid, Near, Window, bounds, heads, union

from .oracle import dense
from .problems import Problem, Tensors, arguments, draw

PROBLEMS = (
    Problem((5,), Near(3), head_dim=2, heads=1),
    Problem((3, 4), Near(3, dilation=2), head_dim=2, heads=1, has_bias=True),
    Problem((4,), Near(2, causal=True), head_dim=2, value_dim=1, heads=2, kv_heads=1, extra_tokens=2, has_bias=True),
    Problem((4,), Window(3, shift=1), head_dim=2, heads=1, extra_tokens=2, extra_lengths=(1, 0), batch=2),
    Problem((3, 2), union((Full(), Near(1)), Near(2)), head_dim=2, heads=2, kv_heads=1),
    Problem((4,), heads(Near(3), Grid(2)), head_dim=2, has_bias=True, extra_queries=1),
    Problem((4,), Near(3), head_dim=2, heads=1, batch=2, grids=((3,), (4,))),
    Problem((4,), bounds(Near(3), (4,)).shift(0, 3, 3), key_grid=(3,), head_dim=2, heads=1),
    Problem((2, 3), Near(2), key_grid=(3, 2), head_dim=2, heads=1),
)

every_backend = pytest.mark.parametrize("backend", backends.usable())
# several back ends differentiate through the same function: one of them stands for all
DIFFERENT = {backends.find(name).differentiable: name for name in reversed(backends.usable())}
every_differentiable = pytest.mark.parametrize("backend", DIFFERENT.values())
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def clean(problem: Problem) -> Tensors:
    """The inputs without NaN in what is not read: numerical derivatives would meet it."""
    return {name: tensor.nan_to_num().requires_grad_() for name, tensor in draw(problem, torch.float64).items()}


def flat_call(problem: Problem, backend: str | None, names: list[str]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The problem as a function of its tensors alone; lse of queries without keys, a constant -inf, are set to 0."""

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = arguments(problem, dict(zip(names, tensors, strict=True)))
        out, lse = vicinal.attention(**given, return_lse=True, backend=backend)
        found = (*out, *lse) if problem.extra_queries else (out, lse)
        return tuple(torch.where(tensor == -torch.inf, 0.0, tensor) for tensor in found)

    return call


@every_backend
@every_problem
def test_first_derivatives_pass_gradcheck(problem: Problem, backend: str) -> None:
    tensors = clean(problem)
    assert gradcheck(flat_call(problem, backend, list(tensors)), tuple(tensors.values()))


@every_differentiable
@every_problem
def test_second_derivatives_pass_gradgradcheck(problem: Problem, backend: str) -> None:
    """Along one random direction; every entry of the Hessian is checked by the slow test below."""
    tensors = clean(problem)
    assert gradgradcheck(flat_call(problem, backend, list(tensors)), tuple(tensors.values()), fast_mode=True)


@pytest.mark.slow
@every_differentiable
@every_problem
def test_every_second_derivative_passes_gradgradcheck(problem: Problem, backend: str) -> None:
    tensors = clean(problem)
    assert gradgradcheck(flat_call(problem, backend, list(tensors)), tuple(tensors.values()))


@every_backend
@every_problem
def test_gradients_that_can_be_differentiated_equal_those_that_cannot(problem: Problem, backend: str) -> None:
    tensors = clean(problem)
    outputs = flat_call(problem, backend, list(tensors))(*tensors.values())
    weights = [torch.randn_like(output) for output in outputs]
    inputs = list(tensors.values())
    plain = torch.autograd.grad(outputs, inputs, weights, retain_graph=True)
    differentiable = torch.autograd.grad(outputs, inputs, weights, create_graph=True)
    for grad, wanted in zip(differentiable, plain, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


def penalty(attend: Callable[..., torch.Tensor], tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """R1: the squared length of the gradient of a score by its input, differentiated by the parameters."""
    tokens, projection, bias = tensors["tokens"], tensors["projection"], tensors["bias"]
    query, key, value = (tokens @ projection).unflatten(-1, (3, 2, 4)).unbind(-3)
    score = attend(query, key, value, bias).square().sum()
    (slope,) = torch.autograd.grad(score, tokens, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), (projection, bias))


@every_differentiable
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_penalty_equals_that_of_dense_attention(dtype: torch.dtype, backend: str) -> None:
    problem = Problem((5, 7), (Near(3), Near(5)), head_dim=4, has_bias=True)

    def by_oracle(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return dense(problem, {"query": query, "key": key, "value": value, "bias": bias})["out"]

    def by_us(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return vicinal.attention(query, key, value, problem.pattern, bias=bias, backend=backend)

    drawn = {
        "tokens": torch.randn(1, 5, 7, 8),
        "projection": torch.randn(8, 24) / 3,
        "bias": torch.randn(2, 5, 9),
    }

    def results(attend: Callable[..., torch.Tensor], to: torch.dtype) -> tuple[torch.Tensor, ...]:
        return penalty(attend, {name: tensor.to(to).requires_grad_() for name, tensor in drawn.items()})

    exact, ours, eager = results(by_oracle, torch.float64), results(by_us, dtype), results(by_oracle, dtype)
    for truth, mine, plain in zip(exact, ours, eager, strict=True):
        rounding = 32 * torch.finfo(dtype).eps * float(truth.abs().max())
        allowed = 2 * float((plain - truth).abs().max()) + rounding
        assert float((mine - truth).abs().max()) <= allowed


def test_scores_by_way_of_window_order_have_second_derivatives() -> None:
    """The unfused operators need no detour: they are linear in each input, and each other's gradients."""
    query, key, value = (torch.randn(1, 3, 3, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(3))
    pattern = (Near(3, border="crop"), Near(2))

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        weights = vicinal.attention_scores(tensors[0], tensors[1], pattern).softmax(-1)
        return vicinal.apply_scores(weights, tensors[2], pattern)

    assert gradcheck(call, (query, key, value))
    assert gradgradcheck(call, (query, key, value), fast_mode=True)


def test_unknown_number_of_derivatives_can_be_taken() -> None:
    """A third derivative, since nothing says stop after two."""
    tensors = [torch.randn(1, 4, 1, 2, dtype=torch.float64).requires_grad_() for _ in range(3)]
    call: Any = functools.partial(vicinal.attention, pattern=Near(3), backend="tiled")
    found: Any = call(*tensors).square().sum()
    wanted: Any = dense(
        Problem((4,), Near(3), heads=1, head_dim=2), dict(zip(("query", "key", "value"), tensors, strict=True))
    )
    wanted = wanted["out"].square().sum()
    for _ in range(3):
        found, wanted = (
            sum(grad.square().sum() for grad in torch.autograd.grad(score, tensors, create_graph=True))
            for score in (found, wanted)
        )
    torch.testing.assert_close(found, wanted)
