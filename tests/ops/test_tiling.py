"""Tiles against the masks they are cut from, pair by pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from vicinal.ops.tiled.plan import choose_cut
from vicinal.ops.tiling import EMPTY, FULL, PARTIAL, AxisTiles, buckets, classify, cut, visits
from vicinal.pattern import AxisKind, AxisTable, Bounds, Full, Grid, Halo, Near, Same, Window, bounds
from vicinal.pattern.bounds import Member
from vicinal.pattern.counting import member_mask, member_pairs


def tables() -> Iterator[tuple[str, AxisTable]]:
    """Tables of every kind, with classes of unequal size, wrapping, cut, shifted, turned around."""
    kinds: list[tuple[AxisKind, int]] = [
        (Near(5), 17),
        (Near(4, dilation=3), 22),
        (Near(3, dilation=5), 13),
        (Near(9, dilation=2), 11),
        (Near(5, stride=3), 19),
        (Near(6, dilation=2, stride=4), 23),
        (Near(5, stride=2, causal=True), 16),
        (Near(4, dilation=3, causal=True), 20),
        (Near(5, border="crop"), 14),
        (Near(5, border="wrap"), 14),
        (Near(3, dilation=4, border="wrap"), 16),
        (Near(20, border="wrap"), 9),
        (Near(7), 1),
        (Window(5), 17),
        (Window(5, shift=2), 20),
        (Window(30), 11),
        (Halo(4, 2), 18),
        (Grid(4), 20),
        (Full(), 9),
        (Full(causal=True), 13),
        (Same(), 8),
    ]
    for kind, length in kinds:
        yield f"{kind!r}-{length}".replace(" ", ""), AxisTable.of(kind, length)
    yield "two-grids-40-13", AxisTable.of(Near(5), 40, 13)
    yield "two-grids-7-30", AxisTable.of(Near(4, border="crop"), 7, 30)
    yield "slice", AxisTable.of(Near(4, dilation=3), 26).slice(5, 19)
    yield "slice-of-wrap", AxisTable.of(Near(5, dilation=2, border="wrap"), 18).slice(3, 16)
    yield "partly-blind", AxisTable.of(Near(3), 20).shift(4, 9)
    yield "all-blind", AxisTable.of(Near(3, dilation=2), 9).shift(30, 5)
    yield "transposed", AxisTable.of(Near(6, stride=4, causal=True), 27).transpose()
    yield "transposed-dilated", AxisTable.of(Near(3, dilation=4), 27).shift(3, 17).transpose()


TABLES = dict(tables())
TILE_SIZES = (1, 2, 3, 4, 7, 100)

by_table = pytest.mark.parametrize("name", TABLES)


def cuts(table: AxisTable) -> Iterator[AxisTiles]:
    for tile, aligned in itertools.product(TILE_SIZES, (False, True)):
        yield cut(table, tile, aligned=aligned)


@by_table
def test_every_query_is_in_exactly_one_tile(name: str) -> None:
    table = TABLES[name]
    for tiles in cuts(table):
        assert sorted(tiles.query[tiles.is_query]) == list(range(len(table)))
        assert tiles.is_query[:, 0].all()
        for row, real in zip(tiles.query, tiles.is_query, strict=True):
            assert len({int(query) % table.step for query in row}) == 1
            assert (np.diff(row[real]) == table.step).all()
            assert (row[~real] == row[real][-1]).all()


@by_table
def test_tiles_are_no_larger_than_asked_for(name: str) -> None:
    table = TABLES[name]
    for tile in TILE_SIZES:
        assert cut(table, tile).queries <= tile
        assert cut(table, tile, aligned=True).queries <= tile


@by_table
def test_interval_of_a_tile_is_the_least_cover_of_what_its_queries_see(name: str) -> None:
    table = TABLES[name]
    for tiles in cuts(table):
        for number in range(tiles.num_tiles):
            seen = [
                table.start[query] + table.step * np.arange(table.count[query])
                for query in tiles.query[number][tiles.is_query[number]]
            ]
            keys = np.concatenate(seen)
            if not len(keys):
                assert tiles.size[number] == 0
                continue
            assert tiles.first[number] == keys.min()
            assert tiles.first[number] + table.step * (tiles.size[number] - 1) == keys.max()


@by_table
def test_each_query_sees_its_own_range_of_the_interval(name: str) -> None:
    table = TABLES[name]
    for tiles in cuts(table):
        assert (tiles.low >= 0).all()
        assert (tiles.high <= tiles.keys).all()
        coordinates = tiles.key_coordinates()
        assert (coordinates >= 0).all()
        assert (coordinates < table.length).all()
        for number, place in np.ndindex(tiles.query.shape):
            own = range(tiles.low[number, place], tiles.high[number, place])
            query = tiles.query[number, place]
            unwrapped = [tiles.first[number] + table.step * at for at in own]
            assert unwrapped == list(table.start[query] + table.step * np.arange(table.count[query]))
            assert [int(coordinates[number, at]) for at in own] == [key % table.length for key in unwrapped]


@by_table
def test_aligned_cuts_fall_wherever_the_window_changes(name: str) -> None:
    table = TABLES[name]
    for tile in TILE_SIZES:
        tiles = cut(table, tile, aligned=True)
        for row in tiles.query:
            assert len({(int(table.start[query]), int(table.count[query])) for query in row}) == 1


@by_table
def test_offsets_say_where_a_bias_is_read(name: str) -> None:
    table = TABLES[name]
    if table.bias_length is None:
        with pytest.raises(ValueError, match="takes no bias"):
            cut(table, 4).offsets()
        return
    for tiles in cuts(table):
        offsets = tiles.offsets()
        for number, place in np.ndindex(tiles.query.shape):
            query = tiles.query[number, place]
            for at in range(tiles.low[number, place], tiles.high[number, place]):
                distance = tiles.first[number] + table.step * at - table.center[query]
                assert distance % table.step == 0
                assert offsets[number, place] + at == distance // table.step + table.bias_length // 2
                assert 0 <= offsets[number, place] + at < table.bias_length


@by_table
def test_buckets_hold_every_tile_once(name: str) -> None:
    for tiles in cuts(TABLES[name]):
        parts = buckets(tiles)
        assert sum(part.num_tiles for part in parts) == tiles.num_tiles
        queries = np.concatenate([part.query[part.is_query] for part in parts])
        assert sorted(queries) == list(range(len(tiles.table)))
        assert sum(part.num_tiles * part.keys for part in parts) <= tiles.num_tiles * tiles.keys


def key_tiles(table: AxisTable, residue: int, key_tile: int) -> list[list[int]]:
    """The keys of one residue class, in pieces."""
    members = list(range(residue, table.length, table.step))
    return [members[at : at + key_tile] for at in range(0, len(members), key_tile)]


def expected_class(seen: np.ndarray) -> int:
    if not seen.size or not seen.any():
        return EMPTY
    return FULL if seen.all() else PARTIAL


@by_table
def test_classes_of_tile_pairs_equal_those_of_the_mask(name: str) -> None:
    table = TABLES[name]
    mask = table.mask()
    for tiles in cuts(table):
        for key_tile in TILE_SIZES:
            found = classify(tiles, key_tile)
            for number in range(tiles.num_tiles):
                queries = tiles.query[number][tiles.is_query[number]]
                pieces = key_tiles(table, int(tiles.first[number]) % table.step, key_tile)
                wanted = [expected_class(mask[np.ix_(queries, keys)]) for keys in pieces]
                wanted += [EMPTY] * (found.shape[1] - len(pieces))
                assert found[number].tolist() == wanted
                # and no key outside of the tile's class is seen
                others = np.arange(table.length) % table.step != tiles.first[number] % table.step
                assert not mask[queries][:, others].any()


MEMBERS = (
    ("17x22", bounds((Near(5), Near(4, dilation=3)), (17, 22))),
    ("20x14", bounds((Window(5, shift=2), Near(5, border="wrap")), (20, 14))),
    ("12x13", bounds((Grid(4), Full(causal=True)), (12, 13))),
    ("5x9x7", bounds((Near(3, causal=True), Halo(4, 1), Near(3, dilation=2)), (5, 9, 7))),
    ("19", bounds(Near(5, stride=3), (19,))),
    ("14x10-on-5x4", bounds(Near(3), (14, 10), (5, 4))),
    ("9x6-partly-blind", bounds(Near(3), (9, 6)).shift(0, 4, 3)),
)


@pytest.mark.parametrize(("query_tile", "key_tile"), [(1, 1), (4, 4), (3, 5), (16, 2)], ids=str)
@pytest.mark.parametrize(("name", "table"), MEMBERS, ids=[name for name, _ in MEMBERS])
def test_visits_equal_those_counted_on_the_mask(name: str, table: Bounds, query_tile: int, key_tile: int) -> None:
    member: Member = table.groups[0].members[0]
    rank = len(member)
    found = visits(member, (query_tile,) * rank, (key_tile,) * rank)
    axes = [axis_pairs(axis, query_tile, key_tile) for axis in member]
    mask = member_mask(member)
    grid, key_grid = [len(axis) for axis in member], [axis.length for axis in member]
    visited = full = 0
    per_query_tile: dict[tuple[int, ...], int] = {}
    for pairs in itertools.product(*axes):
        queries = np.ravel_multi_index(np.ix_(*(queries for _, queries, _ in pairs)), grid).ravel()
        keys = np.ravel_multi_index(np.ix_(*(keys for _, _, keys in pairs)), key_grid).ravel()
        kind = expected_class(mask[np.ix_(queries, keys)])
        visited += kind != EMPTY
        full += kind == FULL
        number = tuple(number for number, _, _ in pairs)
        per_query_tile[number] = per_query_tile.get(number, 0) + (kind != EMPTY)
    assert found.visited == visited
    assert found.full == full
    assert found.worst == max(per_query_tile.values())
    assert found.query_tiles == len(per_query_tile)
    assert found.pairs_needed == member_pairs(member) == int(mask.sum())
    assert found.pairs_computed == visited * query_tile**rank * key_tile**rank
    assert found.waste >= 1 or not mask.any()
    assert found.key_tiles == math.prod(
        sum(len(key_tiles(axis, residue, key_tile)) for residue in range(min(axis.step, axis.length)))
        for axis in member
    )


def axis_pairs(table: AxisTable, query_tile: int, key_tile: int) -> list[tuple[int, np.ndarray, list[int]]]:
    """Every query tile of an axis with every key tile of its class, as coordinates."""
    tiles = cut(table, query_tile)
    return [
        (number, tiles.query[number][tiles.is_query[number]], keys)
        for number in range(tiles.num_tiles)
        for keys in key_tiles(table, int(tiles.first[number]) % table.step, key_tile)
    ]


@pytest.mark.parametrize(
    ("kind", "grid", "tiles", "size"),
    [
        (Window(7), (56, 56), 8, 7),
        (Window(7, shift=3), (56, 56), 9, 7),
        (Window(5), (35, 35), 7, 5),
        (Grid(7), (56, 56), 8, 7),
        (Near(8, stride=8), (64, 64), 8, 8),
        (Full(), (24, 24), 1, 24),
        (Window(64), (512,), 8, 64),
        (Grid(64), (512,), 8, 64),
        (Window(4), (12, 8, 4), 3, 4),
    ],
    ids=str,
)
def test_chosen_cut_tiles_windows_on_their_own_boundaries(
    kind: AxisKind, grid: tuple[int, ...], tiles: int, size: int
) -> None:
    axes = choose_cut(bounds(kind, grid).groups[0].members[0], bounded=True)
    assert (axes[0].num_tiles, axes[0].queries, axes[0].keys) == (tiles, size, size)
    for axis in axes:
        if isinstance(kind, Window) and kind.shift:  # the blocks at the edges are shorter, the others whole
            assert axis.is_whole.sum() == tiles - 2
        else:
            assert axis.is_whole.all()
            assert axis.num_tiles * axis.queries * axis.keys == axis.table.count.sum()


@pytest.mark.parametrize("kind", [Near(7), Near(13, dilation=4), Halo(8, 3), Near(5, border="wrap")], ids=repr)
def test_chosen_cut_of_sliding_windows_keeps_the_waste_small(kind: AxisKind) -> None:
    member = bounds(kind, (64, 48)).groups[0].members[0]
    axes = choose_cut(member, bounded=True)
    computed = math.prod(axis.num_tiles * axis.queries * axis.keys for axis in axes)
    assert member_pairs(member) <= computed <= 6 * member_pairs(member)


@by_table
def test_chosen_cut_covers_every_query(name: str) -> None:
    table = TABLES[name]
    for bounded in (True, False):
        (axis,) = choose_cut((table,), bounded=bounded)
        assert sorted(axis.query[axis.is_query]) == list(range(len(table)))
