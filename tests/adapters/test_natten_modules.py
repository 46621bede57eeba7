"""The modules, and attention layers that call NATTEN as the published NAT, DiNAT and StyleNAT model files do.

The layers here are our own; what they share with the published ones is how they call. Each is held against a dense
computation that knows nothing of windows as tables.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vicinal
from vicinal.adapters import natten
from vicinal.adapters.natten import context
from vicinal.adapters.natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb
from vicinal.adapters.natten.modules import NeighborhoodAttention
from vicinal.adapters.natten.versions import asked

from .windows import dense_attention

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def dense_layer(layer: Any, inputs: torch.Tensor, window: dict[str, Any], rpb: torch.Tensor | None) -> torch.Tensor:
    """What an attention layer with `qkv` and `proj` computes, densely."""
    qkv = layer.qkv(inputs).unflatten(-1, (3, layer.num_heads, -1))
    return layer.proj(dense_attention(*qkv.unbind(-3), window, rpb)[0].flatten(-2))


def compare(layer: nn.Module, found: torch.Tensor, wanted: torch.Tensor, inputs: torch.Tensor) -> None:
    """Outputs, and the gradients of inputs and all parameters."""
    torch.testing.assert_close(found, wanted, **CLOSE)
    tensors = [inputs, *layer.parameters()]
    for one, other in zip(*(torch.autograd.grad(it.pow(2).sum(), tensors) for it in (found, wanted)), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, **CLOSE)


def random_inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dilation", [1, 2])
def test_nat_and_dinat_layers_call_the_module(dilation: int) -> None:
    """Both name the bias by the release they find: a package with a `context` is 0.17's."""
    bias = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}
    options = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0, **bias}
    layer = natten.NeighborhoodAttention2D(12, kernel_size=5, dilation=dilation, num_heads=3, **options).double()
    assert sorted(layer.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight", "rpb"]
    nn.init.normal_(layer.rpb)
    inputs = random_inputs(2, 11, 14, 12)
    wanted = dense_layer(layer, inputs, {"kernel_size": 5, "dilation": dilation}, layer.rpb)
    compare(layer, layer(inputs), wanted, inputs)


class UnfusedLayer(nn.Module):
    """Scores, softmax and sums apart and heads first, as Dinat in transformers and many derived models have it."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.randn(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(inputs).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        query, key, value = qkv[0], qkv[1], qkv[2]
        query = query * query.shape[-1] ** -0.5
        attn = natten2dqkrpb(query, key, self.rpb, self.kernel_size, self.dilation).softmax(dim=-1)
        out = natten2dav(attn, value, self.kernel_size, self.dilation)
        return self.proj(out.permute(0, 2, 3, 1, 4).reshape(inputs.shape))


@pytest.mark.parametrize(("grid", "kernel_size", "dilation"), [((9, 13), 3, 3), ((7, 7), 7, 1), ((14, 15), 7, 2)])
def test_layers_that_take_scores_apart(grid: tuple[int, int], kernel_size: int, dilation: int) -> None:
    layer = UnfusedLayer(12, 3, kernel_size, dilation).double()
    inputs = random_inputs(1, *grid, 12)
    wanted = dense_layer(layer, inputs, {"kernel_size": kernel_size, "dilation": dilation}, layer.rpb)
    compare(layer, layer(inputs), wanted, inputs)


class HydraLayer(nn.Module):
    """Groups of heads with windows of their own, as in StyleNAT: uneven groups, chunked views, a list of biases."""

    def __init__(self, dim: int, num_heads: int, groups: tuple[int, ...], kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.num_heads, self.groups, self.kernels = num_heads, groups, kernels
        self.dilations = tuple(range(1, len(kernels) + 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        tables = (torch.randn(size, 2 * k - 1, 2 * k - 1) for size, k in zip(groups, kernels, strict=True))
        self.rpb = nn.ParameterList([nn.Parameter(table) for table in tables])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(inputs).reshape(*inputs.shape[:-1], 3, self.num_heads, -1).permute(3, 0, 4, 1, 2, 5)
        query, key, value = (part.squeeze(0) for part in qkv.chunk(3, dim=0))
        query = query * query.shape[-1] ** -0.5
        outs = []
        split = (tensor.split(self.groups, dim=1) for tensor in (query, key, value))
        for own_query, own_key, own_value, rpb, kernel, dilation in zip(
            *split, self.rpb, self.kernels, self.dilations, strict=True
        ):
            attn = natten2dqkrpb(own_query, own_key, rpb, kernel, dilation).softmax(dim=-1)
            outs.append(natten2dav(attn, own_value, kernel, dilation))
        return self.proj(torch.cat(outs, dim=1).permute(0, 2, 3, 1, 4).reshape(inputs.shape))


@pytest.mark.parametrize(("groups", "kernels"), [((2, 2), (3, 3)), ((1, 1, 2), (3, 5, 3))])
def test_stylenat_splits_heads(groups: tuple[int, ...], kernels: tuple[int, ...]) -> None:
    natten.use_fused_na(True)  # its file does so when it is imported
    natten.use_autotuner(True)
    try:
        layer = HydraLayer(16, sum(groups), groups, kernels).double()
        inputs = random_inputs(1, 10, 11, 16)
        query, key, value = layer.qkv(inputs).unflatten(-1, (3, layer.num_heads, -1)).unbind(-3)
        parts = zip(*(tensor.split(groups, -2) for tensor in (query, key, value)), strict=True)
        wanted = [
            dense_attention(*part, {"kernel_size": kernel, "dilation": dilation}, rpb)[0]
            for part, kernel, dilation, rpb in zip(parts, kernels, layer.dilations, layer.rpb, strict=True)
        ]
        compare(layer, layer(inputs), layer.proj(torch.cat(wanted, -2).flatten(-2)), inputs)
    finally:
        context.NattenContext.reset()
        context.AutotunerContext.reset()


def test_music_models_call_the_sequence_functions() -> None:
    query, key, value = (torch.randn(2, 3, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    attn = natten1dqkrpb(query, key, rpb, 5, 8)
    out = natten1dav(attn.softmax(dim=-1), value, 5, 8)
    heads_last = (tensor.transpose(1, 2) for tensor in (query, key, value))
    wanted = dense_attention(*heads_last, {"kernel_size": 5, "dilation": 8}, rpb, scale=1.0)[0]
    torch.testing.assert_close(out.transpose(1, 2), wanted, **CLOSE)


def test_hourglass_models_choose_by_what_is_there() -> None:
    """k-diffusion's image transformer asks `has_fused_na`, then calls either way; both are the same here."""
    query, key, value = torch.randn(3, 1, 8, 9, 2, 16).unbind(0)
    assert natten.has_fused_na()
    fused = natten.functional.na2d(query, key, value, 5, scale=1.0)
    first = [tensor.movedim(-2, 1) for tensor in (query, key, value)]
    scores = natten.functional.na2d_qk(first[0], first[1], 5)
    unfused = natten.functional.na2d_av(scores.softmax(dim=-1), first[2], 5).movedim(1, -2)
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_module_of_today_has_the_weights_of_ours(rank: int) -> None:
    kind = getattr(natten, f"NeighborhoodAttention{rank}D")
    ours = getattr(vicinal, f"NeighborhoodAttention{rank}D")
    window = {"kernel_size": 4, "stride": 2, "dilation": 2, "is_causal": True}
    module = kind(embed_dim=16, num_heads=2, **window, qk_scale=0.0)
    other = ours(16, 2, **window, qk_scale=0.0)
    other.load_state_dict(module.state_dict())
    inputs = torch.randn(1, *(9, 8, 10)[:rank], 16)
    torch.testing.assert_close(module(inputs), other(inputs))
    assert isinstance(module, nn.Module)
    assert (module.kernel_size, module.stride, module.dilation) == ((4,) * rank, (2,) * rank, (2,) * rank)
    assert (module.scale, module.is_causal, module.na_dim, module.rpb) == (0.0, (True,) * rank, rank, None)


def test_dropped_weights_leave_the_rest_in_the_mean() -> None:
    layer = natten.NeighborhoodAttention1D(dim=8, num_heads=2, kernel_size=5, attn_drop=0.4).double()
    inputs = torch.randn(1, 20, 8, dtype=torch.float64)
    plain = layer.eval()(inputs)
    layer.train()
    drawings = torch.stack([layer(inputs) for _ in range(400)])
    assert not torch.allclose(drawings[0], drawings[1])
    spread = drawings.std(0) / 400**0.5
    assert ((drawings.mean(0) - plain).abs() < 6 * spread).all()


@pytest.mark.parametrize("shape", [(1, 4, 9, 8), (2, 5, 3, 8)])
def test_modules_of_015_pad_small_inputs(shape: tuple[int, ...]) -> None:
    layer = natten.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3, dilation=2, bias=True).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    padded = nn.functional.pad(inputs, (0, 0, 0, max(0, 6 - shape[2]), 0, max(0, 6 - shape[1])))
    wanted = dense_layer(layer, padded, {"kernel_size": 3, "dilation": 2}, layer.rpb)
    torch.testing.assert_close(layer(inputs), wanted[:, : shape[1], : shape[2]], **CLOSE)
    cut = natten.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3, dilation=2, rel_pos_bias=True).double()
    cut.load_state_dict(layer.state_dict())
    assert not torch.allclose(cut(inputs), layer(inputs))


