"""The LTX-2.5 diffusion decoder of diffusers with its own processor and with ours: time, peak memory, agreement.

    OMP_NUM_THREADS=1 python benchmarks/ltx_decoder.py

Prints a table, and writes it to benchmarks/results/ltx-decoder.json and docs/diffusers.md. Weights are random; kernel
sizes are the published ones. A layer is the whole layer, projections included, and the mask of those who need one is
built beforehand; peak memory is taken in a process of its own, and there the mask is built, as it must be once a grid.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

try:
    import torchvision  # noqa: F401 - diffusers imports it where it is installed
except RuntimeError:
    sys.modules["torchvision"] = None  # a wheel for CUDA beside a CPU build of torch; diffusers does without

import diffusers
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoVaeNeighborhoodAttention

import vicinal
from vicinal.adapters.diffusers import apply
from vicinal.measure import machine, timing
from vicinal.measure.memory import HostMeter

RESULTS = pathlib.Path(__file__).parent / "results" / "ltx-decoder.json"
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "diffusers.md"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"
OURS, FLEX, DENSE = "vicinal", "flex", "masked SDPA"
MOST_DENSE = 8000
"""On more tokens than these the masked peers are not run: scores of every pair of tokens are gigabytes per head."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer on a grid of tokens, or with `dim` 0 a decoder with few channels on a grid of latents."""

    name: str
    grid: tuple[int, int, int]
    kernel: tuple[int, int, int] = (0, 0, 0)
    dim: int = 0
    strides: tuple[tuple[int, int, int], ...] = ()
    tokens: int = 0  # of the largest stage, where it is a decoder


SMALL_STRIDES, STRIDES = ((1, 2, 2), (2, 1, 1), (2, 1, 1), (2, 1, 2)), ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2))
CASES = {
    case.name: case
    for case in (
        Case("stage 4 layer, 4608 tokens", (8, 24, 24), (3, 5, 5), 512),
        Case("stage 5 layer, 6912 tokens", (12, 24, 24), (11, 11, 11), 256),
        Case("decoder, strides cut down", (3, 7, 7), strides=SMALL_STRIDES, tokens=17 * 14 * 28),
        Case("decoder, published strides", (3, 7, 7), strides=STRIDES, tokens=17 * 56 * 56),
    )
}


class MaskedProcessor:
    """Dense attention with a mask of every pair of tokens: what can be differentiated without us."""

    def __init__(self) -> None:
        self.masks: dict[Any, torch.Tensor] = {}

    def mask(self, grid: tuple[int, ...], kernel: tuple[int, ...]) -> torch.Tensor:
        if (grid, kernel) not in self.masks:
            tokens, pattern = torch.Size(grid).numel(), tuple(map(vicinal.Near, kernel))
            self.masks[grid, kernel] = vicinal.pattern.mask(pattern, grid).reshape(tokens, tokens)
        return self.masks[grid, kernel]

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: Any = None) -> torch.Tensor:
        sees = self.mask(tuple(hidden_states.shape[1:4]), attn.kernel_size)
        flat = (tensor.flatten(1, 3).transpose(1, 2) for tensor in attn.project_qkv(hidden_states))
        out = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=sees, scale=1.0)
        return attn.to_out[0](out.transpose(1, 2).reshape(hidden_states.shape))


def decoder(case: Case) -> Any:
    """A decoder with random weights: few channels, one or two layers a stage, the published kernels."""
    return diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=16,
        decoder_stage_channels=(512, 256, 128, 128, 64),
        decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_upsample_strides=case.strides,
    )


