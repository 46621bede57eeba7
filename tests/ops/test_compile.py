"""torch.compile: whole graphs, the same numbers, and no more recompiling than the sizes ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Bounds, Full, Near, Window, bounds, heads, union

from .problems import SAMPLE, Problem, Tensors, arguments, draw, draw_grads

FIRST, *OTHERS = backends.usable()

GLOBAL = heads(Near(3), union(Near(3, dilation=2), Window(4)))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole_graph(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [tensor for part in found for tensor in flat(part)]


def assert_same(
    compiled: Callable[..., Any], eager: Callable[..., Any], tensors: list[torch.Tensor], **closeness: float
) -> None:
    """Outputs and gradients of the compiled function equal those of the function itself."""
    closeness = closeness or {"rtol": 1e-5, "atol": 1e-6}
    found, wanted = flat(compiled(*tensors)), flat(eager(*tensors))
    torch.testing.assert_close(found, wanted, equal_nan=True, **closeness)
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    weights = [torch.randn_like(tensor) for tensor in wanted]
    grads = torch.autograd.grad(found, inputs, weights)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, inputs, weights), **closeness)


# a compiler sees no more of a back end than its name, so that all but the first may do with one problem
@pytest.mark.parametrize(
    ("problem", "backend"),
    [
        *((problem, FIRST) for problem in SAMPLE),
        *((SAMPLE[1], backend) for backend in OTHERS),
        *(
            pytest.param(problem, backend, marks=pytest.mark.slow)
            for problem in SAMPLE
            for backend in OTHERS
            if problem != SAMPLE[1]
        ),
    ],
    ids=str,
)
def test_compiled_attention_equals_eager_with_every_feature(problem: Problem, backend: str) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.float32).items()}
    given = arguments(problem, tensors)
    fixed = {name: given.pop(name) for name in ("grids", "extra_lengths") if name in given}

    def call(tensors: Tensors, **others: torch.Tensor) -> Any:
        named = arguments(problem, tensors)
        return vicinal.attention(**{**named, **others}, return_lse=True, backend=backend)

    found, wanted = flat(whole_graph(call)(tensors, **fixed)), flat(call(tensors, **fixed))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    names = ("out", "extra_out", "lse", "extra_lse") if problem.extra_queries else ("out", "lse")
    by_name = draw_grads(problem, {name: tensor.detach() for name, tensor in zip(names, wanted, strict=True)})
    weights = [by_name[name] for name in names]
    inputs = list(tensors.values())
    grads = torch.autograd.grad(found, inputs, weights)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, inputs, weights), rtol=1e-5, atol=1e-6)


def inputs(*shape: int, number: int = 3) -> list[torch.Tensor]:
    return [torch.randn(*shape).requires_grad_() for _ in range(number)]


def test_pattern_may_be_written_inline() -> None:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        pattern = (Near(3, dilation=2), Window(4, shift=1))
        return vicinal.attention(query, key, value, pattern, return_lse=True)

    assert_same(whole_graph(call), call, inputs(2, 7, 9, 2, 8))


def test_pattern_may_be_a_global() -> None:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return vicinal.attention(query, key, value, GLOBAL)

    assert_same(whole_graph(call), call, inputs(1, 8, 6, 4, 8))


def test_pattern_may_be_built_inline_from_heads_and_union() -> None:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        pattern = heads(Near(3), union(Near(3), (Full(), Near(1))), sizes=(1, 3))
        return vicinal.attention(query, key, value, pattern)

    assert_same(whole_graph(call), call, inputs(1, 8, 6, 4, 8))


@pytest.mark.parametrize(
    "pattern",
    [Near(3), (Near(5), Full(causal=True)), GLOBAL, bounds(Near(3), (8, 6)).slice(0, 0, 8)],
    ids=["kind", "tuple", "heads", "bounds"],
)
def test_pattern_may_be_in_a_closure_or_an_argument(pattern: Any) -> None:
    def closed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return vicinal.attention(query, key, value, pattern)

    assert_same(whole_graph(closed), closed, inputs(1, 8, 6, 4, 8))
    query, key, value = inputs(1, 8, 6, 4, 8)
    found = whole_graph(vicinal.attention)(query, key, value, pattern)
    torch.testing.assert_close(found, closed(query, key, value), rtol=1e-5, atol=1e-6)


class Layer(torch.nn.Module):
    def __init__(self, pattern: Any) -> None:
        super().__init__()
        self.pattern = pattern
        self.projection = torch.nn.Linear(16, 48)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projection(tokens).unflatten(-1, (3, 2, 8)).unbind(-3)
        return vicinal.attention(query, key, value, self.pattern).flatten(-2)


@pytest.mark.parametrize("pattern", [Near(3), heads(Near(3), Window(4))], ids=["kind", "heads"])
def test_pattern_may_be_an_attribute_of_a_module(pattern: Any) -> None:
    module = Layer(pattern)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled, module, inputs(2, 7, 6, 16, number=1))


def test_layers_of_one_class_with_different_patterns_do_not_mix() -> None:
    layers = torch.nn.Sequential(Layer(Near(3)), Layer(Near(3, dilation=2)), Layer(Window(4)), Layer(Near(5)))
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    assert_same(compiled, layers, inputs(2, 9, 8, 16, number=1), rtol=1e-4, atol=1e-5)


def test_compiled_function_follows_a_pattern_that_changes() -> None:
    module = Layer(Near(3))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    tokens = torch.randn(1, 8, 8, 16)
    first = compiled(tokens)
    module.pattern = Near(5)
    torch.testing.assert_close(compiled(tokens), module(tokens))
    assert not torch.allclose(compiled(tokens), first)


def test_sliced_bounds_made_while_running_compile() -> None:
    """A streaming cache makes a new table at each step, outside of what is compiled."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: Bounds) -> torch.Tensor:
        return vicinal.attention(query, key, value, table)

    compiled = whole_graph(call)
    query, key, value = torch.randn(3, 1, 12, 2, 4).unbind(0)
    for start in (0, 4, 8):
        table = bounds(Near(3), (12,)).slice(0, start, start + 4)
        rows = query[:, start : start + 4]
        torch.testing.assert_close(compiled(rows, key, value, table), call(rows, key, value, table))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_names_compile(rank: int) -> None:
    function = (vicinal.na1d, vicinal.na2d, vicinal.na3d)[rank - 1]

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extra: torch.Tensor) -> Any:
        return function(
            query, key, value, 3, dilation=2, additional_keys=extra, additional_values=extra, return_lse=True
        )

    tensors = [*inputs(1, *(7, 6, 8)[:rank], 2, 8), *inputs(1, 4, 2, 8, number=1)]
    assert_same(whole_graph(call), call, tensors)


