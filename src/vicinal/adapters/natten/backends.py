"""What NATTEN tells about its back ends and their tile shapes, answered for ours."""

from __future__ import annotations

from typing import Any

import torch

from vicinal.ops import explain
from vicinal.pattern import Full, Near

HAS_LIBNATTEN = False
"""Whether NATTEN's compiled kernels are there. They are not, and nothing here needs them."""


def choose_backend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, torch_compile: bool = False) -> str:
    """The name of the back end that a fused function takes, which it also accepts as `backend`.

    >>> query = torch.empty(1, 8, 8, 2, 16)
    >>> choose_backend(query, query, query) in ("cpu", "tiled")
    True
    """
    del torch_compile
    return explain(query, key, value, Near(2)).backend


def get_compatible_backends(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, torch_compile: bool = False
) -> list[str]:
    """The names of all back ends that could, the best first.

    >>> query = torch.empty(1, 8, 8, 2, 16)
    >>> get_compatible_backends(query, query, query)[-2:]
    ['tiled', 'reference']
    """
    del torch_compile
    return _able(query, key, value, Near(2))


def choose_fmha_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> str:
    """`choose_backend` for `attention`."""
    return get_compatible_fmha_backends(query, key, value, is_causal, is_varlen, torch_compile)[0]


def get_compatible_fmha_backends(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> list[str]:
    """`get_compatible_backends` for `attention`."""
    del is_causal, is_varlen, torch_compile
    return _able(query, key, value, Full())


def _able(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Near | Full) -> list[str]:
    explanation = explain(query, key, value, pattern)
    return [explanation.backend, *(name for name, reasons in explanation.refused.items() if not reasons)]


def no_configs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **more: Any) -> list[Any]:
    """Tile shapes to choose from: none, as NATTEN answers for a kernel that cannot run. Ours plan their own.

    >>> query = torch.empty(1, 8, 8, 2, 16)
    >>> no_configs(query, query, query)
    []
    """
    del query, key, value, options, more
    return []


CONFIGS = (
    *(
        f"get_{direction}configs_for_cutlass{kind}_{operation}"
        for direction in ("", "bwd_")
        for kind in ("", "_hopper", "_blackwell")
        for operation in ("fna", "fmha")
    ),
    "get_configs_for_flex_fna",
    "get_configs_for_flex_fmha",
)
"""The functions of NATTEN that answer so."""
