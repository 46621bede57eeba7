"""The flex back end: FlexAttention's answers on our block lists, eager and compiled, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vicinal
from vicinal import BackendRefused, Full, Grid, Near, Window, bounds, union
from vicinal.cli.explain import explain_sizes
from vicinal.ops import backend as backends
from vicinal.ops.engines import block_mask, flex
from vicinal.pattern.axis import AxisKind

from .problems import CRISS_CROSS, HYDRA, MIXED, POWERS, PROBLEMS, Problem, arguments, draw, near
from .tolerance import assert_agrees, disagreement, judge, run

TAKEN = (
    Problem((97,), Near(13, dilation=7), heads=3),
    Problem((53,), Near(9, dilation=2, stride=4, causal=True), batch=2),
    Problem((24,), Near(7, dilation=2, border="wrap")),
    Problem((1,), Near(7)),
    Problem((17, 11), near((5, 4), dilation=(3, 1)), heads=4, kv_heads=2, value_dim=5),
    Problem((12, 15), (Grid(4), Window(5, shift=2)), batch=2),
    Problem((13, 11, 9), near((3, 4, 3), (3, 2, 2), (2, 3, 3), (False, True, True)), heads=1),
    Problem((14, 10), Near(3), key_grid=(5, 4), heads=4, kv_heads=2),
    Problem((9, 10), HYDRA, heads=4),
    Problem((12, 8), MIXED, heads=4, kv_heads=2),
    Problem((29,), POWERS, heads=4, kv_heads=2),
    Problem((6, 9), CRISS_CROSS, value_dim=3, extra_tokens=3, extra_queries=2),
    Problem((16,), union(Near(3, border="wrap"), Near(3, dilation=4, border="wrap"))),
    Problem((14,), Near(5, dilation=2), scale=0.0),
    Problem((9,), bounds(Near(3), (9,)).shift(0, 20, 4), key_grid=(4,)),
)


def outputs(problem: Problem, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = vicinal.attention(**arguments(problem, draw(problem, dtype)), return_lse=True, backend="flex")
    if problem.extra_queries:
        (out, extra_out), (lse, extra_lse) = found
        return {"out": out, "lse": lse, "extra_out": extra_out, "extra_lse": extra_lse}
    return dict(zip(("out", "lse"), found, strict=True))


def check(problem: Problem, dtype: torch.dtype) -> None:
    judgment = judge(problem, dtype)
    found = outputs(problem, dtype)
    wrong = [complaint for name in found if (complaint := disagreement(name, found[name], judgment))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("problem", TAKEN, ids=str)
def test_flex_agrees_with_the_oracle(problem: Problem) -> None:
    check(problem, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_flex_agrees_with_the_oracle_on_every_problem(problem: Problem, dtype: torch.dtype) -> None:
    try:
        check(problem, dtype)
    except BackendRefused as refusal:
        pytest.skip(str(refusal))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", TAKEN, ids=str)
def test_flex_agrees_with_the_oracle_on_a_gpu(problem: Problem, dtype: torch.dtype) -> None:
    wide = Problem(**{**vars(problem), "head_dim": 16, "value_dim": 32 if problem.value_dim else None})
    assert_agrees(run(wide, dtype, "flex", "cuda"), judge(wide, dtype))


COMPILED: tuple[tuple[tuple[int, ...], tuple[AxisKind, ...], int], ...] = (
    # on this problem lists of the first residue class alone, as the rival builds them, give wrong answers
    ((13, 11, 9), near((3, 4, 3), (3, 2, 2), (2, 3, 3), (False, True, True)), 32),
    ((40, 24), near((16, 8), stride=(8, 8)), 64),
    ((31, 22), near((7, 4), dilation=(2, 5)), 16),
    ((24, 20), (Near(5, border="wrap"), Window(8, shift=3)), 32),
    ((200,), (Full(causal=True),), 128),
)


def compiled_answer(grid: tuple[int, ...], pattern: Any, volume: int, spoil: bool = False) -> tuple[torch.Tensor, ...]:
    """What compiled FlexAttention makes of our block lists, and the right answer."""
    member = bounds(pattern, grid).groups[0].members[0]
    ready = block_mask.member_blocks(member, (), block_mask.chosen_orders(member, volume), 0, torch.device("cpu"))
    assert ready.visited < ready.queries.num_tiles * ready.keys.num_tiles
    query, key, value = torch.randn(3, 2, *grid, 2, 16)
    if spoil:
        ready.block_mask.kv_num_blocks.clamp_(max=1)
    call = flex.compiled_for(ready.block_mask, False, with_lse=False)
    rows = (ready.queries.enter(query), ready.keys.enter(key), ready.keys.enter(value))
    with torch.no_grad():
        out = call(*(tensor.transpose(1, 2) for tensor in rows), 0.25)
    torch._dynamo.reset()
    found = ready.queries.leave(out.transpose(1, 2))
    return found, vicinal.attention(query, key, value, pattern, scale=0.25, backend="reference")


def test_compiled_flex_is_right_in_every_residue_class() -> None:
    torch.testing.assert_close(*compiled_answer(*COMPILED[0]), atol=2e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED[1:], ids=str)
def test_compiled_flex_is_right_on_our_block_lists(case: Any) -> None:
    torch.testing.assert_close(*compiled_answer(*case), atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_compiled_flex_does_read_the_block_lists() -> None:
    found, right = compiled_answer(*COMPILED[2], spoil=True)
    assert (found - right).abs().max() > 0.1


def test_flex_says_that_it_has_no_gradients_on_a_cpu() -> None:
    query = torch.randn(1, 9, 2, 8, requires_grad=True)
    out = vicinal.attention(query, query, query, Near(3), backend="flex")
    with pytest.raises(BackendRefused, match="'flex' cannot give gradients on a CPU: FlexAttention has no backward"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Problem((9,), Near(3), has_bias=True), "does not support a position bias"),
        (Problem((9,), Near(3), batch=2, grids=((9,), (4,))), r"does not support grids \(padded batches\)"),
        (Problem((9,), Near(3), batch=2, extra_tokens=2, extra_lengths=(1, 2)), "does not support extra_lengths"),
        (Problem((300, 300), Near(3), heads=1, head_dim=1), "writes out all scores on a CPU, at most 8192"),
    ],
    ids=["bias", "grids", "extra_lengths", "tokens"],
)
def test_flex_refuses_what_it_does_not_take(problem: Problem, words: str) -> None:
    with pytest.raises(BackendRefused, match=words):
        vicinal.attention(**arguments(problem, draw(problem, torch.float32)), backend="flex")


def test_flex_names_what_it_does_not_take_on_a_gpu() -> None:
    refused = explain_sizes(Near(3), (64,), head_dim=(8, 32), place=("cuda", "float64")).refused["flex"]
    assert refused == [
        "takes float32, float16, bfloat16 on cuda, the tensors are float64",
        "takes head dims from 16 on cuda, got 8",
    ]
    assert explain_sizes(Near(9), (300, 300), place=("cuda", "bfloat16"), backend="flex").backend == "flex"


def test_flex_is_an_engine_and_never_the_choice_on_a_cpu() -> None:
    assert "flex" not in backends.known()
    assert "flex" in backends.known(with_engines=True)
    problem = explain_sizes(Near(9), (64,), head_dim=(16, 16)).problem
    assert backends.preference(problem, ["flex", "tiled"]) == ["tiled"]
    on_gpu = explain_sizes(Near(9), (64,), head_dim=(16, 16), place=("cuda", "float16")).problem
    assert backends.preference(on_gpu, ["flex", "tiled"]) == ["flex", "tiled"]


def test_explanation_tells_the_tiles_and_how_many_are_visited() -> None:
    query = torch.empty(1, 64, 64, 2, 16)
    tiles = vicinal.explain(query, query, query, Near(16, stride=16), backend="flex").tiles
    (member,) = tiles["members"]
    assert member["visited"] < member["of"]
    assert member["query_tile"][0] * member["query_tile"][1] == tiles["block"] == block_mask.BLOCK


def test_block_lists_are_made_once_for_a_pattern_a_grid_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = block_mask.member_blocks

    def noted(*given: Any) -> Any:
        made.append(given)
        return make(*given)

    monkeypatch.setattr(block_mask, "member_blocks", noted)
    block_mask.plan.cache_clear()
    for grid in ((21, 5), (21, 5), (20, 5), (21, 5)):
        for dtype in (torch.float32, torch.float64):
            query = torch.randn(1, *grid, 2, 8, dtype=dtype)
            vicinal.attention(query, query, query, Near(3), backend="flex")
    assert len(made) == 2


def test_tables_that_lie_where_forgotten_ones_lay_are_read_again() -> None:
    one = torch.arange(5, dtype=torch.int32)[None]
    assert block_mask.row_of(one) == one.numpy().tobytes()
    assert block_mask.row_of(one) is block_mask.row_of(one)
    for number in range(50):
        other = torch.full((1, 5), number, dtype=torch.int32)
        assert block_mask.row_of(other) == other.numpy().tobytes()
        del other
    assert len(block_mask._WORDS) <= len(block_mask._ROWS) + 1
