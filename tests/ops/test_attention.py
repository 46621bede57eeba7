"""Promises of `vicinal.attention` that have a name: views, dtypes, scales, gradients one by one, memory."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Full, Near, Same, Window, heads, union

from .problems import PROBLEMS, SAMPLE, Problem, arguments, draw, draw_grads
from .tolerance import assert_agrees, judge, run, with_gradients

every_backend = pytest.mark.parametrize("backend", backends.usable())


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@every_backend
def test_attention_takes_slices_of_one_projection(backend: str) -> None:
    projected = normal(2, 5, 7, 3, 4, 8).requires_grad_()
    weight = normal(2, 5, 7, 4, 8)
    out = vicinal.attention(*projected.unbind(3), Near(3), backend=backend)
    (grad,) = torch.autograd.grad(out, projected, weight)
    apart = leaves(*projected.unbind(3))
    expected = vicinal.attention(*apart, Near(3), backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, torch.stack(torch.autograd.grad(expected, apart, weight), 3), rtol=0, atol=0)


@every_backend
def test_attention_takes_heads_first_tensors_seen_heads_last(backend: str) -> None:
    tensors = [normal(2, 4, 5, 7, 8).requires_grad_() for _ in range(3)]
    weight = normal(2, 4, 5, 7, 8).permute(0, 2, 3, 1, 4)
    out = vicinal.attention(*(tensor.permute(0, 2, 3, 1, 4) for tensor in tensors), Window(3), backend=backend)
    grads = torch.autograd.grad(out, tensors, weight)
    dense = leaves(*(tensor.permute(0, 2, 3, 1, 4).contiguous() for tensor in tensors))
    expected = vicinal.attention(*dense, Window(3), backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, dense, weight), strict=True):
        torch.testing.assert_close(grad.permute(0, 2, 3, 1, 4), wanted, rtol=0, atol=0)


@every_backend
def test_attention_takes_expanded_keys_and_expanded_gradients(backend: str) -> None:
    query, key = normal(3, 11, 2, 8).requires_grad_(), normal(1, 11, 1, 8).requires_grad_()
    spread = key.expand(3, 11, 2, 8)
    vicinal.attention(query, spread, spread, Near(4), backend=backend).sum().backward()
    copied_query, copy = leaves(query, spread)
    vicinal.attention(copied_query, copy, copy, Near(4), backend=backend).backward(torch.ones(3, 11, 2, 8))
    torch.testing.assert_close(query.grad, copied_query.grad)
    torch.testing.assert_close(key.grad, copy.grad.sum(0, keepdim=True).sum(2, keepdim=True))


@every_backend
def test_attention_takes_one_tensor_as_query_key_and_value(backend: str) -> None:
    tokens, weight = normal(2, 9, 2, 8, dtype=torch.float64).requires_grad_(), normal(2, 9, 2, 8).double()
    (grad,) = torch.autograd.grad(vicinal.attention(tokens, tokens, tokens, Near(3), backend=backend), tokens, weight)
    apart = leaves(tokens, tokens, tokens)
    grads = torch.autograd.grad(vicinal.attention(*apart, Near(3), backend=backend), apart, weight)
    torch.testing.assert_close(grad, sum(grads))


@every_backend
def test_scale_of_zero_averages_the_values(backend: str) -> None:
    query, key, value = normal(3, 1, 9, 2, 4).unbind(0)
    out, lse = vicinal.attention(query, key, value, Near(3), scale=0, return_lse=True, backend=backend)
    torch.testing.assert_close(out[:, 4], value[:, 3:6].mean(1))
    torch.testing.assert_close(lse, torch.full_like(lse, 3.0).log())


@every_backend
def test_scale_is_head_dim_to_the_minus_one_half_unless_given(backend: str) -> None:
    query, key, value = normal(3, 1, 9, 2, 16).unbind(0)
    default = vicinal.attention(query, key, value, Near(3), backend=backend)
    torch.testing.assert_close(default, vicinal.attention(query, key, value, Near(3), scale=0.25, backend=backend))


@every_backend
def test_scores_of_any_size_neither_overflow_nor_vanish(backend: str) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in normal(3, 1, 40, 2, 8).unbind(0))
    out, lse = vicinal.attention(query, key, value, Near(7), scale=1e4, return_lse=True, backend=backend)
    scores = vicinal.attention_scores(query, key, Near(7), scale=1e4)
    torch.testing.assert_close(lse, scores.amax(-1))
    assert (
        out[..., None, :] - vicinal.apply_scores(torch.eye(7)[scores.argmax(-1)], value, Near(7))[..., None, :]
    ).abs().max() < 1e-5
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)


@every_backend
@pytest.mark.parametrize("problem", [SAMPLE[1], SAMPLE[3], PROBLEMS[0]], ids=str)
def test_gradient_of_each_input_alone_equals_that_among_others(problem: Problem, backend: str) -> None:
    together = run(problem, torch.float64, backend)
    for name in draw(problem, torch.float64):
        tensors = draw(problem, torch.float64)
        tensors[name].requires_grad_()
        found = vicinal.attention(**arguments(problem, tensors), return_lse=True, backend=backend)
        outputs = dict(zip(("out", "lse"), found, strict=True))
        if problem.extra_queries:
            outputs = dict(zip(("out", "extra_out", "lse", "extra_lse"), (*found[0], *found[1]), strict=True))
        outputs = {key: tensor for key, tensor in outputs.items() if tensor.requires_grad}
        weights = draw_grads(problem, {"out": together["out"], "lse": together["lse"]} | {
            key: together[key] for key in ("extra_out", "extra_lse") if key in together
        })  # fmt: skip
        (grad,) = torch.autograd.grad(list(outputs.values()), tensors[name], [weights[key] for key in outputs])
        torch.testing.assert_close(grad, together[f"grad_{name}"])


@every_backend
def test_lse_alone_and_output_alone_have_the_gradients_they_have_together(backend: str) -> None:
    tensors = [normal(2, 11, 2, 6, dtype=torch.float64).requires_grad_() for _ in range(3)]
    out, lse = vicinal.attention(*tensors, Near(4), return_lse=True, backend=backend)
    weight, lse_weight = normal(*out.shape).double(), normal(*lse.shape).double()
    both = torch.autograd.grad((out, lse), tensors, (weight, lse_weight), retain_graph=True)
    of_out = torch.autograd.grad(out, tensors, weight, retain_graph=True)
    of_lse = torch.autograd.grad(lse, tensors, lse_weight, allow_unused=True)
    for together, one, other in zip(both, of_out, of_lse, strict=True):
        torch.testing.assert_close(together, one if other is None else one + other)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_has_the_dtype_of_the_query_and_lse_is_wide(dtype: torch.dtype, backend: str) -> None:
    query, key, value = normal(3, 1, 6, 2, 4).to(dtype).unbind(0)
    out, lse = vicinal.attention(query, key, value, Near(3), return_lse=True, backend=backend)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_backend
def test_bias_in_float32_serves_a_query_in_bfloat16_and_keeps_its_gradient_wide(backend: str) -> None:
    query, key, value = normal(3, 1, 6, 7, 2, 8).bfloat16().unbind(0)
    bias = normal(2, 5, 5).requires_grad_()
    out = vicinal.attention(query, key, value, Near(3), bias=bias, backend=backend)
    (grad,) = torch.autograd.grad(out.float().sum(), bias)
    assert grad.dtype == torch.float32
    exact_bias = bias.detach().double().requires_grad_()
    exact = vicinal.attention(query.double(), key.double(), value.double(), Near(3), bias=exact_bias)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_bias)
    exact = exact.detach()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2**-7 * float(exact.abs().max()))
    torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=2**-6 * float(exact_grad.abs().max()))


@every_backend
def test_inputs_and_gradients_are_left_as_they_were(backend: str) -> None:
    problem = SAMPLE[1]
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.float32).items()}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    out, extra_out = vicinal.attention(**arguments(problem, tensors), backend=backend)
    weights = [torch.randn_like(out), torch.randn_like(extra_out)]
    copies = [weight.clone() for weight in weights]
    out_before = out.detach().clone()
    torch.autograd.grad((out, extra_out), list(tensors.values()), weights)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, copies, strict=True))
    assert torch.equal(out, out_before)


@every_backend
@pytest.mark.parametrize("pattern", [Same(), Window(3), Full(), union(Near(3), Same())], ids=repr)
def test_output_shares_no_memory_with_an_input(pattern: Any, backend: str) -> None:
    query, key, value = normal(3, 1, 6, 1, 4).unbind(0)
    out = vicinal.attention(query, key, value, pattern, backend=backend)
    assert out.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (query, key, value)}
    assert out.is_contiguous()


@every_backend
def test_second_run_gives_the_same_bits(backend: str) -> None:
    first, second = (run(SAMPLE[3], torch.float32, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
def test_attention_runs_without_gradients_and_under_checkpointing(backend: str) -> None:
    tensors = [normal(1, 9, 2, 4).requires_grad_() for _ in range(3)]
    out = vicinal.attention(*tensors, Near(3), backend=backend)
    with torch.no_grad():
        assert not vicinal.attention(*tensors, Near(3), backend=backend).requires_grad
    # only the portable back end goes another way where nothing has to be kept for a backward
    rounding = 1e-6 if backend == "tiled" else 0.0
    with torch.inference_mode():
        again = vicinal.attention(*tensors, Near(3), backend=backend)
    torch.testing.assert_close(again, out, rtol=rounding, atol=rounding)
    again = checkpoint(
        lambda *inputs: vicinal.attention(*inputs, Near(3), backend=backend), *tensors, use_reentrant=False
    )
    for grad, wanted in zip(
        torch.autograd.grad(again.sum(), tensors), torch.autograd.grad(out.sum(), tensors), strict=True
    ):
        assert torch.equal(grad, wanted)


CHUNKED = (*SAMPLE, Problem((9, 13), Near(3), batch=3, extra_tokens=2, has_bias=True, heads=4, kv_heads=2))


@pytest.mark.parametrize("problem", CHUNKED, ids=str)
def test_tiled_backend_gives_the_same_in_many_small_chunks(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems fit into one chunk; the loop over chunks and samples must hold for them as well."""
    monkeypatch.setattr("vicinal.ops.tiled.parts.CHUNK_BYTES", 4096)
    monkeypatch.setattr("vicinal.ops.tiled.parts.WHOLE_BYTES", 0)
    assert_agrees(run(problem, torch.float32, "tiled"), judge(problem, torch.float32))


