"""Other packages' own attention, where they are installed: timm's and transformers' Swin windows, and NATTEN."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vicinal.measure.peers.window import from_windows, shift_mask, square_window, to_windows
from vicinal.measure.task import HEADS_LAST, Layout, NotRun, Prepared, Task
from vicinal.pattern import Near


def _import(package: str, module: str) -> Any:
    """Another package's module; the run goes on without it where it is missing or does not suit this torch."""
    if importlib.util.find_spec(package) is None:
        raise NotRun(f"{package} is not installed")
    mend_torchvision()
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise NotRun(f"{package} cannot be imported: {str(error).splitlines()[0]}") from error


@functools.cache
def mend_torchvision() -> None:
    """Let torchvision be imported where its compiled half was built for another torch than the one that is here.

    The wheel on PyPI is built for CUDA. Beside a torch without CUDA its library does not load, and then its import,
    and with it that of transformers' and timm's models, fails at a missing operator. Declared here, without a kernel,
    that operator costs nothing and is not called by anything that only wants the import. Without effect elsewhere.
    """
    spec = importlib.util.find_spec("torchvision")
    library = None if spec is None or spec.origin is None else Path(spec.origin).parent / "_C.so"
    if library is None or not library.is_file() or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        ctypes.CDLL(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _packed_windows(task: Task, size: int, shift: int) -> Layout:
    """Windows with query, key and value side by side, as a projection of all three leaves them."""
    problem = task.problem
    channels = problem.heads * problem.head_dim

    def enter_out(tensor: torch.Tensor) -> torch.Tensor:
        return to_windows(tensor.flatten(-2), size, shift).contiguous()

    def leave_out(windows: torch.Tensor) -> torch.Tensor:
        whole = from_windows(windows, problem.grid, size, shift)
        return whole.unflatten(-1, (problem.heads, problem.head_dim))

    def enter(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (torch.cat([enter_out(tensor) for tensor in tensors], -1),)

    def leave_inputs(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(map(leave_out, tensors[0].split(channels, -1)))

    return Layout("[batch * windows, size * size, 3 * channels]", enter, leave_inputs, enter_out, leave_out)


class _Slice(nn.Module):
    """Stands where a projection was: takes one third of the channels."""

    def __init__(self, begin: int, size: int) -> None:
        super().__init__()
        self.channels = slice(begin, begin + size)

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        return packed[..., self.channels]


def timm_window(task: Task) -> list[Prepared]:
    """The `WindowAttention` of timm without projections, its position bias zero, on windows that are cut already.

    Both its default and its fused form, which it counts as experimental.
    """
    size, shift = square_window(task)
    swin = _import("timm", "timm.models.swin_transformer")
    problem = task.problem
    mask = shift_mask(problem.grid, size, shift, -100.0)  # timm's own "hidden"
    if mask is not None:
        mask = mask.to(task.device, task.dtype)
    layout = _packed_windows(task, size, shift)
    version = importlib.metadata.version("timm")
    candidates = []
    for is_fused in (False, True):
        module = swin.WindowAttention(problem.heads * problem.head_dim, num_heads=problem.heads, window_size=size)
        module.qkv, module.proj, module.fused_attn = nn.Identity(), nn.Identity(), is_fused
        module = _frozen(module, task)

        def call(packed: torch.Tensor, module: nn.Module = module) -> torch.Tensor:
            out: torch.Tensor = module(packed, mask)
            return out

        candidates.append(Prepared(call, layout, f"{version}, fused" if is_fused else version))
    return candidates


def transformers_window(task: Task) -> list[Prepared]:
    """The `SwinAttention` of transformers 5 without projections, its bias zero, on windows that are cut already."""
    size, shift = square_window(task)
    swin = _import("transformers", "transformers.models.swin.modeling_swin")
    version = importlib.metadata.version("transformers")
    if int(version.partition(".")[0]) < 5:
        raise NotRun(f"written for transformers 5, {version} is installed")
    problem = task.problem
    channels = problem.heads * problem.head_dim
    mask = shift_mask(problem.grid, size, shift, -100.0)
    if mask is not None:
        mask = mask.to(task.device, task.dtype)
    module = swin.SwinAttention(swin.SwinConfig(attn_implementation="sdpa"), channels, problem.heads, size)
    module.q_proj, module.k_proj, module.v_proj = (_Slice(part * channels, channels) for part in range(3))
    module.o_proj = nn.Identity()
    module = _frozen(module, task)

    def call(packed: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module(packed, mask)[0]
        return out

    return [Prepared(call, _packed_windows(task, size, shift), f"{version}, sdpa")]


def _frozen(module: nn.Module, task: Task) -> nn.Module:
    """The module for inference, its remaining parameters (the position bias) zero."""
    for parameter in module.requires_grad_(False).parameters():
        parameter.zero_()
    return module.eval().to(task.device, task.dtype)


def natten(task: Task) -> list[Prepared]:
    """NATTEN, whatever it chooses to run here."""
    problem = task.problem
    kinds = [kind for kind in problem.kinds if isinstance(kind, Near)]
    if len(kinds) != len(problem.grid) or any(kind.border != "shift" for kind in kinds):
        raise NotRun("neighborhoods with a shifted border only")
    package = _import("natten", "natten")
    if package.__spec__.origin == "vicinal.adapters.natten":
        raise NotRun("what is imported as natten is Vicinal's own adapter: uninstall it to measure NATTEN")
    if task.backward and task.device.type == "cpu":
        raise NotRun("current NATTEN has no backward on CPU")
    if problem.tokens > 4096 and task.device.type == "cpu":
        raise NotRun("on a CPU its cost is that of all queries by all keys, uncompiled")
    function = getattr(package, f"na{len(problem.grid)}d")
    settings = {
        "kernel_size": tuple(kind.kernel_size for kind in kinds),
        "dilation": tuple(kind.dilation for kind in kinds),
        "stride": tuple(kind.stride for kind in kinds),
        "is_causal": tuple(kind.causal for kind in kinds),
    }

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function(query, key, value, **settings)
        return out

    return [Prepared(call, HEADS_LAST, importlib.metadata.version("natten"))]
