"""The whole table of problems through the Triton kernels in the interpreter, written down as it goes.

    python -m tests.ops.triton_table benchmarks/results/triton-interpreter.json [float32 float16]

Outputs and all gradients against the oracle, in memory that was filled with NaN. Small problems come first. Started
again it goes on, with what the file has of the same kernels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vicinal.measure import sources
from vicinal.ops import backend as backends

from .problems import PROBLEMS, Problem
from .tolerance import disagreement, judge, run


def on_cpu(triton: backends.Backend) -> backends.Backend:
    """The back end, taking CPU tensors."""
    capability = dataclasses.replace(triton.capability, devices=("cpu", "cuda"))
    return dataclasses.replace(triton, capability=capability)


def rows(problem: Problem) -> int:
    """Queries of all heads and samples."""
    return problem.batch * problem.heads * math.prod(problem.grid)


def check(problem: Problem, name: str) -> dict[str, Any]:
    """What was wrong with a problem, if anything, and the seconds of processor time in the interpreter."""
    dtype = getattr(torch, name)
    judgment, begin = judge(problem, dtype), time.process_time()
    try:
        results = run(problem, dtype, "triton")
        assert set(results) == set(judgment.exact)
        wrong = [found for each, got in results.items() if (found := disagreement(each, got, judgment))]
    except Exception as error:  # noqa: BLE001 - whatever happens belongs to the problem, and the table goes on
        wrong = [f"{type(error).__name__}: {error}"]
    return {"problem": str(problem), "dtype": name, "wrong": wrong, "seconds": round(time.process_time() - begin, 1)}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    text = json.dumps(_head())[:-1] + ', "problems": [\n' + ",\n".join("  " + json.dumps(line) for line in lines)
    path.write_text(text + "\n]}\n")


def _head() -> dict[str, Any]:
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__, "kernels": sources.digest("ops/triton/kernels")}


def _known(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text()) if path.exists() else {}
    lines: list[dict[str, Any]] = found.pop("problems", [])
    return lines if found == _head() else []


def main(path: Path, names: list[str]) -> int:
    """Run what the file lacks."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    backends.register(on_cpu(backends.find("triton")))
    lines = _known(path)
    done = {(line["problem"], line["dtype"]) for line in lines}
    for problem in sorted(PROBLEMS, key=rows):
        for name in names:
            if (str(problem), name) not in done:
                lines.append(check(problem, name))
                write(path, lines)
                print(json.dumps(lines[-1]), flush=True)
    wrong = [line for line in lines if line["wrong"]]
    print(f"{len(lines)} of {len(PROBLEMS) * len(names)} run, {len(wrong)} disagree")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before a first call imports Triton
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or ["float32", "float16"]))
