"""StyleNAT's generator with its attention by us and by others: time, peak memory, agreement, layer by layer.

    OMP_NUM_THREADS=1 python benchmarks/stylenat.py

Prints a table, and writes it to benchmarks/results/stylenat.json. Weights are random, the sizes are those of FFHQ at
256 (batch 1) and of the top layer at 1024. A layer is the whole mixer, projections included. Ours is one call for all
heads; the others are one call of ours for each group of heads, keys gathered query by query, and dense attention with a
mask and the position bias in it. Indices and masks are made beforehand; peak memory is taken in a process of its own,
without weights and inputs, and there they are made, as they must be once a map.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import vicinal
from vicinal.layers import attention as layer_module
from vicinal.layers.attention import PatternAttention
from vicinal.measure import machine, timing
from vicinal.measure.memory import HostMeter
from vicinal.models.stylenat import FIRST, VARIANTS, StyleNAT, StyleNatConfig
from vicinal.pattern import Heads, bounds

RESULTS = pathlib.Path(__file__).parent / "results" / "stylenat.json"
OURS, GROUPS, GATHER, DENSE = "vicinal, one call", "a call per head group", "gather", "masked SDPA"
NAMES = (OURS, GROUPS, GATHER, DENSE)
MOST_BYTES = 3_000_000_000
"""Contenders that need more than this for keys or masks of one head group are not run."""

Split = list[tuple[Any, slice, torch.Tensor]]


def split(pattern: Any, bias: Any, num_heads: int) -> Split:
    """Each head group's pattern, its heads and its bias."""
    if not isinstance(pattern, Heads):
        return [(pattern, slice(0, num_heads), bias)]
    found, begin = [], 0
    for group, table in zip(pattern.groups, bias, strict=True):
        found.append((group, slice(begin, begin + len(table)), table))
        begin += len(table)
    return found


