"""Strided convolutions onto few places: as torch's own, to the gradients of gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.few_places import LEAST_CHANNELS, MOST_PLACES, convolve

CASES = {
    "3x3": (64, 5, (3, 3), 2, 1, False),
    "with bias": (65, 7, (3, 3), 2, 1, True),
    "2x2, a row left over": (64, 4, (2, 2), 2, 0, True),
    "not square": (64, 3, (3, 5), (1, 3), (0, 2), False),
}


def plain(inputs: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    return channels_last(layer(channels_first(inputs)))


def is_ours(out: torch.Tensor) -> bool:
    assert out.grad_fn is not None
    return "FewPlaces" in out.grad_fn.next_functions[0][0].name()


def made(case: str) -> tuple[torch.Tensor, nn.Conv2d]:
    in_dim, dim, size, stride, padding, bias = CASES[case]
    torch.manual_seed(0)
    layer = nn.Conv2d(in_dim, dim, size, stride, padding, bias=bias).to(memory_format=torch.channels_last)
    return torch.randn(2, 7, 11, in_dim, requires_grad=True), layer


@pytest.mark.parametrize("case", CASES)
def test_few_places_give_the_gradients_of_torch(case: str) -> None:
    inputs, layer = made(case)
    out = convolve(inputs, layer)
    assert is_ours(out)
    leaves = (inputs, *layer.parameters())
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    exact_inputs, exact = inputs.detach().double().requires_grad_(), copy.deepcopy(layer).double()
    exact_leaves = (exact_inputs, *exact.parameters())
    expected = torch.autograd.grad(plain(exact_inputs, exact), exact_leaves, grad.double())
    usual = torch.autograd.grad(plain(inputs, layer), leaves, grad)
    for ours, theirs, right in zip(found, usual, expected, strict=True):
        assert ours.stride() == theirs.stride()
        rounding = 16 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + rounding


def test_few_places_are_differentiated_twice() -> None:
    inputs, layer = made("with bias")
    leaves = (inputs, *layer.parameters())

    def second(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), leaves)

    for ours, theirs in zip(second(convolve(inputs, layer)), second(plain(inputs, layer)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_few_places_leave_out_gradients_that_nobody_wants() -> None:
    inputs, layer = made("with bias")
    assert layer.bias is not None
    layer.bias.requires_grad_(False)
    convolve(inputs.detach(), layer).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is None
    layer.weight.requires_grad_(False)
    assert not is_ours(convolve(inputs, layer))


def test_few_places_are_no_matter_of_a_layer_that_is_watched_or_replaced() -> None:
    inputs, layer = made("3x3")
    seen: list[nn.Module] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(module))
    assert not is_ours(convolve(inputs, layer)) and seen == [layer]
    handle.remove()
    assert is_ours(convolve(inputs, layer))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolve(inputs, layer).dtype == torch.bfloat16
    nn.utils.parametrizations.weight_norm(layer)
    assert not is_ours(convolve(inputs, layer))


def test_many_places_and_few_channels_are_left_to_torch() -> None:
    layer = nn.Conv2d(LEAST_CHANNELS, 1, 1)
    assert is_ours(convolve(torch.zeros(1, 1, MOST_PLACES, LEAST_CHANNELS), layer))
    assert not is_ours(convolve(torch.zeros(1, 1, MOST_PLACES + 1, LEAST_CHANNELS), layer))
    assert not is_ours(convolve(torch.zeros(1, 1, 1, 8), nn.Conv2d(8, 1, 1)))


def test_an_image_that_is_too_small_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="Kernel size"):
        convolve(torch.zeros(1, 1, 1, 64), nn.Conv2d(64, 1, 3))
