"""Several processes on this machine, by torchrun's own machinery."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vicinal.training.checkpoint import Store
from vicinal.training.memory import keep_memory
from vicinal.training.recipe import Recipe
from vicinal.training.report import Outcome, Report
from vicinal.training.run import LostProcess, Stopped, train

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
"""Those that torchrun takes over."""

_FAILED = "failed-{rank}.json"


def train_on(processes: int, recipe: Recipe, folder: str | Path, *, resume: bool = False, report: Report) -> Outcome:
    """`train` in so many processes; `report` has to be picklable, and speaks in the first of them.

    One process that ends ends all: the others are stopped, and what is left is the last checkpoint.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes == 1 or "RANK" in os.environ:
        return train(recipe, folder, resume=resume, report=report)
    if recipe.loop.batch_size % (processes * recipe.loop.accumulation):
        raise ValueError(
            f"loop.batch_size must be a multiple of processes x accumulation = {processes} x "
            f"{recipe.loop.accumulation}, got {recipe.loop.batch_size}"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=_LOOKS_EVERY_S,
    )
    # not the run's folder for their words: it may be what is missing, or full
    with _quiet(), tempfile.TemporaryDirectory(prefix="vicinal-") as words:
        try:
            results = elastic_launch(config, _work)(recipe, str(folder), resume, report, words)
        except ChildFailedError as error:
            raise LostProcess(_what_happened(error, Path(folder), Path(words), processes)) from None
        except SignalException as asked:
            raise Stopped(f"stopped by {asked.sigval.name}; {_last(Path(folder))}") from None
    outcome: Outcome = results[0]
    return outcome


_LOOKS_EVERY_S = 0.2
"""How often torchrun's part looks after its processes."""


def _work(recipe: Recipe, folder: str, resume: bool, report: Report, words: str) -> Outcome:
    """One process. What a person should read is left in a file, because its traceback would be lost in the others'."""
    for number in (signal.SIGINT, signal.SIGTERM):  # at once: what waits for the others would wait long, and complain
        signal.signal(number, lambda *_: os._exit(1))
    keep_memory()
    try:
        return train(recipe, folder, resume=resume, report=report)
    except (ValueError, OSError) as error:
        file = Path(words) / _FAILED.format(rank=os.environ["RANK"])
        try:
            file.write_text(json.dumps({"kind": type(error).__name__, "words": str(error)}))
        except OSError:  # that disk is full: then the words go where they can
            print(error, file=sys.stderr)
        if isinstance(error, LostProcess):
            time.sleep(
                5 * _LOOKS_EVERY_S
            )  # so that the lost process is seen to be gone before this one, which only noticed
        # not sys.exit: other processes wait in a collective, and leaving in good order would wait for them
        sys.stdout.flush()
        os._exit(1)


def _last(folder: Path) -> str:
    steps = Store(folder / "checkpoints").steps()
    return f"the last checkpoint is of step {steps[-1]}; go on by --resume" if steps else "there is no checkpoint yet"


def _what_happened(error: Any, folder: Path, words: Path, processes: int) -> str:
    said = {path.name: json.loads(path.read_text()) for path in sorted(words.glob(_FAILED.format(rank="*")))}
    own = [one["words"] for one in said.values() if one["kind"] != LostProcess.__name__]
    if own:
        return str(own[0])
    # the one that was killed, not those that noticed and ended by themselves
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode > 0, item[1].timestamp))
    code = failure.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"process {rank} of {processes} {how}, and the others were stopped; {_last(folder)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchrun's log of tracebacks and tables, and with signals handled afterwards as they were before."""
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS} if is_main else {}
    loggers = [logging.getLogger(f"torch.distributed.elastic{name}") for name in ("", ".agent.server.api")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which would say so at length
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
