"""A short search for faster tiles on the GPU at hand: those that the model thinks best are timed against each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vicinal.measure.timing import compare
from vicinal.ops import resolve
from vicinal.ops.backend import BackendRefused
from vicinal.ops.triton import override, tuned
from vicinal.ops.triton.choose import candidates, this_device, this_gpu
from vicinal.ops.triton.plan import PASSES, Tiles
from vicinal.pattern.bounds import AnyPattern, Member, bounds

WORTH_KEEPING = 0.97
"""Tiles are kept where they take at most this part of the chosen ones' time: less is noise."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is tuned for. Answers hold for any batch and number of heads; the search needs some."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    has_bias: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """One pass: the tiles that the model chose, the fastest ones, and the milliseconds of both."""

    name: str
    chosen: Tiles
    fastest: Tiles
    chosen_ms: float
    fastest_ms: float
    tried: int
    failed: int
    is_kept: bool

    def to_dict(self) -> dict[str, object]:
        """As plain values."""
        return dataclasses.asdict(self)


def tune(
    pattern: AnyPattern,
    grid: tuple[int, ...],
    sizes: Sizes,
    *,
    most: int = 12,
    seconds: float = 2.0,
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> list[Found]:
    """Time the tiles of least modelled cost for each pass, and keep on disk what is faster than the model's choice.

    Each pass takes about `seconds`, and compiling on top. One pattern for all heads: those of `heads(...)` are tuned
    one by one, each on its own.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BackendRefused("needs a GPU that torch can use (CUDA or ROCm), and there is none here")
    table = bounds(pattern, grid)
    if len(table.groups) > 1 or len(table.groups[0].members) > 1:
        raise ValueError(f"tune: pattern must be without heads and union; tune their parts, got {pattern!r}")
    calls = _Calls(pattern, grid, sizes, device)
    found = []
    for name in PASSES:
        say(f"{name} ...")
        found.append(_one_pass(calls, table.groups[0].members[0], sizes, name, most, seconds, say))
    override.forget()
    return found


class _Calls:
    """Calls of each pass alone, with tiles of their own: these travel in the layout."""

    def __init__(self, pattern: AnyPattern, grid: tuple[int, ...], sizes: Sizes, device: str) -> None:
        self.pattern, _ = resolve.key_of(pattern)
        shape = (sizes.batch, *grid, sizes.heads, sizes.head_dim)
        tensors = [torch.randn(shape, device=device, dtype=sizes.dtype) for _ in range(4)]
        self.query, self.key, self.value = (tensor.requires_grad_() for tensor in tensors[:3])
        self.grad = tensors[3]
        self.tables = resolve.tables(self.pattern, grid, grid, self.query)
        dims = (sizes.heads, sizes.heads, sizes.head_dim, sizes.head_dim)
        self.sizes = (self.query.device.type, sizes.dtype, grid, grid, *dims, (sizes.has_bias, False, False, False))
        self.scale = sizes.head_dim**-0.5
        self.bias: torch.Tensor | None = None
        if sizes.has_bias:
            (size,) = resolve.problem_layout(self.pattern, grid, grid, sizes.heads, False).bias_sizes
            self.bias = torch.randn(size, device=device, dtype=sizes.dtype)

    def of(self, name: str, tiles: Tiles) -> Callable[[], Any]:
        """What is timed; raises where these tiles do not run."""
        with override.forced(**{name: tiles}):
            layout, backend = resolve.chosen(self.pattern, self.sizes, "triton")

        def forward() -> Any:
            return torch.ops.vicinal.attend(
                self.query, self.key, self.value, self.tables, self.bias, None, None, None, layout, self.scale, backend
            )

        def without_gradients() -> Any:
            with torch.no_grad():
                return forward()

        if name == "forward":
            call = without_gradients
        else:
            out, wanted = forward()[0], (self.query,) if name == "query" else (self.key, self.value)
            call = functools.partial(torch.autograd.grad, out, wanted, self.grad, retain_graph=True)
        call()
        if self.query.device.type == "cuda":
            torch.cuda.synchronize(self.query.device)
        return call


def _one_pass(
    calls: _Calls, member: Member, sizes: Sizes, name: str, most: int, seconds: float, say: Callable[[str], None]
) -> Found:
    dims = (sizes.head_dim, sizes.head_dim)
    costs = candidates(member, *dims, sizes.dtype, this_device(), name, is_heavy=sizes.has_bias, most=most)
    chosen = costs[0].tiles
    tiles = list(dict.fromkeys([*(cost.tiles for cost in costs), *_variations(chosen)]))
    ready, failed = {}, 0
    for one in tiles:
        try:
            ready[one] = calls.of(name, one)
        except Exception as error:  # noqa: BLE001 - Triton's errors have no common base; tiles that do not fit are none
            say(f"  {one}: {type(error).__name__}")
            failed += 1
    if chosen not in ready:
        raise BackendRefused(f"the tiles that the model chooses for the pass {name!r} do not run here: {chosen}")
    timings = compare(
        {str(place): call for place, call in enumerate(ready.values())}, seconds=seconds, device=calls.query.device
    )
    milliseconds = {one: timings[str(place)].median_ms for place, one in enumerate(ready)}
    fastest = min(milliseconds, key=lambda one: milliseconds[one])
    best = {"chosen_ms": round(milliseconds[chosen], 5), "fastest_ms": round(milliseconds[fastest], 5)}
    is_kept = milliseconds[fastest] <= WORTH_KEEPING * milliseconds[chosen]
    gpu = this_gpu()
    if is_kept and gpu is not None:
        key = tuned.key_of(member, *dims, sizes.dtype, name, is_heavy=sizes.has_bias, gpu=gpu)
        tuned.save(key, fastest, {**best, "torch": torch.__version__})
    return Found(name=name, chosen=chosen, fastest=fastest, tried=len(ready), failed=failed, is_kept=is_kept, **best)


def _variations(tiles: Tiles) -> Iterator[Tiles]:
    """The same tiles with more or fewer warps and stages."""
    for warps in (1, 2, 4, 8):
        for stages in (1, 2, 3):
            yield dataclasses.replace(tiles, warps=warps, stages=stages)
