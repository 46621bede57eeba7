"""NATTEN's modules of 0.14 to 0.21: one class each, which takes the arguments of any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vicinal import layers
from vicinal.adapters.natten.versions import Orders, asked, by_name
from vicinal.ops import apply_scores, attention_scores

_FIRST = ("embed_dim", "num_heads", "kernel_size")
_LAST = ("qkv_bias", "qk_scale", "attn_drop", "proj_drop")
_ORDERS: Orders = {
    (0, 14): (*_FIRST, "dilation", "bias", *_LAST),
    (0, 16): (*_FIRST, "dilation", "is_causal", "rel_pos_bias", *_LAST, "use_experimental_ops"),
    (0, 20): (*_FIRST, "stride", "dilation", "is_causal", "qkv_bias", "qk_scale", "proj_drop"),
}
_ORDERS_3D: Orders = {**_ORDERS, (0, 14): (*_FIRST, "kernel_size_d", "dilation", "dilation_d", "bias", *_LAST)}

PADS_BEFORE = (0, 16)
"""The release in which modules stopped to pad small inputs, and to have a bias unless told otherwise."""


class _NattenModule(layers.neighborhood._NeighborhoodAttention):
    """Multi-head neighborhood attention over `[batch, *grid, embed_dim]`, from the arguments of any release.

    `dim` and `embed_dim` are the same, as are `bias` (until 0.15) and `rel_pos_bias` (0.17). Where `bias` is given, or
    `install(version=...)` named a release before 0.16, inputs smaller than the dilated window are padded with zeros
    that become tokens, as they were then; and if neither bias is given, that release has one and later ones have none.
    """

    orders: ClassVar[Orders]

    def __init__(self, *args: Any, **options: Any) -> None:
        given = self._read(args, options)
        is_early = asked.is_before(PADS_BEFORE) or bool({"bias", "kernel_size_d", "dilation_d"} & given.keys())
        has_bias = given.get("bias", given.get("rel_pos_bias"))
        attn_drop = given.get("attn_drop") or 0.0
        if not 0.0 <= attn_drop < 1.0:
            raise ValueError(f"attn_drop must be a probability in 0 <= p < 1, got {attn_drop}")
        super().__init__(
            given["embed_dim"],
            given["num_heads"],
            _per_axis(given, "kernel_size"),
            stride=_or(given.get("stride"), 1),
            dilation=_or(_per_axis(given, "dilation"), 1),
            is_causal=_or(given.get("is_causal"), False),
            qkv_bias=_or(given.get("qkv_bias"), True),
            qk_scale=given.get("qk_scale"),
            proj_drop=_or(given.get("proj_drop"), 0.0),
            rel_pos_bias=is_early if has_bias is None else bool(has_bias),
            pad_mode="legacy" if is_early else "none",
        )
        # what code reads from a module of NATTEN
        self.na_dim = self.rank
        self.scale = self.head_dim**-0.5 if self.scale is None else self.scale
        self.stride = tuple(axis.stride for axis in self.pattern)
        self.is_causal = tuple(axis.causal for axis in self.pattern)
        self.attn_drop_rate = attn_drop
        self.attn_drop = nn.Dropout(attn_drop)

    @classmethod
    def _read(cls, args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments under one set of names."""
        renamed = {"embed_dim" if name == "dim" else name: value for name, value in options.items()}
        if len(renamed) < len(options):
            raise TypeError(f"{cls.__name__}() got both dim and embed_dim, which are the same")
        given = by_name(cls.__name__, cls.orders, args, renamed)
        missing = [name for name in _FIRST if name not in given]
        if missing:
            raise TypeError(f"{cls.__name__}() missing arguments: {', '.join(missing)}")
        if "bias" in given and "rel_pos_bias" in given:
            raise TypeError(f"{cls.__name__}() got both bias and rel_pos_bias, which are the same")
        return given

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """In one step; in two where weights are to be dropped between them."""
        if not self.training or not self.attn_drop_rate:
            return super()._attend(query, key, value)
        scores = attention_scores(query, key, self.pattern, bias=self.rpb, scale=self.scale)
        weights = self.attn_drop(scores.softmax(-1)).to(value.dtype)
        return apply_scores(weights, value, self.pattern)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _per_axis(given: Mapping[str, Any], name: str) -> Any:
    """A size for all axes, or, as 0.15 had it, one for time and one for the other two."""
    in_time = given.get(f"{name}_d")
    rest = given.get(name)
    if in_time is None:
        return rest
    rest = _or(rest, 1)
    return (in_time, rest, rest)


class NeighborhoodAttention1D(_NattenModule):
    """`natten.NeighborhoodAttention1D` over sequences `[batch, length, embed_dim]`.

    >>> NeighborhoodAttention1D(embed_dim=64, num_heads=2, kernel_size=7, stride=2)(torch.randn(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    rank = 1
    orders = _ORDERS


class NeighborhoodAttention2D(_NattenModule):
    """`natten.NeighborhoodAttention2D` over feature maps `[batch, height, width, embed_dim]`.

    >>> module = NeighborhoodAttention2D(dim=64, kernel_size=7, dilation=2, num_heads=2, rel_pos_bias=True)
    >>> module(torch.randn(1, 14, 14, 64)).shape, sorted(module.state_dict())
    (torch.Size([1, 14, 14, 64]), ['proj.bias', 'proj.weight', 'qkv.bias', 'qkv.weight', 'rpb'])
    """

    rank = 2
    orders = _ORDERS


class NeighborhoodAttention3D(_NattenModule):
    """`natten.NeighborhoodAttention3D` over videos `[batch, time, height, width, embed_dim]`.

    >>> module = NeighborhoodAttention3D(32, 2, kernel_size=5, kernel_size_d=3, bias=True)
    >>> module(torch.randn(1, 4, 6, 6, 32)).shape, module.rpb.shape
    (torch.Size([1, 4, 6, 6, 32]), torch.Size([2, 5, 9, 9]))
    """

    rank = 3
    orders = _ORDERS_3D


class NeighborhoodAttention(NeighborhoodAttention2D):
    """The two-dimensional module under its first name and with the order of arguments that it had until 0.14.4.

    >>> NeighborhoodAttention(64, 7, 2)(torch.randn(1, 14, 14, 64)).shape
    torch.Size([1, 14, 14, 64])
    """

    orders: ClassVar[Orders] = {(0, 14): ("embed_dim", "kernel_size", "num_heads", *_LAST, "dilation", "bias")}

    def __init__(self, *args: Any, **options: Any) -> None:
        given = self._read(args, options)
        super().__init__(**{**given, "bias": given.get("bias", True)})
