"""The registered operators as torch sees them: schema, fakes, gradients, autocast, cost."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import vicinal
from vicinal.ops import backend as backends
from vicinal.ops import resolve
from vicinal.pattern import Near, Same, Window, count, heads

from .problems import CRISS_CROSS, HYDRA, MIXED, SAMPLE, Problem, Tensors, arguments, draw, near
from .tolerance import FACTOR, judge, largest

every_backend = pytest.mark.parametrize("backend", backends.usable())
ops = torch.ops.vicinal


def seen_by_torch(problem: Problem, tensors: Tensors, backend: str, needs: bool = True) -> tuple[Any, ...]:
    """What the public call hands to `vicinal::attend`."""
    caught: list[tuple[Any, ...]] = []

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ops.attend.default:
                caught.append(args)
            return func(*args, **(kwargs or {}))

    with Catch(), torch.no_grad():
        vicinal.attention(**arguments(problem, tensors), backend=backend)
    passed = caught[0]
    return tuple(
        value.detach().clone().requires_grad_(needs)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for value in passed
    )


REGISTERED = (
    SAMPLE[0],
    SAMPLE[1],
    SAMPLE[3],
    SAMPLE[4],
    Problem((5, 4), Same(), head_dim=3, value_dim=5),
    Problem((6,), Near(3), batch=2, extra_tokens=2, extra_lengths=(0, 2)),
)


@every_backend
@pytest.mark.parametrize("problem", REGISTERED, ids=str)
def test_attend_passes_opcheck(problem: Problem, backend: str) -> None:
    tensors = {name: tensor.nan_to_num() for name, tensor in draw(problem, torch.float32).items()}
    torch.library.opcheck(ops.attend.default, seen_by_torch(problem, tensors, backend))


@every_backend
@pytest.mark.parametrize("problem", REGISTERED, ids=str)
def test_attend_backward_passes_opcheck(problem: Problem, backend: str) -> None:
    tensors = {name: tensor.nan_to_num() for name, tensor in draw(problem, torch.float32).items()}
    passed = seen_by_torch(problem, tensors, backend, needs=False)
    out, lse = ops.attend(*passed)
    needs = [passed[place] is not None for place in (0, 1, 2, 4, 5, 6)]
    for grads in ((torch.randn_like(out), torch.randn_like(lse)), (torch.randn_like(out), None)):
        given = (*grads, out, lse, *passed, needs)
        torch.library.opcheck(ops.attend_backward.default, given)
        assert [grad.shape for grad in ops.attend_backward(*given)] == [
            passed[place].shape if need else (0,) for place, need in zip((0, 1, 2, 4, 5, 6), needs, strict=True)
        ]
    some = [False, True, False, *needs[3:]]
    torch.library.opcheck(ops.attend_backward.default, (out, None, out, lse, *passed, some))


@pytest.mark.parametrize(
    "problem",
    [
        Problem((7,), Near(3, dilation=2), head_dim=4),
        Problem((5, 6), heads(Near(3), Window(2)), heads=4, kv_heads=2, head_dim=3, batch=2),
        Problem((4, 3), CRISS_CROSS, head_dim=2, key_grid=None),
    ],
    ids=str,
)
def test_unfused_operators_pass_opcheck(problem: Problem) -> None:
    tensors = draw(problem, torch.float32)
    query, key, value = (tensors[name].requires_grad_() for name in ("query", "key", "value"))
    layout = resolve.packed_layout(problem.pattern.key, problem.grid, problem.grid, problem.heads)
    tables = resolve.tables(problem.pattern.key, problem.grid, problem.grid, query)
    torch.library.opcheck(ops.scores.default, (query, key, tables, layout, 0.5))
    scores = ops.scores(query, key, tables, layout, 0.5)
    weights = scores.detach().softmax(-1).requires_grad_()
    torch.library.opcheck(ops.apply.default, (weights, value, tables, layout))
    spread = (weights, query, tables, layout, key.shape[-2], problem.grid)
    torch.library.opcheck(ops.spread.default, spread)


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones(problem: Problem) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, dtype).items()}
        real = flat(vicinal.attention(**arguments(problem, tensors), return_lse=True))
        grads = torch.autograd.grad(real, list(tensors.values()), [torch.ones_like(tensor) for tensor in real])
        with FakeTensorMode() as mode:
            faked = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
            fake = flat(vicinal.attention(**arguments(problem, faked), return_lse=True))
            fake_grads = torch.autograd.grad(fake, list(faked.values()), [torch.ones_like(tensor) for tensor in fake])
        for made, wanted in zip((*fake, *fake_grads), (*real, *grads), strict=True):
            assert made.dtype == wanted.dtype
            assert made.shape == wanted.shape
            assert made.stride() == wanted.stride()


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [tensor for part in found for tensor in flat(part)]


def test_meta_tensors_go_through_forward_and_backward() -> None:
    query, key, value = torch.empty(3, 2, 512, 512, 4, 32, device="meta").requires_grad_().unbind(0)
    out, lse = vicinal.attention(query, key, value, Near(13), return_lse=True)
    assert out.device.type == lse.device.type == "meta"
    assert out.shape == (2, 512, 512, 4, 32)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value))
    assert all(grad.device.type == "meta" and grad.shape == query.shape for grad in grads)
    scores = vicinal.attention_scores(query, key, Near(3))
    assert vicinal.apply_scores(scores.softmax(-1), value, Near(3)).shape == out.shape


def test_fakes_leave_nothing_behind_for_real_tensors() -> None:
    """Tables are remembered; those made while a fake mode was on must be real."""
    pattern, grid = Near(3, dilation=2), (1, 19, 2, 4)
    with FakeTensorMode():
        vicinal.attention(*(torch.empty(grid) for _ in range(3)), pattern)
        scores = vicinal.attention_scores(*(torch.empty(grid) for _ in range(2)), pattern, bias=torch.zeros(2, 5))
        assert scores.shape == (1, 19, 2, 3)
    query, key, value = torch.randn(3, *grid).unbind(0)
    assert vicinal.attention(query, key, value, pattern).isfinite().all()
    real = vicinal.attention_scores(query, key, pattern, bias=torch.zeros(2, 5))
    torch.testing.assert_close(real, vicinal.attention_scores(query, key, pattern))


@every_backend
@pytest.mark.parametrize("problem", [SAMPLE[1], SAMPLE[3]], ids=str)
def test_autocast_computes_in_its_own_precision_and_keeps_gradients_in_theirs(problem: Problem, backend: str) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.bfloat16).items()}
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flat(vicinal.attention(**arguments(problem, wide), return_lse=True, backend=backend))
    wanted = flat(vicinal.attention(**arguments(problem, tensors), return_lse=True, backend=backend))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=2**-6)
    grads = torch.autograd.grad([tensor.float().sum() for tensor in found], list(wide.values()))
    assert all(grad.dtype == torch.float32 for grad in grads)
    exact = judge(problem, torch.bfloat16).exact
    for mine, name in zip(found, ("out", "extra_out") if problem.extra_queries else ("out",), strict=False):
        assert largest(mine.detach().double() - exact[name]) <= FACTOR * 2**-7 * largest(exact[name])


def test_autocast_takes_what_a_projection_under_it_gives() -> None:
    """Query, key and value in bfloat16, but prefix tokens and bias still in float32, as parameters are."""
    projection = torch.nn.Linear(8, 24)
    prefix = torch.nn.Parameter(torch.randn(1, 2, 2, 4))
    bias = torch.nn.Parameter(torch.randn(2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, key, value = projection(torch.randn(1, 9, 8)).unflatten(-1, (3, 2, 4)).unbind(-3)
        out = vicinal.attention(query, key, value, Near(3), bias=bias, extra_key=prefix, extra_value=prefix)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert prefix.grad is not None
    assert prefix.grad.dtype == torch.float32
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


@every_backend
def test_a_backward_pass_under_autocast_is_the_one_outside(backend: str) -> None:
    """Also of a gradient: `backward()` within the `with` is common, if not what torch advises."""
    inputs = {name: torch.randn(1, 9, 11, 2, 8, dtype=torch.bfloat16) for name in ("query", "key", "value")}
    inputs["bias"] = torch.randn(2, 5, 5)

    def gradients(is_inside: bool, times: int) -> list[torch.Tensor]:
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = vicinal.attention(**tensors, pattern=Near(3), backend=backend).float().square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_inside):
            for left in reversed(range(times)):
                grads = torch.autograd.grad(found, list(tensors.values()), create_graph=left > 0)
                found = sum(grad.float().square().sum() for grad in grads)
        return list(grads)

    for times in (1, 2):
        for inside, outside in zip(gradients(True, times), gradients(False, times), strict=True):
            assert inside.dtype == outside.dtype
            assert outside.abs().max() > 0
            torch.testing.assert_close(inside, outside, rtol=2**-6, atol=2**-6 * largest(outside))


def test_autocast_leaves_float64_alone() -> None:
    query = torch.randn(1, 9, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vicinal.attention(query, query, query, Near(3)).dtype == torch.float64


def flops_of(problem: Problem, pairs: int) -> tuple[int, int]:
    """Forward and backward, by the formula of the design."""
    value_dim = problem.head_dim if problem.value_dim is None else problem.value_dim
    forward = 2 * pairs * (problem.head_dim + value_dim)
    return forward, forward * 5 // 2


def pairs_of(problem: Problem) -> int:
    """(query, key) pairs over the batch and all heads, counted from the masks."""
    total = 0
    for sample in range(problem.batch):
        grid = problem.grid if problem.grids is None else problem.grids[sample]
        key_grid = problem.keys if problem.grids is None else grid
        tokens = problem.extra_tokens if problem.extra_lengths is None else problem.extra_lengths[sample]
        total += count(problem.pattern, grid, key_grid, heads=problem.heads)
        total += problem.heads * torch.Size(grid).numel() * tokens
        total += problem.heads * problem.extra_queries * (torch.Size(key_grid).numel() + tokens)
    return total


@every_backend
@pytest.mark.parametrize(
    "problem",
    [
        *SAMPLE,
        Problem((9,), Near(4), value_dim=5, batch=3, extra_tokens=4, extra_lengths=(0, 3, 4), extra_queries=2),
        Problem((8, 8), HYDRA, heads=4, kv_heads=1),
        Problem((12, 8), MIXED, heads=4),
    ],
    ids=str,
)
def test_flop_counter_counts_exactly(problem: Problem, backend: str) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.float32).items()}
    forward, backward = flops_of(problem, pairs_of(problem))
    with FlopCounterMode(display=False) as counter:
        outputs = flat(vicinal.attention(**arguments(problem, tensors), backend=backend))
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(outputs, list(tensors.values()), [torch.ones_like(tensor) for tensor in outputs])
    assert counter.get_total_flops() == backward


def test_flop_counter_counts_the_unfused_operators() -> None:
    problem = Problem((9, 8), Near(3), value_dim=5)
    tensors = draw(problem, torch.float32)
    with FlopCounterMode(display=False) as counter:
        scores = vicinal.attention_scores(tensors["query"], tensors["key"], problem.pattern)
        vicinal.apply_scores(scores.softmax(-1), tensors["value"], problem.pattern)
    assert counter.get_total_flops() == flops_of(problem, pairs_of(problem))[0]


def test_flop_counter_counts_on_the_meta_device() -> None:
    query = torch.empty(2, 56, 56, 2, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        vicinal.attention(query, query, query, near((7, 7), dilation=(1, 8)))
    assert counter.get_total_flops() == 2 * 39_337_984


def test_flop_counter_that_was_imported_first_knows_the_operators_too() -> None:
    """The formulas are handed over whichever of the two modules comes first."""
    assert "torch.utils.flop_counter" in sys.modules
    registry = sys.modules["torch.utils.flop_counter"].flop_registry
    for operator in (ops.attend, ops.attend_backward, ops.scores, ops.apply, ops.spread):
        assert operator in registry


class Watching(torch.overrides.TorchFunctionMode):
    """Remembers what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_whoever_watches_sees_the_operator(needs_grad: bool) -> None:
    query = torch.randn(1, 6, 6, 1, 8, requires_grad=needs_grad)

    def call() -> torch.Tensor:
        return vicinal.na2d(query, query, query, 3)

    alone = call()
    with Watching() as functions:
        assert torch.equal(call(), alone)
    assert "vicinal.attend.default" in functions.seen
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() > 0
    with torch.profiler.profile() as profile:
        call()
    assert "vicinal::attend" in {event.key for event in profile.key_averages()}


