"""StyleNAT's generator with its attention by us and by others: time, peak memory, agreement, layer by layer.

    OMP_NUM_THREADS=2 python benchmarks/stylenat.py
    OMP_NUM_THREADS=2 python benchmarks/stylenat.py --resume     # goes on with a run that was cut short
    python benchmarks/stylenat.py --docs                         # only writes the table into docs/stylenat.md again

Writes benchmarks/results/stylenat.json after every case, and the table between the two markers of docs/stylenat.md.
Weights are random, the sizes those of FFHQ at 256 (batch 1) and of the top layer at 1024. A layer is the whole mixer,
projections included. Ours is one call for all heads; the others are one call of ours for each group of heads, keys
gathered query by query, and dense attention with a mask and the position bias in it. Indices and masks are made
beforehand; peak memory is taken in a process of its own, without weights and inputs, and there they are made, as they
must be once a map. Who needs more than an eighth of the machine's memory is not run; the table says how much that is.
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
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "stylenat.md"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"

SHARE = 1 / 8
"""Contenders that need more of the machine's memory than this are not run: copies come on top, and others' work."""

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


def by_one_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Any, bias: Any) -> torch.Tensor:
    """Ours."""
    return vicinal.attention(query, key, value, pattern, bias=bias)


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


WAYS: dict[str, Callable[..., torch.Tensor]] = {OURS: by_one_call, GROUPS: by_groups, GATHER: by_gather, DENSE: by_mask}


def needs(name: str, config: StyleNatConfig, level: int) -> int:
    """Bytes of what a contender must hold at once in a layer: all heads' masks, or one group's keys and values."""
    tokens, width = (FIRST * 2**level) ** 2, config.widths[level]
    count = config.heads(width)
    if name == DENSE:
        return 4 * count * tokens**2
    share = max(config.pattern(level).sizes or (count,)) if level else count
    keys = max(config.kernel_sizes[level]) ** 2
    return 2 * 4 * tokens * keys * share * (width // count) if name == GATHER else 0


def called(name: str, module: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A forward pass with the attention of a contender."""
    way = WAYS[name]

    def call() -> torch.Tensor:
        # ours is put in its place too, so that all pay alike for the exchange
        with torch.no_grad(), mock.patch.object(layer_module, "attention", lambda *a, bias, backend: way(*a, bias)):
            result: torch.Tensor = module(inputs)
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


def wanted(case: str, name: str) -> int:
    """Bytes that a contender needs in a case; a generator keeps the masks of all its blocks from image to image."""
    image, _, last = case.removeprefix("generator ").partition(", level ")
    config = VARIANTS[f"stylenat_ffhq{image}"]
    if last:
        return needs(name, config, int(math.log2(int(last) // FIRST)))
    levels = [needs(name, config, level) for level in range(config.levels)]
    return config.depth * sum(levels) if name == DENSE else max(levels)


def refusal(case: str, name: str, memory_gb: float) -> str:
    """Why a contender does not take part on a machine with so much memory, or nothing.

    >>> refusal("256, level 256", DENSE, memory_gb=25.0)
    'does not fit: 68.7 GB of masks'
    """
    size = wanted(case, name) / 1e9
    if size <= SHARE * memory_gb:
        return ""
    what = "masks" if name == DENSE else "keys and values"
    return f"{'does not fit' if size > memory_gb else 'not run'}: {size:,.1f} GB of {what}"


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
    on = machine.describe()
    reasons = {name: refusal(case, name, on["memory_gb"]) for name in NAMES}
    module, inputs = prepared(case)
    calls = {name: called(name, module, inputs) for name, reason in reasons.items() if not reason}
    ours = calls[OURS]()
    errors = {name: float((call() - ours).abs().max() / ours.abs().max()) for name, call in calls.items()}
    del ours
    for name, error in errors.items():
        if error > 1e-4:
            raise SystemExit(f"{case}: {name} is {error:.2g} away; a wrong answer gets no time")
    timings = timing.compare(calls, seconds=seconds)
    MASKS.clear()
    places.cache_clear()
    entries = []
    for name, reason in reasons.items():
        entry: dict[str, Any] = {"name": name, "reason": reason}
        if not reason:
            entry |= {**timings[name].figures(), "peak_mb": peak_mb(case, name), "error": errors[name]}
            entry["ours_faster"] = round(timings[OURS].speedup_over(timings[name]), 2)
        entries.append(entry)
    return {
        "case": case,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "input_mb": round(inputs.numel() * inputs.element_size() / 1e6, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "entries": entries,
    }


def table(found: dict[str, Any]) -> str:
    """The results for reading."""
    lines = ["| case | attention | ms | peak MB | rounds | ours faster |", "|---|---|---:|---:|---:|---:|"]
    for row in found["rows"]:
        for entry in row["entries"]:
            start = f"| {row['case']} | {entry['name']} |"
            if entry["reason"]:
                lines.append(f"{start} {entry['reason']} | | | |")
                continue
            ratio = "" if entry["name"] == OURS else f"{entry['ours_faster']:.2f}x"
            lines.append(f"{start} {entry['median_ms']:.1f} | {entry['peak_mb']:.0f} | {entry['rounds']} | {ratio} |")
    on, loads = found["machine"], [row["load_average"] for row in found["rows"]]
    threads = f"{on['threads']} thread{'s' if on['threads'] > 1 else ''} of {on['logical_cpus']}"
    lines += [
        "",
        f"Machine: {on['cpu']}, {threads}, {on['memory_gb']} GB, torch {on['torch']}, {found['created'][:10]}; "
        f"load average {min(loads):.1f} to {max(loads):.1f}.",
    ]
    return "\n".join(lines)


def save(rows: dict[str, dict[str, Any]], path: pathlib.Path) -> dict[str, Any]:
    """After every row, so that an interrupted run keeps what it has."""
    found = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {"dtype": "float32", "batch": 1, "direction": "forward"},
        "rows": sorted(rows.values(), key=lambda row: CASES.index(row["case"])),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def kept(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The rows that a run on this machine, with as many threads, left in a file."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    return {row["case"]: row for row in old["rows"]} if old["machine"] == machine.describe() else {}


def show(found: dict[str, Any], docs: pathlib.Path) -> None:
    """Put the table between the markers of a page."""
    head, rest = docs.read_text().split(START)
    docs.write_text(f"{head}{START}\n{table(found)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="", help="only cases with this in their name; others keep theirs")
    parser.add_argument("--seconds", type=float, default=8.0, help="for the timing of each row, about")
    parser.add_argument("--resume", action="store_true", help="only cases that the output does not have yet")
    parser.add_argument("--docs", action="store_true", help="write the page again from what was measured")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
        return
    if options.docs:
        show(json.loads(options.output.read_text()), DOCS)
        return
    rows = kept(options.output) if options.part or options.resume else {}
    for case in CASES:
        if options.part in case and not (options.resume and case in rows):
            print(f"{case} ...", file=sys.stderr)
            rows[case] = measured(case, options.seconds)
            save(rows, options.output)
    found = save(rows, options.output)
    print(table(found))
    if options.output == RESULTS and len(rows) == len(CASES):
        show(found, DOCS)


if __name__ == "__main__":
    main()