VARIANTS = [
    {"kv_heads": kv_heads, "extra_tokens": extra_tokens, "has_bias": has_bias, "batch": batch}
    for kv_heads in (4, 1, 2)
    for extra_tokens in (0, 3, 1)
    for has_bias in (False, True)
    for batch in (2, 1)
]


@pytest.mark.parametrize("pattern", [Near(3), Near(3, dilation=2)], ids=repr)
def test_what_is_remembered_of_one_call_does_not_leak_into_the_next(pattern: Any) -> None:
    """The same pattern on the same grid, so the same plan, with everything else changing from call to call."""
    for variant in VARIANTS:
        problem = Problem((7, 8), pattern, heads=4, **variant)
        for dtype in (torch.float32, torch.float64):
            assert_agrees(run(problem, dtype, "tiled"), judge(problem, dtype))


@every_backend
def test_result_does_not_depend_on_the_other_samples_of_the_batch(backend: str) -> None:
    query, key, value = normal(3, 5, 23, 2, 8, dtype=torch.float64).unbind(0)
    together = vicinal.attention(query, key, value, Near(5, dilation=2), backend=backend)
    for sample in range(5):
        alone = [tensor[sample : sample + 1] for tensor in (query, key, value)]
        torch.testing.assert_close(
            vicinal.attention(*alone, Near(5, dilation=2), backend=backend), together[sample : sample + 1]
        )


