"""torch.export: strict and not, a batch of any size, and programs that run where this library is not."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram

import vicinal
from vicinal.pattern import Near, Window, heads, union

from .problems import SAMPLE, Problem, arguments, draw

TELLING = (SAMPLE[1], SAMPLE[3], SAMPLE[4])
"""Bias and extra tokens; head groups and unions; sizes that differ from sample to sample."""

by_problem = pytest.mark.parametrize(
    "problem",
    [problem if problem in TELLING else pytest.param(problem, marks=pytest.mark.slow) for problem in SAMPLE],
    ids=str,
)


class Call(torch.nn.Module):
    """A problem as a module of its batched tensors; what has no batch is a parameter."""

    def __init__(self, problem: Problem, backend: str | None = None) -> None:
        super().__init__()
        self.problem, self.backend = problem, backend
        for name, tensor in draw(problem, torch.float32).items():
            if name.startswith("bias"):
                self.register_parameter(name, torch.nn.Parameter(tensor))

    def forward(self, tensors: dict[str, torch.Tensor]) -> Any:
        given = {**dict(self.named_parameters()), **tensors}
        others = {name: given.pop(name) for name in ("grids", "extra_lengths") if name in given}
        named = {**arguments(self.problem, given), **others}
        return vicinal.attention(**named, return_lse=True, backend=self.backend)


def inputs(problem: Problem, batch: int) -> dict[str, torch.Tensor]:
    """The problem's batched tensors, repeated to a batch."""
    tensors = {name: tensor for name, tensor in draw(problem, torch.float32).items() if not name.startswith("bias")}
    if problem.grids is not None:
        tensors["grids"] = torch.tensor(problem.grids)
    if problem.extra_lengths is not None:
        tensors["extra_lengths"] = torch.tensor(problem.extra_lengths)
    repeat = -(-batch // problem.batch)
    return {name: torch.cat([tensor] * repeat)[:batch].clone() for name, tensor in tensors.items()}


def exported(problem: Problem, *, strict: bool, backend: str | None = None) -> tuple[Call, ExportedProgram]:
    module, given = Call(problem, backend), inputs(problem, 2)
    shapes = {"tensors": {name: {0: Dim("batch", min=1, max=64)} for name in given}}
    return module, torch.export.export(module, (given,), dynamic_shapes=shapes, strict=strict)


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [tensor for part in found for tensor in flat(part)]


def operators(program: ExportedProgram) -> set[str]:
    """Which namespaces of operators a program calls."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


def assert_same_for_any_batch(problem: Problem, module: Call, program: ExportedProgram) -> None:
    runnable = program.module()
    for batch in (1, 2, 5):
        given = inputs(problem, batch)
        torch.testing.assert_close(flat(runnable(given)), flat(module(given)), rtol=1e-5, atol=1e-5)


@by_problem
def test_strict_export_gives_the_same_numbers_for_any_batch(problem: Problem) -> None:
    module, program = exported(problem, strict=True)
    assert "vicinal" in operators(program)
    assert_same_for_any_batch(problem, module, program)


@by_problem
def test_nonstrict_export_of_the_portable_back_end_is_plain_aten_with_the_same_numbers(problem: Problem) -> None:
    module, program = exported(problem, strict=False, backend="tiled")
    assert_same_for_any_batch(problem, module, program)
    if problem.grids is None and problem.extra_lengths is None:
        assert operators(program) == {"aten"}
    else:  # sizes that differ from sample to sample are only known to the operator
        assert operators(program) == {"aten", "vicinal"}


# torch 2.13 decomposes with a helper that it has itself deprecated
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_nonstrict_export_decomposes_to_core_aten() -> None:
    problem = SAMPLE[0]
    module, program = exported(problem, strict=False, backend="tiled")
    decomposed = program.run_decompositions()
    assert operators(decomposed) == {"aten"}
    assert_same_for_any_batch(problem, module, decomposed)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_exported_program_survives_saving_and_loading(strict: bool) -> None:
    module, program = exported(SAMPLE[0], strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, given = torch.export.load(file), inputs(SAMPLE[0], 3)
    torch.testing.assert_close(flat(loaded.module()(given)), flat(module(given)), rtol=1e-5, atol=1e-5)


class Block(torch.nn.Module):
    """A piece of a model: projection, attention under several patterns, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern = heads(Near(3), union(Near(3, dilation=2), Window(4)))
        self.qkv, self.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 4, 4)).unbind(-3)
        return self.proj(vicinal.attention(query, key, value, self.pattern).flatten(-2))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_module_with_attention_exports_and_can_still_be_trained(strict: bool) -> None:
    module, tokens = Block(), torch.randn(2, 7, 9, 16)
    program = torch.export.export(module, (tokens,), dynamic_shapes=({0: Dim("batch")},), strict=strict).module()
    more = torch.randn(5, 7, 9, 16)
    torch.testing.assert_close(program(more), module(more), rtol=1e-5, atol=1e-6)
    weight = torch.randn(5, 7, 9, 16)
    grads = torch.autograd.grad(program(more), list(program.parameters()), weight)
    wanted = torch.autograd.grad(module(more), list(module.parameters()), weight)
    names = dict(zip(dict(module.named_parameters()), wanted, strict=True))
    for (name, _), grad in zip(program.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, names[name], rtol=1e-4, atol=1e-5)


def test_bias_exports_as_a_parameter_and_follows_a_change_of_it() -> None:
    problem = Problem((5, 6), Near(3), has_bias=True)
    module, program = exported(problem, strict=False)
    runnable, given = program.module(), inputs(problem, 2)
    with torch.no_grad():
        dict(runnable.named_parameters())["bias"].mul_(-3)
        dict(module.named_parameters())["bias"].mul_(-3)
    torch.testing.assert_close(flat(runnable(given)), flat(module(given)), rtol=1e-5, atol=1e-5)
