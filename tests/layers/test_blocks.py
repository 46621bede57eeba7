"""The residual block, drop path, combinators, norms, pooled and channel attention, tags, costs."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block, DropPath, drop_rates
from vicinal.layers.channel_attention import ChannelAttention
from vicinal.layers.combine import Parallel, SplitChannels, SplitHeads
from vicinal.layers.convolution import (
    Depthwise,
    FocalModulation,
    LargeKernelAttention,
    PoolingDifference,
    RecursiveGate,
)
from vicinal.layers.cost import cost
from vicinal.layers.deformable import DeformableMerging
from vicinal.layers.initialization import fan_out, initialize, truncated
from vicinal.layers.mlp import Mlp
from vicinal.layers.norm import GridBatchNorm, GridGroupNorm, Modulated
from vicinal.layers.pooled import AveragePool, PooledAttention, Reduce
from vicinal.layers.tags import Tag, parameter_groups, parameter_tags, set_group, tag
from vicinal.layers.tokens import LearnedPositions
from vicinal.layers.windowed import WindowedDepthwise
from vicinal.pattern import Full, Halo, Near, Window


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, inputs):
        return self.factor * inputs


@pytest.mark.parametrize(
    ("place", "expected"), [("pre", 1 + 2 * 10), ("branch", 1 + 10 * 2), ("post", 10 * (1 + 2))], ids=str
)
def test_where_the_norm_stands(place, expected):
    """With a norm that multiplies by 10 and a mixer that multiplies by 2, one branch on ones."""
    block = Block(4, Times(2.0), None, norm=lambda _: Times(10.0), norm_place=place)
    assert block(torch.ones(1, 2, 4)).unique().tolist() == [expected]


def test_slots_are_applied_in_order():
    block = Block(
        1, Times(2.0), Times(3.0), norm=lambda _: nn.Identity(), layer_scale=0.5, positions=(Times(1.0), None)
    )
    # 1 + position 1 = 2; + 0.5 * 2 * 2 = 4; + 0.5 * 3 * 4 = 10
    assert block(torch.ones(1, 3, 1)).unique().tolist() == [10.0]
    assert {name for name, _ in block.named_parameters()} == {"gamma1", "gamma2"}


def test_an_empty_slot_has_no_parameters():
    block = Block(4, None, Mlp(4, 8), layer_scale=0.1)
    assert not [name for name, _ in block.named_parameters() if name.startswith(("norm1", "gamma1"))]


def test_a_modulated_block_needs_its_condition():
    block = Block(4, Times(1.0), Mlp(4, 8), norm=lambda dim: Modulated(nn.LayerNorm(dim), dim, 3))
    inputs = torch.randn(2, 3, 3, 4)
    assert block(inputs, torch.randn(2, 3)).shape == inputs.shape
    with pytest.raises(ValueError, match="condition"):
        block(inputs)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_modulation_is_gain_and_shift(offset):
    norm = Modulated(nn.Identity(), 2, 1, offset=offset)
    with torch.no_grad():
        norm.affine.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        norm.affine.bias.zero_()
    out = norm(torch.ones(1, 5, 2), torch.ones(1, 1))
    assert out[0, 0].tolist() == [offset + 1 + 3, offset + 2 + 4]


def test_an_unknown_norm_place_is_refused():
    with pytest.raises(ValueError, match="norm_place"):
        Block(4, None, None, norm_place="before")


def test_drop_path_keeps_the_mean_and_whole_samples():
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3))
    assert [round(value, 6) for value in out.unique().tolist()] == [0.0, 1.333333]
    assert (out.flatten(1).std(1) == 0).all()
    assert abs(out.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(3, 2)), torch.ones(3, 2))
    with pytest.raises(ValueError, match="drop_rate"):
        DropPath(1.0)


def test_drop_rates_grow_over_all_layers():
    rates = drop_rates((2, 3), 0.4)
    assert [round(rate, 6) for level in rates for rate in level] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert drop_rates((1,), 0.3) == [[0.0]]


def test_heads_are_split_between_mixers_that_see_all_channels():
    near, whole = PatternAttention(12, 1, Near(3), out_dim=4), PatternAttention(12, 2, Full(), out_dim=8)
    inputs = torch.randn(1, 5, 5, 12)
    expected = torch.cat([near(inputs), whole(inputs)], -1)
    assert torch.equal(SplitHeads(near, whole)(inputs), expected)


def test_channels_are_split():
    mixer = SplitChannels((Times(2.0), 3), (None, 5))
    assert mixer(torch.ones(1, 2, 8))[0, 0].tolist() == [2.0] * 3 + [1.0] * 5
    with pytest.raises(ValueError, match="the parts take 8 channels, the input has 9"):
        mixer(torch.ones(1, 2, 9))


def test_parallel_adds_up_with_weights_where_asked():
    assert Parallel(Times(2.0), Times(3.0))(torch.ones(1, 1)).item() == 5.0
    weighted = Parallel(Times(2.0), Times(3.0), use_weights=True)
    with torch.no_grad():
        weighted.weights.copy_(torch.tensor([1.0, 10.0]))
    assert weighted(torch.ones(1, 1)).item() == 32.0


def test_norms_with_the_channels_last_are_torchs():
    inputs = torch.randn(3, 4, 5, 6)
    first = inputs.movedim(-1, 1)
    for ours, theirs in ((GridGroupNorm(6), nn.GroupNorm(1, 6)), (GridBatchNorm(6), nn.BatchNorm2d(6))):
        torch.testing.assert_close(ours(inputs), theirs(first).movedim(1, -1))


@pytest.mark.parametrize("grid", [(7,), (6, 8), (2, 4, 6)], ids=str)
def test_pooled_attention_in_every_rank(grid):
    mixer = PooledAttention(8, 2, Reduce(8, 2, rank=len(grid)))
    inputs = torch.randn(2, *grid, 8)
    query = mixer.q(inputs).flatten(1, -2).unflatten(-1, (2, 4)).transpose(1, 2)
    kv = mixer.kv(mixer.pool(inputs)).flatten(1, -2).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
    out = nn.functional.scaled_dot_product_attention(query, kv[0], kv[1]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(inputs), mixer.proj(out).unflatten(1, grid))
    assert mixer.pool(inputs).shape[1:-1] == mixer.pool.key_grid(grid)


def test_average_pool_means_what_is_there():
    pooled = AveragePool(2)(torch.arange(5.0).reshape(1, 1, 5, 1))
    assert pooled.flatten().tolist() == [0.5, 2.5, 4.0]
    assert AveragePool(2).key_grid((1, 5)) == (1, 3)


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4)], ids=str)
def test_channel_attention_in_every_rank(grid):
    mixer = ChannelAttention(8, 2)
    inputs = torch.randn(2, *grid, 8)
    query, key, value = mixer.qkv(inputs).flatten(1, -2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    weights = torch.einsum("bhtk,bhtv->bhkv", key * 0.5, value).softmax(-1)
    out = torch.einsum("bhkv,bhtv->bthk", weights, query).flatten(2).unflatten(1, grid)
    torch.testing.assert_close(mixer(inputs), mixer.proj(out))


@pytest.mark.parametrize("grid", [(9,), (5, 6), (3, 4, 5)], ids=str)
def test_depthwise_in_every_rank(grid):
    mixer = Depthwise(4, 3, rank=len(grid))
    assert mixer(torch.randn(1, *grid, 4)).shape == (1, *grid, 4)


def test_pooling_difference_means_what_is_on_the_grid():
    out = PoolingDifference(3)(torch.tensor([[1.0, 2.0, 6.0]]).reshape(1, 1, 3, 1))
    assert out.flatten().tolist() == [0.5, 1.0, -2.0]


def test_windowed_convolution_does_not_cross():
    mixer = WindowedDepthwise(1, (None, 2))
    inputs = torch.zeros(1, 4, 6, 1)
    inputs[0, 2, 3] = 1.0
    touched = (mixer(inputs) - mixer(torch.zeros_like(inputs)))[0, ..., 0].abs() > 1e-9
    assert touched.nonzero().tolist() == [[row, column] for row in (1, 2, 3) for column in (2, 3)]


@pytest.mark.parametrize(
    "make", [lambda: RecursiveGate(12, 4), lambda: Depthwise(4, 2), lambda: ChannelAttention(8, 3)]
)
def test_sizes_that_do_not_divide_are_refused(make):
    with pytest.raises(ValueError, match=r"order|kernel_size|num_heads"):
        make()


def test_focal_modulation_sees_the_whole_map_through_its_last_gate():
    mixer = FocalModulation(4, 1)
    inputs = torch.randn(1, 9, 9, 4, requires_grad=True)
    mixer(inputs)[0, 0, 0].sum().backward()
    assert (inputs.grad[0, 8, 8] != 0).all()


def test_positions_are_resized_for_another_grid():
    positions = LearnedPositions((2, 2), 3)
    nn.init.ones_(positions.table)
    assert torch.equal(positions(torch.zeros(1, 4, 6, 3)), torch.ones(1, 4, 6, 3))


def test_tags_survive_a_copy_and_say_their_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    tag(model[0], weight=Tag(weight_decay=False, role="table"))
    set_group(model[2], "head")
    tags = parameter_tags(copy.deepcopy(model))
    assert tags["0.weight"] == Tag(weight_decay=False, role="table")
    assert tags["2.weight"] == Tag(group="head")
    assert not any(tags[name].weight_decay for name in ("0.bias", "1.weight", "1.bias", "2.bias"))
    groups = {group["name"]: group for group in parameter_groups(model, 1.0, 0.1, {"head": 0.5})}
    assert groups["head"]["lr"] == 0.5
    assert groups["head"]["weight_decay"] == 0.1
    assert groups["body, no decay"]["weight_decay"] == 0.0
    with pytest.raises(ValueError, match="groups that the model lacks"):
        parameter_groups(model, 1.0, 0.1, {"tail": 1.0})


def test_cost_counts_layers_and_the_keys_that_are_seen():
    model = nn.Sequential(nn.Linear(8, 16), PatternAttention(16, 2, Window(4, shift=2), qkv_bias=False))
    found = cost(model, 2, 8, 8, 8)
    tokens, rest = 2 * 64, 8 * 16 + 4 * 16 * 16
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.nominal == tokens * (rest + 2 * 16 * 16)
    # blocks of 2, 4 and 2 along each axis: on average 3 of 4 keys per axis
    assert found.exact == tokens * (rest + 2 * 9 * 16)


def test_cost_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert cost(model, 1, 2, 10).nominal == 8 * 4 * 6
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_initialization_draws_what_it_is_told():
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Conv2d(64, 64, 3, groups=64), PatternAttention(16, 2, Near(3), rel_pos_bias=True)
    )
    kept = model[1].weight.clone()
    initialize(model, linear=truncated(0.02), position_bias=truncated(0.5))
    assert 0.015 < model[0].weight.std() < 0.025
    assert model[0].bias.abs().max() == 0
    assert torch.equal(model[1].weight, kept)
    assert model[2].rpb.std() > 0.2
    initialize(model, convolution=fan_out)
    assert abs(model[1].weight.std().item() - (2 / 9) ** 0.5) < 0.05


GRIDS = [(13,), (5, 6), (3, 4, 5)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda rank: LargeKernelAttention(8, rank=rank),
        lambda rank: RecursiveGate(8, 3, rank=rank),
        lambda rank: FocalModulation(8, 2, rank=rank),
        lambda rank: Parallel(PoolingDifference(3), Depthwise(8, rank=rank), use_weights=True),
        lambda rank: PooledAttention(8, 2, AveragePool(2)),
        lambda rank: nn.Sequential(LearnedPositions((4,) * rank, 8), GridGroupNorm(8), GridBatchNorm(8)),
    ],
    ids=["large kernel", "gate", "focal", "pooling", "pooled", "norms"],
)
def test_mixers_and_norms_in_every_rank(make, grid):
    module, inputs = make(len(grid)), torch.randn(2, *grid, 8)
    out = module(inputs)
    assert out.shape == inputs.shape
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_pooling_difference_is_the_same_rule_in_every_rank():
    ramp = torch.arange(7.0)[None, :, None]
    expected = PoolingDifference(3)(ramp)
    assert torch.equal(PoolingDifference(3)(ramp[:, :, None]), expected[:, :, None])
    assert torch.equal(PoolingDifference(3)(ramp[:, None, :, None]), expected[:, None, :, None])
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        PoolingDifference(2)


def test_group_norm_trains_behind_a_frozen_input():
    # in a process of its own: torch's group norm ended it
    program = (
        "import torch; from vicinal.layers.norm import GridGroupNorm; norm = GridGroupNorm(32); "
        "norm(torch.randn(2, 5, 7, 32)).sum().backward(); print(norm.weight.grad.shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "torch.Size([32])\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cost_of_a_model_in_another_precision(dtype):
    assert cost(nn.Conv2d(3, 4, 2).to(dtype), 1, 3, 8, 8) == cost(nn.Conv2d(3, 4, 2), 1, 3, 8, 8)


def test_nominal_cost_of_a_halo_counts_the_block_and_both_sides():
    found = cost(PatternAttention(8, 1, Halo(2, 1), rank=1), 1, 12, 8)
    assert found.nominal - 12 * 4 * 64 == 12 * 4 * 2 * 8
    assert found.exact < found.nominal


def test_drop_path_keeps_its_rate_in_half_precision():
    torch.manual_seed(0)
    kept = DropPath(0.001).train()(torch.ones(200_000, 1, dtype=torch.bfloat16)).count_nonzero().item()
    assert 100 < 200_000 - kept < 300


def test_a_drop_path_rate_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"drop_path_rate must be a probability .* got 1.5"):
        drop_rates((2, 2), 1.5)


def test_deformable_merging_finds_its_places_in_half_precision():
    torch.manual_seed(0)
    half = DeformableMerging(8, 16).eval()
    nn.init.uniform_(half.offset.bias, -1, 1)
    half.to(torch.bfloat16)
    exact = copy.deepcopy(half).double()
    inputs = torch.randn(1, 60, 60, 8, dtype=torch.bfloat16)
    expected = exact(inputs.double())
    error = (half(inputs).double() - expected).square().mean().sqrt()
    assert error < 2**-6 * expected.square().mean().sqrt()
