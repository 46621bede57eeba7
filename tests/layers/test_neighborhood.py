"""The modules with NATTEN's names: parameters, layouts, the bias, and the padding that old weights expect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vicinal
from vicinal import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from vicinal.layers.tags import parameter_tags
from vicinal.pattern import Near

MODULES = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
by_rank = pytest.mark.parametrize("rank", [1, 2, 3])


def by_hand(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The module's formula, from its parameters: project, split into (3, heads, head_dim), attend, join, project."""
    rank = inputs.dim() - 2
    projected = inputs @ module.qkv.weight.T + (0 if module.qkv.bias is None else module.qkv.bias)
    query, key, value = projected.reshape(*inputs.shape[:-1], 3, module.num_heads, -1).unbind(rank + 1)
    out = vicinal.attention(query, key, value, module.pattern, bias=module.rpb, scale=module.scale, backend="reference")
    return out.reshape(inputs.shape) @ module.proj.weight.T + module.proj.bias


@by_rank
@pytest.mark.parametrize("rel_pos_bias", [False, True], ids=["plain", "rpb"])
def test_module_computes_its_formula(rank: int, rel_pos_bias: bool) -> None:
    module = MODULES[rank - 1](12, 3, kernel_size=3, dilation=2, rel_pos_bias=rel_pos_bias).double()
    if rel_pos_bias:
        nn.init.normal_(module.rpb)
    inputs = torch.randn(2, *(7, 6, 8)[:rank], 12, dtype=torch.float64)
    torch.testing.assert_close(module(inputs), by_hand(module, inputs))


