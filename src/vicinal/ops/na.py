"""Neighborhood attention under the names that NATTEN gave it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from vicinal.ops.api import attention
from vicinal.pattern.axis import Near

_T = TypeVar("_T", int, bool)


def na1d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Neighborhood attention on a sequence `[batch, length, heads, head_dim]`.

    Arguments mean what they mean in NATTEN; windows larger than the axis and a kernel of 1 are ordinary here.

    >>> query, key, value = torch.randn(3, 1, 100, 2, 16).unbind(0)
    >>> na1d(query, key, value, kernel_size=9, dilation=2, is_causal=True).shape
    torch.Size([1, 100, 2, 16])
    """
    return _neighborhood(
        1, query, key, value, (kernel_size, stride, dilation, is_causal), scale,
        (additional_keys, additional_values), bias, return_lse, backend,
    )  # fmt: skip


def na2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Neighborhood attention on feature maps `[batch, height, width, heads, head_dim]`.

    `bias` is a relative position bias `[heads, 2 * kernel_height - 1, 2 * kernel_width - 1]`.

    >>> query, key, value = torch.randn(3, 1, 14, 20, 2, 32).unbind(0)
    >>> na2d(query, key, value, kernel_size=7, bias=torch.zeros(2, 13, 13)).shape
    torch.Size([1, 14, 20, 2, 32])
    """
    return _neighborhood(
        2, query, key, value, (kernel_size, stride, dilation, is_causal), scale,
        (additional_keys, additional_values), bias, return_lse, backend,
    )  # fmt: skip


def na3d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Neighborhood attention on videos `[batch, time, height, width, heads, head_dim]`.

    >>> query, key, value = torch.randn(3, 1, 4, 8, 8, 2, 16).unbind(0)
    >>> na3d(query, key, value, kernel_size=(3, 5, 5), is_causal=(True, False, False)).shape
    torch.Size([1, 4, 8, 8, 2, 16])
    """
    return _neighborhood(
        3, query, key, value, (kernel_size, stride, dilation, is_causal), scale,
        (additional_keys, additional_values), bias, return_lse, backend,
    )  # fmt: skip


def neighborhood(
    rank: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> tuple[Near, ...]:
    """The pattern that NATTEN's arguments stand for: one `Near` per axis.

    >>> neighborhood(2, (7, 9), dilation=2)
    (Near(7, dilation=2), Near(9, dilation=2))
    """
    kernels = on_each_axis("kernel_size", kernel_size, rank)
    strides = on_each_axis("stride", stride, rank)
    dilations = on_each_axis("dilation", dilation, rank)
    causal = on_each_axis("is_causal", is_causal, rank)
    return tuple(Near(*axis) for axis in zip(kernels, dilations, strides, causal, strict=True))


@functools.lru_cache(maxsize=256)
def _same_on_all_axes(rank: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> tuple[Near, ...]:
    return neighborhood(rank, kernel_size, stride, dilation, is_causal)


def on_each_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One value for each axis: a single value stands for all of them."""
    if value is None:
        raise ValueError(f"{name} must be given for each axis or once for all, got None")
    if not isinstance(value, list | tuple):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(f"{name} must be one value or {rank} values, got {len(value)}: {value!r}")
    return tuple(value)


def _neighborhood(
    rank: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: tuple[Any, Any, Any, Any],
    scale: float | None,
    additional: tuple[torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Any:
    kernel_size, stride, dilation, is_causal = window
    if (
        type(kernel_size) is int
        and type(stride) is int
        and type(dilation) is int
        and type(is_causal) is bool
        and not torch.compiler.is_compiling()  # a compiler would warn that it does not see the cache
    ):
        pattern = _same_on_all_axes(rank, kernel_size, stride, dilation, is_causal)
    else:
        pattern = neighborhood(rank, kernel_size, stride, dilation, is_causal)
    extra_key, extra_value = additional
    if extra_key is None and extra_value is None:
        return attention(query, key, value, pattern, bias=bias, scale=scale, return_lse=return_lse, backend=backend)
    options: dict[str, Any] = {"bias": bias, "scale": scale, "return_lse": return_lse, "backend": backend}
    try:
        return attention(query, key, value, pattern, extra_key=extra_key, extra_value=extra_value, **options)
    except ValueError as error:  # under the name that the caller used
        text = str(error).replace("extra_key", "additional_keys").replace("extra_value", "additional_values")
        raise ValueError(text) from error
