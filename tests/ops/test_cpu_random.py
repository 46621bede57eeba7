"""Ten thousand random problems for the compiled CPU kernels, in every memory layout; all that nobody sees is NaN."""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Callable
from random import Random

import pytest
import torch

from vicinal.ops.cpu import library
from vicinal.pattern import Heads, Union

from ..conftest import has_compiler
from .conftest import Forced, Shrink
from .layouts import LAYOUTS
from .oracle import head_masks
from .problems import Problem, Tensors
from .random_problems import random_problem
from .tolerance import disagreement, judge, run

if library.reason_missing() is not None and not has_compiler():
    pytest.skip("no C++ compiler, so there is no library to test", allow_module_level=True)

ISAS = library.ISAS[1 : library.ISAS.index(library.load().best_isa) + 1]
DTYPES = (*(torch.float32,) * 7, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64)


def chosen_strategy(rng: Random, problem: Problem, dtype: torch.dtype) -> str:
    """Mostly tiles, or what is chosen, dense groups where there are some.

    Tiles are no choice in float64, nor for short types where head groups share a key head.
    """
    shares = isinstance(problem.pattern, Heads) or getattr(problem.pattern, "groups", ())[1:]
    if dtype == torch.float64 or (shares and dtype != torch.float32):
        return rng.choice(("auto", "simple"))
    return rng.choice(("tiles", "tiles", "tiles", "auto", "auto", "simple"))


def hide_unseen_keys(problem: Problem, tensors: Tensors) -> None:
    """NaN in keys and values that no query sees."""
    if problem.extra_queries:
        return  # they see all keys
    kv_heads = tensors["key"].shape[-2]
    for sample in range(problem.batch):
        own = None if problem.grids is None else problem.grids[sample]
        grid, keys = own or problem.grid, own or problem.keys
        seen = head_masks(problem, grid, keys).any(1).unflatten(0, (kv_heads, -1)).any(1)
        inside = (sample, *map(slice, keys))
        hidden = ~seen.T.reshape(*keys, kv_heads, 1)
        for name in ("key", "value"):
            tensors[name][inside] = tensors[name][inside].masked_fill(hidden, torch.nan)


def complaints(problem: Problem, dtype: torch.dtype, lay: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
    judgment = judge(problem, dtype)
    results = run(problem, dtype, "cpu", prepare=lambda tensors: hide_unseen_keys(problem, tensors), lay=lay)
    assert set(results) == set(judgment.exact)
    return [wrong for name, result in results.items() if (wrong := disagreement(name, result, judgment))]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 100))])
def test_hundred_random_problems_agree_with_the_oracle(seed: int, forced: Forced, shrink: Shrink) -> None:
    rng, failures = Random(seed), []
    used: collections.Counter[str] = collections.Counter()
    poison = ctypes.CDLL(str(library.path())).vicinal_poison_workspace
    poison.argtypes, poison.restype = (), None
    for number in range(100):
        problem, dtype, lay = random_problem(rng), rng.choice(DTYPES), rng.choice(LAYOUTS)
        strategy, isa = chosen_strategy(rng, problem, dtype), rng.choice(ISAS)
        if dtype == torch.bfloat16 and ISAS[-1] == "amx" and rng.random() < 0.5:
            isa = "amx"
        forced(strategy, isa)
        poison()
        shrink((0, 1 << 12, 1 << 14, 1 << 16)[number % 4])  # the smaller, the more colours
        wrong = complaints(problem, dtype, lay)
        failures += [f"{number}: {problem!r}, {dtype}, {lay.__name__}, {strategy}, {isa}", *wrong] if wrong else []
        used.update((strategy, isa, type(problem.pattern).__name__))
    assert not failures, "\n".join(failures)
    assert {"tiles", "simple", *ISAS, "tuple", Union.__name__, Heads.__name__, "Bounds"} <= set(used)