def test_lazy_negatives_are_negated() -> None:
    complex_part = torch.randn(1, 6, 6, 1, 8, dtype=torch.complex64)
    query = complex_part.conj().imag
    assert query.is_neg()
    plain = -complex_part.imag
    for _ in range(2):  # the second call skips the checks
        torch.testing.assert_close(vicinal.na2d(query, query, query, 3), vicinal.na2d(plain, plain, plain, 3))


@pytest.mark.parametrize("backend", ["cpu", "tiled", "reference"])
def test_gradients_that_are_lazily_negated_are_negated(backend: str) -> None:
    query = torch.randn(1, 6, 6, 1, 8, requires_grad=True)
    other = torch.randn(1, 6, 6, 1, 8, dtype=torch.complex64)
    out = vicinal.na2d(query, query, query, 3, backend=backend)
    lazy = other.conj().imag
    assert lazy.is_neg()
    (found,) = torch.autograd.grad(out, query, lazy, retain_graph=True)
    (wanted,) = torch.autograd.grad(out, query, -other.imag)
    torch.testing.assert_close(found, wanted)


def test_inference_mode_records_nothing_even_with_gradients_enabled() -> None:
    query = torch.randn(1, 6, 6, 1, 8, requires_grad=True)
    for _ in range(2):
        with torch.inference_mode(), torch.enable_grad():
            assert not vicinal.na2d(query, query, query, 3).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of torch's own, on first use
@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_is_refused(needs_grad: bool) -> None:
    query = torch.randn(1, 6, 6, 1, 8)
    for _ in range(2):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(query.clone().requires_grad_(needs_grad), torch.ones_like(query))
            with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
                vicinal.na2d(dual, query, query, 3)
