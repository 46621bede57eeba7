"""Checkpoints through torch.distributed.checkpoint: complete or not there at all.

A checkpoint is written into a folder with another name, flushed to the disk, and then renamed. So a process that
dies at any moment leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from vicinal.training.world import World

_NAME = re.compile(r"step-(\d+)")


class CheckpointFailed(ValueError):
    """A checkpoint could not be written or read; the message says what is still there."""


@dataclass(frozen=True)
class Store:
    """The checkpoints of a run, in `folder`; the newest `keep` of them and the best are kept."""

    folder: Path
    keep: int = 2

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, rising."""
        if not self.folder.is_dir():
            return []
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in found if match is not None)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}"

    def best(self) -> int | None:
        """The step of the best checkpoint."""
        try:
            step = int(json.loads((self.folder / "best.json").read_text())["step"])
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return step if self.path(step).is_dir() else None

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any], world: World, *, is_best: bool) -> None:
        """Write a checkpoint; every process calls this with its part of `tensors`."""
        part = self.folder / f".part-{step:08d}"
        try:
            if world.is_first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            world.wait()
            writer = FileSystemWriter(part, sync_files=True)
            with _alone():
                save_tensors(tensors, storage_writer=writer, no_dist=world.mesh is None)
            if world.is_first:
                write_whole(part / "facts.json", json.dumps(facts, indent=2))
                shutil.rmtree(self.path(step), ignore_errors=True)
                part.rename(self.path(step))
                _flush(self.folder)
                if is_best:
                    self.mark_best(step)
                self._tidy()
            world.wait()
        except (OSError, CheckpointException) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise CheckpointFailed(self._sorry(step, error)) from error

    def mark_best(self, step: int) -> None:
        """Say that the checkpoint of a step is the best."""
        if self.best() != step:
            write_whole(self.folder / "best.json", json.dumps({"step": step}))

    def _sorry(self, step: int, error: BaseException) -> str:
        steps = self.steps()
        kept = f"the checkpoint of step {steps[-1]} is complete" if steps else "there is no earlier checkpoint"
        reason = error
        if isinstance(error, CheckpointException):
            reason = next(iter(error.failures.values()))[0]
        words = (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)
        what = f"the checkpoint of step {step} could not be written to {self.folder}"
        return f"{what}: {words}; {kept}; make room, then --resume"

    def _tidy(self) -> None:
        """Remove old checkpoints, and what was left of those that were never completed."""
        wanted = {*self.steps()[-self.keep :], self.best()}
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if path.name.startswith(".part-") or (match is not None and int(match[1]) not in wanted):
                shutil.rmtree(path, ignore_errors=True)

    def facts(self, step: int) -> dict[str, Any]:
        """What stands beside the tensors."""
        loaded: dict[str, Any] = json.loads((self.path(step) / "facts.json").read_text())
        return loaded

    def load(self, step: int, tensors: dict[str, Any], world: World) -> None:
        """Fill `tensors` from a checkpoint, which may have been written by another number of processes."""
        try:
            reader = FileSystemReader(self.path(step))
            with _alone():
                load_tensors(tensors, storage_reader=reader, no_dist=world.mesh is None)
        except (OSError, CheckpointException, RuntimeError, KeyError) as error:
            raise CheckpointFailed(
                f"the checkpoint {self.path(step)} cannot be read ({_first_line(error)}); remove it to go on from the "
                "one before, or check that the recipe is the one it was made with"
            ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that one process is one process, which torch gives even where it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or, if anything happens, as it was before."""
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, content: bytes) -> None:
    """The same for bytes; an error names the file, and leaves nothing half written."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    part.replace(path)
    _flush(path.parent)


def _flush(folder: Path) -> None:
    """Make a rename in a folder last; systems without folder handles do without."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write weights as safetensors, whole or not at all."""
    from safetensors.torch import save

    write_bytes_whole(
        path, save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, metadata)
    )
