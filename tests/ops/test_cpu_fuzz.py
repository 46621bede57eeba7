"""The C interface of the CPU kernels refuses what makes no sense, whatever it is, and never crashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vicinal.ops.cpu import library

from ..conftest import has_compiler

if library.reason_missing() is not None and not has_compiler():
    pytest.skip("no C++ compiler, so there is no library to test", allow_module_level=True)


@pytest.mark.parametrize("strategy", ["auto", "simple", "tiles"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_corrupted_record_is_an_error_or_a_valid_call(seed: int, strategy: str) -> None:
    script = Path(__file__).with_name("fuzz_records.py")
    arguments = [str(seed), "4000", str(library.STRATEGIES.index(strategy))]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-3000:]}"
    valid, refused, _ = map(int, done.stdout.split())
    assert valid > 200  # corruption that happens to mean something, and what is refused
    assert refused > 1000
