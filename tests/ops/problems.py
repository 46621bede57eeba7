"""Awkward problems that every back end must solve: sizes, kinds and features, and the tensors that go with them."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import torch

from vicinal.pattern import (
    AnyPattern,
    Bounds,
    Full,
    Grid,
    Halo,
    Near,
    Same,
    Window,
    bias_shape,
    bounds,
    heads,
    union,
)

Tensors = dict[str, torch.Tensor]

INPUTS = ("query", "key", "value", "bias", "extra_key", "extra_value", "extra_query")
"""Everything that takes a gradient; the bias of the groups of `heads` are called `bias0`, `bias1`, ..."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of the operator. `grids` and `extra_lengths` hold one entry per sample."""

    grid: tuple[int, ...]
    pattern: AnyPattern
    key_grid: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int | None = None
    head_dim: int = 8
    value_dim: int | None = None
    batch: int = 1
    has_bias: bool = False
    extra_tokens: int = 0
    extra_lengths: tuple[int, ...] | None = None
    extra_queries: int = 0
    grids: tuple[tuple[int, ...], ...] | None = None
    scale: float | None = None

    @property
    def keys(self) -> tuple[int, ...]:
        return self.grid if self.key_grid is None else self.key_grid

    @property
    def number(self) -> float:
        """The scale as a number."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def bias_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each group's bias tables, without the heads."""
        shapes: Any = bias_shape(self.pattern, self.grid, self.key_grid)
        return shapes if isinstance(shapes[0], tuple) else (shapes,)

    @property
    def group_heads(self) -> tuple[int, ...]:
        return bounds(self.pattern, self.grid, self.key_grid).split(self.heads)

    def __str__(self) -> str:
        kinds = repr(self.pattern) if not isinstance(self.pattern, Bounds) else "Bounds"
        parts = ["x".join(map(str, self.grid))]
        if self.key_grid is not None:
            parts.append("on-" + "x".join(map(str, self.key_grid)))
        parts.append(kinds.replace(" ", "").replace("'", ""))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("grid", "key_grid", "pattern") and value != field.default:
                parts.append(f"{field.name}={value}".replace(" ", ""))
        return "-".join(parts)


def near(kernel: tuple[int, ...], dilation: Any = 1, stride: Any = 1, causal: Any = False) -> tuple[Near, ...]:
    """One `Near` per axis, in the way the rival's problem lists are written."""
    spread = [value if isinstance(value, tuple) else (value,) * len(kernel) for value in (dilation, stride, causal)]
    return tuple(Near(*axis) for axis in zip(kernel, *spread, strict=True))


CRISS_CROSS = union((Same(), Full()), (Full(), Same()))
HYDRA = heads(Near(3), Near(3, dilation=3))
POWERS = union(Near(3), Near(3, dilation=2), Near(3, dilation=4))
MIXED = heads(Near(3), CRISS_CROSS, Window(4, shift=1), sizes=(1, 2, 1))


def _one_axis() -> Iterator[Problem]:
    yield Problem((97,), Near(13, dilation=7), heads=3)
    yield Problem((163,), Near(31), value_dim=5)
    yield Problem((41,), Near(8, stride=3), heads=4, kv_heads=2)
    yield Problem((53,), Near(9, dilation=2, stride=4, causal=True), batch=2)
    yield Problem((31,), Near(31))
    yield Problem((31,), Near(40, dilation=3))
    yield Problem((29,), Near(1), head_dim=1)
    yield Problem((1,), Near(7))
    yield Problem((2,), Near(2, causal=True))
    yield Problem((23,), Near(8, dilation=3, stride=2, border="crop"))
    yield Problem((24,), Near(7, dilation=2, border="wrap"))
    yield Problem((10,), Near(15, border="wrap"), batch=2)
    yield Problem((10,), Near(10, border="wrap"))
    yield Problem((37,), Full(causal=True))
    yield Problem((29,), Window(8, shift=3), batch=3)
    yield Problem((6,), Window(7, shift=3))
    yield Problem((30,), Halo(7, 3))
    yield Problem((35,), Grid(5))
    yield Problem((13,), Same())
    yield Problem((300,), Near(5), heads=1, batch=2)


