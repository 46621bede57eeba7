"""The one tolerance of the operator's tests, and the comparison that uses it.

Our error against float64 may be at most `FACTOR` times that of the same-precision eager computation, plus rounding:
of the result in its own precision, and of the terms that are summed, in the precision that sums them (float32 at
least). No number here depends on a problem or a back end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vicinal
from vicinal import BackendRefused

from .oracle import Magnitudes, dense
from .problems import Problem, Tensors, arguments, draw, draw_grads

Layout = Callable[[torch.Tensor], torch.Tensor]
"""The same numbers, perhaps differently in memory."""

FACTOR = 2
"""The c of the rule."""

ROUNDINGS = 2
"""How many roundings of the largest result and of the largest sum's terms are granted beside it."""


DRAWS = 4
"""How many drawings of a problem's tensors the error of an eager computation in half precision is the largest of.

It is a random number, and where a result has few entries a lucky one may be far too small. In wider precisions the
rounding of the summed terms stands for that.
"""


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What a problem's results are, by name (`out`, `grad_query`, ...), and how far off they may be."""

    exact: Tensors
    allowed: dict[str, float]


@functools.lru_cache(maxsize=8)
def judge(problem: Problem, dtype: torch.dtype) -> Judgment:
    """The truth about a problem, and the error that is allowed in this precision.

    There is nothing wider to hold float64 against. Its eager error is that of float32 scaled by their eps, and
    the truth, which is computed in float64 too, has that error as well.
    """
    narrow = torch.float32 if dtype == torch.float64 else dtype
    exact = _results(problem, narrow, torch.float64)
    sizes = _results(problem, narrow, torch.float64, core=Magnitudes.apply)
    errors = _eager_errors(problem, narrow, exact)
    for drawing in range(1, DRAWS if dtype.itemsize == 2 else 1):
        again = _results(problem, narrow, torch.float64, drawing=drawing)
        others = _eager_errors(problem, narrow, again, drawing)
        errors = {name: max(error, others[name]) for name, error in errors.items()}
    eps, sum_eps = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    ratio, factor = eps / torch.finfo(narrow).eps, FACTOR + (dtype == torch.float64)
    allowed = {}
    for name, result in exact.items():
        size = max(largest(result), 1.0) if name.endswith("lse") else largest(result)  # see Magnitudes
        rounding = ROUNDINGS * (eps * size + sum_eps * largest(sizes[name]))
        allowed[name] = factor * ratio * errors[name] + rounding
    return Judgment(exact, allowed)


def _eager_errors(problem: Problem, dtype: torch.dtype, exact: Tensors, drawing: int = 0) -> dict[str, float]:
    """How far off the eager computation in a precision is, for each result."""
    eager = _results(problem, dtype, dtype, drawing=drawing)
    return {name: largest(result.double() - exact[name]) for name, result in eager.items()}


def _results(problem: Problem, drawn: torch.dtype, dtype: torch.dtype, *, drawing: int = 0, **core: Any) -> Tensors:
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in draw(problem, drawn, drawing).items()}
    return with_gradients(problem, tensors, dense(problem, tensors, **core))


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def with_gradients(problem: Problem, tensors: Tensors, outputs: Tensors, lay: Layout = _as_it_is) -> Tensors:
    """Outputs, and the gradient of every input for fixed gradients of all outputs."""
    names = list(tensors)
    grads = draw_grads(problem, {name: tensor.detach().cpu() for name, tensor in outputs.items()})
    found = torch.autograd.grad(
        list(outputs.values()),
        [tensors[name] for name in names],
        [lay(grads[name].to(outputs[name].device)) for name in outputs],
        allow_unused=True,
    )
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    for name, grad in zip(names, found, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(tensors[name]) if grad is None else grad
    return results


def largest(tensor: torch.Tensor) -> float:
    """The largest finite absolute value; that infinities stand where they should is checked apart."""
    return float(torch.where(tensor.isfinite(), tensor, 0.0).abs().max()) if tensor.numel() else 0.0


def run(
    problem: Problem,
    dtype: torch.dtype,
    backend: str | None,
    device: str = "cpu",
    prepare: Callable[[Tensors], None] | None = None,
    lay: Layout = _as_it_is,
) -> Tensors:
    """The library's results for a problem: outputs and gradients of every input, by name.

    `prepare` may change the drawn tensors where that must not matter, `lay` how inputs and gradients lie in memory.
    """
    drawn = draw(problem, dtype)
    if prepare:
        prepare(drawn)
    tensors = {name: lay(tensor.to(device)).requires_grad_() for name, tensor in drawn.items()}
    try:
        found = vicinal.attention(**arguments(problem, tensors), return_lse=True, backend=backend)
    except BackendRefused as refusal:
        pytest.skip(str(refusal))
    outputs = dict(zip(("out", "lse"), found, strict=True))
    if problem.extra_queries:
        (out, extra_out), (lse, extra_lse) = found
        outputs = {"out": out, "lse": lse, "extra_out": extra_out, "extra_lse": extra_lse}
    return {name: tensor.cpu() for name, tensor in with_gradients(problem, tensors, outputs, lay).items()}


def assert_agrees(results: Tensors, judgment: Judgment) -> None:
    """Every result is there, finite where the truth is, and within what is allowed of it."""
    assert set(results) == set(judgment.exact)
    wrong = [complaint for name in results if (complaint := disagreement(name, results[name], judgment))]
    assert not wrong, "\n".join(wrong)


def disagreement(name: str, result: torch.Tensor, judgment: Judgment) -> str | None:
    """What is wrong with one result, or None."""
    exact, allowed = judgment.exact[name], judgment.allowed[name]
    if result.shape != exact.shape:
        return f"{name}: shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    if not torch.equal(result.isfinite(), exact.isfinite()) or not torch.equal(result == -torch.inf, exact.isinf()):
        return f"{name}: {int(result.isnan().sum())} NaN, {int(result.isinf().sum())} infinite of {result.numel()}"
    error = largest(result.double() - exact)
    if error > allowed:
        return f"{name}: error {error:.3g}, allowed {allowed:.3g}, largest value {largest(exact):.3g}"
    return None
