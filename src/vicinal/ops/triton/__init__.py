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
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def reason_missing() -> str | None:
    """Why this installation cannot run Triton kernels, or None.

    CPU tensors ask too, perhaps in a forked process: the device is looked at only where the process uses one already.
    """
    if not _has_triton():
        return "Triton is not installed; torch for CUDA and ROCm brings it along"
    if torch.version.hip is None and torch.cuda.is_initialized():
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
    from vicinal.ops.triton.plan import pack

    return pack(choices(_costs(problem, bounds)))


def _costs(problem: Problem, bounds: Any) -> Any:
    """For each member the tiles of each pass: forced ones, else measured ones, else those that the model chooses."""
    from vicinal.ops.triton import choose, override, tuned
    from vicinal.ops.triton.plan import PASSES

    sizes = (problem.head_dim, problem.value_dim)
    costs = choose.choose_all(bounds, *sizes, problem.dtype, choose.this_device(), has_bias=problem.has_bias)
    gpu = choose.this_gpu()
    parts = [(member, number > 0) for group in bounds.groups for number, member in enumerate(group.members)]
    for place, (member, is_later) in enumerate(parts):
        own = list(costs[place])
        for at, name in enumerate(PASSES):
            other = override.forced_tiles(name)
            if other is None and gpu is not None:
                heavy = is_later or problem.has_bias
                other = tuned.find(tuned.key_of(member, *sizes, problem.dtype, name, is_heavy=heavy, gpu=gpu))
            if other is not None:
                own[at] = choose.cost_of(member, other, *sizes, name)
        costs[place] = (own[0], own[1], own[2])
    return costs


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
