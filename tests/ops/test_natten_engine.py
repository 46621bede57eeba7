"""The natten back end, with a module standing in for NATTEN, whose kernels run on NVIDIA's GPUs alone."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vicinal
from vicinal import BackendRefused, Full, Near, Window, heads
from vicinal.adapters import natten as adapter
from vicinal.cli.explain import explain_sizes
from vicinal.ops import backend as backends
from vicinal.ops import resolve
from vicinal.ops.engines import natten as engine
from vicinal.ops.na import neighborhood

from .problems import Problem, arguments, draw, near
from .tolerance import assert_agrees, judge, run

Calls = list[tuple[str, dict[str, Any]]]


def stand_in(calls: Calls) -> ModuleType:
    """A module with NATTEN's functions, its rule about scale, and its lse without a gradient."""
    module = ModuleType("natten")
    module.__spec__ = importlib.machinery.ModuleSpec("natten", None, origin="a stand-in")
    module.HAS_LIBNATTEN = True

    def function(name: str, rank: int) -> Any:
        def attend(query, key, value, kernel_size, stride, dilation, is_causal, scale, return_lse):
            calls.append((name, {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "scale": scale}))
            assert return_lse
            assert query.is_contiguous()
            pattern = neighborhood(rank, kernel_size, stride, dilation, is_causal)
            out, lse = vicinal.attention(
                query, key, value, pattern, scale=scale or None, return_lse=True, backend="tiled"
            )
            return out, lse.detach()

        return attend

    for rank in (1, 2, 3):
        setattr(module, f"na{rank}d", function(f"na{rank}d", rank))
    return module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """NATTEN is there, and runs on CPUs."""
    noted: Calls = []
    monkeypatch.setitem(sys.modules, "natten", stand_in(noted))
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    own = backends.find("natten")
    capability = dataclasses.replace(own.capability, devices=("cpu", "cuda"))
    backends.register(dataclasses.replace(own, capability=capability))
    resolve._choose.cache_clear()
    yield noted
    resolve._choose.cache_clear()


TAKEN = (
    Problem((41,), Near(8, stride=3), heads=4, kv_heads=2),
    Problem((53,), Near(9, dilation=2, stride=4, causal=True), batch=2, value_dim=16),
    Problem((12, 15), (Window(4), Full())),
    Problem((13, 11, 9), near((3, 4, 3), (3, 2, 2), (2, 3, 3), (False, True, True)), heads=1),
    Problem((14,), Near(5, dilation=2), scale=0.0),
    Problem((14,), Near(5, dilation=2), scale=-0.7),
)


@pytest.mark.parametrize("problem", TAKEN, ids=str)
def test_natten_is_called_with_what_the_tables_say(problem: Problem, calls: Calls) -> None:
    assert_agrees(run(problem, torch.float32, "natten"), judge(problem, torch.float32))
    assert calls
    assert {name for name, _ in calls} == {f"na{len(problem.grid)}d"}


@pytest.mark.gpu
@pytest.mark.parametrize("problem", TAKEN, ids=str)
def test_natten_agrees_with_the_oracle_on_a_gpu(problem: Problem) -> None:
    wide = Problem(**{**vars(problem), "head_dim": 32, "value_dim": None})
    assert_agrees(run(wide, torch.float16, "natten", "cuda"), judge(wide, torch.float16))


def test_windows_of_swin_go_as_strided_neighborhoods(calls: Calls) -> None:
    query = torch.randn(1, 12, 15, 2, 8)
    vicinal.attention(query, query, query, (Window(4), Near(5, dilation=3)), backend="natten")
    assert calls == [("na2d", {"kernel_size": (4, 5), "stride": (4, 1), "dilation": (1, 3), "scale": 8**-0.5})]


def test_gradient_of_the_lse_is_not_left_to_natten(calls: Calls) -> None:
    """NATTEN's backward leaves it out without a word, so that losses on the lse would train on wrong gradients."""
    query = torch.randn(1, 14, 2, 8, dtype=torch.float32, requires_grad=True)
    out, lse = vicinal.attention(query, query, query, Near(5), return_lse=True, backend="natten")
    (found,) = torch.autograd.grad(out.sum() + lse.square().sum(), query)
    assert len(calls) == 1
    out, lse = vicinal.attention(query, query, query, Near(5), return_lse=True, backend="reference")
    (wanted,) = torch.autograd.grad(out.sum() + lse.square().sum(), query)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_empty_batch_does_not_reach_natten(calls: Calls) -> None:
    query = torch.randn(0, 14, 2, 8)
    assert vicinal.attention(query, query, query, Near(5), backend="natten").shape == query.shape
    assert calls == []