def test_module_arguments_by_position_and_by_release() -> None:
    kind = natten.NeighborhoodAttention2D
    with pytest.raises(ValueError, match=r"NeighborhoodAttention2D: .*since 0.14 .*dilation.*since 0.20 .*stride"):
        kind(8, 2, 3, 2)
    assert kind(8, 2, 3, 1).dilation == (1, 1)
    assert kind(8, 2, 4, 2, 3, True).pattern == (vicinal.Near(4, dilation=3, stride=2, causal=True),) * 2
    assert kind(8, 2, 3, 2, False, True, True, None, 0.0, 0.0, False).rpb is not None  # 0.17
    try:
        asked.version = "0.15.1"
        early = kind(8, 2, 3, 2)
        assert (early.dilation, early.pad_mode, early.rpb is None) == ((2, 2), "legacy", False)
        asked.version = "0.17.5"
        middle = kind(8, 2, 3, 2)
        assert (middle.dilation, middle.pad_mode, middle.rpb) == ((2, 2), "none", None)
        asked.version = "0.21.6"
        assert kind(8, 2, 3, 2).stride == (2, 2)
    finally:
        asked.version = None
    for wrong, message in (
        ({"dim": 8, "embed_dim": 8, "num_heads": 2, "kernel_size": 3}, "both dim and embed_dim"),
        ({"dim": 8, "num_heads": 2}, "missing arguments: kernel_size"),
        (
            {"dim": 8, "num_heads": 2, "kernel_size": 3, "bias": True, "rel_pos_bias": True},
            "both bias and rel_pos_bias",
        ),
        ({"dim": 8, "num_heads": 2, "kernel_size": 3, "window": 3}, "unexpected keyword argument 'window'"),
    ):
        with pytest.raises(TypeError, match=message):
            kind(**wrong)
    with pytest.raises(ValueError, match="attn_drop must be a probability"):
        kind(dim=8, num_heads=2, kernel_size=3, attn_drop=1.0)


def test_the_first_module_has_its_own_order() -> None:
    module = NeighborhoodAttention(8, 3, 2, True, None, 0.0, 0.0, 2)
    assert (module.num_heads, module.kernel_size, module.dilation) == (2, (3, 3), (2, 2))
    assert module.rpb is not None
    assert module.pad_mode == "legacy"


def test_modules_on_videos_take_two_kernels() -> None:
    module = natten.NeighborhoodAttention3D(16, 2, 5, 3, 2, 1, True)  # 0.15: kernel_size_d, dilation, dilation_d, bias
    assert (module.kernel_size, module.dilation) == ((3, 5, 5), (1, 2, 2))
    assert module.rpb is not None
    assert module.rpb.shape == (2, 5, 9, 9)
