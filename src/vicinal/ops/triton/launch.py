"""From the tensors of a call to launches of the kernels; nothing here waits for the device or reads from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vicinal.ops.backend import Inputs
from vicinal.ops.packing import HEADER, AxisLayout, GroupLayout
from vicinal.ops.triton.plan import Box, Choice, Tiles, box, unpack

LOG2_E = math.log2(math.e)
_WIDE = 1 << 31

RECORDS: list[tuple[Any, dict[str, Any]]] = []
"""Kernels and their arguments, of launches on the meta device: what a compiler needs to know, without a GPU."""


def start(kernel: Any, grid: tuple[int, ...], like: torch.Tensor, **arguments: Any) -> None:
    """Launch a kernel on the device of `like`; a grid without programs is none. On the meta device it is noted only."""
    if not math.prod(grid):
        return
    if like.device.type == "meta":
        RECORDS.append((kernel, arguments))
        return
    if like.device.type == "cuda":
        with torch.cuda.device(like.device):
            kernel[grid](**arguments)
    else:
        kernel[grid](**arguments)


def precision(dtype: torch.dtype) -> str:
    """How matrix products of float32 are computed: as torch's own are set to be."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def as_rows(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """`[batch, *grid, heads, dim]` as `[batch, tokens, heads, dim]`, channels side by side; a copy where it must be."""
    rows = tensor.flatten(1, rank)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def is_spread(rows: torch.Tensor) -> bool:
    """Whether an offset within a sample of these rows, or of a copy of them, does not fit into 32 bits."""
    steps = zip(rows.shape[1:], rows.stride()[1:], strict=True)
    return bool(rows.numel()) and max(sum((n - 1) * abs(step) for n, step in steps), math.prod(rows.shape[1:])) >= _WIDE


def strides(name: str, rows: torch.Tensor | None) -> dict[str, int]:
    """The strides of rows, by the names that kernels give them."""
    sample, token, head, _ = (0, 0, 0, 0) if rows is None else rows.stride()
    return {f"s_{name}_sample": sample, f"s_{name}": token, f"s_{name}_head": head}


