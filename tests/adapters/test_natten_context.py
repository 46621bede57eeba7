"""Switches keep what they are told, questions are answered for our operator, and tables of tiles are empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vicinal.adapters import natten
from vicinal.adapters.natten import arguments, backends, context, flops


@pytest.fixture(autouse=True)
def fresh_switches() -> Iterator[None]:
    yield
    context.NattenContext.reset()
    context.AutotunerContext.reset()


@pytest.mark.parametrize(
    ("switch", "question", "begins"),
    [
        ("use_deterministic_algorithms", "are_deterministic_algorithms_enabled", False),
        ("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled", True),
        ("allow_flex_compile", "is_flex_compile_allowed", False),
        ("allow_flex_compile_backprop", "is_flex_compile_backprop_allowed", False),
        ("use_fused_na", "is_fused_na_enabled", False),
        ("use_fna", "is_fna_enabled", False),
        ("use_autotuner", "is_autotuner_enabled", False),
        ("use_tf32_in_gemm_na", "is_tf32_in_gemm_na_enabled", True),
        ("use_tiled_na", "is_tiled_na_enabled", True),
        ("use_gemm_na", "is_gemm_na_enabled", True),
    ],
)
def test_a_switch_keeps_what_it_is_told(switch: str, question: str, begins: bool) -> None:
    assert getattr(natten, question)() is begins
    for mode in (True, False, True):
        getattr(natten, switch)(mode)
        assert getattr(natten, question)() is mode


def test_flex_compilation_can_be_shut_off_again() -> None:
    # in NATTEN 0.21 `disable_flex_compile` turns it on
    natten.allow_flex_compile(True, backprop=True)
    assert natten.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile_backprop()
    assert (natten.is_flex_compile_allowed(), natten.is_flex_compile_backprop_allowed()) == (True, False)
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()


def test_memory_preferences() -> None:
    assert natten.is_memory_usage_default()
    natten.set_memory_usage_preference("strict")
    assert natten.is_memory_usage_strict()
    natten.set_memory_usage_preference("unrestricted")
    assert natten.is_memory_usage_unrestricted()
    assert natten.get_memory_usage_preference() is context.MemoryUsagePreference.Unrestricted
    with pytest.raises(ValueError, match="pref must be one of default, strict, unrestricted, got 'low'"):
        natten.set_memory_usage_preference("low")  # type: ignore[arg-type]


def test_the_switches_of_017() -> None:
    natten.use_autotuner(True, thorough_mode_backward=True)
    assert natten.is_autotuner_enabled_for_forward()
    assert not natten.is_autotuner_enabled_for_backward()
    assert natten.is_autotuner_thorough_for_backward()
    assert not natten.is_autotuner_thorough_for_forward()
    natten.disable_autotuner()
    assert not natten.is_autotuner_enabled()
    natten.force_flex_attention()
    assert natten.is_fused_na_enabled()
    assert context.should_use_flex_attention()
    assert context.should_force_flex_attention()
    natten.use_flex_attention()
    assert not context.should_force_flex_attention()
    for name in ("tf32", "gemm_na", "tiled_na"):
        assert getattr(natten, f"disable_{name}")() is False
        assert getattr(natten, f"enable_{name}")() is True


def test_questions_are_answered_for_our_operator() -> None:
    assert natten.has_fna()
    assert natten.has_fused_na(0)
    assert not natten.has_gemm()
    assert not natten.has_fp64_gemm(0)
    assert natten.has_cuda() is natten.has_half(0) is natten.has_bfloat() is torch.cuda.is_available()
    assert natten.HAS_LIBNATTEN is False
    assert arguments.get_device_cc("cpu") == 0


def test_a_back_end_that_is_chosen_can_be_named() -> None:
    query = torch.randn(1, 6, 7, 2, 8)
    name = backends.choose_backend(query, query, query, torch_compile=False)
    assert name in backends.get_compatible_backends(query, query, query, torch_compile=False)
    assert natten.na2d(query, query, query, kernel_size=3, backend=name).shape == query.shape
    flat = query.flatten(1, 2)
    name = backends.choose_fmha_backend(flat, flat, flat, is_causal=True, is_varlen=False, torch_compile=False)
    assert natten.attention(flat, flat, flat, backend=name).shape == flat.shape


def test_there_are_no_tile_shapes_to_choose_from() -> None:
    query = torch.randn(1, 6, 7, 2, 8)
    for name in ("get_configs_for_cutlass_fna", "get_bwd_configs_for_cutlass_hopper_fmha", "get_configs_for_flex_fna"):
        assert getattr(natten, name)(query, query, query) == []
    assert natten.get_configs_for_flex_fmha(query, query, query, torch_compile=True) == []


def test_operations_are_counted_as_in_017() -> None:
    first, last = (2, 3, 8, 9, 16), (2, 8, 9, 3, 16)
    window = ((5, 3), (1, 1), (False, False))
    pairs = 2 * 3 * 8 * 9 * 15
    assert flops.na_qk_flop_count(first, first, *window, is_heads_last=False) == 2 * pairs * 16
    assert flops.na_av_flop_count((2, 3, 8, 9, 15), first, *window, is_heads_last=False, return_macs=True) == pairs * 16
    assert flops.fna_flop_count(last, last, last, *window, is_heads_last=True) == 4 * pairs * 16
    with pytest.raises(NotImplementedError, match="FlopCounterMode"):
        flops.get_flops(torch.nn.Identity(), torch.zeros(1))


def test_the_front_door_has_every_name() -> None:
    assert {"has_half", "use_fused_na", "na2d", "install", "get_configs_for_cutlass_fna"} <= set(dir(natten))
    with pytest.raises(AttributeError, match="no attribute 'natten4d'"):
        _ = natten.natten4d
