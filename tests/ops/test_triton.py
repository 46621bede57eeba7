"""The Triton kernels in Triton's interpreter: the shared table of problems against the oracle, gradients too.

The interpreter runs a kernel's operations one by one in NumPy, so that small problems are quick tests and the others
slow ones; `triton_table` runs all of them, and goes on where it was interrupted. bfloat16 products are wrong in it, and
are tested on a GPU only (tests/gpu).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vicinal
from vicinal.ops import backend as backends
from vicinal.ops.triton.override import forced
from vicinal.ops.triton.plan import Tiles
from vicinal.pattern import Full, Near, Window, bounds, heads, union

from .layouts import LAYOUTS
from .problems import HYDRA, MIXED, PROBLEMS, Problem, near
from .test_agreement import short
from .tolerance import assert_agrees, judge, run
from .triton_table import on_cpu, rows

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.7.1 for its interpreter")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles here (there is a GPU: see tests/gpu), it does not interpret", allow_module_level=True)

MOST_ROWS = 36
"""Queries of all heads and samples that a problem of the quick tests has at most."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The back end takes CPU tensors."""
    from vicinal.ops import api, resolve

    def forget() -> None:
        api._KNOWN.clear()
        resolve._choose.cache_clear()

    monkeypatch.setitem(backends._BACKENDS, "triton", on_cpu(backends.find("triton")))
    forget()
    yield
    forget()


def is_small(problem: Problem) -> bool:
    return rows(problem) <= MOST_ROWS


SMALL = [problem for problem in PROBLEMS if is_small(problem)]
QUICK = {torch.float32: SMALL, torch.float16: SMALL[::5]}


@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        pytest.param(problem, dtype, id=f"{short(dtype)}-{problem}", marks=() if problem in quick else pytest.mark.slow)
        for dtype, quick in QUICK.items()
        for problem in PROBLEMS
    ],
)
def test_kernels_agree_with_the_oracle(problem: Problem, dtype: torch.dtype) -> None:
    assert_agrees(run(problem, dtype, "triton"), judge(problem, dtype))


AWKWARD = (
    Tiles(query=(1, 3, 5), phase=(0, 1, 2), key=(1, 2, 7), warps=4, stages=1),
    Tiles(query=(1, 1, 16), phase=(0, 0, 5), key=(1, 16, 1), warps=4, stages=1),
)