def power(number: int) -> int:
    """The block for a head dim."""
    return max(16, 1 << (number - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Part:
    """One union member of one head group: where it stands in the tables, its heads, and its tiles."""

    layout: GroupLayout
    member: tuple[AxisLayout, ...]
    number: int
    first_head: int
    o_group: int
    member_words: int
    choice: Choice
    bias: torch.Tensor | None

    @property
    def is_last(self) -> bool:
        """Whether no other member follows."""
        return self.number == len(self.layout.members) - 1

    @property
    def wraps(self) -> dict[str, bool]:
        """Which axes wrap, by the names that kernels give them."""
        flags = (*(False,) * (3 - len(self.member)), *(axis.wraps for axis in self.member))
        return {f"WRAPS_{axis}": flag for axis, flag in enumerate(flags)}

    @property
    def has_turns(self) -> bool:
        """Whether an axis wraps."""
        return any(axis.wraps for axis in self.member)


class Call:
    """The tensors of one call as kernels take them, and the arguments that all passes share."""

    def __init__(self, inputs: Inputs) -> None:
        rank = inputs.layout.rank
        self.inputs = inputs
        self.rank = rank
        self.query, self.key, self.value = (as_rows(t, rank) for t in (inputs.query, inputs.key, inputs.value))
        self.extra_key = _extra(inputs.extra_key)
        self.extra_value = _extra(inputs.extra_value)
        lengths = inputs.extra_lengths
        self.extra_lengths = None if self.extra_key is None or lengths is None else lengths.contiguous()
        self.grid, self.key_grid = box(inputs.grid), box(inputs.key_grid)
        self.samples, self.tokens, self.heads, self.head_dim = self.query.shape
        self.kv_heads, self.value_dim = self.value.shape[2:]
        self.shared = self.heads // max(self.kv_heads, 1)
        self.tables = inputs.tables
        # one row may stand for a whole batch, also where sizes are given: then it says how large its samples are
        self.has_rows = self.tables.shape[0] > 1
        self.is_padded = any(axis.step == 0 for group in inputs.layout.groups for m in group.members for axis in m)

    def zeros_or_empty(self, shape: Sequence[int], dtype: torch.dtype, *, zeros: bool) -> torch.Tensor:
        """Fresh memory on the device of the call."""
        make = torch.zeros if zeros else torch.empty
        return make(tuple(shape), dtype=dtype, device=self.query.device)

    def parts(self) -> Iterator[Part]:
        """All members of all groups, in the order in which they must run."""
        layout = self.inputs.layout
        choices = unpack(layout.plan, layout)
        words = sum(HEADER + 3 * length for length in self.inputs.grid)
        biases: Sequence[torch.Tensor | None] = [None] * len(layout.groups)
        if self.inputs.bias is not None:
            biases = self.inputs.bias.contiguous().split(list(layout.bias_sizes))
        first_head = o_group = 0
        for group, own, bias in zip(layout.groups, choices, biases, strict=True):
            for number, (member, choice) in enumerate(zip(group.members, own, strict=True)):
                yield Part(group, member, number, first_head, o_group, words, choice, bias)
            first_head += group.heads
            o_group += words * len(group.members)

    def sizes(self) -> dict[str, Any]:
        """Head dims and what else is fixed when a kernel is compiled."""
        dims = {"D": self.head_dim, "DV": self.value_dim}
        blocks = {f"BLOCK_{name}": power(dim) for name, dim in dims.items()}
        return {"RANK": self.rank, **dims, **blocks, "IS_WIDE": self.is_wide}

    @property
    def is_wide(self) -> bool:
        """Whether an offset within a sample may not fit into 32 bits."""
        return (
            any(is_spread(rows) for rows in (self.query, self.key, self.value))
            or self.tokens * self.heads * max(self.head_dim, self.value_dim) >= _WIDE
        )

    def grids(self, names: str) -> dict[str, int]:
        """Grid sizes by name: `"n0 m1"` gives `n_0` of the query grid and `m_1` of the key grid."""
        sizes = {"n": self.grid, "m": self.key_grid}
        return {f"{name[0]}_{name[1]}": sizes[name[0]][int(name[1])] for name in names.split()}

    def bias_of(self, part: Part) -> dict[str, Any]:
        """The bias table of a group, and its shape."""
        shape = box(part.layout.bias_shape) if part.bias is not None and part.layout.bias_shape else (1, 1, 1)
        return {"p_bias": part.bias, **{f"bias_{axis}": length for axis, length in enumerate(shape)}}

    def programs(self, tile: Box, phase: Box, grid: Box, member: Sequence[AxisLayout]) -> int:
        """Tiles of a head: exact where the step is known, else as if it were 1."""
        steps = box([max(axis.step, 1) for axis in member])
        return math.prod(
            min(step, length) * -(-(-(-length // step) + begin) // size)
            for step, length, begin, size in zip(steps, grid, phase, tile, strict=True)
        )


def _extra(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None or not tensor.shape[1] else as_rows(tensor, 1)


def tile_names(tiles: Tiles) -> dict[str, int]:
    """Tiles by the names that kernels give them."""
    names = {"BLOCK_M": tiles.block_queries, "BLOCK_N": tiles.block_keys}
    boxes = {"Q": tiles.query, "K": tiles.key, "PHASE": tiles.phase}
    names |= {f"{name}_{axis}": size for name, sizes in boxes.items() for axis, size in enumerate(sizes)}
    return {**names, "num_warps": tiles.warps, "num_stages": tiles.stages}


def start_query_pass(
    call: Call,
    part: Part,
    out: torch.Tensor,
    prior: torch.Tensor | None,
    lse: torch.Tensor,
    grad: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
) -> None:
    """Launch the forward of a member, or with `delta` its part of the gradient of the query."""
    from vicinal.ops.triton.kernels.query_pass import query_pass

    is_gradient = delta is not None
    tiles = part.choice[1 if is_gradient else 0]
    programs = call.programs(tiles.query, tiles.phase, call.grid, part.member)
    has_extra = call.extra_key is not None and part.number == 0
    start(
        query_pass,
        (programs * part.layout.heads * call.samples,),
        call.query,
        p_query=call.query,
        p_key=call.key,
        p_value=call.value,
        p_out=out,
        p_prior=prior,
        p_lse=lse,
        p_grad=grad,
        p_delta=delta,
        p_tables=call.tables,
        p_extra_key=call.extra_key if has_extra else None,
        p_extra_value=call.extra_value if has_extra else None,
        p_extra_lengths=call.extra_lengths if has_extra else None,
        scale=call.inputs.scale * LOG2_E,
        programs=programs,
        row_words=call.tables.shape[1] if call.has_rows else 0,
        extra_tokens=0 if call.extra_key is None else call.extra_key.shape[1],
        o_group=part.o_group,
        member_words=part.member_words,
        heads=call.heads,
        shared=call.shared,
        first_head=part.first_head,
        group_heads=part.layout.heads,
        EARLIER=part.number,
        EARLIER_WRAPS=earlier_wraps(part),
        HAS_BIAS=part.bias is not None,
        HAS_EXTRA=has_extra,
        HAS_LENGTHS=has_extra and call.extra_lengths is not None,
        HAS_ROWS=call.has_rows or call.is_padded,
        IS_GRADIENT=is_gradient,
        PRECISION=precision(call.query.dtype),
        **call.bias_of(part),
        **call.grids("n0 n1 n2 m1 m2"),
        **strides("query", call.query),
        **strides("key", call.key),
        **strides("value", call.value),
        **strides("grad", grad),
        **strides("extra_key", call.extra_key),
        **strides("extra_value", call.extra_value),
        **call.sizes(),
        **part.wraps,
        **tile_names(tiles),
    )


def earlier_wraps(part: Part) -> bool:
    """Whether an axis of a member before this one wraps."""
    return any(axis.wraps for member in part.layout.members[: part.number] for axis in member)


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    call = Call(inputs)
    shape = (*inputs.query.shape[:-1], call.value_dim)
    out = call.zeros_or_empty(shape, inputs.query.dtype, zeros=call.is_padded)
    lse = call.zeros_or_empty(shape[:-1], torch.float32, zeros=False)
    if call.is_padded:
        lse.fill_(-math.inf)
    several = any(len(group.members) > 1 for group in inputs.layout.groups)
    # between the members of a union the output is kept in float32
    work = call.zeros_or_empty(shape, torch.float32, zeros=False) if several and out.dtype != torch.float32 else out
    for part in call.parts():
        start_query_pass(call, part, out if part.is_last else work, work if part.number else None, lse)
    return out, lse
