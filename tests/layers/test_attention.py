"""The mixer over patterns, against attention written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicinal.layers.attention import PatternAttention, crop_grid, pad_grid
from vicinal.layers.neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from vicinal.layers.rotary import Rotary
from vicinal.layers.words import near, window
from vicinal.pattern import Full, Near, Same, Window, heads, mask, union


@pytest.mark.parametrize(
    ("module", "grid"),
    [(NeighborhoodAttention1D, (11,)), (NeighborhoodAttention2D, (9, 12)), (NeighborhoodAttention3D, (3, 5, 6))],
    ids=["1d", "2d", "3d"],
)
def test_equals_nattens_module_under_its_weights(module, grid):
    theirs = module(16, 2, kernel_size=3, dilation=1, rel_pos_bias=True)
    ours = PatternAttention(16, 2, Near(3), rank=len(grid), rel_pos_bias=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = torch.randn(2, *grid, 16)
    torch.testing.assert_close(ours(inputs), theirs(inputs))


@pytest.mark.parametrize("size", [(20, 30), (28, 28)], ids=str)
def test_legacy_padding_is_that_of_nattens_module(size):
    theirs = NeighborhoodAttention2D(16, 2, kernel_size=7, dilation=4, rel_pos_bias=True, pad_mode="legacy")
    ours = PatternAttention(16, 2, near(7, dilation=4), rel_pos_bias=True, pad_mode="legacy")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = torch.randn(1, *size, 16)
    torch.testing.assert_close(ours(inputs), theirs(inputs))


def written_out(mixer, inputs, pattern):
    grid = inputs.shape[1:-1]
    query, key, value = mixer.qkv(inputs).unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).unbind(-3)
    if mixer.norm_q is not None:
        query, key = mixer.norm_q(query), mixer.norm_k(key)
    if mixer.rotary is not None:
        query, key = mixer.rotary(query), mixer.rotary(key)
    flat = [piece.flatten(1, len(grid)).transpose(1, 2) for piece in (query, key, value)]
    seen = mask(pattern, grid)
    tokens = flat[0].shape[2]
    seen = seen.reshape(-1, tokens, tokens)
    out = nn.functional.scaled_dot_product_attention(
        *flat, attn_mask=seen.repeat_interleave(mixer.num_heads // len(seen), 0)
    )
    return mixer.proj(out.transpose(1, 2).flatten(2).unflatten(1, grid))


@pytest.mark.parametrize(
    "pattern",
    [Near(3), Window(4, shift=1), heads(Near(3), (Full(), Same())), union((Same(), Full()), (Full(), Same()))],
    ids=repr,
)
@pytest.mark.parametrize("options", [{}, {"qk_norm": nn.RMSNorm}, {"rotary": True}], ids=["plain", "norm", "rotary"])
def test_equals_attention_written_out(pattern, options):
    mixer = PatternAttention(24, 2, pattern, **options)
    inputs = torch.randn(2, 5, 6, 24)
    torch.testing.assert_close(mixer(inputs), written_out(mixer, inputs, pattern))


def test_groups_of_heads_have_tables_of_their_own():
    mixer = PatternAttention(32, 4, heads(Near(3), Near(5), sizes=(3, 1)), rel_pos_bias=True)
    assert [tuple(table.shape) for table in mixer.rpb] == [(3, 5, 5), (1, 9, 9)]
    before = mixer(inputs := torch.randn(1, 6, 6, 32))
    with torch.no_grad():
        mixer.rpb[1].add_(torch.randn(1, 9, 9))
    assert (mixer(inputs) - before).abs().max() > 1e-3


def test_a_table_for_the_whole_grid_serves_smaller_ones():
    mixer = PatternAttention(16, 2, Full(), rel_pos_bias=True, table_grid=(6, 6))
    small = PatternAttention(16, 2, Full(), rel_pos_bias=True, table_grid=(4, 5))
    state = mixer.state_dict()
    small.load_state_dict({**state, "rpb": state["rpb"][:, 2:-2, 1:-1]})
    inputs = torch.randn(1, 4, 5, 16)
    torch.testing.assert_close(mixer(inputs), small(inputs))
    with pytest.raises(ValueError, match=r"made for grids of up to \(6, 6\), got \(7, 6\)"):
        mixer(torch.randn(1, 7, 6, 16))


def test_a_table_that_needs_a_grid_says_so():
    with pytest.raises(ValueError, match="give table_grid"):
        PatternAttention(16, 2, Full(), rel_pos_bias=True)


def test_the_value_mixer_adds_before_the_projection():
    class Double(nn.Module):
        def forward(self, values):
            return 2 * values

    mixer = PatternAttention(16, 2, Near(3), value_mixer=Double())
    plain = PatternAttention(16, 2, Near(3))
    plain.load_state_dict(mixer.state_dict())
    inputs = torch.randn(1, 5, 5, 16)
    values = mixer.qkv(inputs)[..., 32:]
    expected = plain(inputs) + nn.functional.linear(2 * values, mixer.proj.weight)
    torch.testing.assert_close(mixer(inputs), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_heads": 3}, "num_heads"), ({"num_heads": 2, "pad_mode": "zeros"}, "pad_mode")],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatternAttention(16, pattern=window(4), **arguments)


def test_padding_and_cropping_undo_each_other():
    inputs = torch.randn(2, 3, 4, 5)
    padded = pad_grid(inputs, (5, 4))
    assert torch.equal(crop_grid(padded, (3, 4)), inputs)
    assert padded[:, 3:].abs().sum() == 0
    assert pad_grid(inputs, (3, 4)) is inputs


@pytest.mark.parametrize(("grid", "head_dim"), [((7,), 4), ((3, 5), 10), ((2, 3, 4), 6)], ids=str)
def test_rotary_scores_depend_on_the_distance_alone(grid, head_dim):
    rotary = Rotary(head_dim, len(grid))
    query, key = torch.randn(2, head_dim)
    spread = [vector.expand(1, *grid, 1, head_dim) for vector in (query, key)]
    turned = [rotary(piece)[0, ..., 0, :] for piece in spread]
    first = (slice(0, -1),) * len(grid)
    second = (slice(1, None),) * len(grid)
    scores = (turned[0][first] * turned[1][second]).sum(-1)
    torch.testing.assert_close(scores, scores.flatten()[0].expand(scores.shape), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm().expand(grid), rtol=1e-4, atol=1e-4)


def test_rotary_turns_every_pair():
    turned = Rotary(8, 3)(torch.ones(1, 2, 2, 2, 1, 8))
    assert ((turned[0, 1, 1, 1, 0] - 1).abs() > 1e-3).all()