def test_unfused_operators_compile() -> None:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = vicinal.attention_scores(query, key, Near(3), bias=bias)
        return vicinal.apply_scores(scores.softmax(-1), value, Near(3))

    assert_same(whole_graph(call), call, [*inputs(2, 5, 6, 2, 8), torch.randn(2, 5, 5).requires_grad_()])


def test_merge_compiles() -> None:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        parts = [vicinal.attention(query, key, value, Full(), return_lse=True) for _ in range(2)]
        return vicinal.merge_attentions([part[0] for part in parts], [part[1] for part in parts])

    assert_same(whole_graph(call), call, inputs(1, 9, 2, 8))


@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem((9, 8), Near(3), has_bias=True, extra_tokens=2),
        Problem((9, 8), GLOBAL, heads=4, extra_queries=2),
        Problem((9, 8), Near(3), grids=((9, 8),), extra_tokens=2, extra_lengths=(1,)),
    ],
    ids=["bias", "heads", "grids"],
)
def test_batches_of_two_and_more_share_one_recompilation(problem: Problem, backward: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def call(tensors: Tensors, **others: Any) -> Any:
        return vicinal.attention(**{**arguments(problem, tensors), **others})

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 8, 4):
        tensors = {
            name: (tensor if name == "bias" else tensor.expand(batch, *tensor.shape[1:]).clone()).requires_grad_(
                backward
            )
            for name, tensor in draw(problem, torch.float32).items()
        }
        others = {
            name: torch.tensor(value).expand(batch, *torch.tensor(value).shape[1:]).clone()
            for name, value in (("grids", problem.grids), ("extra_lengths", problem.extra_lengths))
            if value is not None
        }
        found, wanted = flat(compiled(tensors, **others)), flat(call(tensors, **others))
        torch.testing.assert_close(found, wanted, equal_nan=True)
        if backward:
            torch.autograd.grad([tensor.sum() for tensor in found], list(tensors.values()))
    assert counter.frame_count <= 2


