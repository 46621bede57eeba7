"""Which tiles the Triton kernels use: counted exactly, cheap where they should be, and carried as integers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from vicinal.ops.packing import Layout, layout_of
from vicinal.ops.tiling import cut_evenly
from vicinal.ops.triton.choose import DEVICES, Cost, choices, choose, choose_all, count_axis
from vicinal.ops.triton.plan import PASSES, Tiles, block, ordinary, pack, unpack
from vicinal.pattern import Full, Grid, Halo, Near, Same, Window, bounds, heads, mask, union
from vicinal.pattern.bounds import AnyPattern, Member
from vicinal.pattern.table import AxisTable

from .problems import CRISS_CROSS, near

AXES = (
    (Near(5), 23),
    (Near(6, stride=4), 31),
    (Near(4, dilation=3), 25),
    (Near(5, causal=True, stride=2), 19),
    (Near(4, border="crop"), 17),
    (Window(5, shift=2), 23),
    (Halo(4, 2), 21),
    (Grid(4), 12),
    (Full(), 9),
    (Full(causal=True), 13),
    (Same(), 8),
)


def brute_force(pattern: AnyPattern, length: int, step: int, pitch: int, phase: int, size: int) -> tuple[int, int]:
    """Tiles visited, and how many of them are full, from the mask and the definition of the tiles alone."""
    seen = mask(pattern, (length,)).numpy()
    visited = full = 0
    for residue in range(min(step, length)):
        members = range(residue, length, step)
        for begin in range(-phase, len(members), pitch):
            tile = [members[place] for place in range(max(begin, 0), min(begin + pitch, len(members)))]
            if not tile:
                continue
            needed = np.flatnonzero(seen[tile].any(0))
            for first in range(needed[0], needed[-1] + 1, step * size):
                keys = [first + step * place for place in range(size)]
                visited += 1
                full += all(key <= needed[-1] and seen[tile, key].all() for key in keys)
    return visited, full


@pytest.mark.parametrize(("kind", "length"), AXES, ids=str)
def test_modelled_visits_equal_a_count_from_the_mask(kind: Near, length: int) -> None:
    table = AxisTable.of(kind, length)
    for pitch, phase, size in itertools.product((1, 3, 4, 8), (0, 1, 2), (1, 2, 5, 8)):
        found = count_axis(cut_evenly(table, pitch, phase % pitch), size)
        assert found == brute_force(kind, length, table.step, pitch, phase % pitch, size), (pitch, phase, size)


def test_visits_of_a_box_equal_a_count_from_the_mask() -> None:
    pattern, grid = (Near(3, causal=True), Near(5, dilation=2), Window(4, shift=1)), (5, 11, 9)
    cost = choose(bounds(pattern, grid).groups[0].members[0], 32, 32, torch.float16, DEVICES["sm90"], "forward")
    counts = [
        brute_force(kind, length, kind.step(length), pitch, phase, size)
        for kind, length, pitch, phase, size in zip(
            pattern, grid, cost.tiles.query, cost.tiles.phase, cost.tiles.key, strict=True
        )
    ]
    assert cost.visited == math.prod(visited for visited, _ in counts)
    assert cost.full == math.prod(full for _, full in counts)
    assert cost.pairs_needed == int(mask(pattern, grid).sum())


def chosen(pattern: AnyPattern, grid: tuple[int, ...], head_dim: int = 128, name: str = "forward") -> Cost:
    member: Member = bounds(pattern, grid).groups[0].members[0]
    return choose(member, head_dim, head_dim, torch.bfloat16, DEVICES["sm90"], name)


def waste(cost: Cost) -> float:
    return cost.pairs_computed / cost.pairs_needed


@pytest.mark.parametrize("name", PASSES)
def test_small_windows_do_not_waste_ten_times(name: str) -> None:
    assert waste(chosen(Near(7), (56, 56), 32, name)) < 5
    assert waste(chosen(Near(7), (7, 7), 32, name)) < 2
    assert waste(chosen(Near(7, dilation=8), (56, 56), 32, name)) < 2


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("shift", [0, 3])
def test_windows_are_tiled_on_their_own_boundaries(name: str, shift: int) -> None:
    cost = chosen(Window(7, shift=shift), (56, 56), 32, name)
    assert cost.tiles.query == cost.tiles.key == (1, 7, 7)
    assert cost.visited == cost.programs == (8 + (shift > 0)) ** 2


@pytest.mark.parametrize(
    ("pattern", "grid"),
    [
        (near((18, 24, 24), stride=(16, 8, 8)), (30, 48, 80)),
        (Near(80, stride=16), (256, 256)),
        (Near(2048, stride=256), (32768,)),
    ],
    ids=["video", "image", "sequence"],
)
def test_strides_make_every_tile_full(pattern: AnyPattern, grid: tuple[int, ...]) -> None:
    for name in PASSES:
        cost = chosen(pattern, grid, name=name)
        assert waste(cost) == 1
        assert cost.full == cost.visited


def test_sliding_video_window_wastes_less_than_fixed_key_tiles() -> None:
    # fixed tiles of 256 queries and 128 keys bring 11.1 times fewer pairs down to 3.27 times less work
    assert waste(chosen(near((18, 24, 24)), (30, 48, 80))) < 1.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (32, 32), (80, 48), (128, 128), (256, 256), (16, 256)], ids=str)
def test_blocks_hold_their_tiles_and_stay_small(device: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    member = bounds((Near(3), Near(9), Near(12)), (8, 20, 33)).groups[0].members[0]
    for name in PASSES:
        tiles = choose(member, *dims, dtype, DEVICES[device], name).tiles
        assert 16 <= tiles.block_queries <= 128
        assert 16 <= tiles.block_keys <= 128
        assert math.prod(tiles.query) <= tiles.block_queries
        assert tiles.warps in (1, 2, 4, 8)
        assert tiles.stages in (1, 2, 3)


def test_choice_travels_in_the_layout() -> None:
    table = bounds(heads(Near(5, dilation=2), CRISS_CROSS), (9, 14))
    costs = choose_all(table, 64, 64, torch.float16, DEVICES["sm80"])
    assert len(costs) == 3
    layout = dataclasses.replace(layout_of(table, 4), plan=pack(choices(costs)))
    again = Layout.unpack(layout.packed)
    assert again == layout
    assert unpack(again.plan, again) == [choices(costs)[:1], choices(costs)[1:]]
    assert unpack((), again)[1] == [(ordinary(2),) * 3] * 2
    assert layout_of(table, 4).packed == layout.packed[: -len(layout.plan)]


def test_part_of_a_wrapping_table_gets_tiles_too() -> None:
    table = bounds(Near(5, border="wrap"), (18,)).slice(0, 4, 15)
    assert len(choose_all(table, 32, 32, torch.float16, DEVICES["sm90"])) == 1


def test_choice_takes_no_longer_than_a_second() -> None:
    import time

    member = bounds(union((Near(17), Near(23), Near(21)), Near(3)), (32, 45, 79)).groups[0].members[0]
    begin = time.process_time()
    choose(member, 128, 128, torch.float16, DEVICES["sm90"], "key")
    assert time.process_time() - begin < 2


def test_block_is_a_power_of_two_of_at_least_sixteen() -> None:
    assert [block(tokens) for tokens in (1, 16, 17, 49, 64, 65)] == [16, 16, 32, 64, 64, 128]
    assert Tiles((1, 7, 7), (0, 0, 0), (1, 4, 4), 4, 2).to_dict()["block"] == [64, 16]
