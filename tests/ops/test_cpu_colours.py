"""Units of the backward that share keys: colour by colour, each adding to what earlier colours have written."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.ops.cpu import library
from vicinal.pattern import Full, Near, Window, bounds, heads

from ..conftest import has_compiler
from .conftest import Shrink
from .problems import Problem, near
from .test_cpu import results, same_bits
from .tolerance import assert_agrees, judge, run

if library.reason_missing() is not None and not has_compiler():
    pytest.skip("no C++ compiler, so there is no library to test", allow_module_level=True)

SOURCE = 5 * 16 * 4
"""Bytes that a key takes in a unit where heads have up to 16 channels: itself twice, its value, and both sums."""

PART = bounds(Near(5), (44,)).slice(0, 2, 42)

PROBLEMS = (
    Problem((67,), Near(5)),
    Problem((61,), Near(7), heads=4, kv_heads=2, value_dim=20),
    Problem((90,), Near(5, dilation=3), batch=2),
    Problem((70,), Near(8, stride=3), has_bias=True),
    Problem((64,), Near(9, causal=True)),
    Problem((33, 7), (Near(5), Full())),
    Problem((7, 33), (Full(), Near(4, border="crop")), has_bias=True, batch=2),
    Problem((14, 27), (Window(4), Near(5))),
    Problem((17, 23), near((5, 3))),
    Problem((19, 22), near((3, 4), dilation=(2, 1), causal=(True, False)), heads=4, kv_heads=1),
    Problem((21, 16), near((4, 5), stride=(2, 3)), has_bias=True, batch=3, heads=3),
    Problem((20, 18), Near(3), batch=2, grids=((20, 18), (13, 5))),
    Problem((20, 18), Near(3), batch=2, grids=((9, 18), (20, 1)), has_bias=True),
    Problem((9, 10, 11), Near(3)),
    Problem((8, 9, 13), near((3, 2, 3), causal=(True, False, False)), has_bias=True),
    Problem((14, 26), Near(3), key_grid=(19, 17)),
    Problem((30, 12), Near(3), key_grid=(15, 20), has_bias=True),
    Problem((15, 16), heads(Near(3), Near(3, dilation=2)), heads=4),
    Problem(PART.grid, PART, key_grid=PART.key_grid),
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_small_units_agree_with_the_oracle(problem: Problem, shrink: Shrink) -> None:
    judgment, found = judge(problem, torch.float32), []
    for keys in (0, 24, 60, 130):
        shrink(keys * SOURCE or 1)
        found.append(run(problem, torch.float32, "cpu"))
        assert_agrees(found[-1], judgment)
    # no unit fits the first; elsewhere sums in another order tell that one did
    assert any(not torch.equal(found[0]["grad_key"], one["grad_key"]) for one in found[1:])


def test_same_bits_whatever_the_number_of_threads(shrink: Shrink) -> None:
    shrink(60 * SOURCE)
    once = results(1, PROBLEMS)
    for threads in (2, 5):
        assert same_bits(once, results(threads, PROBLEMS)), threads


def test_keys_that_nobody_sees_get_zeros(shrink: Shrink) -> None:
    table = bounds(Near(5), (44,)).slice(0, 8, 36)
    problem = Problem(table.grid, table, key_grid=table.key_grid)
    for keys in (0, 24):
        shrink(keys * SOURCE)
        found = run(problem, torch.float32, "cpu")
        for name in ("grad_key", "grad_value"):
            assert torch.equal(found[name][:, :6], torch.zeros_like(found[name][:, :6]))


def test_maps_beyond_the_caches_are_their_heads_apart() -> None:
    """Eight megabytes are written past the caches, and fetched ahead; half of them are not."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 128, 128, 4, 32).requires_grad_() for _ in range(3)]
    gradient = torch.randn(1, 128, 128, 4, 32)

    def found(low: int, high: int) -> list[torch.Tensor]:
        parts = [leaf[..., low:high, :] for leaf in leaves]
        out = vicinal.attention(*parts, Near(7), backend="cpu")
        return [out, *torch.autograd.grad(out, parts, gradient[..., low:high, :])]

    apart = zip(found(0, 2), found(2, 4), strict=True)
    for whole, halves in zip(found(0, 4), apart, strict=True):
        torch.testing.assert_close(whole, torch.cat(halves, -2), rtol=1e-5, atol=1e-5)
