"""Promises of `vicinal.attention` that have a name: views, empty batches, padding, blind queries, the lse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Bounds, Full, Near, Same, Window, bounds, heads, union

from .problems import PROBLEMS, SAMPLE, Problem, arguments, draw, draw_grads
from .tolerance import assert_agrees, judge, run, with_gradients

every_backend = pytest.mark.parametrize("backend", backends.known())


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


def half_blind(length: int = 8) -> Bounds:
    """The first queries of a row see keys, the others none."""
    return bounds(Near(3), (length,)).shift(0, -length, length + 2)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_query_without_keys_gives_zero_minus_infinity_and_zero_gradients(dtype: torch.dtype, backend: str) -> None:
    table = half_blind()
    sees = table.groups[0].members[0][0].count > 0
    assert 0 < sees.sum() < len(sees)
    blind = torch.from_numpy(~sees)
    query = normal(2, 8, 2, 4).to(dtype).requires_grad_()
    key, value = (normal(2, 10, 2, 4).to(dtype).requires_grad_() for _ in range(2))
    out, lse = vicinal.attention(query, key, value, table, return_lse=True, backend=backend)
    grads = torch.autograd.grad(
        (out, lse), (query, key, value), (normal(*out.shape).to(dtype), normal(*lse.shape).to(lse.dtype))
    )
    assert (out[:, blind] == 0).all()
    assert (lse[:, blind] == -torch.inf).all()
    assert lse[:, ~blind].isfinite().all()
    assert (grads[0][:, blind] == 0).all()
    assert (grads[0][:, ~blind] != 0).any()
    unseen = torch.ones(10, dtype=torch.bool)
    for first, count in zip(table.groups[0].members[0][0].start, table.groups[0].members[0][0].count, strict=True):
        unseen[first : first + count] = False
    assert unseen.any()
    for grad in grads[1:]:
        assert (grad[:, unseen] == 0).all()
        assert grad.isfinite().all()


@every_backend
def test_grid_where_no_query_sees_any_key_gives_zeros(backend: str) -> None:
    table = bounds(Near(3), (6, 5)).shift(0, 40, 4)
    query = normal(1, 6, 5, 2, 4).requires_grad_()
    key, value = (normal(1, 4, 5, 2, 4).requires_grad_() for _ in range(2))
    out, lse = vicinal.attention(query, key, value, table, return_lse=True, backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad((out, lse), (query, key, value), (torch.ones_like(out), torch.ones_like(lse)))
    assert not any(grad.any() for grad in grads)


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
    with torch.inference_mode():
        assert torch.equal(vicinal.attention(*tensors, Near(3), backend=backend), out)
    again = checkpoint(
        lambda *inputs: vicinal.attention(*inputs, Near(3), backend=backend), *tensors, use_reentrant=False
    )
    for grad, wanted in zip(
        torch.autograd.grad(again.sum(), tensors), torch.autograd.grad(out.sum(), tensors), strict=True
    ):
        assert torch.equal(grad, wanted)


@every_backend
def test_sliced_bounds_with_bias_equal_the_rows_of_the_whole(backend: str) -> None:
    query, key, value = normal(3, 2, 9, 10, 2, 4, dtype=torch.float64).unbind(0)
    pattern = (Near(3, dilation=2), Window(4, shift=1))
    bias = normal(2, 5, 7, dtype=torch.float64)
    whole, lse = vicinal.attention(query, key, value, pattern, bias=bias, return_lse=True, backend=backend)
    table = bounds(pattern, (9, 10)).slice(0, 2, 7).slice(1, 3, 4)
    part, part_lse = vicinal.attention(
        query[:, 2:7, 3:4], key, value, table, bias=bias, return_lse=True, backend=backend
    )
    torch.testing.assert_close(part, whole[:, 2:7, 3:4])
    torch.testing.assert_close(part_lse, lse[:, 2:7, 3:4])


@every_backend
@pytest.mark.parametrize("border", ["shift", "crop", "wrap"])
def test_halo_rank_with_bias_equals_its_rows_of_the_whole(border: Any, backend: str) -> None:
    """What a rank of a sharded grid does: its own queries against its own keys and a halo, also around the seam."""
    query, key, value = normal(3, 1, 16, 3, 2, 4, dtype=torch.float64).unbind(0)
    pattern = (Near(5, border=border), Near(3))
    bias = normal(2, 9, 5, dtype=torch.float64)
    whole = vicinal.attention(query, key, value, pattern, bias=bias, backend=backend)
    for begin in range(0, 16, 4):
        reach = [row % 16 for row in range(begin - 2, begin + 6)] if border == "wrap" else range(max(begin - 2, 0), 16)
        table = bounds(pattern, (16, 3)).slice(0, begin, begin + 4)
        table = table.shift(0, begin - 2, 8) if border == "wrap" else table.shift(0, reach[0], len(reach))
        if border == "shift" and begin == 12:  # the last windows are moved inward and reach further
            continue
        rows = list(reach)
        part = vicinal.attention(
            query[:, begin : begin + 4], key[:, rows], value[:, rows], table, bias=bias, backend=backend
        )
        torch.testing.assert_close(part, whole[:, begin : begin + 4])


@every_backend
def test_streamed_keys_equal_the_whole_under_a_causal_pattern(backend: str) -> None:
    query, key, value = normal(3, 1, 12, 3, 2, 4, dtype=torch.float64).unbind(0)
    pattern = (Near(4, causal=True), Near(3))
    whole = vicinal.attention(query, key, value, pattern, backend=backend)
    for step in range(12):
        forgotten = max(step - 3, 0)
        table = bounds(pattern, (12, 3)).slice(0, step, step + 1).shift(0, forgotten, step + 1 - forgotten)
        kept = slice(forgotten, step + 1)
        out = vicinal.attention(query[:, step : step + 1], key[:, kept], value[:, kept], table, backend=backend)
        torch.testing.assert_close(out, whole[:, step : step + 1])


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


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_tiled_backend_gives_the_same_in_many_small_chunks(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems fit into one chunk; the loop over chunks and samples must hold for them as well."""
    monkeypatch.setattr("vicinal.ops.tiled.parts.CHUNK_BYTES", 4096)
    assert_agrees(run(problem, torch.float32, "tiled"), judge(problem, torch.float32))


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