def prepared(case: Case, contender: str) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A call of the case, and what it may be differentiated by; the same weights and inputs for everyone."""
    torch.manual_seed(0)
    if case.dim:
        layer: Any = LTX2VideoVaeNeighborhoodAttention(case.dim, case.kernel)
        inputs = torch.randn(1, *case.grid, case.dim, requires_grad=True)
        model, block_mask = layer, None
        if contender == OURS:  # what `apply` does for each layer
            layer.set_processor(ours_of(layer))
        elif contender == FLEX:
            block_mask = layer.build_block_mask(inputs)
        else:
            layer.set_processor(MaskedProcessor())
            layer.processor.mask(case.grid, case.kernel)
        return lambda: layer(inputs, block_mask), [inputs, *model.parameters()]
    model = decoder(case)
    inputs = torch.randn(1, 16, *case.grid, requires_grad=True)
    if contender == OURS:
        apply(model, "ltx-decoder")
    elif contender == DENSE:
        model.set_attn_processor(MaskedProcessor())
    generator = torch.Generator()
    used = [parameter for name, parameter in model.named_parameters() if "latents_" not in name]
    return lambda: model(inputs, generator=generator.manual_seed(1)).sample, [inputs, *used]


def ours_of(layer: Any) -> Any:
    """Our processor for a layer outside a decoder."""
    from vicinal.adapters.diffusers.hosts import HOSTS

    host = HOSTS["LTX2VideoDiffusionDecoderModel"]
    return host.processor(host.presets["ltx-decoder"](layer), layer.processor, None, None)


def runner(case: Case, contender: str, is_backward: bool) -> Callable[[], list[torch.Tensor]]:
    call, leaves = prepared(case, contender)

    def forward() -> list[torch.Tensor]:
        with torch.no_grad():
            return [call()]

    def both() -> list[torch.Tensor]:
        out = call()
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        return [out.detach(), *(grad for grad in grads if grad is not None)]

    return both if is_backward else forward


def refusal(case: Case, contender: str, is_backward: bool) -> str:
    """Why a contender does not take part, or nothing."""
    tokens = case.tokens or torch.Size(case.grid).numel()
    if contender != OURS and tokens > MOST_DENSE:
        return f"not run: {tokens} tokens, {4e-9 * tokens**2:.1f} GB of scores per head"
    if contender == FLEX and is_backward:
        try:
            runner(Case("", (3, 5, 5), (3, 5, 5), 64), FLEX, True)()
        except NotImplementedError as error:
            return f"cannot: {str(error).splitlines()[0]}"
    return ""


def peak_mb(case: Case, contender: str, is_backward: bool) -> float:
    """Peak memory of one call in a fresh process, mask and results included, weights and input not."""
    arguments = ["--peak", case.name, contender, "backward" if is_backward else "forward"]
    ran = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True, env=os.environ
    )
    return round(float(ran.stdout.split()[-1]) / 1e6, 1)


def print_peak(name: str, contender: str, direction: str) -> None:
    case, is_backward = CASES[name], direction == "backward"
    tiny = dataclasses.replace(case, grid=(11, 11, 11)) if case.dim else Case("", (3, 5, 5), (3, 5, 5), 64)
    runner(tiny, contender, is_backward)()  # libraries are not charged to the call
    meter = HostMeter()
    runner(case, contender, is_backward)()
    print(meter.peak())


def error_between(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest value of the same tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) for one, other in pairs)


def measured(case: Case, is_backward: bool, seconds: float) -> dict[str, Any]:
    """One row: everyone checked against the first peer that runs, then timed in turns."""
    reasons = {name: refusal(case, name, is_backward) for name in (OURS, FLEX, DENSE)}
    calls = {name: runner(case, name, is_backward) for name, reason in reasons.items() if not reason}
    peer = next((name for name in calls if name != OURS), None)
    error = error_between(calls[OURS](), calls[peer]()) if peer else None
    if error is not None and error > 1e-4:
        raise SystemExit(f"{case.name}: {error:.2g} away from {peer}; a wrong answer gets no time")
    timings = timing.compare(calls, seconds=seconds)
    entries = []
    for name, reason in reasons.items():
        entry: dict[str, Any] = {"name": name, "reason": reason}
        if not reason:
            entry |= {**timings[name].figures(), "peak_mb": peak_mb(case, name, is_backward)}
            entry["ours_faster"] = round(timings[OURS].speedup_over(timings[name]), 2)
        entries.append(entry)
    direction = "forward+backward" if is_backward else "forward"
    checked = {"against": peer, "error": error}
    load = round(os.getloadavg()[0], 2)
    row = {"case": dataclasses.asdict(case), "direction": direction, "load_average": load, "checked": checked}
    return {**row, "entries": entries}


def table(found: dict[str, Any]) -> str:
    """The results as the page in docs/ shows them."""
    lines = ["| case | direction | who | ms | peak MB | ours faster |", "|---|---|---|---:|---:|---:|"]
    for row in found["rows"]:
        for entry in row["entries"]:
            start = f"| {row['case']['name']} | {row['direction']} | {entry['name']} |"
            if entry["reason"]:
                lines.append(f"{start} {entry['reason'].split('. ')[0]} | | |")
                continue
            ratio = "" if entry["name"] == OURS else f"{entry['ours_faster']:.1f}x"
            lines.append(f"{start} {entry['median_ms']:.0f} | {entry['peak_mb']:.0f} | {ratio} |")
    on, load = found["machine"], max(row["load_average"] for row in found["rows"])
    threads = f"{on['threads']} thread{'s' if on['threads'] > 1 else ''} of {on['logical_cpus']}"
    lines += ["", f"Machine: {on['cpu']}, {threads}, torch {on['torch']}, diffusers {found['settings']['diffusers']},"]
    lines[-1] += f" {found['created'][:10]}; shared with others (load average up to {load:.1f}), so read the ratios."
    return "\n".join(lines)


def shown(page: str, found: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(START)
    return f"{before}{START}\n{table(found)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "part", nargs="?", default="", help="only the cases with this in their name; others keep theirs"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for the timing of each row, about")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
        return
    old = json.loads(options.output.read_text())["rows"] if options.part and options.output.exists() else []
    rows = {(row["case"]["name"], row["direction"]): row for row in old}
    for case in (case for case in CASES.values() if options.part in case.name):
        for direction in ("forward", "forward+backward"):
            print(f"{case.name}, {direction} ...", file=sys.stderr)
            rows[case.name, direction] = measured(case, direction != "forward", options.seconds)
            found = save(list(rows.values()), options.output)
    print(table(found))
    if options.output == RESULTS:
        PAGE.write_text(shown(PAGE.read_text(), found))


def save(rows: list[dict[str, Any]], path: pathlib.Path) -> dict[str, Any]:
    """After every row, so that an interrupted run keeps what it has."""
    found = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {"diffusers": diffusers.__version__, "dtype": "float32"},
        "rows": rows,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
