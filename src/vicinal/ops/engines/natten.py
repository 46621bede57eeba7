"""The natten back end: NATTEN's fused kernels, where NATTEN is installed with them and the problem is one of its own.

NATTEN is looked for on the disk and imported only when a call goes to it: its import touches the GPU. Its kernels give
no gradient for the log-sum-exp (they leave it out silently), so where one is asked for, the portable back end computes
the gradients. Not run on a GPU here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicinal.ops.backend import (
    Backend,
    Capability,
    Gradients,
    Inputs,
    Problem,
    gradients_through,
    register,
)
from vicinal.ops.engines.block_mask import row_of
from vicinal.ops.neighborhood import neighborhood_of
from vicinal.ops.packing import Layout, unpack_row
from vicinal.ops.simulator import simulate
from vicinal.ops.tiled.backward import backward as portable_backward
from vicinal.ops.tiled.forward import differentiable
from vicinal.pattern.axis import Near
from vicinal.pattern.bounds import Bounds, Group

HEAD_DIM_MULTIPLE = 8
FAST_HEAD_DIMS = (32, 64, 128)
TILES = {1: (128,), 2: (16, 8), 3: (4, 4, 8)}
"""Tiles of NATTEN's kernels for Hopper, by the number of axes; the same for queries and keys."""


def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    natten = importlib.import_module("natten")
    query, scale = inputs.query, inputs.scale
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not query.shape[0]:
        blank = query.new_empty(*query.shape[:-1], inputs.value.shape[-1])
        return blank, query.new_empty(query.shape[:-1], dtype=lse_dtype)
    if scale == 0.0:  # which NATTEN takes for "the default"
        query, scale = query * 0.0, 1.0
    kinds = _kinds(inputs)
    out, lse = getattr(natten, f"na{len(kinds)}d")(
        query,
        inputs.key,
        inputs.value,
        kernel_size=tuple(kind.kernel_size for kind in kinds),
        stride=tuple(kind.stride for kind in kinds),
        dilation=tuple(kind.dilation for kind in kinds),
        is_causal=tuple(kind.causal for kind in kinds),
        scale=scale,
        return_lse=True,
    )
    return out.contiguous(), lse.to(lse_dtype).contiguous()


def _kinds(inputs: Inputs) -> tuple[Near, ...]:
    """NATTEN's arguments, read off the tables."""
    row = np.frombuffer(row_of(inputs.tables), dtype=np.int32)
    ((member,),) = unpack_row(row, inputs.layout, inputs.grid)
    kinds = neighborhood_of(Bounds((Group((member,)),)))
    assert kinds is not None, "the choice of this back end has seen the same tables"
    return kinds


def backward(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients by NATTEN's own backward, after its forward is run once more; without it where lse has a gradient."""
    if grad_lse is not None:
        return portable_backward(inputs, out, lse, grad_out, grad_lse, needs)
    return gradients_through(forward, inputs, grad_out, None, needs, create_graph=False)


def reason_missing() -> str | None:
    """Why NATTEN's kernels cannot be used here, None where they can."""
    loaded = sys.modules.get("natten")
    try:
        spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec("natten")
    except ValueError:
        spec = None
    if spec is None:
        return "needs NATTEN, which is not installed"
    if spec.origin == "vicinal.adapters.natten":
        return "needs NATTEN, but what is imported as natten is Vicinal's own adapter"
    has_kernels = getattr(loaded, "HAS_LIBNATTEN", None)
    if has_kernels is None:
        folders = map(Path, spec.submodule_search_locations or ())
        has_kernels = any(next(folder.glob("libnatten*"), None) is not None for folder in folders)
    return None if has_kernels else "needs NATTEN with its compiled kernels (libnatten), this one has none"


def _refusals(problem: Problem) -> list[str]:
    """What no capability can tell."""
    reasons = []
    kinds = problem.neighborhood
    if kinds is None:
        reasons.append("takes neighborhoods (Near with windows that fit the axis) only")
    elif min(kind.kernel_size for kind in kinds) < 2:
        reasons.append("takes kernel sizes of at least 2")
    for name, dim in (("head", problem.head_dim), ("value", problem.value_dim)):
        if dim % HEAD_DIM_MULTIPLE:
            reasons.append(f"takes {name} dims that are multiples of {HEAD_DIM_MULTIPLE}, got {dim}")
    return reasons


def leads(problem: Problem) -> bool:
    """Whether the automatic choice prefers NATTEN to our own kernels.

    Where the windows fall on its tiles, so that it masks nothing, NATTEN publishes close to the FLOP bound for half
    precision and these head dims. Elsewhere it masks every tile, and comes after our own. Not measured here.
    """
    kinds = problem.neighborhood
    if kinds is None or problem.dtype.itemsize != 2 or problem.head_dim not in FAST_HEAD_DIMS:
        return False
    if problem.value_dim != problem.head_dim:
        return False
    tile = TILES[len(kinds)]
    return simulate(kinds, problem.grid, query_tile=tile, key_tile=tile).is_block_sparse


def _describe(problem: Problem, bounds: Any, layout: Layout) -> dict[str, Any]:
    del bounds, layout
    kinds = problem.neighborhood or ()
    return {
        "method": "NATTEN's fused kernels; gradients of the log-sum-exp by the portable back end",
        "kernel_size": [kind.kernel_size for kind in kinds],
        "stride": [kind.stride for kind in kinds],
        "dilation": [kind.dilation for kind in kinds],
        "is_causal": [kind.causal for kind in kinds],
    }


register(
    Backend(
        name="natten",
        capability=Capability(
            devices=("cuda",),
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            # beyond 128 its choice on Hopper falls on a kernel that always raises
            max_head_dim=128,
            lacks=frozenset({"has_bias", "has_extra_keys", "has_extra_lengths", "has_grids", "groups", "members"}),
        ),
        forward=forward,
        backward=backward,
        differentiable=differentiable,
        describe=_describe,
        reason_missing=reason_missing,
        further_refusals=_refusals,
        leads=leads,
        is_engine=True,
    )
)
