"""Whole models on this machine: inference and a training step at 224 pixels, and where a training step's time goes.

    python benchmarks/models.py --batches 1 8

Our Swin-Tiny beside timm's and transformers' (the same architecture, random weights, no drop path), and NAT-Tiny and
DiNAT-Tiny per multiply-add beside our Swin. Everybody takes turns in one run, in a process as Python starts it; with
`--keep-memory` in one that keeps freed memory (`vicinal.training.keep_memory`), as `vicinal train` does. Writes
benchmarks/results/models.json, or models-kept.json.
How fast NAT could be with other kernels: benchmarks/model_floor.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import vicinal
from vicinal.layers.cost import cost
from vicinal.measure import machine, report, timing
from vicinal.measure.peers.installed import mend_torchvision
from vicinal.training import keep_memory

RESULTS = pathlib.Path(__file__).parent / "results" / "models.json"
NODE = "autograd::engine::evaluate_function: "
"""How torch's profiler begins the name of what a node of the backward pass does."""

OURS = ("swin_tiny", "nat_tiny", "dinat_tiny")
PARTS = {
    "linear layers": (
        "aten::linear",
        "addmm",
        "aten::mm",
        "mkldnn::_linear_pointwise",
        "AddmmBackward0",
        "MmBackward0",
    ),
    "attention": ("vicinal::attend", "_AttendBackward", "_Unpack", "_UnpackBackward"),
    "norms": ("aten::layer_norm", "NativeLayerNormBackward0"),
    "convolutions": ("aten::conv2d", "ConvolutionBackward0"),
    "activations": ("aten::gelu", "GeluBackward0"),
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad", "torch::autograd::AccumulateGrad"),
    "shortcuts": ("aten::add", "AddBackward0"),
}
"""Parts of a step, by layers: an operation belongs to the layer, or to the node of the backward pass, that called it.

So a linear layer is its product, its bias and the sum that is the bias's gradient. GELU is never counted as a product.
"""

KERNELS = ("linear layers", "attention", "norms", "convolutions")
"""What ought to take nearly all of a step."""

COPIES = ("aten::clone", "aten::contiguous", "aten::_to_copy")
"""What changes a layout counts by itself, whichever layer asked for it; the optimizer's step counters do not."""


class Logits(nn.Module):
    """A model of transformers as a function of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def models() -> dict[str, nn.Module]:
    """Ours and the others', by name."""
    mend_torchvision()
    import timm
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(drop_path_rate=0.0, num_labels=1000)
    return {
        **{name: vicinal.create_model(name, drop_path_rate=0.0) for name in OURS},
        "timm swin_tiny": timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0),
        "transformers swin_tiny": Logits(SwinForImageClassification(config)),
    }


def inference(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    """One forward pass without gradients."""
    model.eval()

    def call() -> None:
        with torch.inference_mode():
            model(images)

    return call


def training_step(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    """Forward, loss, backward, one step of AdamW."""
    labels = torch.arange(len(images)) % 1000
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return call


KINDS = {"inference": inference, "training step": training_step}
Calls = dict[str, Callable[[], Any]]


def timed(
    built: dict[str, nn.Module], options: argparse.Namespace
) -> Iterator[tuple[str, int, Calls, dict[str, timing.Timing]]]:
    """Row by row: the kind, the batch, the models' calls, and their times in turns."""
    for batch in options.batches:
        images = torch.randn(batch, 3, options.size, options.size)
        for kind, make in KINDS.items():
            calls = {name: make(model, images) for name, model in built.items()}
            yield kind, batch, calls, timing.compare(calls, seconds=options.seconds, device=torch.device("cpu"))


def shares(call: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Which part of a call's time goes where, from torch's profiler; of several calls the quickest.

    What passes between operations, in Python, is in the rest.
    """
    call()
    parts = min((parts_ms(call) for _ in range(repeats)), key=lambda found: sum(found.values()))
    total = sum(parts.values())
    return {name: round(own / total, 4) for name, own in sorted(parts.items(), key=lambda item: -item[1])}


def in_kernels(found: dict[str, float]) -> dict[str, float]:
    """Shares of the kernels together: of the step, and of what of it is not the optimizer."""
    kernels = sum(found[name] for name in KERNELS)
    return {"of_step": round(kernels, 3), "of_forward_and_backward": round(kernels / (1 - found["optimizer"]), 3)}


def parts_ms(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one call by part, under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded, record_function("all of it"):
        call()
    parts = dict.fromkeys([*PARTS, "copies", "the rest"], 0.0)
    for event in recorded.events():
        parts[_part(event)] += event.self_cpu_time_total / 1e3
    return parts


def _part(event: Any) -> str:
    """The outermost layer that an operation belongs to; gradients of shortcuts are added up within other nodes."""
    callers = [event.name.removeprefix(NODE)]
    parent = event.cpu_parent
    while parent is not None:
        callers.append(parent.name.removeprefix(NODE))
        parent = parent.cpu_parent
    if any(caller in COPIES for caller in callers) and not any("Optimizer.step" in caller for caller in callers):
        return "copies"
    if callers[0] == "aten::add_" and len(callers) > 1 and callers[1].endswith("Backward0"):
        return "shortcuts"
    if callers[:2] == ["aten::sum", "AddBackward0"]:  # of the bias that was added together with the shortcut
        return "linear layers"
    for caller in reversed(callers):
        for part, words in PARTS.items():
            if any(word in caller for word in words):
                return part
    return "the rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="time for one row")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--keep-memory", action=argparse.BooleanOptionalAction, default=False, help="see vicinal.training.keep_memory"
    )
    options = parser.parse_args()
    is_kept = keep_memory() if options.keep_memory else False
    built = models()
    macs = {name: cost(built[name], 1, 3, options.size, options.size).nominal for name in OURS}
    result: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "load_average": os.getloadavg()[0],
        "freed_memory_is_kept": is_kept,
        "multiply_adds": macs,
        "rows": [],
        "shares": {},
        "in_kernels": {},
    }
    for kind, batch, _, timings in timed(built, options):
        ours = timings["swin_tiny"]
        row: dict[str, Any] = {"kind": kind, "batch": batch}
        row["median_ms"] = {name: round(found.median_ms, 2) for name, found in timings.items()}
        row["swin_tiny_faster_than"] = {
            name: round(ours.speedup_over(found), 3) for name, found in timings.items() if name not in OURS
        }
        row["per_multiply_add_vs_our_swin"] = {
            name: round(ours.speedup_over(timings[name]) ** -1 * macs[name] / macs["swin_tiny"], 3) for name in OURS[1:]
        }
        result["rows"].append(row)
        print(json.dumps(row))
    for name in OURS:
        result["shares"][name], result["in_kernels"][name] = {}, {}
        for batch in options.batches:
            images = torch.randn(batch, 3, options.size, options.size)
            result["shares"][name][str(batch)] = found = shares(training_step(built[name], images))
            result["in_kernels"][name][str(batch)] = in_kernels(found)
            print(name, batch, found, in_kernels(found))
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    target = RESULTS.with_stem("models-kept") if options.keep_memory else RESULTS
    report.write(result, target)
    print(f"saved as {target}")


if __name__ == "__main__":
    main()
