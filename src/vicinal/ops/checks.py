"""Every check of what a caller passes, in one place and before any work.

Messages say which argument, what came, and what is allowed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RANKS = (1, 2, 3)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """A shape that prints as plain numbers."""
    return tuple(tensor.shape)


def _grid_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The grid as plain integers.

    A compiler that has seen two sizes makes symbols of them, but tables, layouts and the choice of a back end need
    numbers: `index` tells it so, for the heads and dims as well. The batch may stay a symbol.
    """
    return tuple(operator.index(length) for length in tensor.shape[1:])[:-2]


def check_tensor(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a dense tensor of a floating dtype we compute in."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        nested = ", nested" if value.is_nested else ""
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {value.layout}{nested}")
    if value.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")


def check_same(name: str, tensor: torch.Tensor, query: torch.Tensor, whose: str = "query") -> None:
    """Raise `ValueError` unless `tensor` has the dtype and device of `query` (or of what `whose` names)."""
    if tensor.dtype != query.dtype:
        raise ValueError(f"{name} must have the dtype of {whose} ({query.dtype}), got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of {whose} ({query.device}), got {tensor.device}")


def check_qkv(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rank: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check query, key and value against each other and return (grid, key_grid).

    `rank` is the number of axes that the pattern fixes, if it does.
    """
    check_tensor("query", query)
    ranks = RANKS if rank is None else (rank,)
    if query.dim() - 3 not in ranks:
        wanted = " or ".join(str(axes + 3) for axes in ranks)
        raise ValueError(
            f"query must have {wanted} axes [batch, *grid, heads, head_dim], got {query.dim()}: {shape_of(query)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor)
        check_same(name, tensor, query)
        if tensor.dim() != query.dim():
            raise ValueError(f"{name} must have {query.dim()} axes like query, got {tensor.dim()}: {shape_of(tensor)}")
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the batch of query ({query.shape[0]}), got {tensor.shape[0]}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head_dim of query ({query.shape[-1]}), got {key.shape[-1]}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} must have no empty axis but the batch, got {shape_of(tensor)}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"key must have a number of heads that divides the query's ({query.shape[-2]}), got {key.shape[-2]}"
        )
    if value.shape[1:-1] != key.shape[1:-1]:
        raise ValueError(
            f"value must have the grid and heads of key {tuple(key.shape[1:-1])}, got {tuple(value.shape[1:-1])}"
        )
    grid, key_grid, _ = (_grid_of(tensor) for tensor in (query, key, value))
    return grid, key_grid


def check_scale(scale: Any, head_dim: int) -> float:
    """The scale as a number; None is `head_dim ** -0.5`."""
    if scale is None:
        return float(head_dim) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be None or a finite number, got {scale!r}")
    return float(scale)


def flatten_bias(
    bias: Any, shapes: Sequence[tuple[int, ...] | None], sizes: Sequence[int], query: torch.Tensor
) -> torch.Tensor:
    """Check a bias (a tuple of tables for `heads`) against what each head group wants, and make it one vector."""
    if isinstance(bias, torch.Tensor) and len(shapes) == 1:
        tables: Sequence[Any] = (bias,)
    elif isinstance(bias, tuple | list):
        tables = bias
    else:
        wanted = "a tensor" if len(shapes) == 1 else f"a tuple of {len(shapes)} tensors, one per group of heads(...)"
        raise ValueError(f"bias must be {wanted}, got {type(bias).__name__}")
    if len(tables) != len(shapes):
        raise ValueError(f"bias must be a tuple of {len(shapes)} tensors, one per group of heads, got {len(tables)}")
    for number, (table, shape, size) in enumerate(zip(tables, shapes, sizes, strict=True)):
        name = "bias" if len(shapes) == 1 else f"bias[{number}]"
        if shape is None:
            raise ValueError(
                f"{name} must be None for this pattern: a union, a transposed Bounds or an axis kind without "
                "relative positions takes no bias"
            )
        check_tensor(name, table)
        if table.device != query.device:
            raise ValueError(f"{name} must be on the device of query ({query.device}), got {table.device}")
        if table.dtype not in (query.dtype, torch.float32):
            raise ValueError(f"{name} must be float32 or have the dtype of query ({query.dtype}), got {table.dtype}")
        if tuple(table.shape) != (size, *shape):
            raise ValueError(f"{name} must have shape {(size, *shape)} (heads, then bias_shape), got {shape_of(table)}")
    vectors = [table.reshape(-1) for table in tables]
    return vectors[0] if len(vectors) == 1 else torch.cat([vector.to(vectors[0].dtype) for vector in vectors])


def check_extra_keys(
    extra_key: Any,
    extra_value: Any,
    extra_lengths: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Check extra tokens that every query sees."""
    if (extra_key is None) != (extra_value is None):
        missing = "extra_key" if extra_key is None else "extra_value"
        raise ValueError(f"{missing} must be given too: extra_key and extra_value come together")
    if extra_key is None:
        if extra_lengths is not None:
            raise ValueError("extra_lengths must be None where extra_key is None")
        return
    check_tokens("extra_key", extra_key, key, query)
    check_tokens("extra_value", extra_value, value, query)
    if extra_value.shape[1] != extra_key.shape[1]:
        raise ValueError(
            f"extra_value must have as many tokens as extra_key ({extra_key.shape[1]}), got {extra_value.shape[1]}"
        )
    if extra_lengths is not None:
        check_lengths("extra_lengths", extra_lengths, (query.shape[0],), query)
        if not _is_readable(extra_lengths):
            return
        tokens = extra_key.shape[1]
        if bool((extra_lengths < 0).any()) or bool((extra_lengths > tokens).any()):
            raise ValueError(f"extra_lengths must lie in 0..{tokens}, got {extra_lengths.tolist()}")


def check_tokens(name: str, tensor: Any, like: torch.Tensor, query: torch.Tensor, whose: str = "query") -> None:
    """Raise `ValueError` unless `tensor` holds tokens with the heads and dim of `like`, for the batch of `query`."""
    check_tensor(name, tensor)
    check_same(name, tensor, query, whose)
    wanted = (query.shape[0], "tokens", *like.shape[-2:])
    if tensor.dim() != 4 or tensor.shape[0] != query.shape[0] or tensor.shape[2:] != like.shape[-2:]:
        raise ValueError(f"{name} must have shape [batch, tokens, kv_heads, dim] = {wanted}, got {shape_of(tensor)}")


def check_weights(
    weights: Any, value: Any, extra_value: Any, rank: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Check weights in window order against the values they sum; returns (grid, key_grid, extra tokens)."""
    check_tensor("weights", weights)
    ranks = RANKS if rank is None else (rank,)
    if weights.dim() - 3 not in ranks:
        wanted = " or ".join(str(axes + 3) for axes in ranks)
        raise ValueError(f"weights must have {wanted} axes [batch, *grid, heads, window], got {shape_of(weights)}")
    check_tensor("value", value)
    check_same("value", value, weights, "weights")
    for name, tensor, axes in (("weights", weights, weights.shape[1:-1]), ("value", value, value.shape[1:])):
        if 0 in axes:
            raise ValueError(f"{name} must have no empty axis but the batch, got {shape_of(tensor)}")
    if value.dim() != weights.dim() or value.shape[0] != weights.shape[0] or weights.shape[-2] % value.shape[-2]:
        raise ValueError(
            f"value must be [batch, *key_grid, kv_heads, value_dim] with the batch of weights ({weights.shape[0]}) and "
            f"a number of heads that divides {weights.shape[-2]}, got {shape_of(value)}"
        )
    if extra_value is not None:
        check_tokens("extra_value", extra_value, value, weights, "weights")
    tokens = 0 if extra_value is None else extra_value.shape[1]
    return _grid_of(weights), _grid_of(value), tokens


def check_lengths(name: str, value: Any, shape: tuple[int, ...], query: torch.Tensor) -> None:
    """Raise `ValueError` unless `value` is an int64 tensor of this shape on the query's device."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        came = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must be an int64 tensor, got {came}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {shape_of(value)}")
    if value.device != query.device:
        raise ValueError(f"{name} must be on the device of query ({query.device}), got {value.device}")


def check_grids(grids: Any, grid: tuple[int, ...], key_grid: tuple[int, ...], query: torch.Tensor) -> bool:
    """Check the true sizes of a padded batch; returns whether their values could be looked at."""
    check_lengths("grids", grids, (query.shape[0], len(grid)), query)
    if grid != key_grid:
        raise ValueError(f"grids must be None where the grid {grid} and the key grid {key_grid} differ")
    if not _is_readable(grids):
        return False
    for sample, sizes in enumerate(grids.tolist()):
        if any(not 1 <= size <= most for size, most in zip(sizes, grid, strict=True)):
            raise ValueError(f"grids[{sample}] must lie between 1 and the padded grid {grid}, got {tuple(sizes)}")
    return True


def check_extra_query(extra_query: Any, query: torch.Tensor) -> None:
    """Check tokens that see the whole grid."""
    check_tensor("extra_query", extra_query)
    check_same("extra_query", extra_query, query)
    wanted = (query.shape[0], "tokens", *query.shape[-2:])
    if extra_query.dim() != 4 or extra_query.shape[0] != query.shape[0] or extra_query.shape[2:] != query.shape[-2:]:
        raise ValueError(
            f"extra_query must have shape [batch, tokens, heads, head_dim] = {wanted}, got {shape_of(extra_query)}"
        )
    operator.index(extra_query.shape[1])  # a number to compilers, see _grid_of


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at without a synchronisation or a graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is torch.Tensor