@every_backend
def test_gradient_reaches_the_bias_of_every_group(backend: str) -> None:
    problem = Problem((7, 6), heads(Near(3), Full(), Window(4), sizes=(1, 2, 1)), heads=4, kv_heads=2, has_bias=True)
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.float64).items()}
    assert [name for name in tensors if name.startswith("bias")] == ["bias0", "bias1", "bias2"]
    out, lse = vicinal.attention(**arguments(problem, tensors), return_lse=True, backend=backend)
    results = with_gradients(problem, tensors, {"out": out, "lse": lse})
    assert_agrees(results, judge(problem, torch.float64))
    assert all(results[f"grad_bias{group}"].any() for group in range(3))


@every_backend
@pytest.mark.parametrize("problem", [SAMPLE[1], SAMPLE[4]], ids=str)
def test_defaults_of_torch_change_nothing(problem: Problem, backend: str) -> None:
    """Neither the default device nor the default dtype may slip into what is made along the way."""
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(problem, torch.float32).items()}
    given = arguments(problem, tensors)
    wanted = flat(vicinal.attention(**given, return_lse=True, backend=backend))
    weights = [torch.ones_like(tensor) for tensor in wanted]
    wanted_grads = torch.autograd.grad(wanted, list(tensors.values()), weights)
    forget_plans()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = flat(vicinal.attention(**given, return_lse=True, backend=backend))
            grads = torch.autograd.grad(found, list(tensors.values()), weights, retain_graph=True)
            again = torch.autograd.grad(found, list(tensors.values()), weights, create_graph=True)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads, wanted_grads)
    torch.testing.assert_close([grad.detach() for grad in again], list(wanted_grads), rtol=1e-4, atol=1e-5)


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [tensor for part in found for tensor in flat(part)]


