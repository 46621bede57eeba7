"""Attention of tokens that are in tile order already, for models that stay in it from the first layer to the last."""

from __future__ import annotations

from typing import Any

import torch

from vicinal.ops import resolve
from vicinal.ops.api import attention, under_autocast
from vicinal.ops.backend import choose
from vicinal.ops.engines import flex
from vicinal.ops.engines.block_mask import BLOCK
from vicinal.ops.tile_order import TileOrder
from vicinal.pattern.bounds import AnyPattern


def attention_in_order(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AnyPattern,
    order: TileOrder,
    *,
    bias: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`vicinal.attention` for `[batch, positions, heads, head_dim]` in tile order, answered in that order.

    Where FlexAttention compiled takes the call, tokens stay as they lie. Any other back end wants the grid: for those
    the tokens leave the order and enter it again.

    >>> order = TileOrder((4, 8, 8), (2, 4, 4), (1, 1, 1))
    >>> tokens = torch.randn(1, 4, 8, 8, 2, 16)
    >>> query = order.enter(tokens)
    >>> out = attention_in_order(query, query, query, Near(3), order)
    >>> torch.allclose(order.leave(out), vicinal.attention(tokens, tokens, tokens, Near(3)), atol=1e-6)
    True
    """
    check_in_order(query, key, value, order)
    if stays_in_order(query, key, value, pattern, order, bias, backend):
        return _flex_in_order(query, key, value, pattern, order, scale)
    query, key, value = (order.leave(tensor) for tensor in (query, key, value))
    out: torch.Tensor = attention(query, key, value, pattern, bias=bias, scale=scale, backend=backend)
    return order.enter(out)


def check_in_order(query: Any, key: Any, value: Any, order: TileOrder) -> None:
    """Raise `ValueError` unless the tensors hold as many tokens as the order has positions."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.shape[1] != order.num_positions:
            raise ValueError(
                f"{name} must be [batch, {order.num_positions}, heads, dim] in the tile order of {order.grid}, "
                f"got {tuple(tensor.shape)}"
            )


def stays_in_order(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AnyPattern,
    order: TileOrder,
    bias: Any,
    backend: str | None,
) -> bool:
    """Whether the call goes to FlexAttention as it is: the back end chosen for it is flex, and the tiles suit."""
    if query.device.type == "cpu" or order.volume % BLOCK or bias is not None:
        return False
    pattern_key, _ = resolve.key_of(pattern)
    heads, dims = (query.shape[2], key.shape[2]), (query.shape[3], value.shape[3])
    sizes = (order.grid, order.grid, *heads, *dims)
    problem, _ = resolve.make_problem(pattern_key, query.device.type, query.dtype, *sizes, (False,) * 4)
    return choose(problem, backend) == "flex"


def _flex_in_order(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AnyPattern,
    order: TileOrder,
    scale: float | None,
) -> torch.Tensor:
    """FlexAttention on the tokens as they lie; its own autograd, so the forward is not run again for gradients."""
    query, key, value = under_autocast(query, key, value)
    pattern_key, _ = resolve.key_of(pattern)
    layout = resolve.problem_layout(pattern_key, order.grid, order.grid, query.shape[2], False)
    tables = resolve.tables(pattern_key, order.grid, order.grid, query)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return flex.ordered(query, key, value, tables, layout, order, factor)
