"""The benchmark of StyleNAT's layers: its contenders compute the same, and its page shows what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from vicinal.layers.attention import PatternAttention
from vicinal.pattern import Full, Near, heads
from vicinal.recipes import distances
from vicinal.recipes.shipped import FOLDER, GENERATOR

ROOT = Path(__file__).parents[2]


def script(name):
    """A script of the benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    return script("stylenat")


@pytest.mark.parametrize("pattern", [Full(), heads(Near(3), Near(3, dilation=2), sizes=(1, 2))], ids=["all", "groups"])
def test_every_contender_gives_the_same_answer(benchmark, pattern):
    grid = (4, 4) if pattern == Full() else (7, 8)
    mixer = PatternAttention(24, 3, pattern, rel_pos_bias=True, table_grid=grid if pattern == Full() else None)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = torch.randn(1, *grid, 24)
    expected = mixer(inputs)
    for name in benchmark.NAMES:
        torch.testing.assert_close(benchmark.called(name, mixer, inputs)(), expected, rtol=1e-4, atol=1e-4, msg=name)


def test_what_does_not_fit_is_said_with_its_size(benchmark):
    assert benchmark.refusal("256, level 64", benchmark.DENSE, 25.0) == ""
    assert benchmark.refusal("256, level 256", benchmark.DENSE, 25.0) == "does not fit: 68.7 GB of masks"
    assert benchmark.refusal("1024, level 1024", benchmark.DENSE, 25.0) == "does not fit: 17,592.2 GB of masks"
    assert benchmark.refusal("generator 256", benchmark.DENSE, 25.0).startswith("does not fit: 156.9")
    assert benchmark.refusal("256, level 128", benchmark.DENSE, 25.0) == "not run: 8.6 GB of masks"
    assert benchmark.refusal("1024, level 1024", benchmark.GATHER, 25.0) == "not run: 6.6 GB of keys and values"
    assert all(not benchmark.refusal(case, benchmark.OURS, 0.0) for case in benchmark.CASES)


def test_the_page_shows_what_was_measured(benchmark):
    found = json.loads(benchmark.RESULTS.read_text())
    page = benchmark.DOCS.read_text()
    shown = page.split(benchmark.START)[1].split(benchmark.END)[0].strip()
    assert shown == benchmark.table(found), "python benchmarks/stylenat.py --docs"
    assert [row["case"] for row in found["rows"]] == benchmark.CASES


def test_the_page_and_the_card_show_how_the_training_went():
    training = script("stylenat_training")
    found = json.loads(training.RESULTS.read_text())
    shown = training.DOCS.read_text().split(training.START)[1].split(training.END)[0].strip()
    assert shown == training.table(found)
    ours, baseline = (line[-1] for line in found["runs"].values())
    card = (FOLDER / f"{GENERATOR}.md").read_text()
    assert training.figures(ours) in card
    assert training.figures(baseline) in card
    tour = distances.read()
    assert (tour.ours, tour.baseline) == pytest.approx((ours["frechet"], baseline["frechet"]), rel=1e-3)
    assert tour.extractor == ours["extractor"] == found["extractor"]
