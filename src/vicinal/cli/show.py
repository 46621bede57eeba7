"""`vicinal show`: a pattern on a grid, as text or as a picture."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from vicinal.cli.terminal import console
from vicinal.pattern import Pattern, parse
from vicinal.pattern.draw import QUERY, SEEN, UNSEEN
from vicinal.pattern.numbers import as_grid
from vicinal.tour.views import Reach, Seen, TileMap, reach, seen, tile_maps

MOST_PLACES = 1 << 20
"""Keys, or pairs of tiles, that are still worth a picture."""

TILE_SIGNS = (".", "+", "#")
"""Empty, partial, full: in the order of the classes in `vicinal.ops.tiling`."""

DEPTH_SIGNS = ".123456789abcdefghijklmnoprstuvwxyz"  # without q, the query that does not see itself

STYLES = {
    **dict.fromkeys(DEPTH_SIGNS, "magenta"),
    **{"1": "bold cyan", "2": "cyan", "3": "green", "4": "yellow"},
    **{QUERY: "bold bright_red", QUERY.lower(): "bright_red", SEEN: "cyan", UNSEEN: "bright_black", "+": "yellow"},
}


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    views = views_of(options)
    if options.save is not None:
        from vicinal.tour.pictures import save_views

        print(save_views(views, options.save))
        return
    out = console()
    for number, view in enumerate(views):
        if number:
            out.print()
        print_view(view, out)


def views_of(options: argparse.Namespace) -> list[Seen | Reach | TileMap]:
    """What the options ask for, in the order in which it is shown."""
    if options.pattern is None and options.schedule is None:
        raise ValueError("give a pattern, or the patterns of some layers after --schedule")
    if options.tiles is None and options.key_tile is not None:
        raise ValueError("--key-tile goes with --tiles, which says how many queries a tile has")
    if options.tiles is not None and options.pattern is None:
        raise ValueError("--tiles needs a pattern before the options: which one falls into tiles?")
    grid = as_grid("show", "--grid", options.grid)
    key_grid = grid if options.key_grid is None else as_grid("show", "--key-grid", options.key_grid)
    for lengths in (grid, key_grid):
        if math.prod(lengths) > MOST_PLACES:
            raise ValueError(
                f"a grid of {math.prod(lengths):,} places is too large for a picture; at most {MOST_PLACES:,}"
            )
    views: list[Seen | Reach | TileMap] = []
    if options.pattern is not None:
        pattern = parse(options.pattern)
        views += seen(pattern, grid, key_grid, query=options.query)
        if options.tiles is not None:
            views += _checked_tiles(options, pattern)
    if options.schedule is not None:
        views.append(reach([parse(layer) for layer in options.schedule], grid, key_grid, query=options.query))
    return views


def _checked_tiles(options: argparse.Namespace, pattern: Pattern) -> list[TileMap]:
    key_grid = options.grid if options.key_grid is None else options.key_grid
    key_tile = options.tiles if options.key_tile is None else options.key_tile
    queries, keys = _at_least(options.grid, options.tiles), _at_least(key_grid, key_tile)
    if queries * keys > MOST_PLACES:
        raise ValueError(
            f"{queries:,} query tiles by {keys:,} key tiles are too many for a picture; choose larger ones"
        )
    return tile_maps(pattern, options.grid, options.key_grid, query_tile=options.tiles, key_tile=options.key_tile)


def _at_least(grid: Sequence[int], tile: Sequence[int]) -> int:
    """How many tiles a grid has without a dilation; one size stands for all axes."""
    sizes = list(tile) * len(grid) if len(tile) == 1 else tile
    return math.prod(-(-length // max(size, 1)) for length, size in zip(grid, sizes, strict=False))


def print_view(view: Seen | Reach | TileMap, out: Console) -> None:
    """One view as a heading, a picture in letters, and what the letters mean."""
    heading, lines, legend = _text_of(view)
    out.print(heading, style="bold", soft_wrap=True)
    for line in lines:
        out.print(_colored(line), soft_wrap=True)
    out.print(legend, style="dim", soft_wrap=True)


def _text_of(view: Seen | Reach | TileMap) -> tuple[str, Iterator[str], str]:
    if isinstance(view, TileMap):
        return _tiles_text(view)
    size = view.keys.size if isinstance(view, Seen) else view.layers.size
    if isinstance(view, Seen):
        signs = np.where(view.keys, SEEN, UNSEEN)
        number = int(view.keys.sum())
        heading = f"{view.name}: query {view.query} sees {number:,} of {size:,} keys"
        legend = f"{SEEN} a key it sees, {UNSEEN} one it does not"
    else:
        if len(view.names) >= len(DEPTH_SIGNS):
            raise ValueError(f"a schedule may have up to {len(DEPTH_SIGNS) - 1} layers in text, got {len(view.names)}")
        signs = np.array(list(DEPTH_SIGNS))[view.layers]
        number = int((view.layers > 0).sum())
        heading = f"{' > '.join(view.names)}: query {view.query} hears of {number:,} of {size:,} keys"
        legend = f"1, 2, ... how many layers it takes, {UNSEEN} out of reach"
    if view.has_own_place:
        is_seen = signs[view.query] != UNSEEN
        signs[view.query] = QUERY if is_seen else QUERY.lower()
        legend = f"{QUERY} the query{'' if is_seen else ' (which does not see itself)'}, {legend}"
    return heading, _frames(signs), legend


def _frames(signs: np.ndarray) -> Iterator[str]:
    """The rows of a grid's pictures; the frames of a 3-D grid are parted by an empty line."""
    planes = signs.reshape(-1, *signs.shape[-2:]) if signs.ndim > 1 else signs[None, None]
    for number, plane in enumerate(planes):
        if number:
            yield ""
        yield from ("".join(row) for row in plane)


def _tiles_text(view: TileMap) -> tuple[str, Iterator[str], str]:
    work = view.work
    query_tile, key_tile = ("x".join(map(str, sizes)) for sizes in (work.query_tile, work.key_tile))
    heading = f"{view.name}: query tiles of {query_tile} (rows) by key tiles of {key_tile} (columns)"
    rows = ("".join(TILE_SIGNS[kind] for kind in row) for row in view.pairs())
    legend = (
        f"# full, + partial, . empty: {work.visited:,} visits, {work.full:,} of them full, "
        f"at most {work.worst:,} for one query tile; {work.waste:.2f} pairs computed per pair needed"
    )
    return heading, rows, legend


def _colored(line: str) -> Text:
    """The line in color; runs of one sign become one piece."""
    text = Text()
    start = 0
    for end in range(1, len(line) + 1):
        if end == len(line) or line[end] != line[start]:
            text.append(line[start:end], STYLES[line[start]])
            start = end
    return text
