"""`explain`: what a call would do, without doing it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import vicinal
from vicinal.ops import backend as backends
from vicinal.pattern import Near, Window, count

from .problems import PROBLEMS, SAMPLE, Problem, arguments, draw, near
from .tolerance import run

WHOLE = [problem for problem in PROBLEMS if problem.batch * torch.Size(problem.grid).numel() < 600]


def explained(problem: Problem, device: str, **others: Any) -> vicinal.Explanation:
    tensors = {name: tensor.to(device) for name, tensor in draw(problem, torch.float32).items()}
    return vicinal.explain(**arguments(problem, tensors), **others)


def expected_pairs(problem: Problem) -> int:
    """Pairs over batch and heads, sample by sample: the grid's, the extra tokens', the extra queries'."""
    total = 0
    for sample in range(problem.batch):
        grid = problem.grid if problem.grids is None else problem.grids[sample]
        key_grid = problem.keys if problem.grids is None else grid
        tokens = problem.extra_tokens if problem.extra_lengths is None else problem.extra_lengths[sample]
        queries, keys = torch.Size(grid).numel(), torch.Size(key_grid).numel()
        total += count(problem.pattern, grid, key_grid, heads=problem.heads) + problem.heads * queries * tokens
        total += problem.heads * problem.extra_queries * (keys + tokens)
    return total


@pytest.mark.parametrize("problem", WHOLE, ids=str)
def test_flops_are_exact_for_every_problem(problem: Problem) -> None:
    explanation = explained(problem, "cpu")
    value_dim = problem.head_dim if problem.value_dim is None else problem.value_dim
    wanted = 2 * expected_pairs(problem) * (problem.head_dim + value_dim)
    assert explanation.flops == wanted
    assert explanation.flops_backward == wanted * 5 // 2
    assert not any("not known" in note for note in explanation.notes)


@pytest.mark.parametrize("problem", WHOLE, ids=str)
def test_explanation_turns_into_json_and_back(problem: Problem) -> None:
    plain = explained(problem, "cpu").to_dict()
    assert set(json.loads(json.dumps(plain))) == set(plain)
    assert plain["backend"] in backends.known()
    assert plain["problem"]["dtype"] == "float32"


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_meta_tensors_are_explained_like_real_ones(problem: Problem) -> None:
    real, meta = explained(problem, "cpu"), explained(problem, "meta")
    assert meta.problem.device == "meta"
    assert meta.tiles == real.tiles
    if problem.grids is None and problem.extra_lengths is None:
        assert meta.flops == real.flops
    else:
        assert meta.flops >= real.flops
        assert any("padded batch" in note for note in meta.notes)


@pytest.mark.parametrize("name", backends.usable())
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_explanation_tells_what_the_call_does(problem: Problem, name: str) -> None:
    explanation = explained(problem, "cpu", backend=name)
    assert explanation.backend == name
    assert set(explanation.refused) == set(backends.PREFERENCE) - {name}
    assert explanation.tiles["method"]
    assert run(problem, torch.float32, name)["out"].isfinite().all()
    assert explained(problem, "cpu").backend == backends.usable()[0]


def test_problem_too_large_to_run_is_explained() -> None:
    query = torch.empty(4, 512, 512, 8, 64, device="meta")
    explanation = vicinal.explain(query, query, query, Near(13))
    assert explanation.flops == 4 * 8 * 2 * count(Near(13), (512, 512)) * 128


def test_second_derivatives_are_told_of() -> None:
    query = torch.empty(1, 8, 1, 4)
    explanation = vicinal.explain(query, query, query, Near(3))
    assert any("second derivative" in note for note in explanation.notes)


def test_windows_are_cut_without_waste_and_windows_that_slide_with_some() -> None:
    query = torch.empty(1, 56, 56, 4, 32, device="meta")
    blocks = vicinal.explain(query, query, query, Window(7), backend="tiled").tiles["members"][0]
    assert all(tiles["waste"] == 1 and not tiles["masked"] for tiles in blocks)
    sliding = vicinal.explain(query, query, query, Near(7), backend="tiled").tiles["members"][0]
    assert all(1 < tiles["waste"] < 12 and tiles["masked"] for tiles in sliding)


def test_tiles_cover_every_query_of_the_problem() -> None:
    query = torch.empty(1, 19, 29, 1, 8, device="meta")
    for pattern in (Near(3), near((8, 8), dilation=(2, 3)), Window(4, shift=2)):
        tiles = vicinal.explain(query, query, query, pattern, backend="tiled").tiles["members"][0]
        room = sum(entry["tiles"] * torch.Size(entry["query_tile"]).numel() for entry in tiles)
        assert 19 * 29 <= room < 4 * 19 * 29
