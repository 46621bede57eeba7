"""The flex back end: FlexAttention on tokens in tile order, with block lists that come from the tables.

On CUDA it is compiled, one kernel for each pattern, grid and kind of tensor. On a CPU compiled FlexAttention has no
log-sum-exp, so it runs there as torch's own eager form, which writes out all scores: good for checking, not for work.
Its gradients are FlexAttention's, which has none on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vicinal.ops.backend import (
    Backend,
    BackendRefused,
    Capability,
    Gradients,
    Inputs,
    Problem,
    gradients_through,
    register,
)
from vicinal.ops.engines.block_mask import BLOCK, MemberBlocks, blocks, chosen_orders, plan, row_of
from vicinal.ops.merge import merge_pair
from vicinal.ops.packing import Layout
from vicinal.ops.tile_order import TileOrder
from vicinal.ops.tiled.forward import differentiable

MOST_EAGER_TOKENS = 8192
LEAST_HEAD_DIM = 16

CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    query = inputs.query
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not query.shape[0]:
        return query.new_empty(*query.shape[:-1], inputs.value.shape[-1]), query.new_empty(
            query.shape[:-1], dtype=lse_dtype
        )
    extra_tokens = 0 if inputs.extra_key is None else inputs.extra_key.shape[1]
    groups = plan(row_of(inputs.tables), inputs.layout.packed, inputs.grid, extra_tokens, query.device)
    outs, lses, begin = [], [], 0
    for place, members in zip(inputs.layout.groups, groups, strict=True):
        out, lse = _group(inputs, members, range(begin, begin + place.heads))
        outs.append(out)
        lses.append(lse)
        begin += place.heads
    out = outs[0] if len(outs) == 1 else torch.cat(outs, -2)
    lse = lses[0] if len(lses) == 1 else torch.cat(lses, -1)
    return out.contiguous(), lse.to(lse_dtype).contiguous()


def _group(inputs: Inputs, members: Sequence[MemberBlocks], heads: range) -> tuple[torch.Tensor, torch.Tensor]:
    """One head group: its members one after another, merged by their log-sum-exps."""
    query = inputs.query[..., heads.start : heads.stop, :]
    shared = inputs.query.shape[-2] // inputs.key.shape[-2]
    key, value = (_heads_of(tensor, heads, shared) for tensor in (inputs.key, inputs.value))
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    for member in members:
        keys, values = member.keys.enter(key), member.keys.enter(value)
        if member.extra_tokens:
            assert inputs.extra_key is not None
            assert inputs.extra_value is not None
            extra_key, extra_value = (
                _filled_up(_heads_of(tensor, heads, shared), member.extra_tokens)
                for tensor in (inputs.extra_key, inputs.extra_value)
            )
            keys, values = torch.cat([keys, extra_key], 1), torch.cat([values, extra_value], 1)
        out, lse = attend_in_order(member.queries.enter(query), keys, values, member, inputs.scale)
        found = member.queries.leave(out), member.queries.leave(lse)
        result = found if result is None else _merged(result, found)
    assert result is not None
    return result


def _merged(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = one[1].dtype
    out, lse = merge_pair(one[0].to(wide), one[1], other[0].to(wide), other[1])
    return out.to(one[0].dtype), lse


def _heads_of(tensor: torch.Tensor, heads: range, shared: int) -> torch.Tensor:
    """The key heads `[..., kv_heads, dim]` that some query heads read."""
    if heads.start % shared == 0 and heads.stop % shared == 0:
        return tensor[..., heads.start // shared : heads.stop // shared, :]
    index = torch.tensor([head // shared for head in heads], device=tensor.device)
    return tensor.index_select(-2, index)


def _filled_up(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """`[batch, tokens, ...]` with zeros behind it, up to so many tokens."""
    missing = tokens - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1) if missing else tensor


def ordered(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: torch.Tensor,
    layout: Layout,
    order: TileOrder,
    scale: float,
) -> torch.Tensor:
    """Attention of tokens that are in tile order and stay there: `[batch, positions, heads, dim]`."""
    groups = plan(row_of(tables), layout.packed, order.grid, 0, query.device, order)
    shared, outs, begin = query.shape[2] // key.shape[2], [], 0
    for place, members in zip(layout.groups, groups, strict=True):
        heads = range(begin, begin + place.heads)
        begin += place.heads
        keys, values = (_heads_of(tensor, heads, shared) for tensor in (key, value))
        result: tuple[torch.Tensor, torch.Tensor] | None = None
        for member in members:
            found = attend_in_order(query[:, :, heads.start : heads.stop], keys, values, member, scale)
            result = found if result is None else _merged(result, found)
        assert result is not None
        outs.append(result[0])
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def attend_in_order(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, member: MemberBlocks, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of tokens in tile order, `[batch, positions, heads, dim]` to the same, and the log-sum-exp."""
    rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    is_grouped = query.shape[2] != key.shape[2]
    if query.device.type == "cpu":
        with eager_flex() as flex_attention:
            out, lse = flex_attention(*rows, block_mask=member.block_mask, scale=scale, **_options(is_grouped))
    else:
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in rows)
        run = _compiled(member, query.dtype, (*query.shape, *key.shape[1:], value.shape[-1]), needs_grad)
        out, lse = run(*rows, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _options(is_grouped: bool) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import AuxRequest

    return {"enable_gqa": is_grouped, "return_aux": AuxRequest(lse=True)}


@contextlib.contextmanager
def eager_flex() -> Iterator[Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """FlexAttention in its eager form, without tracing it anew for every mask function."""
    from torch.nn.attention import flex_attention as module

    attend: Any = module.flex_attention

    def call(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, aux = attend(*(tensor.detach() for tensor in tensors), **options)
        return out, aux.lse

    before = module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield call
    finally:
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def _compiled(member: MemberBlocks, dtype: torch.dtype, shape: tuple[int, ...], needs_grad: bool) -> Callable[..., Any]:
    """FlexAttention compiled for one member's mask and one kind of tensors."""
    kind = (dtype, shape, needs_grad)
    if kind not in member.compiled:
        member.compiled[kind] = compiled_for(member.block_mask, shape[2] != shape[5], with_lse=True)
    return member.compiled[kind]


def compiled_for(
    block_mask: Any, is_grouped: bool, *, with_lse: bool, kernel_options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """FlexAttention as a function of query, key, value `[batch, heads, positions, dim]` and scale, to be compiled.

    `kernel_options` are FlexAttention's own. The compiler counts how often it compiles one piece of code and gives up
    after a few times, so each function gets its own.
    """
    from torch.nn.attention.flex_attention import flex_attention

    options: dict[str, Any] = _options(is_grouped) if with_lse else {"enable_gqa": is_grouped}
    options["kernel_options"] = kernel_options

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Any:
        found = flex_attention(query, key, value, block_mask=block_mask, scale=scale, **options)
        return (found[0], found[1].lse) if with_lse else found

    own = types.FunctionType(run.__code__.replace(co_name="flex"), run.__globals__, None, None, run.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def backward(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients by FlexAttention's own backward, after its forward is run once more."""
    del out, lse
    if inputs.query.device.type == "cpu":
        raise BackendRefused(
            "backend 'flex' cannot give gradients on a CPU: FlexAttention has no backward there; use backend=None"
        )
    return gradients_through(forward, inputs, grad_out, grad_lse, needs, create_graph=False)


def _refusals(problem: Problem) -> list[str]:
    """What depends on the device."""
    reasons = []
    least = min(problem.head_dim, problem.value_dim)
    if problem.device == "cuda":
        if problem.dtype not in CUDA_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in CUDA_DTYPES)
            reasons.append(f"takes {names} on cuda, the tensors are {str(problem.dtype).removeprefix('torch.')}")
        if least < LEAST_HEAD_DIM:
            reasons.append(f"takes head dims from {LEAST_HEAD_DIM} on cuda, got {least}")
    elif _size(problem.grid) * _size(problem.key_grid) > MOST_EAGER_TOKENS**2:
        reasons.append(
            f"writes out all scores on a CPU, at most {MOST_EAGER_TOKENS} queries by {MOST_EAGER_TOKENS} keys"
        )
    return reasons


def only_by_name(problem: Problem) -> bool:
    """On a CPU it is slow, large and without gradients: there for those who ask for it."""
    return problem.device != "cuda"


def _size(grid: tuple[int, ...]) -> int:
    size = 1
    for length in grid:
        size *= length
    return size


@functools.cache
def reason_missing() -> str | None:
    """Why FlexAttention cannot be used here, None where it can."""
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return "needs torch.nn.attention.flex_attention, which this torch does not have"
    return None


def _describe(problem: Problem, bounds: Any, layout: Layout) -> dict[str, Any]:
    del layout
    members = []
    for group in bounds.groups:
        for number, member in enumerate(group.members):
            queries, keys = chosen_orders(member)
            found = blocks(member, queries, keys, is_masked=number > 0)
            members.append(
                {
                    "query_tile": list(queries.tile),
                    "key_tile": list(keys.tile),
                    "tiles": queries.num_tiles,
                    "visited": int(found.touched.sum()),
                    "full": int(found.whole.sum()),
                    "of": found.touched.size,
                }
            )
    how = "compiled" if problem.device == "cuda" else "eager, all scores written out"
    return {"method": f"FlexAttention on tokens in tile order, {how}", "block": BLOCK, "members": members}


register(
    Backend(
        name="flex",
        capability=Capability(
            devices=("cuda", "cpu", "meta"), lacks=frozenset({"has_bias", "has_extra_lengths", "has_grids"})
        ),
        forward=forward,
        backward=backward,
        differentiable=differentiable,
        describe=_describe,
        reason_missing=reason_missing,
        further_refusals=_refusals,
        only_by_name=only_by_name,
        is_engine=True,
    )
)