def _two_axes() -> Iterator[Problem]:
    yield Problem((5, 25), near((5, 16), stride=(1, 16)), heads=4)
    yield Problem((5, 25), near((5, 16), stride=(4, 16)), heads=4, kv_heads=1)
    yield Problem((5, 25), near((5, 16), dilation=(5, 11)), heads=3)
    yield Problem((84, 19), near((7, 3), dilation=(5, 1)), heads=1)
    yield Problem((84, 9), near((7, 5), stride=(1, 5), dilation=(5, 1)), heads=1, head_dim=31)
    yield Problem((19, 29), near((8, 8), dilation=(2, 3)), heads=1, head_dim=32)
    yield Problem((48, 17), near((24, 16), dilation=(2, 1)), heads=1)
    yield Problem((23, 33), near((4, 3), stride=(3, 2), dilation=(5, 11)))
    yield Problem((12, 13), near((12, 13), stride=(5, 6)))
    yield Problem((20, 10), near((3, 7), causal=(True, False)), batch=2)
    yield Problem((2, 301), near((3, 9)), heads=1)
    yield Problem((151, 3), near((9, 2)), heads=1)
    yield Problem((1, 17), near((3, 5)))
    yield Problem((17, 1), near((5, 3), dilation=(3, 1)))
    yield Problem((1, 1), Near(3), batch=2)
    yield Problem((10, 13), Window(4, shift=2), heads=4, kv_heads=2)
    yield Problem((14, 11), (Window(7, shift=3), Window(5)))
    yield Problem((13, 18), (Halo(4, 2), Halo(5, 1)))
    yield Problem((12, 15), (Grid(4), Grid(3)))
    yield Problem((6, 11), (Same(), Full()))
    yield Problem((7, 9), (Full(causal=True), Near(4, border="crop")))
    yield Problem((9, 16), (Near(4, border="crop"), Near(5, dilation=2, border="wrap")))


def _three_axes() -> Iterator[Problem]:
    yield Problem((13, 11, 9), near((3, 4, 3), (3, 2, 2), (2, 3, 3), (False, True, True)), heads=1)
    yield Problem((8, 4, 8), near((7, 3, 7)), heads=1)
    yield Problem((6, 8, 9), near((5, 8, 7), stride=(2, 3, 4)), heads=2, kv_heads=1)
    yield Problem((7, 4, 5), near((4, 3, 2), causal=(True, False, False)), batch=2)
    yield Problem((5, 1, 3), near((2, 3, 5)))
    yield Problem((3, 7, 6), (Same(), Window(4, shift=2), Window(3)))
    yield Problem((4, 5, 6), (Full(causal=True), Near(3, border="crop"), Grid(3)))
    yield Problem((3, 2, 8), (Near(2), Same(), Near(5, dilation=2, border="wrap")), value_dim=3)


def _two_grids() -> Iterator[Problem]:
    yield Problem((40,), Near(5), key_grid=(13,))
    yield Problem((7,), Near(4, border="crop"), key_grid=(50,), batch=2)
    yield Problem((9,), Full(), key_grid=(4,))
    yield Problem((1,), Near(3), key_grid=(8,))
    yield Problem((14, 10), Near(3), key_grid=(5, 4), heads=4, kv_heads=2)
    yield Problem((4, 5), (Near(4, border="crop"), Full()), key_grid=(9, 16), has_bias=True)
    yield Problem((13, 6), near((3, 5)), key_grid=(5, 11), has_bias=True)
    yield Problem((3, 4, 5), (Full(), Near(3), Near(2)), key_grid=(2, 4, 9), extra_tokens=2, extra_queries=1)


