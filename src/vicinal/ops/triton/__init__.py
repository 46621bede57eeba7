"""The GPU back end: Triton kernels that read the bounds tables, so that one family of them runs every pattern.

Nothing is compiled when the package is installed, and Triton is imported when a call comes that may need it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from vicinal.ops.backend import Backend, Capability, Gradients, Inputs, Problem, register
from vicinal.ops.packing import Layout
from vicinal.ops.tiled.forward import differentiable

MOST_CHANNELS = 256
LEAST_CAPABILITY = (8, 0)


@functools.cache
def reason_missing() -> str | None:
    """Why this installation cannot run Triton kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; torch for CUDA and ROCm brings it along"
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            needed, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
            return f"needs a GPU of compute capability {needed} or later, this one has {found}"
    return None


def _forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    from vicinal.ops.triton.launch import forward

    return forward(inputs)


def _backward(
    inputs: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    from vicinal.ops.triton.backward import backward

    return backward(inputs, out, lse, grad_out, grad_lse, needs)


def _plan(problem: Problem, bounds: Any) -> tuple[int, ...]:
    """The tiles of every pass, as integers; none (ordinary ones) where there is no pattern to go by."""
    if bounds is None:
        return ()
    from vicinal.ops.triton.choose import choices
    from vicinal.ops.triton.override import with_forced
    from vicinal.ops.triton.plan import pack

    costs = _costs(problem, bounds)
    return pack([with_forced(choice) for choice in choices(costs)])


def _costs(problem: Problem, bounds: Any) -> Any:
    from vicinal.ops.triton.choose import choose_all, this_device

    sizes = (problem.head_dim, problem.value_dim, problem.dtype)
    return choose_all(bounds, *sizes, this_device(), has_bias=problem.has_bias)


def _describe(problem: Problem, bounds: Any, layout: Layout) -> dict[str, Any]:
    from vicinal.ops.triton.choose import this_device
    from vicinal.ops.triton.plan import PASSES

    del layout
    device, costs = this_device(), _costs(problem, bounds)
    return {
        "method": "Triton kernels, one choice of tiles for each pass over each union member",
        "device": f"{device.kind} {device.capability}",
        "members": [{name: cost.to_dict() for name, cost in zip(PASSES, member, strict=True)} for member in costs],
    }


register(
    Backend(
        name="triton",
        capability=Capability(
            devices=("cuda",),
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            max_head_dim=MOST_CHANNELS,
        ),
        forward=_forward,
        backward=_backward,
        differentiable=differentiable,
        describe=_describe,
        reason_missing=reason_missing,
        plan=_plan,
    )
)
