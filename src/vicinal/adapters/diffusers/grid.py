"""The token grid of a video transformer, whose layers see a flat sequence."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

Grid: TypeAlias = tuple[int, ...]
"""Tokens along (time, height, width)."""


class GridSource:
    """The token grid of a video transformer: given once, or noted from each call of the model."""

    def __init__(self, name: str, patch_size: Grid, fixed: Grid | None) -> None:
        self.name, self.patch_size, self.fixed = name, patch_size, fixed
        self.current: dict[int, Grid] = {}  # by thread: one model may serve several at once
        self.seen: dict[int, Grid | None] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Watch the model's calls, unless the grid was given."""
        if self.fixed is None:
            self.handles = [
                model.register_forward_pre_hook(self.enter, with_kwargs=True),
                model.register_forward_hook(self.leave, always_call=True),
            ]

    def detach(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model runs: note the grid of the video it is called with."""
        video = kwargs.get(self.name, args[0] if args else None)
        if not isinstance(video, torch.Tensor) or video.dim() != 5:
            return  # the model itself says what is wrong
        grid = tuple(size // patch for size, patch in zip(video.shape[-3:], self.patch_size, strict=True))
        tokens = math.prod(grid)
        self.current[_thread()] = grid
        self.seen[tokens] = grid if self.seen.get(tokens, grid) == grid else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model has run, or failed."""
        self.current.pop(_thread(), None)

    def of(self, tokens: int) -> Grid:
        """The grid of a sequence of so many tokens.

        Gradient checkpointing runs a layer again when the model's call is over, perhaps after others. Then the number
        of tokens says which grid it was, unless two grids had as many.
        """
        grid = self.fixed or self.current.get(_thread()) or self.seen.get(tokens)
        if grid is None:
            why = (
                "two grids with as many tokens were seen" if tokens in self.seen else "the model itself was not called"
            )
            raise RuntimeError(
                f"the grid of a layer run on its own with {tokens} tokens is not known: {why}; give grid="
            )
        if math.prod(grid) != tokens:
            raise ValueError(
                f"the grid {grid} has {math.prod(grid)} tokens, the sequence {tokens}: grid= must be the grid of the "
                "tokens (after patching), and the sequence whole (not shared out by context parallelism)"
            )
        return grid


def _thread() -> int:
    """Which thread this is; a compiler, which cannot ask, traces one call on its own."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