def _groups_and_unions() -> Iterator[Problem]:
    yield Problem((13, 11), HYDRA, heads=4)
    yield Problem((9, 7), heads((Full(), Window(3)), (Window(3), Full())), heads=2, kv_heads=1)
    yield Problem((9, 10), heads(Near(3), Near(5, dilation=2), Same(), sizes=(1, 4, 1)), heads=6, kv_heads=3)
    yield Problem((12, 8), MIXED, heads=4, kv_heads=2)
    yield Problem((11, 7), MIXED, heads=4, kv_heads=1, batch=2, extra_tokens=3, extra_lengths=(0, 2))
    yield Problem((6, 9), CRISS_CROSS, value_dim=3)
    yield Problem((29,), POWERS, heads=4, kv_heads=2)
    yield Problem((17,), union(Near(5), Near(3)))
    yield Problem((17,), union(Near(3), Near(5)))
    yield Problem((17,), union(Near(4), Near(4)), batch=2)
    yield Problem((16,), union(Near(3, border="wrap"), Near(3, dilation=4, border="wrap")))
    yield Problem((7, 8), union(Window(3), Near(3), (Same(), Full())), extra_tokens=2)
    yield Problem((4, 5, 3), union((Full(), Same(), Same()), Near(2)), heads=2, extra_queries=2)
    yield Problem((15,), union(Full(causal=True), Near(5)))


def _tables() -> Iterator[Problem]:
    def of(table: Bounds, **features: Any) -> Problem:
        return Problem(table.grid, table, key_grid=table.key_grid, **features)

    line = bounds(Near(5), (20,))
    yield of(line.slice(0, 3, 11))
    yield of(line.shift(0, 4, 9))
    yield of(line.shift(0, 4, 9), extra_tokens=2, extra_lengths=(1, 0), batch=2)
    yield of(bounds(Near(4, dilation=3), (26,)).slice(0, 5, 22).shift(0, 2, 20))
    yield of(bounds(Near(6, stride=4, causal=True), (27,)).transpose(), batch=2)
    yield of(bounds(Near(5, dilation=2, border="wrap"), (18,)).slice(0, 4, 15))
    yield of(bounds(Near(5, dilation=2, border="wrap"), (18,)).transpose())
    yield of(bounds((Near(3, dilation=2), Window(4, shift=1)), (9, 10)).transpose())
    yield of(bounds(Near(3), (14, 10), (5, 4)).transpose())
    yield of(bounds((Full(causal=True), Near(3)), (6, 8)).slice(0, 2, 5).shift(1, 2, 4))
    yield of(bounds(heads(Near(3), union(Near(3), Near(3, dilation=2))), (12,)).slice(0, 1, 9).shift(0, 3, 9))
    yield of(bounds(MIXED, (7, 9)).transpose(), heads=4, kv_heads=2)
    yield of(bounds((Same(), Near(3)), (4, 5)).shift(0, 2, 2).shift(1, -2, 9))
    yield of(bounds(Near(3), (9,)).shift(0, 20, 4))


def _biases() -> Iterator[Problem]:
    for grid, pattern in (
        ((19,), Near(5)),
        ((20,), Near(4, dilation=3, stride=2)),
        ((21,), Near(6, stride=2, causal=True)),
        ((22,), Near(5, dilation=2, border="crop")),
        ((18,), Near(4, dilation=3, border="wrap")),
        ((5,), Near(9, border="wrap")),
        ((5,), Near(9)),
        ((17,), Window(5, shift=2)),
        ((17,), Halo(4, 3)),
        ((15,), Grid(5)),
        ((9,), Full(causal=True)),
        ((6,), Same()),
        ((8, 11), near((5, 4), dilation=(1, 2))),
        ((9, 7), (Window(4, shift=3), Full())),
        ((8, 6), (Halo(3, 1), Grid(3))),
        ((4, 5, 6), (Near(3, causal=True), Same(), Near(3, border="crop"))),
    ):
        yield Problem(grid, pattern, has_bias=True, batch=2)
    yield Problem((9, 10), HYDRA, heads=4, kv_heads=2, has_bias=True)
    yield Problem((8, 9), heads(Near(3), Window(4), Full(), sizes=(1, 3, 2)), heads=6, kv_heads=2, has_bias=True)
    yield Problem((8, 7), Near(3), heads=4, kv_heads=1, has_bias=True, extra_tokens=3, value_dim=5)


