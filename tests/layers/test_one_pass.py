"""Linear layers with what stands beside them: the same numbers and gradients, and everybody who looks still sees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vicinal.layers import one_pass
from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block
from vicinal.layers.mlp import Mlp
from vicinal.layers.one_pass import add_linear, linear_gelu
from vicinal.pattern import Near


class Watched(nn.Linear):
    """What an adapter or a quantization puts in a layer's place."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


def block(**options):
    return Block(8, PatternAttention(8, 2, Near(3), rel_pos_bias=True), Mlp(8, 24), **options)


def by_hand(model, inputs):
    """The same block with nothing added at once."""
    out = inputs + model.mixer(model.norm1(inputs))
    return out + model.mlp.fc2(nn.functional.gelu(model.mlp.fc1(model.norm2(out))))


@pytest.fixture
def everything_is_large(monkeypatch):
    """Whatever lies between two linear layers is large, and worked on two or three tokens at a time."""
    monkeypatch.setattr(one_pass, "LARGE", 0)
    monkeypatch.setattr(one_pass, "PIECE", 3 * 24 * 4)


def watched(model, inputs, names):
    """What a model gives, and what forward hooks on some of its modules saw."""
    seen = {}

    def watch(name):
        return model.get_submodule(name).register_forward_hook(lambda module, given, out: seen.setdefault(name, out))

    handles = [watch(name) for name in names]
    with torch.no_grad():
        out = model(inputs)
    for handle in handles:
        handle.remove()
    return out, seen


@pytest.mark.parametrize("kind", [nn.Linear, Watched])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_strided", [False, True])
def test_a_linear_layer_onto_a_shortcut(kind, bias, is_strided):
    layer = kind(5, 3, bias=bias)
    shortcut, inputs = torch.randn(2, 7, 4, 3), torch.randn(2, 7, 4, 5)
    if is_strided:
        shortcut, inputs = shortcut.transpose(1, 2), inputs.transpose(1, 2)
    before = shortcut.clone()
    torch.testing.assert_close(add_linear(shortcut, inputs, layer), shortcut + layer(inputs))
    assert torch.equal(shortcut, before)


def test_a_shortcut_of_another_shape_is_broadcast_as_ever():
    layer, inputs = nn.Linear(5, 3), torch.randn(2, 7, 5)
    torch.testing.assert_close(add_linear(torch.ones(1, 1, 3), inputs, layer), 1 + layer(inputs))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_activation_is_as_exact_as_after_the_product(act, dtype):
    layer, inputs = nn.Linear(37, 53, dtype=dtype), 3 * torch.randn(3, 11, 37, dtype=dtype)
    with torch.no_grad():
        exact = act(copy.deepcopy(layer).double()(inputs.double()))
        eager, found = act(layer(inputs)), linear_gelu(inputs, layer, act)
    room = 2 * (eager.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= room


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("is_strided", [False, True])
def test_a_large_map_goes_through_in_pieces(is_strided, monkeypatch):
    model, inputs = block(), torch.randn(2, 7, 5, 8)
    if is_strided:
        inputs = inputs.transpose(1, 2)
    rows, whole = [], one_pass.linear_gelu
    monkeypatch.setattr(one_pass, "linear_gelu", lambda part, *layers: rows.append(len(part)) or whole(part, *layers))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), by_hand(model, inputs))
    assert sum(rows) == 70 and max(rows) == 3


@pytest.mark.usefixtures("everything_is_large")
def test_gradients_of_a_large_map_are_as_by_hand():
    torch.manual_seed(0)
    model, inputs = block().double(), torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    wanted = [inputs, *model.parameters()]
    out, weights = model(inputs), torch.randn(2, 4, 5, 8, dtype=torch.float64)
    expected = torch.autograd.grad(by_hand(model, inputs), wanted, weights)
    for _ in range(2):  # nothing that a second pass needs is written over
        for one, other in zip(torch.autograd.grad(out, wanted, weights, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("everything_is_large")
def test_a_large_block_differentiates_twice_as_by_hand():
    test_a_block_differentiates_twice_as_by_hand()


@pytest.mark.usefixtures("everything_is_large")
def test_hooks_see_a_large_map_whole():
    test_hooks_see_a_branch_alone(False)


def test_a_block_differentiates_twice_as_by_hand():
    torch.manual_seed(0)
    model, inputs = block().double(), torch.randn(1, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    wanted = [inputs, *model.parameters()]
    found, expected = (
        torch.autograd.grad(
            sum(grad.square().sum() for grad in torch.autograd.grad(out.sin().sum(), wanted, create_graph=True)), wanted
        )
        for out in (model(inputs), by_hand(model, inputs))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_training", [False, True])
def test_hooks_see_a_branch_alone(is_training):
    model, inputs = block(drop_rate=0.0).train(is_training), torch.randn(1, 4, 5, 8)
    names = ("mixer", "mixer.proj", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2")
    for chosen in (*((name,) for name in names), names):
        out, seen = watched(model, inputs, chosen)
        assert set(seen) == set(chosen)
        if "mlp" in seen:
            halfway = inputs + model.mixer(model.norm1(inputs))
            torch.testing.assert_close(halfway + seen["mlp"], out)


def test_layers_that_were_replaced_are_called():
    model, inputs = block(), torch.randn(1, 4, 5, 8)
    expected = by_hand(model, inputs)
    for name in ("fc1", "fc2"):
        setattr(model.mlp, name, Watched(*getattr(model.mlp, name).weight.shape[::-1]))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), by_hand(model, inputs))
        assert not torch.allclose(model(inputs), expected)


def test_branches_that_drop_out_or_are_scaled_are_not_added_at_once():
    inputs = torch.randn(1, 4, 5, 8)
    nothing = block(layer_scale=0.0)
    assert torch.equal(nothing(inputs), inputs)
    torch.manual_seed(0)
    dropped = block(drop_rate=0.999).train()
    assert torch.equal(dropped(inputs), inputs)


def test_autocast_still_casts():
    model, inputs = block().eval(), torch.randn(1, 4, 5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.mlp(inputs).dtype == torch.bfloat16
