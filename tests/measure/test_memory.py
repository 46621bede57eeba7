from __future__ import annotations

import sys

import pytest

from vicinal.measure import memory
from vicinal.measure.problems import Problem
from vicinal.pattern import Near

pytestmark = [
    pytest.mark.plain_memory,
    pytest.mark.skipif(sys.platform == "win32", reason="the system keeps no account of a process's highest memory"),
]


def test_a_large_map_needs_under_1_gb_beyond_inputs_and_output():
    large = Problem("map-512x512", (Near(13), Near(13)), (512, 512), 4, 32)
    peak = memory.peak(large, "tiled")
    size = 512 * 512 * 4 * 32 * 4
    assert (peak.inputs, peak.results) == (3 * size, size)
    assert peak.beyond < 1e9


def test_what_a_call_holds_is_seen():
    # the gathered keys and values alone are 2 * heads * tokens * keys * head_dim * 4 bytes
    problem = Problem("map-64x64", (Near(5), Near(5)), (64, 64), 2, 32)
    gathered = 2 * 2 * 64 * 64 * 25 * 32 * 4
    assert gathered < memory.peak(problem, "gather").beyond < 3 * gathered


def test_a_failure_in_the_other_process_is_told():
    problem = Problem("map", (Near(3), Near(3)), (13, 13), 1, 8)
    with pytest.raises(RuntimeError, match="none of its tiles divides"):
        memory.peak(problem, "halo_bmm")