def _extra_tokens() -> Iterator[Problem]:
    yield Problem((21,), Near(5), extra_tokens=1)
    yield Problem((7, 9), near((3, 4)), heads=4, kv_heads=2, batch=3, extra_tokens=5, extra_lengths=(5, 0, 2))
    yield Problem((6, 5), Window(3), extra_tokens=4, extra_queries=3, batch=2)
    yield Problem((6, 5), Near(3), extra_queries=1, heads=4, kv_heads=1)
    yield Problem((4, 3, 5), Near(3), extra_tokens=2, extra_lengths=(1, 2), extra_queries=2, batch=2, has_bias=True)
    yield Problem((15,), HYDRA, extra_tokens=2, extra_queries=5, value_dim=3, batch=2)
    yield Problem((9,), Near(3), extra_tokens=3, extra_lengths=(0, 0), batch=2, extra_queries=1)


def _padded_batches() -> Iterator[Problem]:
    line, plane = ((12,), (7,), (1,)), ((8, 10), (5, 10), (8, 3))
    yield Problem((12,), Near(5, dilation=2), batch=3, grids=line)
    yield Problem((12,), Near(4, stride=3, causal=True), batch=3, grids=line, has_bias=True)
    yield Problem((12,), Near(4, stride=2, border="crop"), batch=3, grids=((11,), (11,), (3,)))
    yield Problem((12,), Near(5, dilation=2, border="wrap"), batch=3, grids=((12,), (8,), (2,)), has_bias=True)
    yield Problem((12,), Grid(3), batch=2, grids=((9,), (6,)), has_bias=True)
    yield Problem((8, 10), Window(4, shift=2), batch=3, grids=plane, has_bias=True)
    yield Problem((8, 10), (Halo(3, 1), Full()), batch=3, grids=plane, has_bias=True)
    yield Problem((8, 10), (Full(causal=True), Same()), batch=3, grids=plane, heads=4, kv_heads=2)
    yield Problem((9, 10), MIXED, heads=4, kv_heads=2, batch=3, grids=((9, 10), (1, 1), (4, 7)))
    yield Problem(
        (8, 10), HYDRA, batch=3, grids=plane, has_bias=True, extra_tokens=3, extra_lengths=(3, 0, 1), extra_queries=2
    )
    yield Problem((4, 5, 6), near((3, 2, 3), causal=(True, False, False)), batch=2, grids=((2, 5, 4), (4, 1, 6)))
    yield Problem((12,), Near(5), batch=1, grids=((7,),))


def _scales() -> Iterator[Problem]:
    yield Problem((9, 8), Near(3), scale=0.0, has_bias=True)
    yield Problem((14,), Near(5, dilation=2), scale=-0.7)
    yield Problem((14,), Window(5), scale=4.0, extra_tokens=1)


def _head_dims() -> Iterator[Problem]:
    for head_dim in (1, 3, 31, 32, 80, 128, 200):
        yield Problem((6, 7), Near(3), head_dim=head_dim, heads=4, kv_heads=2)
    for head_dim, value_dim in ((1, 33), (31, 8), (200, 3)):
        yield Problem((6, 7), near((3, 4), dilation=(2, 1)), head_dim=head_dim, value_dim=value_dim, has_bias=True)


PROBLEMS = (
    *_one_axis(),
    *_two_axes(),
    *_three_axes(),
    *_two_grids(),
    *_groups_and_unions(),
    *_tables(),
    *_biases(),
    *_extra_tokens(),
    *_padded_batches(),
    *_scales(),
    *_head_dims(),
)

