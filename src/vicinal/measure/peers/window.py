"""Window attention as Swin writes it: roll, cut into windows, attend within each, with a mask where it is shifted."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vicinal.measure.task import Layout, NotRun, Prepared, Task, each
from vicinal.pattern import Window


def square_window(task: Task) -> tuple[int, int]:
    """Size and shift of the windows of a problem that Swin could take; refuses others."""
    problem = task.problem
    kind = next(iter(problem.kinds), None)
    if not isinstance(kind, Window) or any(other != kind for other in problem.kinds) or len(problem.grid) != 2:
        raise NotRun("for square windows on maps only")
    if any(length % kind.size for length in problem.grid):
        raise NotRun("written for windows that divide the map")
    return kind.size, 0 if min(problem.grid) <= kind.size else kind.shift


def to_windows(tensor: torch.Tensor, size: int, shift: int) -> torch.Tensor:
    """`[batch, height, width, ...]` as windows `[batch * windows, size * size, ...]`."""
    batch, height, width, *rest = tensor.shape
    rolled = torch.roll(tensor, (-shift, -shift), (1, 2)) if shift else tensor
    cut = rolled.reshape(batch, height // size, size, width // size, size, *rest)
    return cut.transpose(2, 3).reshape(-1, size * size, *rest)


def from_windows(windows: torch.Tensor, grid: tuple[int, ...], size: int, shift: int) -> torch.Tensor:
    """The inverse of `to_windows`."""
    height, width = grid
    rest = windows.shape[2:]
    cut = windows.reshape(-1, height // size, width // size, size, size, *rest).transpose(2, 3)
    rolled = cut.reshape(-1, height, width, *rest)
    return torch.roll(rolled, (shift, shift), (1, 2)) if shift else rolled


def shift_mask(grid: tuple[int, ...], size: int, shift: int, hidden: float) -> torch.Tensor | None:
    """What is added to the scores of each rolled window, `[windows, size * size, size * size]`; None if not shifted."""
    if not shift:
        return None
    height, width = grid
    region = torch.zeros(1, height, width)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for number, (row, column) in enumerate((row, column) for row in cuts for column in cuts):
        region[:, row, column] = number
    windows = to_windows(region, size, 0)
    return torch.where(windows[:, None, :] == windows[:, :, None], 0.0, hidden)


def window_sdpa(task: Task) -> list[Prepared]:
    """Batched dense attention of each window, which is given rolled and cut already: the least Swin can cost."""
    size, shift = square_window(task)
    problem = task.problem
    mask = shift_mask(problem.grid, size, shift, -torch.inf)
    if mask is not None:
        mask = mask.to(task.device, task.dtype)[:, None]

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(query, key, value)
        own = mask.expand(problem.batch, *mask.shape).flatten(0, 1) if problem.batch > 1 else mask
        return F.scaled_dot_product_attention(query, key, value, attn_mask=own)

    return [Prepared(call, _heads_first_windows(task, size, shift))]


def _heads_first_windows(task: Task, size: int, shift: int) -> Layout:
    return each(
        "[batch * windows, heads, size * size, head_dim]",
        lambda tensor: to_windows(tensor, size, shift).transpose(1, 2),
        lambda windows: from_windows(windows.transpose(1, 2), task.problem.grid, size, shift),
    )