@pytest.mark.parametrize(
    ("pattern", "dims", "features", "words"),
    [
        (Near(1), (8, 8), {}, "takes kernel sizes of at least 2"),
        (Near(5, border="wrap"), (8, 8), {}, "takes neighborhoods"),
        (heads(Near(3), Near(5)), (8, 8), {}, "per-head patterns"),
        (Near(5), (12, 8), {}, "takes head dims that are multiples of 8, got 12"),
        (Near(5), (8, 9), {}, "takes value dims that are multiples of 8, got 9"),
        (Near(5), (8, 8), {"has_bias": True}, "a position bias"),
        (Near(5), (8, 8), {"extra_tokens": 2}, "extra keys"),
        (Near(5), (136, 8), {}, "takes head dims up to 128"),
    ],
    ids=str,
)
def test_natten_refuses_what_it_does_not_take(pattern, dims, features, words, calls: Calls) -> None:
    problem = Problem((12,), pattern, head_dim=dims[0], value_dim=dims[1], **features)
    with pytest.raises(BackendRefused, match=words):
        vicinal.attention(**arguments(problem, draw(problem, torch.float32)), backend="natten")
    assert calls == []


def asked(kernel: tuple[int, ...], stride: tuple[int, ...], grid: tuple[int, ...], **place: Any) -> backends.Problem:
    pattern = neighborhood(len(grid), kernel, stride)
    sizes = {"heads": (2, 2), "head_dim": (64, 64), "place": ("cuda", "float16"), **place}
    return explain_sizes(pattern, grid, **sizes).problem


@pytest.mark.parametrize(
    ("kernel", "stride", "grid", "place", "expected"),
    [
        ((2048,), (256,), (32768,), {}, True),
        ((2048,), (1,), (32768,), {}, False),
        ((80, 80), (16, 16), (256, 256), {}, True),
        ((80, 80), (16, 16), (256, 256), {"head_dim": (80, 80)}, False),
        ((80, 80), (16, 16), (256, 256), {"place": ("cuda", "float32")}, False),
        ((7, 7), (1, 1), (56, 56), {}, False),
    ],
    ids=str,
)
def test_natten_leads_only_where_it_masks_nothing(kernel, stride, grid, place, expected, calls: Calls) -> None:
    problem = asked(kernel, stride, grid, **place)
    assert engine.leads(problem) == expected
    able = ("natten", "triton", "flex", "tiled")
    backends._BACKENDS.setdefault("triton", dataclasses.replace(backends.find("tiled"), name="triton"))
    order = backends.preference(problem, able)
    assert order == list(able) if expected else order == ["triton", "natten", "flex", "tiled"]


def test_named_natten_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "natten", None)
    monkeypatch.setattr(sys, "path", [])
    assert engine.reason_missing() == "needs NATTEN, which is not installed"
    assert "needs NATTEN, which is not installed" in explain_sizes(Near(3), (9,)).refused["natten"]


def test_our_own_adapter_is_not_taken_for_natten() -> None:
    adapter.install()
    try:
        assert engine.reason_missing() == "needs NATTEN, but what is imported as natten is Vicinal's own adapter"
    finally:
        adapter.uninstall()


def test_natten_on_the_disk_is_looked_at_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "natten"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('its import touches the GPU')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "natten", raising=False)
    assert engine.reason_missing() == "needs NATTEN with its compiled kernels (libnatten), this one has none"
    (package / "libnatten.cpython-311-x86_64-linux-gnu.so").touch()
    assert engine.reason_missing() is None
    assert "natten" not in sys.modules


def test_natten_is_never_the_choice_on_a_cpu(calls: Calls) -> None:
    own = engine.reason_missing()
    assert own is None
    query = torch.empty(1, 4096, 2, 64)
    backends.register(dataclasses.replace(backends.find("natten"), capability=backends.Capability(devices=("cuda",))))
    resolve._choose.cache_clear()
    assert vicinal.explain(query, query, query, Near(256, stride=128)).backend != "natten"