@by_rank
def test_state_dict_has_the_published_names_and_shapes(rank: int) -> None:
    """A checkpoint of NATTEN's module loads strictly, one of the time before 0.20 with its `rpb`."""
    published = {
        "qkv.weight": torch.randn(96, 32),
        "qkv.bias": torch.randn(96),
        "proj.weight": torch.randn(32, 32),
        "proj.bias": torch.randn(32),
    }
    module = MODULES[rank - 1](embed_dim=32, num_heads=4, kernel_size=7)
    assert module.load_state_dict(published, strict=True) == nn.modules.module._IncompatibleKeys([], [])
    with_bias = MODULES[rank - 1](32, 4, 7, rel_pos_bias=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        with_bias.load_state_dict(published)
    with_bias.load_state_dict({**published, "rpb": torch.randn(4, *(13,) * rank)})
    without = MODULES[rank - 1](32, 4, 7, qkv_bias=False)
    assert sorted(without.state_dict()) == ["proj.bias", "proj.weight", "qkv.weight"]


def test_bias_table_is_as_long_as_the_window_on_each_axis() -> None:
    module = NeighborhoodAttention3D(8, 2, kernel_size=(3, 5, 1), rel_pos_bias=True)
    assert module.rpb is not None
    assert module.rpb.shape == (2, 5, 9, 1)
    assert "rpb" in dict(module.named_parameters())
    assert "rpb" not in dict(NeighborhoodAttention3D(8, 2, kernel_size=3).named_parameters())


def test_bias_is_found_at_key_minus_query() -> None:
    """A table that is large in one entry makes each query copy the key at that distance."""
    module = NeighborhoodAttention1D(4, 1, kernel_size=3, rel_pos_bias=True).double()
    with torch.no_grad():
        module.rpb.zero_()
        module.rpb[0, 3] = 100.0  # one place to the right of the center, which is 2
        module.qkv.weight.zero_()
        module.qkv.bias.zero_()
        module.qkv.weight[8:] = torch.eye(4)
        module.proj.weight.copy_(torch.eye(4))
        module.proj.bias.zero_()
    inputs = torch.randn(1, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(module(inputs)[:, :5], inputs[:, 1:])


@pytest.mark.parametrize(
    ("grid", "kernel_size", "dilation"),
    [((5, 9), 3, 2), ((4, 4), (3, 5), (2, 1)), ((1, 1), 3, 1), ((6, 2), 3, (2, 3)), ((3, 7), (3, 7), 4)],
    ids=str,
)
def test_legacy_padding_equals_padding_the_input_and_cutting_the_output(
    grid: tuple[int, int], kernel_size: Any, dilation: Any
) -> None:
    module = NeighborhoodAttention2D(
        8, 2, kernel_size, dilation=dilation, rel_pos_bias=True, pad_mode="legacy"
    ).double()
    plain = NeighborhoodAttention2D(8, 2, kernel_size, dilation=dilation, rel_pos_bias=True).double()
    plain.load_state_dict(module.state_dict())
    inputs = torch.randn(2, *grid, 8, dtype=torch.float64)
    sizes = [k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    large = torch.zeros(2, *(max(n, k) for n, k in zip(grid, sizes, strict=True)), 8, dtype=torch.float64)
    large[:, : grid[0], : grid[1]] = inputs
    torch.testing.assert_close(module(inputs), plain(large)[:, : grid[0], : grid[1]])
    if large.shape != inputs.shape:
        assert not torch.allclose(module(inputs), plain(inputs))


@by_rank
def test_legacy_padding_changes_nothing_where_the_input_is_large_enough(rank: int) -> None:
    module = MODULES[rank - 1](8, 2, kernel_size=3, dilation=2, pad_mode="legacy")
    plain = MODULES[rank - 1](8, 2, kernel_size=3, dilation=2)
    plain.load_state_dict(module.state_dict())
    inputs = torch.randn(1, *(6, 7, 6)[:rank], 8)
    assert torch.equal(module(inputs), plain(inputs))


def test_legacy_padding_pads_each_axis_with_tokens_that_hold_the_projections_bias() -> None:
    """The appended tokens are attended to: with an identity for values their bias shows in the output."""
    module = NeighborhoodAttention1D(2, 1, kernel_size=3, pad_mode="legacy").double()
    with torch.no_grad():
        module.qkv.weight.zero_()
        module.qkv.bias.zero_()
        module.qkv.bias[4:] = 3.0  # the value of every token, padding or not
        module.proj.weight.copy_(torch.eye(2))
        module.proj.bias.zero_()
    torch.testing.assert_close(module(torch.zeros(1, 1, 2).double()), torch.full((1, 1, 2), 3.0).double())


@by_rank
def test_all_parameters_get_a_gradient(rank: int) -> None:
    module = MODULES[rank - 1](8, 2, kernel_size=3, rel_pos_bias=True, is_causal=rank == 1)
    module(torch.randn(2, *(5, 4, 6)[:rank], 8)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_initial_bias_is_small_and_cut() -> None:
    module = NeighborhoodAttention2D(64, 16, kernel_size=13, rel_pos_bias=True)
    assert module.rpb is not None
    assert abs(float(module.rpb.detach().std()) - 0.02) < 0.002
    before = module.rpb.detach().clone()
    module.reset_parameters()
    assert not torch.equal(before, module.rpb)


def test_arguments_stand_in_nattens_order() -> None:
    module = NeighborhoodAttention2D(16, 4, (3, 5), (1, 2), (2, 1), (True, False), False, 0.5, 0.25)
    assert module.pattern == (Near(3, 2, 1, True), Near(5, 1, 2, False))
    assert module.qkv.bias is None
    assert module.scale == 0.5
    assert module.proj_drop.p == 0.25


def test_dropout_acts_in_training_only() -> None:
    module = NeighborhoodAttention1D(8, 2, 3, proj_drop=0.5)
    inputs = torch.randn(1, 9, 8)
    assert (module(inputs) == 0).any()
    module.eval()
    assert torch.equal(module(inputs), module(inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_module_follows_its_dtype(dtype: torch.dtype) -> None:
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).to(dtype)
    assert module(torch.randn(1, 5, 6, 8).to(dtype)).dtype == dtype


def test_module_runs_under_autocast_and_compiles() -> None:
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    inputs = torch.randn(2, 5, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(inputs).dtype == torch.bfloat16
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), module(inputs))
    torch._dynamo.reset()


def test_back_end_of_the_module_is_the_one_asked_for() -> None:
    module = NeighborhoodAttention1D(8, 2, 3, backend="natten")  # which has no kernels for this tensor
    with pytest.raises(vicinal.BackendRefused):
        module(torch.randn(1, 9, 8))


def test_module_prints_what_it_is() -> None:
    text = str(NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True))
    for words in ("embed_dim=8", "num_heads=2", "Near(3, dilation=2)", "rel_pos_bias=True"):
        assert words in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_heads": 3}, r"num_heads must divide embed_dim \(8\), got 3"),
        ({"num_heads": 0}, r"num_heads must divide embed_dim \(8\), got 0"),
        ({"kernel_size": 0}, "kernel_size must be .*at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be one value or 2 values, got 3"),
        ({"stride": 5}, r"stride must be at most kernel_size \(3\), got 5"),
        ({"proj_drop": 1.5}, "proj_drop must be a probability .* got 1.5"),
        ({"pad_mode": "zeros"}, 'pad_mode must be "none" or "legacy", got \'zeros\''),
        ({"qk_scale": "big"}, "qk_scale must be None or a finite number, got 'big'|scale must be None or a finite"),
        ({"backend": "fast"}, "backend must be None or one of .*got 'fast'"),
    ],
)
def test_module_refuses_what_means_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(**{"embed_dim": 8, "num_heads": 2, "kernel_size": 3, **given})(torch.randn(1, 5, 5, 8))


@pytest.mark.parametrize("shape", [(1, 5, 8), (1, 5, 5, 7), (5, 5, 8), (1, 2, 5, 5, 8)], ids=str)
def test_module_refuses_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"inputs must be \[batch, height, width, 8\], got"):
        NeighborhoodAttention2D(8, 2, 3)(torch.randn(shape))


def test_bias_is_tagged_as_one() -> None:
    tags = parameter_tags(NeighborhoodAttention2D(32, 2, 3, rel_pos_bias=True))
    assert (tags["rpb"].role, tags["rpb"].weight_decay) == ("position_bias", False)