@functools.cache
def places(pattern: Any, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys each query sees and where in a flattened bias table their place is: `[tokens, keys]` both."""
    keys, tables, width = [], [], 0
    for table in bounds(pattern, grid).groups[0].members[0]:
        start, center = (torch.tensor(part.tolist())[:, None] for part in (table.start, table.center))
        key = start + table.step * torch.arange(int(table.count.max()))
        keys.append(key)
        tables.append(torch.div(key - center, table.step, rounding_mode="floor") + table.bias_length // 2)
        width = table.bias_length
    (rows, columns), (down, across) = keys, tables
    key = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    place = down[:, None, :, None] * width + across[None, :, None, :]
    return key.flatten(0, 1).flatten(1), place.flatten(0, 1).flatten(1)


def by_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Any, bias: Any) -> torch.Tensor:
    """One call of ours for each head group."""
    outs = [
        vicinal.attention(query[..., own, :], key[..., own, :], value[..., own, :], group, bias=table)
        for group, own, table in split(pattern, bias, query.shape[-2])
    ]
    return torch.cat(outs, -2)


def by_gather(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Any, bias: Any) -> torch.Tensor:
    """Each query's keys and values side by side; one image."""
    outs = []
    for group, own, table in split(pattern, bias, query.shape[-2]):
        index, place = places(group, tuple(query.shape[1:3]))
        rows, keys, values = (tensor[0, ..., own, :].flatten(0, 1) for tensor in (query, key, value))
        scores = torch.einsum("thd,tkhd->thk", rows * rows.shape[-1] ** -0.5, keys[index])
        chances = (scores + table.flatten(1)[:, place].transpose(0, 1)).softmax(-1)
        outs.append(torch.einsum("thk,tkhd->thd", chances, values[index]))
    return torch.cat(outs, -2).view(query.shape)


MASKS: dict[Any, torch.Tensor] = {}
"""Masks with the position bias in them, by pattern, map and table: a generator that is not trained makes them once."""


def dense_mask(group: Any, grid: tuple[int, int], table: torch.Tensor) -> torch.Tensor:
    """`[heads, tokens, tokens]`: the bias where a query sees a key, else -inf."""
    known = (group, grid, table.data_ptr())
    if known not in MASKS:
        index, place = places(group, grid)
        tokens = index.shape[0]
        mask = torch.full((len(table), tokens, tokens), -math.inf)
        MASKS[known] = mask.scatter_(2, index.expand(len(table), -1, -1), table.detach().flatten(1)[:, place])
    return MASKS[known]


def by_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Any, bias: Any) -> torch.Tensor:
    """Every query against every key of the map."""
    outs = []
    for group, own, table in split(pattern, bias, query.shape[-2]):
        mask = dense_mask(group, tuple(query.shape[1:3]), table)
        rows, keys, values = (tensor[..., own, :].flatten(1, 2).transpose(1, 2) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
        outs.append(out.transpose(1, 2).view(query[..., own, :].shape))
    return torch.cat(outs, -2)


WAYS: dict[str, Callable[..., torch.Tensor]] = {GROUPS: by_groups, GATHER: by_gather, DENSE: by_mask}


def needs(name: str, config: StyleNatConfig, level: int) -> int:
    """Bytes that keys of one head group, or its mask, take."""
    tokens, width = (FIRST * 2**level) ** 2, config.widths[level]
    count = config.heads(width)
    share = max(config.pattern(level).sizes or (count,)) if level else count
    if name == DENSE:
        return 4 * share * tokens**2
    keys = max(config.kernel_sizes[level]) ** 2
    return 4 * tokens * keys * share * (width // count) if name == GATHER else 0


def called(name: str, module: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A forward pass with the attention of a contender."""

    def call() -> torch.Tensor:
        with torch.no_grad():
            if name == OURS:
                result: torch.Tensor = module(inputs)
                return result
            way = WAYS[name]
            with mock.patch.object(layer_module, "attention", lambda *a, bias, backend: way(*a, bias)):
                result = module(inputs)
            return result

    return call


def prepared(case: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The module and the input of a case: "generator 256", or "256, level 64"."""
    torch.manual_seed(0)
    name, _, last = case.partition(", level ")
    config = VARIANTS[f"stylenat_ffhq{name.removeprefix('generator ')}"]
    if not last:
        return StyleNAT(config).eval(), torch.randn(1, config.latent_size)
    size = int(last)
    level = int(math.log2(size // FIRST))
    width = config.widths[level]
    pattern = config.pattern(level) if level else vicinal.Full()
    grid = None if level else (FIRST, FIRST)
    mixer = PatternAttention(width, config.heads(width), pattern, rel_pos_bias=True, table_grid=grid)
    return mixer.eval(), torch.randn(1, size, size, width)


CASES = [*(f"256, level {FIRST * 2**level}" for level in range(7)), "generator 256", "1024, level 1024"]


def refusal(case: str, name: str) -> str:
    """Why a contender does not take part, or nothing."""
    image, _, last = case.removeprefix("generator ").partition(", level ")
    level = int(math.log2(int(last or image) // FIRST))
    size = needs(name, VARIANTS[f"stylenat_ffhq{image}"], level)
    return f"not run: {size / 1e9:.0f} GB for one group of heads" if size > MOST_BYTES else ""


def peak_mb(case: str, name: str) -> float:
    """Peak memory of one call in a fresh process, results included, weights and input not."""
    arguments = [sys.executable, __file__, "--peak", case, name]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True, env=os.environ)
    return round(float(ran.stdout.split()[-1]) / 1e6, 1)


def print_peak(case: str, name: str) -> None:
    called(name, *prepared("256, level 8"))()  # libraries are not charged to the call
    call = called(name, *prepared(case))
    meter = HostMeter()
    call()
    print(meter.peak())


def measured(case: str, seconds: float) -> dict[str, Any]:
    """One row: everyone checked against us, then timed in turns."""
    reasons = {name: refusal(case, name) for name in NAMES}
    module, inputs = prepared(case)
    calls = {name: called(name, module, inputs) for name, reason in reasons.items() if not reason}
    wanted = calls[OURS]()
    errors = {name: float((call() - wanted).abs().max() / wanted.abs().max()) for name, call in calls.items()}
    for name, error in errors.items():
        if error > 1e-4:
            raise SystemExit(f"{case}: {name} is {error:.2g} away; a wrong answer gets no time")
    timings = timing.compare(calls, seconds=seconds)
    entries = []
    for name, reason in reasons.items():
        entry: dict[str, Any] = {"name": name, "reason": reason}
        if not reason:
            entry |= {**timings[name].figures(), "peak_mb": peak_mb(case, name), "error": errors[name]}
            entry["ours_faster"] = round(timings[OURS].speedup_over(timings[name]), 2)
        entries.append(entry)
    size = inputs.numel() * inputs.element_size()
    load = round(os.getloadavg()[0], 2)
    return {"case": case, "input_mb": round(size / 1e6, 1), "load_average": load, "entries": entries}


def table(found: dict[str, Any]) -> str:
    """The results for reading."""
    lines = ["| case | attention | ms | peak MB | ours faster |", "|---|---|---:|---:|---:|"]
    for row in found["rows"]:
        for entry in row["entries"]:
            start = f"| {row['case']} | {entry['name']} |"
            if entry["reason"]:
                lines.append(f"{start} {entry['reason']} | | |")
                continue
            ratio = "" if entry["name"] == OURS else f"{entry['ours_faster']:.1f}x"
            lines.append(f"{start} {entry['median_ms']:.1f} | {entry['peak_mb']:.0f} | {ratio} |")
    on, load = found["machine"], max(row["load_average"] for row in found["rows"])
    threads = f"{on['threads']} thread{'s' if on['threads'] > 1 else ''} of {on['logical_cpus']}"
    lines += ["", f"Machine: {on['cpu']}, {threads}, torch {on['torch']}, load average up to {load:.1f}."]
    return "\n".join(lines)


def save(rows: list[dict[str, Any]], path: pathlib.Path) -> dict[str, Any]:
    """After every row, so that an interrupted run keeps what it has."""
    found = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {"dtype": "float32", "batch": 1, "direction": "forward"},
        "rows": rows,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="", help="only cases with this in their name; others keep theirs")
    parser.add_argument("--seconds", type=float, default=8.0, help="for the timing of each row, about")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
        return
    old = json.loads(options.output.read_text())["rows"] if options.part and options.output.exists() else []
    rows = {row["case"]: row for row in old}
    for case in (case for case in CASES if options.part in case):
        print(f"{case} ...", file=sys.stderr)
        rows[case] = measured(case, options.seconds)
        found = save(sorted(rows.values(), key=lambda row: CASES.index(row["case"])), options.output)
        MASKS.clear()
    print(table(found))


if __name__ == "__main__":
    main()
