"""Freed memory that a program keeps."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from vicinal.training import keep_memory, memory

FAULTS = """
import resource, sys
from vicinal.training import keep_memory
kept = keep_memory() if sys.argv[1] == "kept" else None
import torch
for _ in range(16):  # before its thresholds are of use, glibc cuts a few crumbs off aligned pieces
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 << 18)  # 48 MB, more than glibc's own threshold ever grows to
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not memory._is_glibc(), reason="glibc's setting")
def test_large_pieces_are_not_fetched_again():
    """Every page of the last would interrupt: 12288 of them, where pages have 4 KB."""
    answer, faults = _faults("kept")
    assert answer == "True"
    assert faults < 100
    assert _faults("as it is")[1] > 500


def _faults(how: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    answer, count = done.stdout.split()
    return answer, int(count)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.os, "confstr", lambda name: (_ for _ in ()).throw(ValueError(name)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("nothing may be loaded"))
    assert keep_memory() is False
