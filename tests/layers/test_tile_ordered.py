"""A model in tile order equals the model on the grid: outputs and gradients, through several layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicinal import BackendRefused, Full, Near, Window, heads, union
from vicinal.layers import TileOrdered
from vicinal.layers.attention import PatternAttention
from vicinal.layers.block import Block
from vicinal.layers.mlp import Mlp
from vicinal.layers.norm import GridGroupNorm
from vicinal.layers.rotary import Rotary
from vicinal.layers.tile_place import TilePlace
from vicinal.ops import ordered
from vicinal.ops.ordered import attention_in_order
from vicinal.ops.tile_order import TileOrder

DIM = 24


def block(pattern: object, rank: int, **options: object) -> Block:
    return Block(DIM, PatternAttention(DIM, 2, pattern, rank=rank, **options), Mlp(DIM, 2 * DIM)).double()


VIDEO = (Near(3), Near(5, dilation=2), Near(4, stride=2))
CASES = (
    (
        (5, 7, 6),
        (2, 4, 2),
        [(VIDEO, {"rotary": True}), ((Full(), Window(4), Window(3)), {"rotary": True}), (VIDEO, {})],
    ),
    ((8, 8, 8), (2, 4, 4), [(Near(3), {"rotary": True, "qk_norm": nn.RMSNorm})] * 3),
    ((9, 13), (4, 4), [(Near(5), {"rel_pos_bias": True}), (heads(Near(3), Window(4)), {"rotary": True})]),
    ((9, 13), (4, 4), [(union((Full(), Near(1)), (Near(1), Full())), {"rotary": True})] * 2),
    ((31,), (8,), [(Near(9, dilation=3), {"rotary": True}), (Near(7, causal=True), {"rotary": True})]),
)


@pytest.mark.parametrize(("grid", "tile", "layers"), CASES, ids=lambda value: "x".join(map(str, value))[:40])
def test_layers_in_tile_order_equal_the_layers_on_the_grid(grid, tile, layers) -> None:
    blocks = [block(pattern, len(grid), **options) for pattern, options in layers]
    model = TileOrdered(blocks, tile)
    inputs = torch.randn(2, *grid, DIM, dtype=torch.float64, requires_grad=True)
    wanted = inputs
    for layer in blocks:
        wanted = layer(wanted)
    grad = torch.randn_like(wanted)
    parameters = [inputs, *model.parameters()]
    expected = torch.autograd.grad(wanted, parameters, grad)
    found = model(inputs)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)
    for one, other in zip(torch.autograd.grad(found, parameters, grad), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


class Turned(nn.Module):
    """A layer of a video model that is given its rotary table, token by token, and a condition for each sample."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mixer = PatternAttention(DIM, 2, (Near(3), Near(3), Near(5)), rank=3)

    def forward(self, inputs: torch.Tensor, table: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift = condition.reshape(len(condition), *(1,) * (inputs.dim() - 2), -1)
        return inputs + self.mixer(inputs * table + shift)


def test_positions_that_layers_are_given_are_permuted_along() -> None:
    layers = [Turned(seed) for seed in range(3)]
    inputs, condition = torch.randn(2, 4, 5, 6, DIM), torch.randn(2, DIM)
    for table in (torch.randn(4, 5, 6, DIM), torch.randn(2, 4, 5, 6, DIM)):
        wanted = inputs
        for layer in layers:
            wanted = layer(wanted, table, condition)
        found = TileOrdered(layers, (2, 2, 4))(inputs, table, condition)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_tokens_are_permuted_once_however_many_layers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fast kernel buys is lost if every layer copies; here attention is one that takes tokens as they lie."""
    entered = []
    enter = TileOrder.enter

    def noted(self: TileOrder, tokens: torch.Tensor, axis: int = 1) -> torch.Tensor:
        entered.append(tokens.shape)
        return enter(self, tokens, axis)

    monkeypatch.setattr(TileOrder, "enter", noted)
    monkeypatch.setattr("vicinal.layers.attention.attention_in_order", lambda query, *_, **__: query)
    model = TileOrdered([block(VIDEO, 3, rotary=True) for _ in range(4)], (2, 4, 4))
    model(torch.randn(1, 4, 8, 8, DIM, dtype=torch.float64))
    assert entered == [(1, 4, 8, 8, DIM), (4, 8, 8, DIM // 4)]  # the tokens, and the angles of all four rotations


def test_layers_are_on_their_grid_again_when_the_model_has_run_or_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = block(VIDEO, 3)
    model = TileOrdered([layer], (2, 2, 2))
    inputs = torch.randn(1, 4, 4, 4, DIM, dtype=torch.float64)
    model(inputs)
    assert layer.mixer.place == TilePlace()
    monkeypatch.setattr(layer.mlp, "forward", lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(inputs)
    assert layer.mixer.place == TilePlace()


def test_state_dict_is_that_of_the_layers() -> None:
    layer = block(VIDEO, 3)
    model = TileOrdered([layer], (2, 2, 2))
    assert set(model.state_dict()) == {f"layers.0.{name}" for name in layer.state_dict()}


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(DIM, DIM, 3)


@pytest.mark.parametrize(
    ("layers", "tile", "words"),
    [
        ([Convolved()], (2, 2, 2), "these need the grid: Conv3d"),
        ([GridGroupNorm(DIM), nn.BatchNorm1d(DIM)], (2,), "need the grid: BatchNorm1d, GridGroupNorm"),
        ([nn.Identity()], (2, 0), r"tile must be 1 to 3 sides of at least 1, got \(2, 0\)"),
    ],
    ids=["convolution", "norms", "tile"],
)
def test_layers_that_need_the_grid_are_refused(layers, tile, words) -> None:
    with pytest.raises(ValueError, match=words):
        TileOrdered(layers, tile)


def test_inputs_of_another_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs must have 3 axes like tile"):
        TileOrdered([nn.Identity()], (2, 2, 2))(torch.randn(1, 4, 4, DIM))


def test_legacy_padding_inside_the_order_is_refused() -> None:
    layer = PatternAttention(DIM, 2, Near(7), rank=2, pad_mode="legacy")
    with pytest.raises(ValueError, match=r"would pad the grid \(5, 5\)"):
        TileOrdered([layer], (2, 2))(torch.randn(1, 5, 5, DIM))


def test_rotation_by_given_angles_equals_its_own() -> None:
    rotary, inputs = Rotary(8, rank=2), torch.randn(1, 4, 6, 2, 8)
    assert torch.equal(rotary(inputs), rotary(inputs, rotary.angles((4, 6), inputs)))


ORDER = TileOrder((4, 6, 8), (2, 4, 4), (1, 1, 1))


@pytest.mark.parametrize(
    "pattern", [(Near(3), Near(3, dilation=2), Near(5)), heads(Near(3), Window(4)), union(Near(3), Window(3))], ids=repr
)
def test_flex_on_tokens_as_they_lie_equals_attention_on_the_grid(pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a GPU takes, here with FlexAttention's eager form."""
    monkeypatch.setattr(ordered, "stays_in_order", lambda *_: True)
    tokens = [torch.randn(2, 4, 6, 8, number, 16) for number in (4, 2, 2)]
    out = attention_in_order(*map(ORDER.enter, tokens), pattern, ORDER)
    wanted = ORDER.enter(ordered.attention(*tokens, pattern))
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "tile", "backend", "expected"),
    [
        ("cpu", (2, 8, 8), "flex", False),
        ("cuda", (2, 8, 8), "flex", True),
        ("cuda", (2, 4, 4), "flex", False),
        ("cuda", (2, 8, 8), "tiled", False),
    ],
)
def test_which_calls_stay_in_order(device: str, tile: tuple[int, ...], backend: str, expected: bool) -> None:
    from torch._subclasses import FakeTensorMode

    order = TileOrder((4, 16, 16), tile, (1, 1, 1))
    with FakeTensorMode():
        query = torch.empty(1, 1024, 2, 64, device=device, dtype=torch.float16)
    assert ordered.stays_in_order(query, query, query, Near(3), order, None, backend) == expected


def test_tensors_that_are_not_in_the_order_are_refused() -> None:
    query = torch.randn(1, 100, 2, 8)
    with pytest.raises(ValueError, match=r"query must be \[batch, 256, heads, dim\] in the tile order of \(4, 6, 8\)"):
        attention_in_order(query, query, query, Near(3), ORDER)


def test_flex_asked_for_on_a_cpu_has_no_gradients_in_order_either() -> None:
    layer = PatternAttention(DIM, 2, Near(3), rank=2, backend="flex")
    out = TileOrdered([layer], (2, 2))(torch.randn(1, 4, 4, DIM))
    with pytest.raises(BackendRefused, match="cannot give gradients on a CPU"):
        out.sum().backward()
