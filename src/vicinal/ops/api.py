"""The public operator: checks what it is given, chooses a back end, calls the registered operator."""

from __future__ import annotations

import itertools
from operator import index
from typing import Any

import torch

from vicinal.ops import checks, operator, resolve
from vicinal.ops.backend import Call as KnownCall
from vicinal.ops.operator import PLAIN_KEYS, keys_of
from vicinal.ops.packing import pack_sample_tables
from vicinal.pattern.bounds import AnyPattern, Bounds
from vicinal.pattern.compose import pattern_parts


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AnyPattern,
    *,
    bias: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    extra_key: torch.Tensor | None = None,
    extra_value: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
    extra_query: torch.Tensor | None = None,
    grids: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Local attention: each query's softmax runs over just the keys that `pattern` lets it see.

    >>> query, key, value = torch.randn(3, 2, 56, 56, 4, 32).unbind(0)
    >>> attention(query, key, value, Near(7)).shape
    torch.Size([2, 56, 56, 4, 32])
    >>> out, lse = attention(query, key, value, heads(Near(7), Window(8)), return_lse=True)
    >>> lse.shape
    torch.Size([2, 56, 56, 4])

    Args:
        query: `[batch, *grid, heads, head_dim]`, a grid of 1 to 3 axes in the order (time, height, width).
        key: `[batch, *key_grid, kv_heads, head_dim]`; `kv_heads` divides `heads`.
        value: `[batch, *key_grid, kv_heads, value_dim]`.
        pattern: axis kinds, `heads(...)`, `union(...)`, or a `Bounds`.
        bias: relative position bias `[heads, *bias_shape(pattern, grid)]`, a tuple of them for `heads(...)`.
        extra_key, extra_value: `[batch, tokens, kv_heads, ...]`, tokens every query sees in the same softmax.
        extra_lengths: int64 `[batch]`, how many of the extra tokens are valid.
        extra_query: `[batch, tokens, heads, head_dim]`, tokens that see the whole grid and the extra keys.
        grids: int64 `[batch, rank]`, the true sizes in a padded batch.
        scale: factor on the scores, `head_dim ** -0.5` by default.
        return_lse: also return the log-sum-exp of the scores, `[batch, *grid, heads]`.
        backend: `None` to choose, or a name; see `explain`.

    Returns:
        The output `[batch, *grid, heads, value_dim]`; with `extra_query` the pair `(out, extra_out)`. With
        `return_lse` a pair of that and the log-sum-exp, which is then a pair too where there are extra queries.
    """
    signature = None
    if extra_key is None and extra_value is None and extra_lengths is None and extra_query is None and grids is None:
        signature = _signature(query, key, value, pattern, bias, scale, backend)
        try:
            known = _KNOWN.get(signature)
        except TypeError:  # a pattern that is no pattern, or a user's axis kind that does not hash
            signature = known = None
        if known is not None:
            return known(query, key, value, bias, return_lse)
    query, key, value, extra_key, extra_value, extra_query = under_autocast(
        query, key, value, extra_key, extra_value, extra_query
    )
    call = Call(query, key, value, pattern, bias, extra_key, extra_value, extra_lengths, grids, scale)
    ready = call.prepare(backend)
    if signature is not None and not torch._C._is_any_autocast_enabled():
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _, tables, _, layout, name = ready
        _KNOWN[signature] = operator.known(query, key, value, bias, (tables, layout, call.scale, name))
    if extra_query is None:
        out, lse = call.run(ready)
        return (out, lse) if return_lse else out
    checks.check_extra_query(extra_query, query)
    extra_ready = call.prepare_extra(extra_query, backend)
    out, lse = call.run(ready)
    extra_out, extra_lse = call.run_extra(extra_query, extra_ready)
    return ((out, extra_out), (lse, extra_lse)) if return_lse else (out, extra_out)


MOST_KNOWN = 1024
"""Calls to remember; with sizes that change all the time, all are forgotten now and then."""

_KNOWN: dict[Any, KnownCall] = {}

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_SCALES = (float, type(None))
_NAMES = (str, type(None))

# names of this module are found sooner than those in torch
_is_compiling = torch.compiler.is_compiling
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set


def _signature(query: Any, key: Any, value: Any, pattern: Any, bias: Any, scale: Any, backend: Any) -> Any:
    """All that checks and choices depend on, for a plain call; None where it is not one.

    A call like one before needs no check, which is most of what a small problem costs. Only exact types count: True
    equals 1.0, but is no scale. Dispatch keys tell which modes and transforms are on, autocast too, and what kinds of
    tensors there are.
    """
    if (
        _is_compiling()
        or type(query) not in _TENSORS
        or type(key) not in _TENSORS
        or type(value) not in _TENSORS
        or not (bias is None or type(bias) in _TENSORS)
        or type(scale) not in _SCALES
        or type(backend) not in _NAMES
    ):
        return None
    keys = keys_of(query).raw_repr()
    try:
        signature: Any = (
            pattern,
            scale,
            backend,
            _included().raw_repr(),
            _excluded().raw_repr(),
            keys,
            keys_of(key).raw_repr(),
            keys_of(value).raw_repr(),
            query.shape,
            key.shape,
            value.shape,
            query.stride(),
            key.stride(),
            value.stride(),
            query.dtype,
            key.dtype,
            value.dtype,
        )
        if bias is not None:
            signature += (keys_of(bias).raw_repr(), bias.shape, bias.stride(), bias.dtype)
    except RuntimeError:  # a tensor without strides
        return None
    if keys != PLAIN_KEYS:  # there may be several devices of a kind
        signature += (query.device, key.device, value.device, None if bias is None else bias.device)
    return signature


Ready = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, ...], str]
"""What the registered operator is called with besides keys and values: queries, tables, bias, layout, back end."""


class Call:
    """One checked call: the tensors, and what the registered operator needs besides."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: AnyPattern,
        bias: torch.Tensor | tuple[torch.Tensor, ...] | None,
        extra_key: torch.Tensor | None,
        extra_value: torch.Tensor | None,
        extra_lengths: torch.Tensor | None,
        grids: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        self.pattern_key, rank = resolve.key_of(pattern)
        self.grid, self.key_grid = checks.check_qkv(query, key, value, rank)
        self.scale = checks.check_scale(scale, query.shape[-1])
        checks.check_extra_keys(extra_key, extra_value, extra_lengths, query, key, value)
        if grids is not None and checks.check_grids(grids, self.grid, self.key_grid, query):
            _check_samples(pattern, grids)
        self.query, self.key, self.value, self.pattern = query, key, value, pattern
        self.bias = bias
        self.extra_key, self.extra_value, self.extra_lengths = extra_key, extra_value, extra_lengths
        self.grids = grids

    def sizes(self, grid: tuple[int, ...], has_bias: bool) -> tuple[Any, ...]:
        """What `resolve.make_problem` takes after the pattern."""
        features = (has_bias, self.extra_key is not None, self.extra_lengths is not None, self.grids is not None)
        return (
            self.query.device.type,
            self.query.dtype,
            grid,
            self.key_grid,
            # whole numbers also where a compiler takes sizes for symbols: a graph is for these
            index(self.query.shape[-2]),
            index(self.key.shape[-2]),
            index(self.query.shape[-1]),
            index(self.value.shape[-1]),
            features,
        )

    def prepare(self, backend: str | None) -> Ready:
        """Everything for the grid's queries, with all that can be refused refused."""
        layout, name = resolve.chosen(self.pattern_key, self.sizes(self.grid, self.bias is not None), backend)
        bias = None
        if self.bias is not None:
            shapes, heads = resolve.bias_shapes(layout)
            bias = checks.flatten_bias(self.bias, shapes, heads, self.query)
        if self.grids is None:
            tables = resolve.tables(self.pattern_key, self.grid, self.key_grid, self.query)
        else:
            assert not isinstance(self.pattern, Bounds)
            tables = pack_sample_tables(self.pattern, self.grid, self.grids)
        return self.query, tables, bias, layout, name

    def prepare_extra(self, extra_query: torch.Tensor, backend: str | None) -> Ready | None:
        """Everything for queries that see the whole grid; None where there are none."""
        rank, tokens = len(self.grid), index(extra_query.shape[1])
        if not tokens:
            return None
        grid = (tokens, *(1,) * (rank - 1))
        pattern_key = resolve.whole_grid_key(rank)
        layout, name = resolve.chosen(pattern_key, self.sizes(grid, False), backend)
        if self.grids is None:
            tables = resolve.tables(pattern_key, grid, self.key_grid, self.query)
        else:
            tables = pack_whole_tables(self.grids, self.key_grid, grid)
        query = extra_query.unflatten(1, grid) if rank > 1 else extra_query
        return query, tables, None, layout, name

    def run_extra(self, extra_query: torch.Tensor, ready: Ready | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of queries that see the whole grid."""
        if ready is None:
            out = extra_query.new_empty(*extra_query.shape[:-1], self.value.shape[-1])
            return out, out.new_empty(out.shape[:-1], dtype=torch.promote_types(out.dtype, torch.float32))
        out, lse = self.run(ready)
        rank = len(self.grid)
        return (out.flatten(1, rank), lse.flatten(1, rank)) if rank > 1 else (out, lse)

    def run(self, ready: Ready) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        query, tables, bias, layout, name = ready
        extras = (self.extra_key, self.extra_value, self.extra_lengths)
        plain = name == "tiled" and self.grids is None and self.extra_lengths is None and _is_exporting()
        attend = operator.attend_plain if plain else torch.ops.vicinal.attend
        out, lse = attend(query, self.key, self.value, tables, bias, *extras, layout, self.scale, name)
        return out, lse


def pack_whole_tables(grids: torch.Tensor, key_grid: tuple[int, ...], grid: tuple[int, ...]) -> torch.Tensor:
    """Per-sample tables by which every query of `grid` sees its sample's whole key grid."""
    zero = grids[:, :1] * 0
    columns = []
    for axis, queries in enumerate(grid):
        length = grids[:, axis, None].clamp(1, key_grid[axis])
        row = zero.expand(-1, queries)
        columns += [zero + 1, length, zero, zero + queries, row, row + length, row]
    return torch.cat(columns, 1).to(torch.int32)


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as autocast wants them for a matrix product; float64 and None stay as they are."""
    first = tensors[0]
    if not isinstance(first, torch.Tensor) or not torch.amp.is_autocast_available(first.device.type):
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _is_exporting() -> bool:
    """Whether a program of plain ATen operations is wanted; a strict export traces the operator instead."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _check_samples(pattern: AnyPattern, grids: torch.Tensor) -> None:
    """Raise `ValueError` where a sample's own grid does not suit the pattern, as on its own it would."""
    if isinstance(pattern, Bounds):
        return
    for sample, sizes in enumerate(grids.tolist()):
        for kinds in itertools.chain.from_iterable(pattern_parts(pattern, len(sizes))[0]):
            for kind, length in zip(kinds, sizes, strict=True):
                refusal = kind.refusal(length)
                if refusal:
                    raise ValueError(f"grids[{sample}] = {tuple(sizes)} does not suit {kind!r}: {refusal}")
