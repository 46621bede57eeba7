"""How fast NAT-Tiny could be per multiply-add beside our Swin-Tiny, if some of its kernels cost less or nothing.

    python benchmarks/model_floor.py --batches 1 8

Three models take turns in one run: Swin, NAT, and NAT whose attention hands on the values and does nothing else. Where
each spends its time, part by part, is read from torch's profiler. Of several calls the least counts, since this is
about what the machine can do. From both follows where NAT would stand with its own attention free, with its linear
layers and convolutions as quick per multiply-add as Swin's linear layers, and with both. Swin keeps its attention, so
these are bounds. Every ratio is Swin's time per multiply-add over NAT's: 1 is as good as Swin. Writes
benchmarks/results/model_floor.json.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import pathlib
import resource
import types
from collections.abc import Callable
from typing import Any

import torch
from models import PARTS, parts_ms, timed
from torch import nn

import vicinal
from vicinal.layers.attention import PatternAttention
from vicinal.layers.cost import cost
from vicinal.measure import machine, report
from vicinal.training import keep_memory

RESULTS = pathlib.Path(__file__).parent / "results" / "model_floor.json"
FREE = "nat_tiny without attention"


class _Values(torch.autograd.Function):
    """The last third of the channels; the gradient goes to all three, so that what follows has numbers to work on."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor) -> torch.Tensor:
        return packed.chunk(3, -1)[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.cat((*grads,) * 3, -1)


def without_attention(model: nn.Module) -> nn.Module:
    """A copy whose attention layers only project."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PatternAttention):
            module._on_grid = types.MethodType(lambda self, inputs: _Values.apply(self.qkv(inputs)), module)
    return model


def multiply_adds(model: nn.Module, size: int) -> dict[str, int]:
    """Nominal multiply-adds by part of the profile, and of all."""
    found = {"linear layers": 0, "convolutions": 0}

    def add(part: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: torch.Tensor) -> None:
            found[part] += output.numel() * layer.weight[0].numel()

        return hook

    kinds = {nn.Linear: "linear layers", nn.Conv2d: "convolutions"}
    handles = [
        module.register_forward_hook(add(kinds[type(module)])) for module in model.modules() if type(module) in kinds
    ]
    with torch.inference_mode():
        model(torch.randn(1, 3, size, size))
    for handle in handles:
        handle.remove()
    total = cost(model, 1, 3, size, size).nominal
    return {**found, "attention": total - sum(found.values()), "all": total}


def least_parts(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds by part, of several profiled calls the least of each."""
    call()
    found = [parts_ms(call) for _ in range(repeats)]
    return {part: round(min(parts[part] for parts in found), 3) for part in [*PARTS, "copies", "the rest"]}


def bounds(least: dict[str, float], parts: dict[str, dict[str, float]], macs: dict[str, dict[str, int]]) -> Any:
    """Swin's time per multiply-add over NAT's, as it is and as it would be."""
    swin, nat = macs["swin_tiny"], macs["nat_tiny"]
    rate = parts["swin_tiny"]["linear layers"] / swin["linear layers"]
    slower = sum(parts["nat_tiny"][part] - rate * nat[part] for part in ("linear layers", "convolutions"))
    would_take = {
        "as it is": least["nat_tiny"],
        "attention free": least[FREE],
        "products and convolutions at Swin's rate": least["nat_tiny"] - slower,
        "both": least[FREE] - slower,
    }
    goal = least["swin_tiny"] * nat["all"] / swin["all"]
    return {name: round(goal / taken, 3) for name, taken in would_take.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=7.0, help="time for one row")
    parser.add_argument("--repeats", type=int, default=5, help="profiled calls of a model")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--keep-memory", action=argparse.BooleanOptionalAction, default=True, help="see vicinal.training.keep_memory"
    )
    options = parser.parse_args()
    is_kept = keep_memory() if options.keep_memory else False
    built = {name: vicinal.create_model(name, drop_path_rate=0.0) for name in ("swin_tiny", "nat_tiny")}
    macs = {name: multiply_adds(model, options.size) for name, model in built.items()}
    built[FREE] = without_attention(built["nat_tiny"])
    result: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "load_average": os.getloadavg()[0],
        "freed_memory_is_kept": is_kept,
        "multiply_adds": macs,
        "rows": [],
    }
    for kind, batch, calls, times in timed(built, options):
        least = {name: round(found.best_ms, 2) for name, found in times.items()}
        parts = {name: least_parts(call, options.repeats) for name, call in calls.items()}
        row = {
            "kind": kind,
            "batch": batch,
            "least_ms": least,
            "parts_ms": parts,
            "per_multiply_add_vs_our_swin": bounds(least, parts, macs),
        }
        result["rows"].append(row)
        print(json.dumps(row))
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    report.write(result, RESULTS)
    print(f"saved as {RESULTS}")


if __name__ == "__main__":
    main()
