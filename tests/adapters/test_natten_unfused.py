"""The two-step functions, heads first: the order of the window, values, every gradient, all their names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal.adapters import natten
from vicinal.adapters.natten import functional

from .windows import dense_scores, neighbors

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
QK = (functional.na1d_qk, functional.na2d_qk, functional.na3d_qk)
AV = (functional.na1d_av, functional.na2d_av, functional.na3d_av)

PROBLEMS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((17,), {"kernel_size": 5}),
    ((23,), {"kernel_size": 4, "dilation": 5}),
    ((19,), {"kernel_size": 7, "dilation": 2, "is_causal": True}),
    ((7, 7), {"kernel_size": 7}),
    ((9, 14), {"kernel_size": 3, "dilation": 3}),
    ((11, 8), {"kernel_size": (5, 2), "dilation": (2, 4)}),
    ((10, 9), {"kernel_size": (3, 4), "is_causal": (True, False)}),
    ((5, 6, 7), {"kernel_size": 3}),
    ((4, 9, 6), {"kernel_size": (2, 3, 5), "dilation": (2, 3, 1), "is_causal": (True, False, False)}),
]
IDS = ["x".join(map(str, grid)) + "-" + "-".join(map(str, window.values())) for grid, window in PROBLEMS]


def window_shape(grid: tuple[int, ...], window: dict[str, Any]) -> tuple[int, ...]:
    size = window["kernel_size"]
    return size if isinstance(size, tuple) else (size,) * len(grid)


def by_hand(
    tensors: dict[str, torch.Tensor], grid: tuple[int, ...], window: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in row-major order of the window, then those of the extra keys, and the sums by their softmax."""
    flat = {name: tensor.flatten(2, -2) for name, tensor in tensors.items() if name != "rpb"}
    dense = dense_scores(flat["query"], flat["key"], grid, window, tensors.get("rpb"))
    size = math.prod(window_shape(grid, window))
    seen = neighbors(grid, window)
    place = torch.tensor([inside + [0] * (size - len(inside)) for inside in seen])
    missing = torch.tensor([[False] * len(inside) + [True] * (size - len(inside)) for inside in seen])
    scores = torch.gather(dense, -1, place.expand(*dense.shape[:2], -1, -1)).masked_fill(missing, -math.inf)
    values = flat["value"]
    if "additional_keys" in flat:
        extra = flat["query"] @ flat["additional_keys"].transpose(-1, -2)
        dense, scores = torch.cat([dense, extra], -1), torch.cat([scores, extra], -1)
        values = torch.cat([values, flat["additional_values"]], 2)
    return scores.unflatten(2, grid), (dense.softmax(-1) @ values).unflatten(2, grid)


