"""Whom we are measured against on a GPU: dense kernels, FlexAttention in three ways, and others' sparse kernels."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vicinal.measure.peers.dense import axis_tables
from vicinal.measure.peers.dense import flex as flex_rows
from vicinal.measure.peers.installed import natten
from vicinal.measure.task import HEADS_FIRST, HEADS_LAST, Layout, NotRun, Prepared, Task, Tensors
from vicinal.ops import attention
from vicinal.ops.engines import flex
from vicinal.ops.engines.block_mask import chosen_orders, member_blocks
from vicinal.ops.tile_order import TileOrder
from vicinal.pattern import Full, Near

Maker = Callable[[Task], list[Prepared]]

STA_TILE = (6, 8, 8)
STA_GRIDS = ((18, 48, 80), (30, 48, 80), (36, 48, 48))


def sdpa(kernel: SDPBackend) -> Maker:
    """Dense attention over all keys by one of torch's kernels."""

    def make(task: Task) -> list[Prepared]:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            rows, keys, values = (tensor.flatten(2, -2) for tensor in (query, key, value))
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(rows, keys, values).view(query.shape)

        return [Prepared(call, HEADS_FIRST)]

    return make


def dense_of(backend: str) -> Maker:
    """Dense attention by one of our own back ends: what its kernels reach without any sparsity."""

    def make(task: Task) -> list[Prepared]:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = attention(query, key, value, Full(), backend=backend)
            return out

        return [Prepared(call, HEADS_LAST)]

    return make


DENSE: dict[str, Maker] = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
"""Dense kernels of torch's own; the fastest of them is what a speed-up is over."""


def flex_tiles(task: Task) -> list[Prepared]:
    """FlexAttention compiled, tokens in tile order beforehand."""
    return _flex(task, *chosen_orders(axis_tables(task)))


def flex_flash(task: Task) -> list[Prepared]:
    """The same with its FlashAttention-4 kernels, where this torch has them and their package is installed."""
    return _flex(task, *chosen_orders(axis_tables(task)), kernel_options={"BACKEND": "FLASH"})


def _flex(
    task: Task, queries: TileOrder, keys: TileOrder, kernel_options: dict[str, Any] | None = None
) -> list[Prepared]:
    if task.device.type == "cpu" and task.backward:
        raise NotRun("FlexAttention has no backward on a CPU")
    if task.problem.head_dim < flex.LEAST_HEAD_DIM:
        raise NotRun(f"FlexAttention takes head dims from {flex.LEAST_HEAD_DIM}")
    ready = member_blocks(axis_tables(task), (), (queries, keys), 0, task.device)
    run = flex.compiled_for(ready.block_mask, False, with_lse=False, kernel_options=kernel_options)
    scale = task.problem.head_dim**-0.5

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own deprecations say nothing about the problem
            out: torch.Tensor = run(query, key, value, scale)
        return out

    detail = f"{'x'.join(map(str, queries.tile))} on {'x'.join(map(str, keys.tile))}"
    return [Prepared(call, _in_order(queries, keys), detail)]


def _in_order(queries: TileOrder, keys: TileOrder) -> Layout:
    """Heads first, tokens in tile order."""
    orders = (queries, keys, keys)

    def enter_one(tensor: torch.Tensor, order: TileOrder) -> torch.Tensor:
        return order.enter(tensor).transpose(1, 2).contiguous()

    def leave_one(tensor: torch.Tensor, order: TileOrder) -> torch.Tensor:
        return order.leave(tensor.transpose(1, 2))

    def enter(tensors: Sequence[torch.Tensor]) -> Tensors:
        return tuple(map(enter_one, tensors, orders))

    def leave(tensors: Sequence[torch.Tensor]) -> Tensors:
        return tuple(map(leave_one, tensors, orders))

    def enter_gradient(tensor: torch.Tensor) -> torch.Tensor:
        # what fills tiles up repeats tokens, whose gradients must not count twice
        inside = torch.from_numpy(queries.is_token()).to(tensor.device)
        return enter_one(tensor, queries) * inside[None, None, :, None]

    return Layout(
        f"[batch, heads, {queries.tile} and {keys.tile} in order, head_dim]",
        enter,
        leave,
        enter_gradient,
        lambda tensor: leave_one(tensor, queries),
    )


def sliding_tile(task: Task) -> list[Prepared]:
    """Sliding Tile Attention's kernels, for its own grids and blocks, where either of its packages is installed."""
    problem = task.problem
    kinds = [kind for kind in problem.kinds if isinstance(kind, Near)]
    fits = problem.grid in STA_GRIDS and tuple(kind.stride for kind in kinds) == STA_TILE
    if not fits or any(kind.kernel_size % tile for kind, tile in zip(kinds, STA_TILE, strict=True)):
        raise NotRun("takes windows and strides of whole tiles of 6x8x8 on its own grids only")
    if task.backward:
        raise NotRun("its kernels are for inference")
    module = next((name for name in ("fastvideo_kernel", "st_attn") if importlib.util.find_spec(name)), None)
    if module is None:
        raise NotRun("neither fastvideo_kernel nor st_attn is installed")
    function = importlib.import_module(module).sliding_tile_attention
    window = tuple(kind.kernel_size // tile for kind, tile in zip(kinds, STA_TILE, strict=True))
    shape = "x".join(map(str, problem.grid))

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function(query, key, value, [window] * problem.heads, 0, False, shape)
        return out

    order = TileOrder(problem.grid, STA_TILE, (1, 1, 1))
    return [Prepared(call, _in_order(order, order), module)]


SPARSE: dict[str, Maker] = {
    "flex_rows": flex_rows,
    "flex_tiles": flex_tiles,
    "flex_flash": flex_flash,
    "natten": natten,
    "sliding_tile": sliding_tile,
}
"""Others' kernels for the same pattern; their answers are checked like ours."""
