"""NATTEN's two-step functions of 0.14 to 0.17, heads first: scores of every query's window, and sums by weights.

Query, key and value are `[batch, heads, *grid, head_dim]`; scores and weights `[batch, heads, *grid, window]`, the
window in row-major order, scores against additional keys `[batch, heads, tokens, head_dim]` after it. There is no
scale: these models scale the query. Tensors go to our operator as transposed views, and what comes back is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from vicinal.adapters.natten.fused import bias_like
from vicinal.adapters.natten.versions import show_signature
from vicinal.ops import apply_scores, attention_scores
from vicinal.ops.na import neighborhood
from vicinal.pattern import Near

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool] | None
_Given = TypeVar("_Given", torch.Tensor, torch.Tensor | None)


def na1d_qk(
    query: torch.Tensor,
    key: torch.Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: torch.Tensor | None = None,
    is_causal: Flags = False,
    rpb: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of a sequence `[batch, heads, length, head_dim]` against its windows, `[batch, heads, length, window]`.

    >>> query, key = torch.randn(2, 1, 4, 20, 8).unbind(0)
    >>> na1d_qk(query, key, kernel_size=5, dilation=2, rpb=torch.zeros(4, 9)).shape
    torch.Size([1, 4, 20, 5])
    """
    return _scores(query, key, _pattern(1, kernel_size, dilation, is_causal), additional_keys, rpb)


def na1d_av(
    attn: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: torch.Tensor | None = None,
    is_causal: Flags = False,
) -> torch.Tensor:
    """Sums of values `[batch, heads, length, head_dim]` by weights `[batch, heads, length, window]`.

    >>> na1d_av(torch.randn(1, 4, 20, 5), torch.randn(1, 4, 20, 8), kernel_size=5).shape
    torch.Size([1, 4, 20, 8])
    """
    return _apply(attn, value, _pattern(1, kernel_size, dilation, is_causal), additional_values)


