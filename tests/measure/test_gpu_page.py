"""The page about GPUs says of kernels that ran on none what the tables beside the benchmarks say."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = re.sub(r"\s+", " ", (ROOT / "docs" / "gpu.md").read_text())


def test_the_page_says_what_was_compiled():
    rows = json.loads((RESULTS / "triton-compile.json").read_text())["rows"]
    per_device = collections.Counter(row["device"] for row in rows)
    (each,) = set(per_device.values())
    worst = {device: max(row["spilled"] for row in rows if row["device"] == device) for device in per_device}
    largest = max(rows, key=lambda row: row["spilled"])
    assert all(row["fits"] for row in rows)
    assert f"all {len(rows)} variants of `vicinal.measure.triton_kernels`, {each} each for" in PAGE
    for device in per_device:
        assert re.search(rf"{each} each for [^.]*\b{device}\b", PAGE), device
    assert f"{sum(row['spilled'] == 0 for row in rows)} spill nothing" in PAGE
    said = f"the worst spills {largest['spilled']} bytes a thread ({largest['dtype']} on {largest['device']}; "
    assert f"{said}{worst['sm100']} on sm100)" in PAGE


def test_the_page_says_what_ran_in_the_interpreter():
    problems = json.loads((RESULTS / "triton-interpreter.json").read_text())["problems"]
    by_dtype = collections.Counter(problem["dtype"] for problem in problems)
    minutes = sum(problem["seconds"] for problem in problems) / 60
    assert not [problem for problem in problems if problem["wrong"]]
    assert set(by_dtype) == {"float32", "float16"}
    (each,) = set(by_dtype.values())
    assert f"every problem of the tests' table, {each} of them" in PAGE
    assert f"{minutes:.0f} minutes of a processor" in PAGE
