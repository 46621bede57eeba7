"""The run folder: what was asked for, metrics as JSON lines, and where pictures and checkpoints go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicinal.training.checkpoint import Store, write_whole


class FolderTaken(ValueError):
    """A run folder already holds a run."""


@dataclass(frozen=True)
class Journal:
    """A run folder: `recipe.json`, `metrics.jsonl`, `curves.png`, `predictions.png`, `checkpoints/`, weights."""

    folder: Path
    keep: int = 2

    @property
    def store(self) -> Store:
        """Its checkpoints."""
        return Store(self.folder / "checkpoints", self.keep)

    @property
    def metrics(self) -> Path:
        """Its JSON lines."""
        return self.folder / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        """The exported model."""
        return self.folder / "model.safetensors"

    def open(self, recipe: dict[str, Any], *, resume: bool) -> int | None:
        """Begin, or find the step to go on from; None for a fresh run.

        Without `resume` a folder that holds a run is refused. With it, another recipe than the folder's is refused.
        """
        file = self.folder / "recipe.json"
        if not resume and (file.exists() or self.store.steps()):
            raise FolderTaken(f"{self.folder} already holds a run; go on with it by --resume, or choose another --out")
        if resume and file.exists():
            try:
                before = json.loads(file.read_text("utf-8"))
            except ValueError:
                raise FolderTaken(f"{file} cannot be read as JSON; choose another --out, or remove the file") from None
            different = sorted(_differences(before, recipe))
            if different:
                raise FolderTaken(
                    f"{self.folder} holds a run of another recipe (it differs in {', '.join(different)}); "
                    "choose another --out"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(recipe, indent=2))
        steps = self.store.steps()
        step = steps[-1] if steps else None
        self._forget_after(step or 0)
        return step

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again; of a line that was cut off too."""
        if not self.metrics.exists():
            return
        kept = [json.dumps(line) for line in read_lines(self.metrics) if line["step"] <= step]
        write_whole(self.metrics, "".join(f"{line}\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (metrics are no longer written)", str(self.metrics)) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    r"""The lines of a metrics file; a last line that was cut off is left out.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"step": 1}\n{"st')
    ...     file.flush()
    ...     read_lines(Path(file.name))
    [{'step': 1}]
    """
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


_MAY_DIFFER = {
    "loop.accumulation",
    "loop.activation_checkpointing",
    "loop.checkpoint_every",
    "loop.compile",
    "loop.workers",
    "loop.threads",
    "loop.keep",
    "loop.pictures",
    "loop.parallel",
    "loop.timeout_s",
    "loop.log_every",
    "status",
}
"""What a resumed run may change: how it is run, not what comes out (but for rounding, as with other processes)."""


def _differences(before: Any, now: Any, name: str = "") -> set[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        found: set[str] = set()
        for key in before.keys() | now.keys():
            found |= _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return set() if before == now or name in _MAY_DIFFER else {name}