def na2d_qk(
    query: torch.Tensor,
    key: torch.Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: torch.Tensor | None = None,
    is_causal: Flags = False,
    rpb: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of a feature map `[batch, heads, height, width, head_dim]`, `[batch, heads, height, width, window]`.

    >>> query, key = torch.randn(2, 1, 4, 9, 12, 8).unbind(0)
    >>> na2d_qk(query, key, kernel_size=(3, 5)).shape
    torch.Size([1, 4, 9, 12, 15])
    """
    return _scores(query, key, _pattern(2, kernel_size, dilation, is_causal), additional_keys, rpb)


def na2d_av(
    attn: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: torch.Tensor | None = None,
    is_causal: Flags = False,
) -> torch.Tensor:
    """Sums of values `[batch, heads, height, width, head_dim]` by weights `[batch, heads, height, width, window]`.

    >>> na2d_av(torch.randn(1, 4, 9, 12, 15), torch.randn(1, 4, 9, 12, 8), kernel_size=(3, 5)).shape
    torch.Size([1, 4, 9, 12, 8])
    """
    return _apply(attn, value, _pattern(2, kernel_size, dilation, is_causal), additional_values)


def na3d_qk(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Scores of a video `[batch, heads, time, height, width, head_dim]`, `[batch, heads, *grid, window]`.

    Takes what `na2d_qk` takes (0.17), or kernel_size_d, kernel_size, dilation_d, dilation, additional_keys (0.15).

    >>> query, key = torch.randn(2, 1, 2, 4, 6, 6, 8).unbind(0)
    >>> na3d_qk(query, key, (3, 5, 5)).shape, na3d_qk(query, key, 3, 5, 1, 1).shape
    (torch.Size([1, 2, 4, 6, 6, 75]), torch.Size([1, 2, 4, 6, 6, 75]))
    """
    given = _three_axes("na3d_qk", ("additional_keys", "is_causal", "rpb"), args, options)
    return _scores(query, key, _pattern_of(given), given.get("additional_keys"), given.get("rpb"))


def na3d_av(attn: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Sums of values `[batch, heads, time, height, width, head_dim]` by weights `[batch, heads, *grid, window]`.

    Takes what `na2d_av` takes (0.17), or kernel_size_d, kernel_size, dilation_d, dilation, additional_values (0.15).

    >>> na3d_av(torch.randn(1, 2, 4, 6, 6, 75), torch.randn(1, 2, 4, 6, 6, 8), (3, 5, 5)).shape
    torch.Size([1, 2, 4, 6, 6, 8])
    """
    given = _three_axes("na3d_av", ("additional_values", "is_causal"), args, options)
    return _apply(attn, value, _pattern_of(given), given.get("additional_values"))


def na1d_qk_with_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: Sizes,
    dilation: Sizes,
    additional_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """`na1d_qk` with its bias in the third place, as in 0.15.

    >>> na1d_qk_with_bias(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.zeros(2, 5), 3, 1).shape
    torch.Size([1, 2, 9, 3])
    """
    return na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_qk_with_bias(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: Sizes,
    dilation: Sizes,
    additional_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """`na2d_qk` with its bias in the third place, as in 0.15.

    >>> na2d_qk_with_bias(torch.randn(1, 2, 5, 5, 4), torch.randn(1, 2, 5, 5, 4), None, 3, 1).shape
    torch.Size([1, 2, 5, 5, 9])
    """
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na3d_qk_with_bias(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, *args: Any, **options: Any
) -> torch.Tensor:
    """`na3d_qk` with its bias in the third place, as in 0.15.

    >>> na3d_qk_with_bias(torch.randn(1, 2, 3, 5, 5, 4), torch.randn(1, 2, 3, 5, 5, 4), None, 3, 5, 1, 1).shape
    torch.Size([1, 2, 3, 5, 5, 75])
    """
    return na3d_qk(query, key, *args, rpb=bias, **options)


def natten1dqkrpb(
    query: torch.Tensor, key: torch.Tensor, rpb: torch.Tensor | None, kernel_size: Sizes, dilation: Sizes
) -> torch.Tensor:
    """Scores of a sequence with a position bias `[heads, 2 * kernel_size - 1]`.

    >>> natten1dqkrpb(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.zeros(2, 5), 3, 1).shape
    torch.Size([1, 2, 9, 3])
    """
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(
    query: torch.Tensor, key: torch.Tensor, rpb: torch.Tensor | None, kernel_size: Sizes, dilation: Sizes
) -> torch.Tensor:
    """Scores of a feature map with a position bias `[heads, 2 * kernel_size - 1, 2 * kernel_size - 1]`.

    >>> query, key = torch.randn(2, 1, 4, 9, 12, 8).unbind(0)
    >>> natten2dqkrpb(query, key, torch.zeros(4, 13, 13), 7, 1).shape
    torch.Size([1, 4, 9, 12, 49])
    """
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten3dqkrpb(
    query: torch.Tensor,
    key: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> torch.Tensor:
    """Scores of a video with a position bias `[heads, 2 * kernel_size_d - 1, 2 * kernel_size - 1, ...]`.

    >>> query, key = torch.randn(2, 1, 2, 4, 6, 6, 8).unbind(0)
    >>> natten3dqkrpb(query, key, torch.zeros(2, 5, 9, 9), 3, 5, 1, 1).shape
    torch.Size([1, 2, 4, 6, 6, 75])
    """
    return na3d_qk(query, key, kernel_size_d, kernel_size, dilation_d, dilation, rpb=rpb)


def natten1dqk(query: torch.Tensor, key: torch.Tensor, kernel_size: Sizes, dilation: Sizes) -> torch.Tensor:
    """`na1d_qk` under its early name; its dilation must be given, for once the kernel was left out.

    >>> natten1dqk(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), 3, 1).shape
    torch.Size([1, 2, 9, 3])
    """
    return na1d_qk(query, key, kernel_size, dilation)


def natten1dav(attn: torch.Tensor, value: torch.Tensor, kernel_size: Sizes, dilation: Sizes) -> torch.Tensor:
    """`na1d_av` under its early name; its dilation must be given, for once the kernel was left out.

    >>> natten1dav(torch.randn(1, 2, 9, 3), torch.randn(1, 2, 9, 4), 3, 1).shape
    torch.Size([1, 2, 9, 4])
    """
    return na1d_av(attn, value, kernel_size, dilation)


def natten2dqk(query: torch.Tensor, key: torch.Tensor, kernel_size: Sizes, dilation: Sizes) -> torch.Tensor:
    """`na2d_qk` under its early name; its dilation must be given, for once the kernel was left out.

    >>> natten2dqk(torch.randn(1, 2, 5, 6, 4), torch.randn(1, 2, 5, 6, 4), 3, 1).shape
    torch.Size([1, 2, 5, 6, 9])
    """
    return na2d_qk(query, key, kernel_size, dilation)


def natten2dav(attn: torch.Tensor, value: torch.Tensor, kernel_size: Sizes, dilation: Sizes) -> torch.Tensor:
    """`na2d_av` under its early name; its dilation must be given, for once the kernel was left out.

    >>> natten2dav(torch.randn(1, 2, 5, 6, 9), torch.randn(1, 2, 5, 6, 4), 3, 1).shape
    torch.Size([1, 2, 5, 6, 4])
    """
    return na2d_av(attn, value, kernel_size, dilation)


natten3dqk, natten3dav = na3d_qk, na3d_av


def _pattern(rank: int, kernel_size: Sizes, dilation: Sizes | None, is_causal: Flags) -> tuple[Near, ...]:
    """The window on each axis; NATTEN takes None for a default."""
    return neighborhood(
        rank, kernel_size, 1, 1 if dilation is None else dilation, False if is_causal is None else is_causal
    )


def _pattern_of(given: dict[str, Any]) -> tuple[Near, ...]:
    return _pattern(3, given["kernel_size"], given.get("dilation"), given.get("is_causal"))


_SPLIT = ("kernel_size_d", "kernel_size", "dilation_d", "dilation")


def _three_axes(function: str, more: tuple[str, ...], args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, from 0.17's order or from 0.15's, which has two numbers each for kernel and dilation."""
    is_split = "kernel_size_d" in options or (len(args) > 2 and isinstance(args[2], int))
    names = (*(_SPLIT if is_split else ("kernel_size", "dilation")), *more)
    given = dict(zip(names, args, strict=False))
    clash, unknown = sorted(given.keys() & options.keys()), sorted(options.keys() - set(names))
    missing = [name for name in (_SPLIT if is_split else names[:1]) if name not in {**given, **options}]
    if len(args) > len(names) or clash or unknown or missing:
        wrong = f"given twice: {clash}, unknown: {unknown}, missing: {missing}"
        raise TypeError(f"{function}() takes two tensors, then {', '.join(names)}; got {len(args)} more, {wrong}")
    given = {**given, **options}
    if is_split:
        given["kernel_size"] = (given.pop("kernel_size_d"), given["kernel_size"], given["kernel_size"])
        given["dilation"] = (given.pop("dilation_d"), given["dilation"], given["dilation"])
    return given


for _function, _leading, _more in (
    (na3d_qk, ("query", "key"), ("additional_keys", "is_causal", "rpb")),
    (na3d_av, ("attn", "value"), ("additional_values", "is_causal")),
):
    _show: Callable[..., None] = show_signature
    _show(_function, _leading, {(0, 17): ("kernel_size", "dilation", *_more), (0, 15): _SPLIT})


def _heads_last(tensor: _Given) -> _Given:
    """A view `[batch, *grid, heads, dim]` of `[batch, heads, *grid, dim]`."""
    return tensor.movedim(1, -2) if isinstance(tensor, torch.Tensor) and tensor.dim() > 2 else tensor


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: tuple[Near, ...],
    additional_keys: torch.Tensor | None,
    rpb: torch.Tensor | None,
) -> torch.Tensor:
    scores = attention_scores(
        _heads_last(query),
        _heads_last(key),
        pattern,
        bias=bias_like(rpb, query),
        extra_key=_heads_last(additional_keys),
        scale=1.0,
    )
    return scores.movedim(-2, 1)


def _apply(
    attn: torch.Tensor, value: torch.Tensor, pattern: tuple[Near, ...], additional_values: torch.Tensor | None
) -> torch.Tensor:
    # under autocast a softmax answers in float32; NATTEN sums in the values' precision
    weights = attn.to(value.dtype)
    out = apply_scores(_heads_last(weights), _heads_last(value), pattern, extra_value=_heads_last(additional_values))
    return out.movedim(-2, 1)
