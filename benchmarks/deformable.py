"""Multi-scale deformable attention on this machine: ours, a loop of grid_sample over levels, and transformers'.

    python benchmarks/deformable.py --image 640

The pixel decoder's problem: 8 heads of 32 channels, 3 maps of strides 32, 16 and 8, 4 points each, every pixel a query.
Forward, and forward with backward, of the sampling alone: the layer's linear parts are the same everywhere. Everybody
takes turns. Outputs are compared first. Writes benchmarks/results/deformable.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from vicinal.layers import multiscale
from vicinal.measure import machine, timing
from vicinal.measure.peers.installed import mend_torchvision

RESULTS = pathlib.Path(__file__).parent / "results" / "deformable.json"
HEADS, HEAD_DIM, POINTS = 8, 32, 4

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(image: int) -> tuple[list[tuple[int, int]], Inputs]:
    """Maps, and value, places and weights as a fresh layer has them, spread by some pixels."""
    torch.manual_seed(0)
    grids = [(image // stride, image // stride) for stride in (32, 16, 8)]
    tokens = sum(rows * columns for rows, columns in grids)
    spread = 3.0 / torch.tensor([columns for _, columns in grids])
    places = multiscale.centers(grids)[None, :, None, None, None]
    places = places + torch.randn(1, tokens, HEADS, 3, POINTS, 2) * spread[:, None, None]
    weights = torch.rand(1, tokens, HEADS, 3 * POINTS).softmax(-1).unflatten(-1, (3, POINTS))
    return grids, (torch.randn(1, tokens, HEADS, HEAD_DIM), places, weights)


def ways(grids: list[tuple[int, int]]) -> dict[str, Callable[..., torch.Tensor]]:
    """The same sums by each way."""
    mend_torchvision()
    from transformers.models.oneformer.modeling_oneformer import multi_scale_deformable_attention

    return {
        "vicinal": lambda value, places, weights: multiscale.sum_of_samples(value, grids, places, weights),
        "grid_sample loop": lambda value, places, weights: multiscale._by_level(value, grids, places, weights),
        "transformers": lambda value, places, weights: multi_scale_deformable_attention(value, grids, places, weights),
    }


def calls(way: Callable[..., torch.Tensor], inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward."""

    def forward() -> None:
        with torch.no_grad():
            way(*inputs)

    def both() -> None:
        given = [tensor.detach().requires_grad_() for tensor in inputs]
        way(*given).sum().backward()

    return {"forward": forward, "forward and backward": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=int, default=640)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for one row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grids, inputs = problem(options.image)
    found = ways(grids)
    expected = found["transformers"](*inputs)
    for name, way in found.items():
        torch.testing.assert_close(way(*inputs), expected, rtol=1e-4, atol=1e-5, msg=f"{name} differs")
    result: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "load_average": os.getloadavg()[0],
        "image": options.image,
        "threads": options.threads,
        "rows": [],
    }
    for kind in ("forward", "forward and backward"):
        timed = {name: calls(way, inputs)[kind] for name, way in found.items()}
        timings = timing.compare(timed, seconds=options.seconds, device=torch.device("cpu"))
        row = {
            "kind": kind,
            "median_ms": {name: round(one.median_ms, 1) for name, one in timings.items()},
            "vicinal_faster_than": {
                name: round(timings["vicinal"].speedup_over(one), 2)
                for name, one in timings.items()
                if name != "vicinal"
            },
        }
        result["rows"].append(row)
        print(json.dumps(row))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved as {RESULTS}")


if __name__ == "__main__":
    main()