@pytest.mark.parametrize(
    "tiles", [pytest.param(AWKWARD[0], id="boxes"), pytest.param(AWKWARD[1], id="lines", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "problem",
    [
        Problem((7, 9), near((3, 4), dilation=(2, 1)), heads=1, has_bias=True),
        Problem((6, 8), (Window(4, shift=1), Near(3, dilation=2, border="wrap")), heads=1),
        Problem((5, 7), union(Near(3), (Near(3), Full())), heads=1, extra_tokens=2),
    ],
    ids=str,
)
def test_any_tiles_give_the_same_result(problem: Problem, tiles: Tiles) -> None:
    with forced(forward=tiles, query=tiles, key=tiles):
        assert_agrees(run(problem, torch.float32, "triton"), judge(problem, torch.float32))


def test_program_without_a_choice_of_tiles_runs_with_ordinary_ones() -> None:
    from vicinal.ops import resolve
    from vicinal.ops.packing import layout_of

    query = torch.randn(1, 5, 6, 1, 8)
    key, _ = resolve.key_of(Near(3))
    layout = layout_of(bounds(Near(3), (5, 6)), 1)
    tables = resolve.tables(key, (5, 6), (5, 6), query)
    given = (query, query, query, tables, None, None, None, None, layout.packed, 0.3)
    ours, ours_lse = torch.ops.vicinal.attend(*given, "triton")
    wanted, wanted_lse = torch.ops.vicinal.attend(*given, "reference")
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(ours_lse, wanted_lse)


@pytest.mark.parametrize("lay", LAYOUTS[1:], ids=lambda lay: lay.__name__)
def test_any_strides_give_the_same_result(lay: Any) -> None:
    problem = Problem((3, 5), Near(3), heads=2, kv_heads=1, extra_tokens=1, value_dim=16)
    assert_agrees(run(problem, torch.float32, "triton", lay=lay), judge(problem, torch.float32))


def test_backward_gives_the_same_bits_again() -> None:
    problem = Problem((6, 7), HYDRA, heads=2, kv_heads=1, has_bias=True, extra_tokens=2)
    once, again = (run(problem, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradient_of_one_output_alone(which: str) -> None:
    query, key, value = (torch.randn(1, 9, 1, 8, requires_grad=True) for _ in range(3))

    def slopes(backend: str) -> tuple[torch.Tensor | None, ...]:
        out, lse = vicinal.attention(query, key, value, Near(3), return_lse=True, backend=backend)
        chosen = out if which == "out" else lse
        return torch.autograd.grad(chosen.sin().sum(), (query, key, value), allow_unused=True)

    for ours, wanted in zip(slopes("triton"), slopes("reference"), strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(query) if wanted is None else wanted)


def test_only_what_is_needed_gets_a_gradient() -> None:
    query, key = torch.randn(1, 9, 1, 8), torch.randn(1, 9, 1, 8, requires_grad=True)
    out = vicinal.attention(query, key, query, Near(3), backend="triton")
    (ours,) = torch.autograd.grad(out.sin().sum(), key)
    out = vicinal.attention(query, key, query, Near(3), backend="reference")
    torch.testing.assert_close(ours, torch.autograd.grad(out.sin().sum(), key)[0])


def test_empty_batch() -> None:
    query = torch.randn(0, 5, 6, 2, 8, requires_grad=True)
    out, lse = vicinal.attention(query, query, query, Near(3), return_lse=True, backend="triton")
    out.sum().backward()
    assert (out.shape, lse.shape) == (query.shape, query.shape[:-1])
    assert query.grad is not None


def test_minus_infinity_in_a_bias_hides_a_key() -> None:
    query, bias = torch.randn(1, 9, 2, 8, requires_grad=True), torch.zeros(2, 5)
    bias[:, 0] = bias[0, 4] = -torch.inf
    wanted = vicinal.attention(query, query, query, Near(3), bias=bias, backend="reference")
    found = vicinal.attention(query, query, query, Near(3), bias=bias, backend="triton")
    torch.testing.assert_close(found, wanted)
    (slope,) = torch.autograd.grad(found.sin().sum(), query)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted.sin().sum(), query)[0])


def test_second_derivative_goes_through_the_portable_form() -> None:
    query = torch.randn(1, 7, 1, 4, requires_grad=True)

    def second(backend: str) -> torch.Tensor:
        out = vicinal.attention(query, query, query, Near(3), backend=backend)
        (slope,) = torch.autograd.grad(out.sin().sum(), query, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), query)[0]

    torch.testing.assert_close(second("triton"), second("reference"))


@pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")
def test_registration_is_right_for_this_back_end() -> None:
    from vicinal.ops import resolve

    query, bias = torch.randn(1, 4, 5, 1, 8, requires_grad=True), torch.randn(9 * 1, requires_grad=True)
    sizes = ("cpu", torch.float32, (4, 5), (4, 5), 1, 1, 8, 8, (True, False, False, False))
    key, _ = resolve.key_of((Near(2), Near(2)))
    layout, name = resolve.chosen(key, sizes, "triton")
    tables = resolve.tables(key, (4, 5), (4, 5), query)
    arguments = (query, query, query, tables, bias, None, None, None, layout, 0.3, name)
    torch.library.opcheck(torch.ops.vicinal.attend.default, arguments)


def test_cuda_tensors_take_these_kernels_and_are_told_which_tiles() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 56, 56, 2, 32, device="cuda", dtype=torch.bfloat16)
        explanation = vicinal.explain(query, query, query, heads(Near(7), union(Window(7), Near(3))))
    assert explanation.backend == "triton"
    members = explanation.tiles["members"]
    assert len(members) == 3
    for member in members:
        assert set(member) == {"forward", "query", "key"}
        assert all(entry["visited"] >= entry["programs"] for entry in member.values())
    assert members[1]["forward"]["query"] == (1, 7, 7)
    assert any("second derivative" in note for note in explanation.notes)


def test_refusals_name_device_dtype_and_head_dim() -> None:
    query = torch.zeros(1, 5, 1, 300, dtype=torch.float64)
    with pytest.raises(vicinal.BackendRefused, match=r"takes float32, float16, bfloat16.*head dims up to 256"):
        vicinal.attention(query, query, query, Near(3), backend="triton")


def test_cpu_tensors_leave_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # once every choice asked the GPU for its capability, which starts CUDA, in forked workers too
    def touch(*_: Any) -> None:
        raise AssertionError("CUDA was asked for something")

    for name in ("is_available", "get_device_capability", "get_device_properties", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, touch)
    query = torch.zeros(1, 5, 2, 4)
    vicinal.attention(query, query, query, Near(3, dilation=2), backend="tiled")
    assert vicinal.explain(query, query, query, Near(3)).backend == "triton"  # in these tests it takes CPU tensors


def test_import_does_not_import_triton_and_cpu_calls_do_not_need_it() -> None:
    script = (
        "import sys, torch, vicinal; query = torch.zeros(1, 5, 1, 4); "
        "vicinal.attention(query, query, query, vicinal.Near(3)); assert 'triton' not in sys.modules; "
        "found = vicinal.explain(query, query, query, vicinal.Near(3)); "
        "assert 'runs on cuda' in found.refused['triton'][0], found.refused"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_mixed_groups_that_share_a_key_head_add_up() -> None:
    problem = Problem((4, 5), MIXED, heads=4, kv_heads=1)
    assert_agrees(run(problem, torch.float32, "triton"), judge(problem, torch.float32))
