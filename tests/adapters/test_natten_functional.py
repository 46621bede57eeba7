"""The fused functions: NATTEN's own problem tables, both generations' arguments, packed sequences, merging."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

import vicinal
from vicinal.adapters import natten
from vicinal.adapters.natten.arguments import check_all_args, generate_varlen_parameters
from vicinal.adapters.natten.versions import asked

from .natten_problems import PROBLEMS, NattenProblem
from .windows import dense_attention

FUNCTIONS = (natten.na1d, natten.na2d, natten.na3d)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64, against a float64 computation in another order


def with_grads(results: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The results and the gradients of all inputs, each result weighted differently in every entry."""
    weights = [torch.linspace(-1, 1, result.numel(), dtype=result.dtype).sin().view_as(result) for result in results]
    return (*results, *torch.autograd.grad(results, inputs, weights))


def compare(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    assert all(result.abs().max() > 0 for result in wanted), "a result of nothing but zeros would prove nothing"
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("extra_tokens", [0, 3])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_nattens_problem_tables(problem: NattenProblem, extra_tokens: int) -> None:
    inputs = list(problem.tensors())
    if extra_tokens:
        inputs += [torch.randn(1, extra_tokens, *tensor.shape[-2:], dtype=tensor.dtype) for tensor in inputs[1:]]
    query, key, value, *extra = (tensor.requires_grad_() for tensor in inputs)
    options = dict(zip(("additional_keys", "additional_values"), extra, strict=False))
    found = FUNCTIONS[len(problem.grid) - 1](query, key, value, **problem.window, **options, return_lse=True)
    wanted = dense_attention(query, key, value, problem.window, extra=(extra[0], extra[1]) if extra else None)
    compare(with_grads(found, tuple(inputs)), with_grads(wanted, tuple(inputs)))
    again = natten.functional.neighborhood_attention_generic(query, key, value, **problem.window, **options)
    torch.testing.assert_close(again, found[0])


def test_a_position_bias_has_its_gradient() -> None:
    query, key, value = (torch.randn(1, 9, 14, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    window = {"kernel_size": (3, 4), "dilation": (3, 2)}
    inputs = (query, key, value, rpb)
    found = natten.na2d(query, key, value, **window, rpb=rpb, scale=0.7, return_lse=True)
    compare(with_grads(found, inputs), with_grads(dense_attention(query, key, value, window, rpb, scale=0.7), inputs))


def test_arguments_of_both_generations_by_position() -> None:
    query = torch.randn(1, 24, 2, 8)
    rpb = torch.randn(2, 7)
    dilated = natten.na1d(query, query, query, kernel_size=4, dilation=3)
    strided = natten.na1d(query, query, query, kernel_size=4, stride=3)
    both = natten.na1d(query, query, query, kernel_size=4, stride=3, dilation=2)
    assert not torch.allclose(dilated, strided)

    def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)

    same(natten.na1d(query, query, query, 4, 3, False), dilated)  # 0.17: a flag in the sixth place
    same(natten.na1d(query, query, query, (4,), (3,), (False,), None, 8**-0.5), dilated)
    same(natten.na1d(query, query, query, 4, 3, xformers_kwargs=None), dilated)
    same(natten.na1d(query, query, query, 4, 3, 2), both)  # 0.21: a number there
    same(natten.na1d(query, query, query, 4, 3, dilation=2), both)
    tiled = natten.na1d(query, query, query, kernel_size=4, stride=3, backend="tiled")
    same(natten.na1d(query, query, query, 4, 3, backend="tiled"), tiled)
    same(natten.na1d(query, query, query, 4, 1), natten.na1d(query, query, query, 4))  # either way the same
    same(natten.na1d(query, query, query, 4, None, None, None), natten.na1d(query, query, query, 4))
    same(
        natten.na1d(query, query, query, 4, 3, True, rpb),
        natten.na1d(query, query, query, kernel_size=4, dilation=3, is_causal=True, rpb=rpb),
    )


def test_what_two_releases_read_differently_is_refused_until_one_is_named() -> None:
    query = torch.randn(1, 24, 2, 8)
    with pytest.raises(ValueError, match=r"na1d: .*since 0.17 dilation; since 0.20 stride.*install\(version="):
        natten.na1d(query, query, query, 4, 3)
    try:
        asked.version = "0.17.5"
        dilated = natten.na1d(query, query, query, 4, 3)
        with pytest.raises(TypeError, match="cannot read"):
            natten.na1d(query, query, query, 4, 3, 2)  # in 0.17 that place is is_causal's
        asked.version = "0.21.6"
        strided = natten.na1d(query, query, query, 4, 3)
    finally:
        asked.version = None
    torch.testing.assert_close(dilated, natten.na1d(query, query, query, 4, dilation=3))
    torch.testing.assert_close(strided, natten.na1d(query, query, query, 4, stride=3))


def test_arguments_nobody_had_are_refused() -> None:
    query = torch.randn(1, 24, 2, 8)
    with pytest.raises(TypeError, match=r"na1d\(\) got an unexpected keyword argument 'kernel'"):
        natten.na1d(query, query, query, 4, kernel=3)
    with pytest.raises(TypeError, match="cannot read 1 positional"):
        natten.na1d(query, query, query, 4, 3, stride=2, dilation=2)
    with pytest.raises(TypeError, match="cannot read"):
        natten.na1d(query, query, query, 4, 2.5)
    with pytest.raises(ValueError, match="query must be"):
        natten.functional.neighborhood_attention_generic(query[0, 0], query, query, 3)


def test_the_signature_shows_every_name() -> None:
    shown = inspect.signature(natten.na2d).parameters
    assert list(shown)[:6] == ["query", "key", "value", "kernel_size", "stride", "dilation"]
    assert {"rpb", "xformers_kwargs", "backend", "return_lse", "backward_kv_splits"} <= set(shown)


HINTS: dict[str, Any] = {
    "q_tile_shape": (8, 8),
    "kv_tile_shape": (8, 8),
    "backward_q_tile_shape": (8, 8),
    "backward_kv_tile_shape": (8, 8),
    "backward_kv_splits": (1, 1),
    "backward_use_pt_reduction": True,
    "run_persistent_kernel": False,
    "kernel_schedule": "pp",
    "torch_compile": True,
    "attention_kwargs": {"q_tile_size": 64, "torch_compile": True},
}


def test_hints_for_kernels_change_nothing() -> None:
    query = torch.randn(1, 7, 9, 2, 8)
    plain = natten.na2d(query, query, query, kernel_size=3)
    assert torch.equal(natten.na2d(query, query, query, kernel_size=3, **HINTS), plain)
    assert torch.equal(
        natten.na2d(query, query, query, kernel_size=3, stride=None, dilation=None, is_causal=None), plain
    )


def test_nattens_own_kernels_are_refused_by_name() -> None:
    query = torch.randn(1, 7, 9, 2, 8)
    for kernel in ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna"):
        with pytest.raises(vicinal.BackendRefused, match=f"{kernel}.*NATTEN's own library"):
            natten.na2d(query, query, query, kernel_size=3, backend=kernel)
    with pytest.raises(vicinal.BackendRefused, match="cutlass-fmha"):
        natten.attention(query[0], query[0], query[0], backend="cutlass-fmha")
    with pytest.raises(vicinal.BackendRefused, match="attention_kwargs: backend 'flex-fmha'"):
        natten.na2d(query, query, query, kernel_size=3, attention_kwargs={"backend": "flex-fmha"})
    with pytest.raises(ValueError, match="backend must be None or one of"):
        natten.na2d(query, query, query, kernel_size=3, backend="cutlass")
    with pytest.raises(ValueError, match="attention_kwargs must be None or a dict"):
        natten.na2d(query, query, query, kernel_size=3, attention_kwargs={"scale": 2.0})
    reference = natten.na2d(query, query, query, kernel_size=3, backend="reference")
    torch.testing.assert_close(reference, natten.na2d(query, query, query, kernel_size=3))


def test_nested_tensors_are_refused() -> None:
    parts = [torch.randn(5, 2, 8), torch.randn(7, 2, 8)]
    for layout in (torch.strided, torch.jagged):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls them a prototype
            query = torch.nested.nested_tensor(parts, layout=layout)
        with pytest.raises(ValueError, match=r"query must be a dense .* nested"):
            natten.na1d(query, query, query, kernel_size=3)


def test_zero_is_a_scale() -> None:
    # NATTEN takes 0.0 for "not given"; then every key would not weigh the same
    query = torch.randn(1, 9, 2, 8, dtype=torch.float64)
    mean = dense_attention(query * 0, query, query, {"kernel_size": 3})[0]
    torch.testing.assert_close(natten.na1d(query, query, query, 3, scale=0.0), mean)
    torch.testing.assert_close(
        natten.attention(query, query, query, scale=0.0), query.mean(1, keepdim=True).expand_as(query)
    )


def test_windows_that_natten_refuses_are_ordinary() -> None:
    query, key, value = torch.randn(3, 1, 5, 1, 2, 8).unbind(0)
    torch.testing.assert_close(natten.na2d(query, key, value, kernel_size=1), value)
    whole = natten.na2d(query, key, value, kernel_size=(5, 1))
    torch.testing.assert_close(natten.na2d(query, key, value, kernel_size=9), whole)
    assert natten.na2d(query[:0], key[:0], value[:0], kernel_size=3).shape == (0, 5, 1, 2, 8)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_causal_from_the_top_left(queries: int, keys: int, is_causal: bool) -> None:
    query = torch.randn(2, queries, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, keys, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = natten.attention(query, key, value, is_causal=is_causal, scale=0.3, return_lse=True)
    heads_first = (tensor.transpose(1, 2).repeat_interleave(4 // tensor.shape[2], 1) for tensor in (query, key, value))
    first, second, third = heads_first
    scores = first @ second.transpose(-1, -2) * 0.3
    if is_causal:
        scores = scores.masked_fill(torch.ones(queries, keys).triu(1).bool(), -torch.inf)
    wanted = ((scores.softmax(-1) @ third).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2))
    compare(with_grads(found, (query, key, value)), with_grads(wanted, (query, key, value)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_see_only_themselves(is_causal: bool) -> None:
    lengths, key_lengths = [3, 0, 6, 1, 2], [3, 4, 5, 0, 7]
    query = torch.randn(1, sum(lengths), 2, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, sum(key_lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seqlens = {
        "seqlens_Q": torch.tensor(lengths, dtype=torch.int32),
        "seqlens_KV": torch.tensor(key_lengths, dtype=torch.int32),
    }
    found, lse = natten.attention(query, key, value, is_causal=is_causal, **seqlens, return_lse=True)
    parts = zip(query.split(lengths, 1), key.split(key_lengths, 1), value.split(key_lengths, 1), strict=True)
    wanted = [
        natten.attention(*part, is_causal=is_causal) if part[1].shape[1] else torch.zeros_like(part[0])
        for part in parts
        if part[0].shape[1]
    ]
    torch.testing.assert_close(found, torch.cat(wanted, 1))
    assert lse[0, 9].tolist() == [-torch.inf, -torch.inf]
    names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
    made = generate_varlen_parameters(query, key, value, **seqlens)
    assert made[2:] == (6, 7)
    cumulative = dict(zip(names, made, strict=True))
    torch.testing.assert_close(natten.attention(query, key, value, is_causal=is_causal, **cumulative), found)
    with pytest.raises(ValueError, match="come together"):
        natten.attention(query, key, value, cumulative_seqlen_Q=made[0])
    with pytest.raises(ValueError, match="seqlens_KV must be an int32 tensor"):
        natten.attention(query, key, value, seqlens_Q=seqlens["seqlens_Q"])
    with pytest.raises(ValueError, match="cumulative_seqlen_Q must rise from 0 to the number of tokens"):
        natten.attention(query[:, 1:], key, value, **cumulative)


def test_merging_parts_is_the_whole_with_its_gradients() -> None:
    query, key, value = (torch.randn(2, 12, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pairs = zip(key.split([5, 3, 4], 1), value.split([5, 3, 4], 1), strict=True)
    parts = [natten.attention(query, *pair, return_lse=True) for pair in pairs]
    found = natten.merge_attentions([out for out, _ in parts], [lse for _, lse in parts], torch_compile=False)
    whole = natten.attention(query, key, value, return_lse=True)
    compare(with_grads(found, (query, key, value)), with_grads(whole, (query, key, value)))


def test_check_all_args_of_both_generations() -> None:
    assert check_all_args(2, 7, 2, False) == ((7, 7), (2, 2), (False, False))
    assert check_all_args(1, 7, dilation=3, is_causal=None) == ((7,), (3,), (False,))
    assert check_all_args(3, (3, 5, 5), 1, 2, (True, False, False)) == (
        (3, 5, 5), (1, 1, 1), (2, 2, 2), (True, False, False),
    )  # fmt: skip
    with pytest.raises(TypeError, match="check_all_args"):
        check_all_args(2, 7, 1)
    with pytest.raises(ValueError, match="stride"):
        check_all_args(1, 3, 5, 1, False)


def test_compiled_calls_are_the_eager_ones() -> None:
    query = torch.randn(1, 9, 10, 2, 8)
    rpb = torch.randn(2, 5, 5)

    def call(query: torch.Tensor) -> torch.Tensor:
        scores = natten.functional.natten2dqkrpb(query.movedim(-2, 1), query.movedim(-2, 1), rpb, 3, 2)
        summed = natten.functional.natten2dav(scores.softmax(-1), query.movedim(-2, 1), 3, 2)
        return natten.na2d(query, query, query, 3, 2, False, rpb) + summed.movedim(1, -2)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), call(query))