SAMPLE = tuple(
    Problem(**{**vars(problem), "head_dim": 16})
    for problem in (
        Problem((41,), Near(8, stride=3), heads=4, kv_heads=2),
        Problem((9, 13), near((3, 5), dilation=(2, 1)), has_bias=True, extra_tokens=3, extra_queries=2),
        Problem((10, 13), Window(4, shift=2), batch=2, value_dim=24),
        Problem((12, 8), MIXED, heads=4, kv_heads=2),
        Problem((8, 10), HYDRA, batch=2, grids=((8, 10), (5, 3)), extra_tokens=2, extra_lengths=(2, 0)),
        Problem((5, 4, 6), near((3, 3, 4), causal=(True, False, False)), heads=1),
        Problem((14, 10), Near(3), key_grid=(5, 4), has_bias=True),
    )
)
"""A few of every sort, for what is slow or needs no more: half precision, compilers, checks of the registration."""


def shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """The shape of every input that the problem has."""
    kv_heads = problem.heads if problem.kv_heads is None else problem.kv_heads
    value_dim = problem.head_dim if problem.value_dim is None else problem.value_dim
    batch, dim = problem.batch, problem.head_dim
    found: dict[str, tuple[int, ...]] = {
        "query": (batch, *problem.grid, problem.heads, dim),
        "key": (batch, *problem.keys, kv_heads, dim),
        "value": (batch, *problem.keys, kv_heads, value_dim),
    }
    if problem.has_bias:
        sizes = problem.group_heads
        for number, (size, shape) in enumerate(zip(sizes, problem.bias_shapes, strict=True)):
            found["bias" if len(sizes) == 1 else f"bias{number}"] = (size, *shape)
    if problem.extra_tokens:
        found["extra_key"] = (batch, problem.extra_tokens, kv_heads, dim)
        found["extra_value"] = (batch, problem.extra_tokens, kv_heads, value_dim)
    if problem.extra_queries:
        found["extra_query"] = (batch, problem.extra_queries, problem.heads, dim)
    return found


def draw(problem: Problem, dtype: torch.dtype, drawing: int = 0) -> Tensors:
    """Every input, normally distributed; float64 ones are the float32 ones. What must not be read is NaN."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(problem).encode()) + drawing)
    narrow = torch.float32 if dtype == torch.float64 else dtype
    tensors = {
        name: torch.randn(shape, generator=generator).to(narrow).to(dtype) for name, shape in shapes(problem).items()
    }
    _forbid(problem, [tensors[name] for name in ("query", "key", "value")])
    for name in ("extra_key", "extra_value"):
        for sample, length in enumerate(problem.extra_lengths or ()):
            tensors[name][sample, length:] = torch.nan
    return tensors


def draw_grads(problem: Problem, outputs: Tensors) -> Tensors:
    """A gradient for every output, NaN where an output is padding."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"gradients of {problem}".encode()))
    grads = {
        name: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16).to(tensor.dtype)
        for name, tensor in outputs.items()
    }
    _forbid(problem, [grads[name] for name in ("out", "lse")])
    return grads


def _forbid(problem: Problem, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        for sample, own in enumerate(problem.grids or ()):
            inside = torch.zeros(tensor.shape[1:], dtype=torch.bool)
            inside[tuple(map(slice, own))] = True
            tensor[sample].masked_fill_(~inside, torch.nan)


def arguments(problem: Problem, tensors: Tensors) -> dict[str, Any]:
    """The arguments of `vicinal.attention`."""
    device = tensors["query"].device
    given: dict[str, Any] = {name: tensors[name] for name in INPUTS if name in tensors}
    tables = tuple(tensors[name] for name in tensors if name.startswith("bias") and name != "bias")
    if tables:
        given["bias"] = tables
    if problem.extra_lengths is not None:
        given["extra_lengths"] = torch.tensor(problem.extra_lengths, device=device)
    if problem.grids is not None:
        given["grids"] = torch.tensor(problem.grids, device=device)
    return {**given, "pattern": problem.pattern, "scale": problem.scale}
