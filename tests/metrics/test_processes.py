"""Moments and features of two processes are those of one that saw everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import vicinal
from vicinal.metrics import Moments

SCRIPT = """
import sys
import torch
from torch import distributed
from vicinal.metrics import Moments, rows_across_processes

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
rows = torch.load(f"{folder}/rows.pt")
mine = rows[:13] if rank == 0 else rows[13:]
moments = Moments.of(mine).across_processes()
torch.save((moments.count, moments.mean, moments.scatter, rows_across_processes(mine)), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_find_what_one_finds(tmp_path):
    rows = torch.randn(50, 6) + 100
    torch.save(rows, tmp_path / "rows.pt")
    path = os.pathsep.join(filter(None, [str(Path(vicinal.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    expected = Moments.of(rows)
    for rank in range(2):
        count, mean, scatter, gathered = torch.load(tmp_path / f"{rank}.pt")
        assert count == 50
        torch.testing.assert_close(mean, expected.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(scatter, expected.scatter, rtol=1e-10, atol=1e-10)
        assert torch.equal(gathered, rows)
