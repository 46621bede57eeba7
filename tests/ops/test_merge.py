"""`merge_attentions`: attention over parts of the keys, joined, is attention over all of them."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.pattern import Full, Near, Same, Window, bounds, mask

from .oracle import dense
from .problems import Problem
from .tolerance import FACTOR


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(20,), (7, 13), (1, 18, 1), (3, 5, 2, 10)], ids=lambda sizes: f"{len(sizes)}-parts")
def test_merged_parts_equal_the_unsplit_softmax(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = Problem((11,), Full(), key_grid=(20,), heads=4, kv_heads=2, head_dim=8)
    tensors = {
        "query": torch.randn(1, 11, 4, 8).to(dtype),
        "key": torch.randn(1, 20, 2, 8).to(dtype),
        "value": torch.randn(1, 20, 2, 8).to(dtype),
    }
    weight, lse_weight = torch.randn(1, 11, 4, 8).to(dtype), torch.randn(1, 11, 4)

    def results(whole: bool, to: torch.dtype) -> list[torch.Tensor]:
        own = {name: tensor.to(to).requires_grad_() for name, tensor in tensors.items()}
        if whole:
            found = dense(problem, own)
            out, lse = found["out"], found["lse"]
        else:
            pairs = zip(own["key"].split(list(sizes), 1), own["value"].split(list(sizes), 1), strict=True)
            parts = [vicinal.attention(own["query"], *pair, Full(), return_lse=True) for pair in pairs]
            out, lse = vicinal.merge_attentions(*zip(*parts, strict=True))
        assert out.dtype == to
        grads = torch.autograd.grad((out, lse), list(own.values()), (weight.to(to), lse_weight.to(lse.dtype)))
        return [tensor.detach().double() for tensor in (out, lse, *grads)]

    exact, ours, eager = results(True, torch.float64), results(False, dtype), results(True, dtype)
    for truth, mine, plain in zip(exact, ours, eager, strict=True):
        rounding = 8 * torch.finfo(dtype).eps * float(truth.abs().max())
        assert float((mine - truth).abs().max()) <= FACTOR * float((plain - truth).abs().max()) + rounding


def test_merged_members_equal_a_union_of_disjoint_patterns() -> None:
    query, key, value = (drawn(2, 5, 9, 2, 4) for _ in range(3))
    left = bounds((Full(), Full()), (5, 9)).shift(1, 0, 4)
    right = bounds((Full(), Full()), (5, 9)).shift(1, 4, 5)
    parts = [
        vicinal.attention(query, key[:, :, :4], value[:, :, :4], left, return_lse=True),
        vicinal.attention(query, key[:, :, 4:], value[:, :, 4:], right, return_lse=True),
    ]
    merged, lse = vicinal.merge_attentions(*zip(*parts, strict=True))
    wanted, wanted_lse = vicinal.attention(query, key, value, Full(), return_lse=True)
    torch.testing.assert_close(merged, wanted)
    torch.testing.assert_close(lse, wanted_lse)


def test_part_that_a_query_cannot_see_changes_neither_result_nor_gradient() -> None:
    """Keys 0 to 5 and 6 to 11 of a narrow window: most queries see nothing of one half."""
    query, key, value = (drawn(1, 12, 2, 4) for _ in range(3))
    table = bounds(Near(3), (12,))
    halves = (table.shift(0, 0, 6), table.shift(0, 6, 6))
    assert not mask(halves[0]).any(1).all()
    parts = [
        vicinal.attention(query, key[:, keys], value[:, keys], half, return_lse=True)
        for keys, half in zip((slice(0, 6), slice(6, 12)), halves, strict=True)
    ]
    merged, lse = vicinal.merge_attentions(*zip(*parts, strict=True))
    wanted, wanted_lse = vicinal.attention(query, key, value, table, return_lse=True)
    torch.testing.assert_close(merged, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    weights = (torch.randn_like(merged), torch.randn_like(lse))
    grads = torch.autograd.grad((merged, lse), (query, key, value), weights)
    wanted_grads = torch.autograd.grad((wanted, wanted_lse), (query, key, value), weights)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad)


def test_query_that_no_part_can_see_gives_zero_and_minus_infinity() -> None:
    query, key, value = (drawn(1, 4, 1, 2) for _ in range(3))
    nothing = bounds(Same(), (4,)).shift(0, 9, 4)
    parts = [vicinal.attention(query, key, value, nothing, return_lse=True) for _ in range(3)]
    merged, lse = vicinal.merge_attentions(*zip(*parts, strict=True))
    assert not merged.any()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad((merged, lse), (query, key, value), (torch.ones_like(merged), torch.ones_like(lse)))
    assert not any(grad.any() for grad in grads)


def test_merge_does_not_depend_on_the_order_and_holds_for_far_apart_lses() -> None:
    outputs = [drawn(3, 2, 5) for _ in range(3)]
    lses = [torch.full((3, 2), value, dtype=torch.float64) for value in (-800.0, 900.0, 899.0)]
    merged, lse = vicinal.merge_attentions(outputs, lses)
    backward, backward_lse = vicinal.merge_attentions(outputs[::-1], lses[::-1])
    torch.testing.assert_close(merged, backward)
    torch.testing.assert_close(lse, backward_lse)
    share = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(merged, share * outputs[1] + (1 - share) * outputs[2])


def test_merge_passes_gradgradcheck() -> None:
    outputs, lses = [drawn(2, 1, 2) for _ in range(3)], [drawn(2, 1) for _ in range(3)]

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return vicinal.merge_attentions(tensors[:3], tensors[3:])

    assert torch.autograd.gradcheck(call, (*outputs, *lses))
    assert torch.autograd.gradgradcheck(call, (*outputs, *lses), fast_mode=True)


def test_merging_a_window_with_its_complement_gives_full_attention() -> None:
    query, key, value = torch.randn(3, 1, 12, 2, 4, dtype=torch.float64).unbind(0)
    inside = vicinal.attention(query, key, value, Window(4), return_lse=True)
    seen = mask(Window(4), (12,))
    scores = vicinal.attention_scores(query, key, Full()).masked_fill(seen[:, None], -torch.inf)
    outside = vicinal.apply_scores(scores.softmax(-1), value, Full()), scores.logsumexp(-1)
    merged, lse = vicinal.merge_attentions(*zip(inside, outside, strict=True))
    wanted, wanted_lse = vicinal.attention(query, key, value, Full(), return_lse=True)
    torch.testing.assert_close(merged, wanted)
    torch.testing.assert_close(lse, wanted_lse)


OUT, LSE = torch.zeros(2, 3, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "lists of one length >= 1, got 0 and 0"),
        ([OUT], [LSE, LSE], "lists of one length >= 1, got 1 and 2"),
        ([OUT, OUT[:1]], [LSE, LSE[:1]], r"outputs\[1\] must have shape \(2, 3, 4\)"),
        ([OUT], [OUT], r"lses\[0\] \(2, 3\), got \(2, 3, 4\) and \(2, 3, 4\)"),
        ([OUT, OUT.double()], [LSE, LSE], r"outputs\[1\] must have the dtype of outputs\[0\]"),
        ([OUT, "x"], [LSE, LSE], r"outputs\[1\] must be a torch.Tensor, got str"),
    ],
)
def test_merge_refuses_what_does_not_fit_together(outputs: list, lses: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicinal.merge_attentions(outputs, lses)