def test_other_sizes_are_other_problems_and_compile_again() -> None:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return vicinal.attention(query, key, value, Near(3, dilation=2))

    compiled = whole_graph(call)
    for shape in ((7, 6, 2, 4), (9, 6, 2, 4), (9, 11, 2, 4), (7, 6, 4, 4), (7, 6, 4, 8)):
        assert_same(compiled, call, inputs(3, *shape))
    scores = whole_graph(lambda query, key: vicinal.attention_scores(query, key, Near(3)))
    sums = whole_graph(lambda weights, value: vicinal.apply_scores(weights, value, Near(3)))
    for length, num_heads in ((7, 2), (9, 2), (9, 4), (12, 5)):
        query, key = torch.randn(2, 3, length, num_heads, 4).unbind(0)
        found = scores(query, key)
        torch.testing.assert_close(found, vicinal.attention_scores(query, key, Near(3)))
        torch.testing.assert_close(sums(found, key), vicinal.apply_scores(found, key, Near(3)))


def test_sizes_that_are_all_dynamic_compile() -> None:
    """`dynamic=True` makes a symbol of every size; those that tables depend on are turned back into numbers."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return vicinal.attention(query, key, value, (Near(3, dilation=2), Window(4)))

    compiled = whole_graph(call, dynamic=True)
    for batch in (2, 3):
        assert_same(compiled, call, inputs(batch, 7, 6, 2, 4))


def test_numbers_of_extra_tokens_may_change() -> None:
    def call(query: torch.Tensor, extra: torch.Tensor) -> Any:
        return vicinal.attention(query, query, query, Near(3), extra_key=extra, extra_value=extra, extra_query=extra)

    compiled = whole_graph(call)
    for tokens in (1, 3, 4, 7):
        assert_same(compiled, call, [*inputs(2, 9, 2, 4, number=1), *inputs(2, tokens, 2, 4, number=1)])


def test_user_mistakes_are_reported_while_compiling() -> None:
    def call(query: torch.Tensor) -> torch.Tensor:
        return vicinal.attention(query, query, query, (Near(3), Near(3)))

    with pytest.raises(Exception, match="query must have 5 axes"):
        whole_graph(call)(torch.randn(1, 9, 2, 4))


def test_gradient_penalty_of_a_compiled_discriminator_is_refused_or_right() -> None:
    """AOTAutograd has no double backward; ours must then fail loudly, never give a wrong number."""
    module = Layer(Near(3))
    compiled = torch.compile(module, backend="aot_eager")
    tokens = torch.randn(1, 5, 5, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (slope,) = torch.autograd.grad(compiled(tokens).square().sum(), tokens, create_graph=True)
        torch.autograd.grad(slope.square().sum(), list(module.parameters()))


def test_inductor_gives_the_numbers_of_eager() -> None:
    module = Layer(GLOBAL.groups[0])
    compiled = torch.compile(module, fullgraph=True)
    assert_same(compiled, module, inputs(2, 7, 6, 16, number=1), rtol=1e-4, atol=1e-5)
