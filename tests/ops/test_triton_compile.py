"""The Triton kernels compile for GPUs that are not here, and fit into their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vicinal.measure.triton_kernels import CASES, launches
from vicinal.ops.backend import Inputs
from vicinal.ops.packing import layout_of, pack_tables
from vicinal.ops.triton import launch
from vicinal.ops.triton.backward import backward
from vicinal.ops.triton.choose import DEVICES
from vicinal.pattern import Near, bounds

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.7.1 to compile without a GPU")


def compiled(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """The table of a run in a process of its own, where Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vicinal.measure.triton_kernels", *arguments, "--out", str(out)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert row["fits"], row
        assert row["shared"] <= DEVICES[row["device"]].shared_bytes
        assert 0 < row["registers"] <= 512


def test_ordinary_kernels_compile_for_both_vendors(tmp_path: Path) -> None:
    arguments = ("--devices", "sm90", "gfx942", "--dtypes", "float16", "--cases", "NAT stage 1")
    rows = compiled(tmp_path / "table.json", *arguments)
    check(rows)
    names = {"query_pass[forward]", "query_pass[gradient]", "key_pass", "row_sums_kernel", "watchers_kernel"}
    assert {row["kernel"] for row in rows} == names
    assert {row["device"] for row in rows} == {"sm90", "gfx942"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("device", DEVICES)
def test_all_kernels_compile(device: str, dtype: str, tmp_path: Path) -> None:
    rows = compiled(tmp_path / "table.json", "--devices", device, "--dtypes", dtype)
    check(rows)
    assert {row["kernel"] for row in rows} >= {"extra_pass", "bias_pass", "key_pass"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_launches_what_it_needs(case: Any) -> None:
    found = [kernel.__name__ for kernel, _ in launches(case, torch.float16, DEVICES["sm80"])]
    assert found.count("query_pass") == 2 * found.count("key_pass")
    assert ("bias_pass" in found) == case.has_bias
    assert ("extra_pass" in found) == (case.extra_tokens > 0)


def test_gradient_spread_over_more_than_two_gigabytes_is_copied() -> None:
    # 32-bit offsets were computed from its strides: those of a part of a tensor far larger than the inputs
    table = bounds(Near(3), (64,))
    layout = layout_of(table, 2)
    query = torch.empty(1, 64, 2, 16, device="meta")
    tables = torch.empty(1, pack_tables(table).shape[1], dtype=torch.int32, device="meta")
    inputs = Inputs(query, query, query, tables, None, None, None, None, layout, 1.0)
    out, lse = launch.forward(inputs)
    grad = torch.empty_strided(out.shape, (1 << 33, 1 << 26, 16, 1), device="meta")
    backward(inputs, out, lse, grad, None, [True] * 6)
    steps = {arguments["s_grad"] for _, arguments in launch.RECORDS if arguments.get("p_delta") is not None}
    launch.RECORDS.clear()
    assert steps == {32}
