"""Tuned tiles: searched on the CPU in Triton's interpreter, kept in a file, and used from there."""

from __future__ import annotations

import json
import os

import pytest
import torch

import vicinal
from vicinal.cli.main import main
from vicinal.measure import tune as tuning
from vicinal.measure.timing import Timing
from vicinal.ops import api, resolve
from vicinal.ops import backend as backends
from vicinal.ops.triton import choose, override, tuned
from vicinal.ops.triton.plan import PASSES
from vicinal.pattern import Near, bounds, heads

from ..ops.triton_table import on_cpu

SIZES = tuning.Sizes(batch=1, heads=1, head_dim=8, dtype=torch.float32)


@pytest.fixture
def some_gpu(tmp_path, monkeypatch):
    """A process that uses a GPU called "some GPU", whose answers go to a file of the test's own."""
    monkeypatch.setenv("VICINAL_TILES", str(tmp_path / "cache" / "tiles.json"))
    for module in (choose, tuning):
        monkeypatch.setattr(module, "this_gpu", lambda: "some GPU")
    monkeypatch.setitem(backends._BACKENDS, "triton", on_cpu(backends.find("triton")))
    override.forget()
    yield tuned.path()
    api._KNOWN.clear()
    resolve._choose.cache_clear()
    tuned.forget()


def explained(size=3):
    query = torch.zeros(1, 9, 1, 8)
    return vicinal.explain(query, query, query, Near(size), backend="triton").tiles["members"][0]


def test_what_is_kept_is_used_for_such_calls_and_no_others(some_gpu):
    before = explained()
    member = bounds(Near(3), (9,)).groups[0].members[0]
    other = choose.candidates(member, 8, 8, torch.float32, choose.this_device(), "query", most=3)[2].tiles
    assert other != choose.choose(member, 8, 8, torch.float32, choose.this_device(), "query").tiles
    key = tuned.key_of(member, 8, 8, torch.float32, "query", is_heavy=False, gpu="some GPU")
    tuned.save(key, other, {"fastest_ms": 1.0})
    override.forget()
    after = explained()
    assert after["forward"] == before["forward"]
    assert after["query"]["query"] == other.query
    assert explained(5)["query"]["modelled"] > 0
    assert json.loads(some_gpu.read_text())[key]["fastest_ms"] == 1.0
    with override.forced(query=choose.choose(member, 8, 8, torch.float32, choose.this_device(), "query").tiles):
        assert explained()["query"] == before["query"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": {"tiles": [[1], [0], [1], 4, 1]}}'])
def test_a_file_that_is_not_ours_is_no_reason_to_fail(some_gpu, text):
    before = explained()
    some_gpu.parent.mkdir()
    some_gpu.write_text(text)
    tuned.forget()
    override.forget()
    assert explained() == before


def test_cost_of_given_tiles_is_that_of_the_choice():
    for pattern, grid in ((Near(7), (56, 56)), (Near(5, dilation=3, border="wrap"), (24,)), (Near(4), (5, 9, 8))):
        member = bounds(pattern, grid).groups[0].members[0]
        for name in PASSES:
            cost = choose.choose(member, 64, 32, torch.float16, choose.DEVICES["sm90"], name)
            assert choose.cost_of(member, cost.tiles, 64, 32, name) == cost


def test_the_search_keeps_what_is_faster(some_gpu, monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here, it does not interpret")
    monkeypatch.setattr(tuning, "_variations", lambda tiles: iter(()))

    def compare(calls, **_):
        for call in calls.values():
            call()
        return {name: Timing({0: 9.0 - int(name)}) for name in calls}

    monkeypatch.setattr(tuning, "compare", compare)
    found = tuning.tune(Near(3), (9,), SIZES, most=2, device="cpu", say=lambda line: None)
    assert [one.name for one in found] == list(PASSES)
    assert all(one.is_kept and (one.chosen_ms, one.fastest_ms, one.failed) == (9.0, 8.0, 0) for one in found)
    assert len(json.loads(some_gpu.read_text())) == 3
    tiles = explained()
    assert all(tiles[one.name]["query"] == one.fastest.query for one in found)


def test_patterns_of_several_parts_are_tuned_part_by_part(some_gpu):
    with pytest.raises(ValueError, match="without heads and union"):
        tuning.tune(heads(Near(3), Near(5)), (9,), SIZES, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--grid 9 --pattern Near(3)",
            "vicinal tune: needs a GPU that torch can use (CUDA or ROCm), and there is none",
        ),
        ("--grid 9 --pattern Near(3", "pattern"),
        ("--grid 9 --pattern Near(3) --heads 0", "--heads"),
        ("--grid 9 --pattern Near(3) --seconds -1", "--seconds must be between 0 and 3600"),
    ],
)
def test_tune_answers_a_mistake_with_a_sentence(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert "Traceback" not in printed.err
