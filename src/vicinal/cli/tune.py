"""`vicinal tune`: a short search for faster tiles of the Triton kernels, whose answer is kept on disk."""

from __future__ import annotations

import argparse
import json
import sys

import torch
from rich import box
from rich.table import Table

from vicinal.cli.terminal import console
from vicinal.measure.tune import Sizes, tune
from vicinal.ops.triton import tuned
from vicinal.ops.triton.plan import Tiles
from vicinal.pattern import parse
from vicinal.pattern.numbers import as_grid, as_integer


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    grid = as_grid("tune", "--grid", options.grid)
    batch, heads, head_dim, most = (
        as_integer("tune", f"--{name.replace('_', '-')}", getattr(options, name), 1)
        for name in ("batch", "heads", "head_dim", "most")
    )
    if not 0 < options.seconds < 3600:
        raise ValueError(f"--seconds must be between 0 and 3600, got {options.seconds}")
    sizes = Sizes(batch, heads, head_dim, getattr(torch, options.dtype), options.bias)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = tune(parse(options.pattern), grid, sizes, most=most, seconds=options.seconds, say=say)
    kept = any(one.is_kept for one in found)
    if options.json:
        answer = {"passes": [one.to_dict() for one in found], "file": str(tuned.path()) if kept else None}
        print(json.dumps(answer, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("pass", "chosen", "ms", "fastest", "ms", "tried", ""):
        table.add_column(name, justify="right" if name in ("ms", "tried") else "left")
    for one in found:
        verdict = "kept" if one.is_kept else "no better"
        cells = (_words(one.chosen), f"{one.chosen_ms:.3f}", _words(one.fastest), f"{one.fastest_ms:.3f}")
        table.add_row(one.name, *cells, str(one.tried), verdict)
    console().print(table)
    print(f"kept in {tuned.path()}: calls of such tensors use them from now on" if kept else "nothing to keep")


def _words(tiles: Tiles) -> str:
    query, key = ("x".join(map(str, sizes)) for sizes in (tiles.query, tiles.key))
    return f"{query} on {key}, {tiles.warps} warps, {tiles.stages} stages"
