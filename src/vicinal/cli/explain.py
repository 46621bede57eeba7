"""`vicinal explain`: what a call would do, asked with sizes instead of tensors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode

from vicinal.cli.terminal import console
from vicinal.ops import Explanation, explain
from vicinal.ops.na import neighborhood
from vicinal.pattern import AnyPattern, bias_shape, bounds, parse
from vicinal.pattern.numbers import as_grid, as_integer


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    pattern = pattern_of(options)
    explanation = explain_sizes(
        pattern,
        options.grid,
        key_grid=options.key_grid,
        batch=options.batch,
        heads=(options.heads, options.heads if options.kv_heads is None else options.kv_heads),
        head_dim=(options.head_dim, options.head_dim if options.value_dim is None else options.value_dim),
        extra_tokens=options.extra_tokens,
        use_bias=options.bias,
        place=(options.device, options.dtype),
        backend=options.backend,
    )
    if options.json:
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        print_explanation(explanation, pattern, options.batch, console())


def pattern_of(options: argparse.Namespace) -> AnyPattern:
    """The pattern that the options name, by --pattern or by NATTEN's arguments."""
    natten = {
        "--kernel": options.kernel,
        "--dilation": options.dilation,
        "--stride": options.stride,
        "--causal": options.causal,
    }
    given = [name for name, value in natten.items() if value is not None]
    if options.pattern is not None:
        if given:
            raise ValueError(f"--pattern says it all: leave out {' and '.join(given)}, or write them into the pattern")
        return parse(options.pattern)
    if options.kernel is None:
        raise ValueError("give --kernel 7 or --pattern 'Near(7)': without them nobody sees anybody")
    causal = [word == "true" for word in options.causal or ["true" if options.causal is not None else "false"]]
    arguments = (options.kernel, options.stride or [1], options.dilation or [1], causal)
    kernel_size, stride, dilation, is_causal = (value[0] if len(value) == 1 else value for value in arguments)
    rank = len(as_grid("explain", "--grid", options.grid))
    kinds = neighborhood(rank, kernel_size, stride, dilation, is_causal)
    return kinds[0] if len(set(kinds)) == 1 else kinds


def explain_sizes(
    pattern: AnyPattern,
    grid: Sequence[int],
    *,
    key_grid: Sequence[int] | None = None,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
    head_dim: tuple[int, int] = (32, 32),
    extra_tokens: int = 0,
    use_bias: bool = False,
    place: tuple[str, str] = ("cpu", "float32"),
    backend: str | None = None,
) -> Explanation:
    """`vicinal.explain` for tensors of these sizes, on any device, whether this machine has it or not.

    `heads` are those of the query and of key and value, `head_dim` that of query and key and that of value, and
    `place` the device and the dtype.

    >>> explain_sizes(Near(7), (56, 56), heads=(2, 2), place=("cuda", "bfloat16")).problem.device
    'cuda'
    """
    device, dtype = device_named(place[0]), getattr(torch, place[1])
    queries = as_grid("explain", "--grid", grid)
    keys = queries if key_grid is None else as_grid("explain", "--key-grid", key_grid)
    batch = as_integer("explain", "--batch", batch, 0)
    tokens = as_integer("explain", "--extra-tokens", extra_tokens, 0)
    num_heads, kv_heads = (as_integer("explain", "--heads, --kv-heads", number, 1) for number in heads)
    dim, value_dim = (as_integer("explain", "--head-dim, --value-dim", number, 1) for number in head_dim)
    with FakeTensorMode():  # like meta tensors these hold no data, but they say which device they are on

        def tensor(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        query = tensor(batch, *queries, num_heads, dim)
        key, value = tensor(batch, *keys, kv_heads, dim), tensor(batch, *keys, kv_heads, value_dim)
        bias = tuple(tensor(*shape) for shape in bias_shapes(pattern, queries, keys, num_heads)) if use_bias else None
        extra = (tensor(batch, tokens, kv_heads, dim), tensor(batch, tokens, kv_heads, value_dim)) if tokens else None
    extra_key, extra_value = extra or (None, None)
    return explain(query, key, value, pattern, bias=bias, extra_key=extra_key, extra_value=extra_value, backend=backend)


def device_named(name: str) -> torch.device:
    """The device, or a `ValueError` with torch's own list of those it knows."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: {error}") from None


def bias_shapes(
    pattern: AnyPattern, grid: tuple[int, ...], key_grid: tuple[int, ...], num_heads: int
) -> Iterator[tuple[int, ...]]:
    """The shape of each head group's bias, its heads first."""
    sizes = bounds(pattern, grid, key_grid).split(num_heads)
    shapes: Any = bias_shape(pattern, grid, key_grid)
    for size, shape in zip(sizes, shapes if len(sizes) > 1 else [shapes], strict=True):
        yield (size, *shape)


def print_explanation(explanation: Explanation, pattern: AnyPattern, batch: int, out: Console) -> None:
    """The answer as tables."""
    problem = explanation.problem
    grid, key_grid = (" x ".join(map(str, lengths)) for lengths in (problem.grid, problem.key_grid))
    keys = "" if grid == key_grid else f" (keys {key_grid})"
    dtype = str(problem.dtype).removeprefix("torch.")
    facts = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("pattern", repr(pattern))
    facts.add_row("sizes", f"batch {batch}, grid {grid}{keys}, {_heads_of(explanation)}, {dtype} on {problem.device}")
    facts.add_row("back end", explanation.backend, style="bold")
    facts.add_row("forward", operations(explanation.flops))
    facts.add_row("backward", operations(explanation.flops_backward))
    out.print(facts)
    tiles, lines = tile_rows(explanation.tiles)
    for line in lines:
        out.print(f"\n{line}")
    if tiles:
        out.print(_tiles_table(tiles))
    refused = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    refused.add_column("other back end", no_wrap=True)
    refused.add_column("why not", overflow="fold")
    for name, reasons in explanation.refused.items():
        refused.add_row(
            name, "; ".join(reasons) or "could, but the one above comes first", style="" if reasons else "dim"
        )
    out.print(refused)
    for note in explanation.notes:
        out.print(f"note: {note}", style="dim", soft_wrap=True)


def _heads_of(explanation: Explanation) -> str:
    problem = explanation.problem
    heads = f"{problem.heads} heads" if problem.heads > 1 else "1 head"
    shared = "" if problem.kv_heads == problem.heads else f" ({problem.kv_heads} of key and value)"
    value = "" if problem.value_dim == problem.head_dim else f" (value {problem.value_dim})"
    return f"{heads}{shared} of {problem.head_dim}{value}"


def operations(number: int) -> str:
    """A count of floating-point operations with a unit, and exactly.

    >>> operations(39337984)
    '39.3 MFLOP (39,337,984)'
    """
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}FLOP ({number:,})"
    return f"{number} FLOP"


def tile_rows(tiles: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """What a back end says about its tiles: records for a table, and the plain facts as lines.

    >>> tile_rows({"method": "dense", "members": [[{"tiles": 4}], [{"tiles": 9}]]})
    ([{'member': 0, 'tiles': 4}, {'member': 1, 'tiles': 9}], ['tiles: dense'])
    """
    rows: list[dict[str, Any]] = []
    lines = [f"tiles: {tiles['method']}"] if "method" in tiles else []
    for name, value in tiles.items():
        if name == "method":
            continue
        if name == "members":
            for number, member in enumerate(value):
                rows += [{"member": number, **record} for record in (member if isinstance(member, list) else [member])]
        else:
            lines.append(f"{name}: {_plain(value)}")
    return rows, lines


def _tiles_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_plain(row.get(name, "")) for name in names))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " x ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
