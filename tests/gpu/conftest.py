"""What is done and what came of it, for tests that borrow a GPU for minutes.

With VICINAL_GPU_LOG a line for each test is written to that file as soon as it is over, and tests that passed there
with the same kernels, torch and GPU are not run again.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch

from vicinal.measure import sources

LOG = os.environ.get("VICINAL_GPU_LOG")


@functools.cache
def _place() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"kernels": sources.digest("ops"), "torch": torch.__version__, "gpu": gpu}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if LOG is None or not Path(LOG).exists():
        return
    place, done = _place(), set()
    for line in Path(LOG).read_text().splitlines():
        found = json.loads(line)
        if found["outcome"] == "passed" and place.items() <= found.items():
            done.add(found["test"])
    again = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = again


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # with several processes (-n) the one that hands the tests out is told of all of them, and the others of their own
    if LOG is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            line["reason"] = str(report.longrepr).strip()[-500:]
        with Path(LOG).open("a") as file:
            file.write(json.dumps({**line, **_place()}) + "\n")
