"""The short way through a block: the same numbers, and nobody who watches, replaces or changes a part is passed by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicinal.layers import plain_block
from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block
from vicinal.layers.mlp import Mlp
from vicinal.layers.norm import GridInstanceNorm
from vicinal.pattern import Near

PARTS = ("norm1", "mixer", "mixer.qkv", "mixer.proj", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "drop_path")


def block(**options):
    torch.manual_seed(0)
    return Block(8, PatternAttention(8, 2, Near(3), rel_pos_bias=True, pad_mode="legacy"), Mlp(8, 24), **options)


def by_hand(model, inputs):
    """Module by module."""
    out = inputs + model.drop_path(model.mixer(model.norm1(inputs)))
    mlp = model.mlp
    return out + model.drop_path(mlp.fc2(mlp.act(mlp.fc1(model.norm2(out)))))


@pytest.mark.parametrize("grid", [(4, 5), (2, 7)])
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("is_strided", [False, True])
def test_numbers_and_gradients_are_those_of_the_modules(grid, is_recorded, is_strided):
    model = block().double()
    inputs = torch.randn(2, *grid, 8, dtype=torch.float64)
    if is_strided:
        inputs = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.set_grad_enabled(is_recorded):
        found, expected = plain_block.run(model, inputs), by_hand(model, inputs)
    assert found is not None
    torch.testing.assert_close(found, expected)
    if is_recorded:
        gradients = [torch.autograd.grad(out.sin().sum(), model.parameters()) for out in (found, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("watch", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_whoever_watches_a_part_is_told(name, watch):
    model, inputs = block(), torch.randn(1, 4, 5, 8, requires_grad=True)
    told = []
    part = model.get_submodule(name)
    handle = getattr(part, watch)(lambda *details: told.append(name))
    model(inputs).sum().backward()
    assert told
    handle.remove()
    assert plain_block.run(model, inputs) is not None


@pytest.mark.parametrize("name", ["norm1", "mixer.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2", "drop_path"])
def test_a_part_that_answers_otherwise_is_asked(name):
    model, inputs = block().eval(), torch.randn(1, 4, 5, 8)
    part = model.get_submodule(name)
    usual = type(part).forward
    before = model(inputs)
    part.forward = lambda *given: 2 * usual(part, *given)
    torch.testing.assert_close(model(inputs), by_hand(model, inputs))
    assert not torch.allclose(model(inputs), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "norm1", GridInstanceNorm()),
        lambda model: setattr(model, "gamma1", nn.Parameter(torch.zeros(8))),
        lambda model: setattr(model, "norm_place", "branch"),
        lambda model: setattr(model, "position2", nn.Linear(8, 8)),
        lambda model: setattr(model.mlp, "between", nn.Tanh()),
        lambda model: setattr(model.mlp, "act", nn.GELU("tanh")),
        lambda model: setattr(model.mlp, "fc1", nn.Linear(8, 24, bias=False)),
        lambda model: nn.utils.parametrizations.weight_norm(model.mlp.fc2),
        lambda model: setattr(model, "drop_path", nn.Dropout(0.5)),
    ],
)
def test_other_parts_go_the_long_way(change):
    model, inputs = block(), torch.randn(1, 4, 5, 8)
    assert plain_block.run(model, inputs) is not None
    change(model)
    assert plain_block.run(model, inputs) is None
    assert model(inputs).shape == inputs.shape


def test_other_moments_go_the_long_way():
    model, inputs = block(), torch.randn(1, 4, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_block.run(model, inputs) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *details: None)
    assert plain_block.run(model, inputs) is None
    handle.remove()
    weights = {name: weight.detach() * 2 for name, weight in model.named_parameters()}
    changed = torch.func.functional_call(model, weights, inputs)
    assert not torch.allclose(changed, model(inputs))
