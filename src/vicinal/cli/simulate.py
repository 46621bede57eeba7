"""`vicinal simulate`: how much of a pattern's saving is left on a kernel that works in tiles."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vicinal.cli.terminal import console
from vicinal.ops import Simulation, simulate
from vicinal.ops.na import neighborhood
from vicinal.ops.simulator import tile_of
from vicinal.ops.tile_search import search
from vicinal.pattern import AxisKind, Near, Pattern, parse
from vicinal.pattern.numbers import as_grid

MOST_SHOWN = 12


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    grid = as_grid("simulate", "--grid", options.grid)
    pattern = pattern_of(options, grid)
    tiles: dict[str, Any] = {"query_tile": _spread(options.query_tile), "key_tile": _spread(options.key_tile)}
    found = simulate(pattern, grid, **tiles, attention_share=options.attention_share)
    choices = []
    if options.search:
        queries, keys = (math.prod(tile_of(name, tile, len(grid))) for name, tile in tiles.items())
        choices = search(pattern, grid, queries=queries, keys=keys, attention_share=options.attention_share)
    if options.json:
        answer = found.to_dict()
        if options.search:
            answer["search"] = [choice.to_dict() for choice in choices]
        print(json.dumps(answer, indent=2))
        return
    out = console()
    print_simulation(found, out)
    if options.search:
        print_choices(choices, out)


def pattern_of(options: argparse.Namespace, grid: tuple[int, ...]) -> Pattern:
    """The pattern that the options name, by --pattern or by --window and what goes with it."""
    others = {"--window": options.window, "--stride": options.stride, "--dilation": options.dilation}
    given = [name for name, value in others.items() if value is not None]
    if options.pattern is not None:
        if given:
            raise ValueError(f"--pattern says it all: leave out {' and '.join(given)}, or write them into the pattern")
        return parse(options.pattern)
    if options.window is None:
        raise ValueError("give --window 18 24 24 or --pattern 'Near(7)': without them nobody sees anybody")
    sizes = _spread(options.window)
    each = [sizes] * len(grid) if isinstance(sizes, int) else sizes
    if len(each) != len(grid):
        raise ValueError(f"--window: one size, or one for each of the {len(grid)} axes, got {each}")
    window = tuple(length if size == -1 else size for size, length in zip(each, grid, strict=True))
    stride, dilation = _spread(options.stride or [1]), _spread(options.dilation or [1])
    kinds = neighborhood(len(grid), window, stride, dilation, False)
    return kinds


def _spread(values: Sequence[int]) -> int | tuple[int, ...]:
    """One value for all axes, or one for each."""
    return values[0] if len(values) == 1 else tuple(values)


def print_simulation(found: Simulation, out: Console) -> None:
    """The answer as a table."""
    facts = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("pattern", repr(found.pattern))
    facts.add_row("grid", sizes(found.grid))
    facts.add_row("tiles", f"{sizes(found.query_tile)} queries, {sizes(found.key_tile)} keys")
    facts.add_row("sparsity", f"{100 * found.sparsity:.1f}%")
    facts.add_row("FLOP bound", _bound(found.flop_bound, found.end_to_end_flop_bound))
    facts.add_row("attention bound", _bound(found.attention_bound, found.end_to_end_bound), style="bold")
    facts.add_row("mean of the tiles", f"{found.mean_bound:.2f}x")
    facts.add_row(
        "block-sparse", "perfectly: no mask is needed" if found.is_block_sparse else "no: some tiles are masked"
    )
    for group in found.visits:
        for member in group:
            facts.add_row(
                "tile pairs",
                f"{member.visited:,} of {member.query_tiles * member.key_tiles:,} visited, {member.full:,} of them "
                f"full; the worst query tile visits {member.worst:,} of {member.key_tiles:,}",
            )
    out.print(facts)


def print_choices(choices: Sequence[Simulation], out: Console) -> None:
    """The strides and tiles worth choosing among, as a table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("stride", "query tile", "key tile", "attention", "end to end", "block-sparse"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in choices[:MOST_SHOWN]:
        end_to_end = "-" if choice.end_to_end_bound is None else f"{choice.end_to_end_bound:.2f}x"
        kinds = choice.pattern if isinstance(choice.pattern, tuple) else ()
        table.add_row(
            " x ".join(_stride(kind) for kind in kinds),
            sizes(choice.query_tile),
            sizes(choice.key_tile),
            f"{choice.attention_bound:.2f}x",
            end_to_end,
            "yes" if choice.is_block_sparse else "no",
        )
    out.print("\nthe best strides and tiles, from blocks to windows that slide by one token:")
    out.print(table)


def _stride(kind: AxisKind) -> str:
    return str(kind.stride) if isinstance(kind, Near) else "-"


def _bound(attention: float, end_to_end: float | None) -> str:
    return f"{attention:.2f}x" + ("" if end_to_end is None else f", end to end {end_to_end:.2f}x")


def sizes(lengths: Sequence[int]) -> str:
    """Lengths of axes in words.

    >>> sizes((30, 48, 80))
    '30 x 48 x 80'
    """
    return " x ".join(map(str, lengths))