@pytest.mark.parametrize("extra_tokens", [0, 3])
@pytest.mark.parametrize(("grid", "window"), PROBLEMS, ids=IDS)
def test_scores_stand_in_nattens_order(grid: tuple[int, ...], window: dict[str, Any], extra_tokens: int) -> None:
    heads, rank = 3, len(grid)
    shapes = {"query": (2, heads, *grid, 8), "key": (2, heads, *grid, 8), "value": (2, heads, *grid, 5)}
    shapes["rpb"] = (heads, *(2 * length - 1 for length in window_shape(grid, window)))
    if extra_tokens:
        shapes |= {"additional_keys": (2, heads, extra_tokens, 8), "additional_values": (2, heads, extra_tokens, 5)}
    tensors = {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}
    keys, values = tensors.get("additional_keys"), tensors.get("additional_values")

    scores = QK[rank - 1](tensors["query"], tensors["key"], **window, rpb=tensors["rpb"], additional_keys=keys)
    out = AV[rank - 1](scores.softmax(-1), tensors["value"], **window, additional_values=values)
    wanted_scores, wanted_out = by_hand(tensors, grid, window)
    torch.testing.assert_close(scores, wanted_scores, **CLOSE)
    torch.testing.assert_close(out, wanted_out, **CLOSE)

    def grads(scores: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).sin().view_as(scores)
        through_scores = (scores.masked_fill(scores == -math.inf, 0.0) * weights).sum()
        return torch.autograd.grad(through_scores + out.pow(2).sum(), list(tensors.values()))

    for name, found, wanted in zip(tensors, grads(scores, out), grads(wanted_scores, wanted_out), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, **CLOSE, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_weights_that_are_no_softmax_have_a_gradient() -> None:
    attn = torch.randn(1, 2, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 2, 6, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda attn, value: functional.natten2dav(attn, value, 3, 2), (attn, value))


def test_every_early_name_is_the_same_function() -> None:
    line, plane, video = (torch.randn(1, 2, *grid, 8) for grid in ((9,), (6, 7), (4, 6, 5)))
    for rank, query in ((1, line), (2, plane), (3, video)):
        split = (3, 3, 1, 1) if rank == 3 else (3, 1)
        rpb = torch.randn(2, *(5,) * rank)
        scores = QK[rank - 1](query, query, 3, rpb=rpb)
        bare = QK[rank - 1](query, query, 3)
        out = AV[rank - 1](bare, query, 3, 1)
        assert torch.equal(getattr(functional, f"natten{rank}dqkrpb")(query, query, rpb, *split), scores)
        assert torch.equal(getattr(functional, f"natten{rank}dqkrpb")(query, query, None, *split), bare)
        assert torch.equal(getattr(functional, f"na{rank}d_qk_with_bias")(query, query, rpb, *split), scores)
        assert torch.equal(getattr(functional, f"natten{rank}dqk")(query, query, *split), bare)
        assert torch.equal(getattr(functional, f"natten{rank}dav")(bare, query, *split), out)


def test_calls_without_a_kernel_size_are_refused() -> None:
    # until 0.14.5 the last number was the dilation; a window of 9 and a dilation of 3 would pass for a kernel of 3
    query, attn = torch.randn(1, 2, 9, 9, 8), torch.randn(1, 2, 9, 9, 9)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'dilation'"):
        functional.natten2dav(attn, query, 3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'dilation'"):
        functional.natten2dqkrpb(query, query, torch.zeros(2, 5, 5), 3)  # type: ignore[call-arg]


def test_three_axes_take_one_kernel_or_two() -> None:
    query = torch.randn(1, 2, 6, 10, 11, 4)
    window = {"kernel_size": (3, 5, 5), "dilation": (1, 2, 2)}
    wanted = functional.na3d_qk(query, query, **window)
    assert torch.equal(functional.na3d_qk(query, query, 3, 5, 1, 2), wanted)
    split = {"kernel_size_d": 3, "kernel_size": 5, "dilation_d": 1, "dilation": 2}
    assert torch.equal(functional.natten3dqkrpb(query, query, None, **split), wanted)
    assert torch.equal(functional.na3d_qk(query, query, (3, 5, 5), (1, 2, 2), None, False), wanted)
    # two numbers alone are one kernel and one dilation
    assert torch.equal(functional.na3d_qk(query, query, 3, 2), functional.na3d_qk(query, query, 3, dilation=2))
    for args, options in (
        ((3, 5, 1), {}),
        ((3,), {"kernel_size_d": 3, "kernel_size": 5}),
        ((), {}),
        (((3, 5, 5),), {"kernel_size": 3}),
        ((3, 5, 1, 2), {"causal": True}),
    ):
        with pytest.raises(TypeError, match="na3d_qk"):
            functional.na3d_qk(query, query, *args, **options)


def test_no_tensor_is_copied_on_the_way() -> None:
    """Transposed views go in and come out: our operator reads heads-first memory as it lies."""
    met: list[tuple[str, list[torch.Tensor]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            met.append((str(func), [entry for entry in args if isinstance(entry, torch.Tensor)]))
            return func(*args, **(kwargs or {}))

    query, key, value = torch.randn(3, 1, 2, 6, 7, 8).unbind(0)
    with Watch():
        scores = functional.natten2dqkrpb(query, key, None, 3, 1)
        functional.natten2dav(scores, value, 3, 1)
    ours = {name: tensors for name, tensors in met if name.startswith("vicinal.")}
    assert [tensor.data_ptr() for tensor in ours["vicinal.scores.default"][:2]] == [query.data_ptr(), key.data_ptr()]
    weights, values = ours["vicinal.apply.default"][:2]
    assert (weights.data_ptr(), values.data_ptr()) == (scores.data_ptr(), value.data_ptr())
    assert not {name for name, _ in met} & {"aten.clone.default", "aten.copy_.default", "aten._to_copy.default"}


def test_half_precision_and_autocast_keep_the_values_precision() -> None:
    query, value = torch.randn(2, 1, 2, 6, 7, 8, dtype=torch.bfloat16).unbind(0)
    rpb = torch.randn(2, 5, 5)
    scores = functional.natten2dqkrpb(query, query, rpb, 3, 1)
    assert scores.dtype == torch.bfloat16
    assert torch.equal(functional.natten2dqkrpb(query, query, rpb.double(), 3, 1), functional.natten2dqkrpb(
        query, query, rpb.bfloat16(), 3, 1
    ))  # fmt: skip
    out = functional.natten2dav(scores.float().softmax(-1), value, 3, 1)
    assert out.dtype == torch.bfloat16
    module = natten.NeighborhoodAttention2D(dim=16, num_heads=2, kernel_size=3, rel_pos_bias=True, attn_drop=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(1, 5, 5, 16)).dtype == torch.bfloat16
