"""Tile order and the classes of its tiles, against the mask."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vicinal import Full, Grid, Halo, Near, Window, bounds
from vicinal.ops.engines.block_mask import blocks, chosen_orders
from vicinal.ops.tile_order import TileOrder, axis_classes, axis_pieces
from vicinal.pattern.axis import AxisKind
from vicinal.pattern.counting import member_mask
from vicinal.pattern.table import AxisTable

TABLES = (
    (Near(5), 23),
    (Near(5, dilation=3), 23),
    (Near(6, dilation=2, stride=3, causal=True), 25),
    (Near(5, dilation=2, border="wrap"), 24),
    (Near(4, border="crop"), 11),
    (Window(5, shift=2), 21),
    (Grid(4), 12),
    (Halo(3, 2), 14),
    (Full(), 9),
)


@pytest.mark.parametrize(("kind", "length"), TABLES, ids=str)
def test_classes_of_ordered_tiles_equal_those_of_the_mask(kind: AxisKind, length: int) -> None:
    table = AxisTable.of(kind, length)
    mask = table.mask()
    steps = {(1, 1), (table.step, table.step), (table.step, 1), (1, table.step)}
    for query_tile, key_tile, (query_step, key_step) in itertools.product((1, 2, 4, 16), (1, 3, 16), steps):
        touched, whole = axis_classes(table, query_tile, key_tile, query_step, key_step)
        queries, _ = axis_pieces(length, query_tile, query_step)
        keys, is_key = axis_pieces(length, key_tile, key_step)
        for query, key in itertools.product(range(len(queries)), range(len(keys))):
            pairs = mask[np.ix_(queries[query], keys[key][is_key[key]])]
            assert touched[query, key] == pairs.any()
            assert whole[query, key] == (pairs.all() and is_key[key].all())


@pytest.mark.parametrize(
    ("grid", "tile", "step"),
    [
        ((7,), (4,), (1,)),
        ((9,), (2,), (4,)),
        ((4, 6), (2, 3), (1, 1)),
        ((5, 7), (2, 4), (1, 3)),
        ((3, 5, 4), (2, 2, 2), (1, 2, 1)),
    ],
    ids=str,
)
def test_tokens_that_enter_the_order_leave_it_as_they_were(grid, tile, step) -> None:
    order = TileOrder(grid, tile, step)
    tokens = torch.randn(2, *grid, 3)
    ordered = order.enter(tokens)
    assert ordered.shape == (2, order.num_positions, 3)
    assert torch.equal(order.leave(ordered), tokens)
    assert int(order.is_token().sum()) == tokens[0, ..., 0].numel()
    # a tile is a box of one residue class on every axis
    for axis, (side, apart) in enumerate(zip(tile, step, strict=True)):
        pieces = order.coordinates(axis).reshape(order.num_tiles, order.volume)
        assert (pieces % apart == pieces[:, :1] % apart).all()
        assert ((pieces.max(1) - pieces.min(1)) <= apart * (side - 1)).all()


def test_gradient_of_the_order_is_its_inverse() -> None:
    order = TileOrder((5, 3), (2, 2), (1, 1))
    tokens = torch.randn(1, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda inputs: order.leave(order.enter(inputs)), tokens)


@pytest.mark.parametrize("given", [((4,), (2, 2), (1,)), ((4,), (0,), (1,)), ((4, 4), (2, 2), (1,))], ids=str)
def test_order_that_does_not_fit_the_grid_is_refused(given) -> None:
    with pytest.raises(ValueError, match="TileOrder: grid, tile and step must"):
        TileOrder(*given)


MEMBERS = (
    bounds((Near(5), Near(4, dilation=3)), (13, 14)),
    bounds((Near(5, border="wrap"), Window(4, shift=1)), (10, 9)),
    bounds((Near(3, causal=True), Near(4, stride=2), Near(3, dilation=2)), (5, 6, 7)),
    bounds(Near(3), (14, 10), (5, 4)),
    bounds((Near(8, stride=8), Near(8, stride=8)), (16, 24)),
)


@pytest.mark.parametrize("table", MEMBERS, ids=repr)
@pytest.mark.parametrize("volume", [4, 16, 64])
def test_block_lists_hold_exactly_the_tiles_that_the_mask_touches(table, volume: int) -> None:
    member = table.groups[0].members[0]
    mask = member_mask(member)
    orders = chosen_orders(member, volume)
    places = [
        np.ravel_multi_index([order.coordinates(axis) for axis in range(len(member))], order.grid) for order in orders
    ]
    queries, keys = (place.reshape(-1, volume) for place in places)
    is_key = orders[1].is_token().reshape(-1, volume)
    found = blocks(member, *orders)
    assert found.touched.shape == (len(queries), len(keys))
    for query, key in itertools.product(range(len(queries)), range(len(keys))):
        pairs = mask[np.ix_(queries[query], keys[key][is_key[key]])]
        assert found.touched[query, key] == pairs.any()
        assert found.whole[query, key] == (pairs.all() and is_key[key].all())


@pytest.mark.parametrize("table", MEMBERS, ids=repr)
def test_chosen_tiles_visit_no_more_pairs_than_any_other_of_their_size(table) -> None:
    member = table.groups[0].members[0]
    rank, volume = len(member), 16
    queries, keys = chosen_orders(member, volume)
    sides = [box for box in itertools.product((1, 2, 4, 8, 16), repeat=rank) if np.prod(box) == volume]
    chosen = blocks(member, queries, keys).touched.sum()
    for query, key in itertools.product(sides, repeat=2):
        others = TileOrder(queries.grid, query, queries.step), TileOrder(keys.grid, key, keys.step)
        assert chosen <= blocks(member, *others).touched.sum()
