"""Tiles that were measured to be faster than the chosen ones, kept on disk by `vicinal tune`.

They are for one pass over one member's tables, with one head dim and dtype, on one kind of GPU; batch and heads do not
matter. The file is read once in a process, and only where a GPU is in use.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vicinal.ops.triton.plan import Tiles, box
from vicinal.pattern.bounds import Member


def path() -> Path:
    """Where answers are kept: $VICINAL_TILES, or triton-tiles.json in the user's cache."""
    given = os.environ.get("VICINAL_TILES")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vicinal" / "triton-tiles.json"


def key_of(
    member: Member, head_dim: int, value_dim: int, dtype: torch.dtype, name: str, *, is_heavy: bool, gpu: str
) -> str:
    """The name of an answer.

    >>> member = bounds(Near(7), (56, 56)).groups[0].members[0]
    >>> key_of(member, 32, 64, torch.float16, "forward", is_heavy=False, gpu="some GPU")[:33]
    'some GPU forward float16 32x64 on'
    """
    found = hashlib.sha256()
    for table in member:
        found.update(repr((table.step, table.length, table.wraps)).encode())
        found.update(table.start.tobytes() + table.count.tobytes())
    heavy = " heavy" if is_heavy else ""
    numbers = str(dtype).removeprefix("torch.")
    return f"{gpu} {name} {numbers} {head_dim}x{value_dim} on {found.hexdigest()[:16]}{heavy}"


def _lines(place: Path) -> dict[str, Any]:
    """What the file says; nothing where there is none, or one that is not ours."""
    try:
        lines = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return lines if isinstance(lines, dict) else {}


@functools.cache
def _answers(place: Path) -> dict[str, Tiles]:
    found = {}
    for key, answer in _lines(place).items():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # somebody else's: then tiles are chosen
            found[key] = tiles_of(answer["tiles"])
    return found


def tiles_of(numbers: Sequence[Any]) -> Tiles:
    """Tiles from the list that `save` writes.

    >>> tiles_of([[1, 7, 7], [0, 0, 0], [1, 4, 8], 4, 2]).block_keys
    32
    """
    query, phase, key, warps, stages = numbers
    tiles = Tiles(box(query, 1), box(phase, 0), box(key, 1), warps, stages)
    if min(*tiles.query, *tiles.key, warps, stages) < 1 or min(tiles.phase) < 0:
        raise ValueError(f"no tiles: {numbers}")
    return tiles


def find(key: str) -> Tiles | None:
    """The tiles of an answer, if there is one."""
    return _answers(path()).get(key)


def save(key: str, tiles: Tiles, about: dict[str, object]) -> None:
    """Keep an answer, with what was measured."""
    place = path()
    lines = _lines(place)
    lines[key] = {"tiles": [tiles.query, tiles.phase, tiles.key, tiles.warps, tiles.stages], **about}
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(lines, indent=1) + "\n")
    beside.replace(place)
    forget()


def forget() -> None:
    """Read the file anew when it is next asked."""
    _answers.cache_clear()
