from __future__ import annotations

import sys

import pytest
import torch

from vicinal.adapters import natten as adapter
from vicinal.measure.gate import Gate
from vicinal.measure.peers import PEERS, dense, halo
from vicinal.measure.problems import Problem
from vicinal.measure.task import NotRun, Task
from vicinal.pattern import AxisKind, Near, Window

SMALL = [
    Problem("map", (Near(3), Near(5)), (8, 28), 2, 8, 2),
    Problem("dilated", (Near(7, dilation=2), Near(3, dilation=4)), (16, 16), 1, 12),
    Problem("one tile for each residue", (Near(7, dilation=2), Near(7, dilation=2)), (14, 14), 2, 8),
    Problem("causal", (Near(5, causal=True), Near(3)), (16, 8), 2, 8),
    Problem("window", (Window(7), Window(7)), (14, 28), 3, 8, 2),
    Problem("shifted window", (Window(4, 2), Window(4, 2)), (8, 12), 2, 8, 2),
    Problem("sequence", (Near(31),), (256,), 2, 8),
    Problem("video", (Near(3), Near(3), Near(5)), (4, 8, 8), 2, 8),
]
small = pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
GENERAL = ("halo_bmm", "halo_sdpa", "gather", "sdpa_mask")


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_are_right(problem, dtype):
    task = Task(problem, dtype, backward=True)
    gate = Gate(task)
    for name in GENERAL:
        candidates = PEERS[name](task)
        assert candidates
        for prepared in candidates:
            verdict = gate.check(task.answer(prepared))
            assert verdict.is_right, f"{name} {prepared.detail}: {verdict.reason}"


@pytest.mark.parametrize("problem", [SMALL[4], SMALL[5]], ids=lambda problem: problem.name)
def test_the_window_peer_is_right(problem):
    task = Task(problem, torch.float32, backward=True)
    verdict = Gate(task).check(task.answer(PEERS["window_sdpa"](task)[0]))
    assert verdict.is_right, verdict.reason


@pytest.mark.parametrize("name", ["halo_bmm", "halo_sdpa"])
def test_a_halo_variant_in_portions_is_the_same(name, monkeypatch):
    task = Task(SMALL[0], torch.float32, backward=True)
    whole = task.answer(PEERS[name](task)[0])
    monkeypatch.setattr(halo, "MOST_BYTES", 100_000)
    monkeypatch.setattr(halo, "PORTION_BYTES", 100_000)
    for ours, theirs in zip(task.answer(PEERS[name](task)[0]), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_halo_tiles_are_those_that_divide_the_grid():
    task = Task(Problem("map", (Near(7), Near(7)), (56, 56), 1, 4), torch.float32)
    assert [prepared.detail for prepared in PEERS["halo_bmm"](task)] == ["4x4", "7x7", "8x8"]


@pytest.mark.parametrize(
    ("name", "kind", "grid", "because"),
    [
        ("halo_bmm", Near(3), (13, 13), "divides"),
        ("halo_sdpa", Near(3, dilation=3), (16, 16), "dilation"),
        ("halo_sdpa", Near(3, border="wrap"), (16, 16), "wrap"),
        ("window_sdpa", Near(3), (16, 16), "windows"),
        ("window_sdpa", Window(5), (16, 16), "divide"),
        ("timm", Near(3), (16, 16), "windows"),
        ("natten", Window(4), (16, 16), "neighborhoods"),
    ],
)
def test_a_peer_says_why_it_does_not_run(name: str, kind: AxisKind, grid: tuple[int, int], because: str):
    task = Task(Problem("odd", (kind, kind), grid, 1, 8), torch.float32)
    with pytest.raises(NotRun, match=because):
        PEERS[name](task)


def test_packages_that_are_missing_are_said_to_be(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, problem in (("timm", SMALL[4]), ("transformers", SMALL[4]), ("natten", SMALL[0])):
        with pytest.raises(NotRun, match=f"{name} is not installed"):
            PEERS[name](Task(problem, torch.float32))


def test_our_own_adapter_is_not_measured_as_natten():
    if "natten" in sys.modules:
        pytest.skip("the real NATTEN is loaded, which install() leaves alone")
    adapter.install()
    try:
        with pytest.raises(NotRun, match="Vicinal's own adapter"):
            PEERS["natten"](Task(SMALL[0], torch.float32))
    finally:
        adapter.uninstall()


def test_dense_peers_refuse_what_is_too_large(monkeypatch):
    task = Task(SMALL[0], torch.float32)
    monkeypatch.setattr(dense, "MOST_DENSE_TOKENS", 100)
    monkeypatch.setattr(dense, "MOST_GATHERED_BYTES", 1000)
    with pytest.raises(NotRun, match="too large"):
        PEERS["sdpa_mask"](task)
    with pytest.raises(NotRun, match="GB"):
        PEERS["gather"](task)


def test_flex_says_that_it_has_no_backward_here():
    with pytest.raises(NotRun, match="no backward"):
        PEERS["flex"](Task(SMALL[0], torch.float32, backward=True))


@pytest.mark.slow
@pytest.mark.parametrize("problem", [SMALL[0], SMALL[1], SMALL[5]], ids=lambda problem: problem.name)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_flex_is_right(problem):
    task = Task(problem, torch.float32)
    verdict = Gate(task).check(task.answer(PEERS["flex"](task)[0]))
    assert verdict.is_right, verdict.reason