def forget_plans() -> None:
    """Empty what the operator remembers, so that everything is made anew."""
    from vicinal.ops import resolve
    from vicinal.ops.tiled import plan

    for module in (resolve, plan):
        for remembered in vars(module).values():
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()


def test_what_inference_mode_leaves_behind_serves_training() -> None:
    """Tensors made under inference mode may not be saved for a backward; none of ours may be one."""
    forget_plans()
    query, bias = normal(1, 33, 2, 4), normal(2, 9)
    with torch.inference_mode():
        vicinal.attention(query, query, query, Near(5), bias=bias)
        vicinal.attention_scores(query, query, Near(5), bias=bias)
    query.requires_grad_()
    out = vicinal.attention(query, query, query, Near(5), bias=bias)
    out = out.sum() + vicinal.attention_scores(query, query, Near(5), bias=bias).sum()
    (grad,) = torch.autograd.grad(out, query, create_graph=True)
    grad.square().sum().backward()
    assert query.grad is not None


def test_threads_do_not_disturb_each_other() -> None:
    forget_plans()
    judgments = {problem: judge(problem, torch.float32) for problem in SAMPLE}

    def work(problem: Problem) -> None:
        assert_agrees(run(problem, torch.float32, "tiled"), judgments[problem])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, SAMPLE * 4))


MEMORY = """
import resource, torch, vicinal
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = torch.randn(1, 32, 32, 4, 32)
vicinal.attention(small, small, small, vicinal.Near(13), backend="tiled")
query, key, value = (torch.randn(1, 512, 512, 4, 32) for _ in range(3))
before = peak()
out = vicinal.attention(query, key, value, vicinal.Near(13), backend="tiled")
print(peak() - before - out.numel() * out.element_size())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak is read from the resource module, which Windows lacks")
def test_tiled_backend_needs_little_memory_beside_inputs_and_output() -> None:
    """All scores of this problem would take 700 MB, its gathered keys 22 GB."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2**30
