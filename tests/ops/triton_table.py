"""The whole table of problems through the Triton kernels in the interpreter, a line for each as it is done.

    python -m tests.ops.triton_table benchmarks/results/triton-interpreter.jsonl [float32 float16]

Outputs and all gradients against the oracle, in memory that was filled with NaN. Small problems come first. Started
again, it goes on after the last line, unless the kernels have changed since: then lines of older kernels are dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch

from vicinal.ops import backend as backends
from vicinal.ops import triton as kernels

from .problems import PROBLEMS, Problem
from .tolerance import disagreement, judge, run


def take_cpu_tensors() -> None:
    """Let the back end take CPU tensors for the rest of the process."""
    triton = backends.find("triton")
    capability = dataclasses.replace(triton.capability, devices=("cpu", "cuda"))
    backends._BACKENDS["triton"] = dataclasses.replace(triton, capability=capability)


def digest() -> str:
    """What the kernels and all that launches them come to."""
    found = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def rows(problem: Problem) -> int:
    return problem.batch * problem.heads * math.prod(problem.grid)


def check(problem: Problem, name: str) -> dict[str, Any]:
    """The line of a problem: what was wrong, if anything, and the seconds of processor time that it took."""
    dtype, begin = getattr(torch, name), time.process_time()
    judgment = judge(problem, dtype)
    judged = time.process_time()
    try:
        results = run(problem, dtype, "triton")
        assert set(results) == set(judgment.exact)
        wrong = [found for each, got in results.items() if (found := disagreement(each, got, judgment))]
    except Exception as error:  # noqa: BLE001 - whatever happens belongs to the problem and the table goes on
        wrong = [f"{type(error).__name__}: {error}"]
    seconds = {"oracle_s": round(judged - begin, 1), "interpreter_s": round(time.process_time() - judged, 1)}
    return {"problem": str(problem), "dtype": name, "agrees": not wrong, "wrong": wrong, **seconds}


def main(path: Path, names: list[str]) -> int:
    """Run what the file lacks."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    take_cpu_tensors()
    own = digest()
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["kernels"] == own]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {(line["problem"], line["dtype"]) for line in lines}
    for problem in sorted(PROBLEMS, key=rows):
        for name in names:
            if (str(problem), name) not in done:
                lines.append({"kernels": own, **check(problem, name)})
                with path.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(json.dumps(lines[-1]), flush=True)
    wrong = [line for line in lines if not line["agrees"]]
    print(f"{len(lines)} of {len(PROBLEMS) * len(names)} run, {len(wrong)} disagree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or ["float32", "float16"]))
