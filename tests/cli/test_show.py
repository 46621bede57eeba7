"""`vicinal show`: its text says what the mask says, and its pictures are pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vicinal.cli.main import main
from vicinal.ops.tiling import EMPTY, FULL, PARTIAL
from vicinal.pattern import Full, Grid, Halo, Near, Same, Window, bounds, draw, heads, mask, receptive_field, union
from vicinal.tour.pictures import save_views
from vicinal.tour.views import reach, seen, tile_maps

PATTERNS = [
    Near(5),
    Near(3, dilation=2, border="wrap"),
    Near(5, border="crop"),
    (Near(4, stride=3), Near(3, causal=True)),
    Window(4, shift=1),
    Halo(3, 2),
    (Grid(3), Same()),
    heads(Near(3), (Full(), Window(4))),
    union((Same(), Full()), (Full(), Same())),
    heads(union(Near(3), Near(3, dilation=4)), Full(causal=True)),
]
GRID = (12, 10)


def printed_by(capsys, *arguments):
    assert main(["show", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def groups_of(pattern, grid, key_grid=None):
    """The mask with an axis of head groups first, also where there is one group."""
    whole = mask(pattern, grid, key_grid)
    return whole if len(bounds(pattern, grid, key_grid).groups) > 1 else whole[None]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("query", [(0, 0), (11, 4), (5, 9)], ids=str)
def test_seen_equals_the_mask(pattern, query):
    views = seen(pattern, GRID, query=query)
    expected = groups_of(pattern, GRID)
    assert len(views) == len(expected)
    for view, group in zip(views, expected, strict=True):
        assert torch.equal(torch.from_numpy(view.keys), group[query])


def test_seen_on_two_grids_equals_the_mask():
    [view] = seen(Near(3), (8, 10), (4, 5), (7, 2))
    assert torch.equal(torch.from_numpy(view.keys), mask(Near(3), (8, 10), (4, 5))[7, 2])
    assert not view.has_own_place


@pytest.mark.parametrize(
    "schedule",
    [
        [Near(3), Near(3, dilation=3)],
        [Window(4), Window(4, shift=2), Near(3, border="wrap")],
        [heads(Near(3), (Full(), Same())), union(Near(3), Grid(2))],
    ],
    ids=repr,
)
def test_reach_equals_the_receptive_field_of_every_depth(schedule):
    view = reach(schedule, GRID, query=(7, 3))
    for depth in range(1, len(schedule) + 1):
        reached = torch.from_numpy((view.layers > 0) & (view.layers <= depth))
        assert torch.equal(reached, receptive_field(schedule[:depth], GRID)[7, 3])


def test_reach_from_another_key_grid_equals_the_receptive_field():
    view = reach([Near(3), Near(5)], (9, 8), (5, 4))
    field = receptive_field([Near(3), Near(5)], (9, 8), (5, 4))[4, 4]
    assert torch.equal(torch.from_numpy(view.layers > 0), field)


@pytest.mark.parametrize("pattern", [Near(5), Window(4, shift=1), Halo(3, 2), Near(4, stride=3), Full(causal=True)])
def test_tile_classes_equal_those_counted_in_the_mask(pattern):
    tile, grid = 4, (12, 16)
    [view] = tile_maps(pattern, grid, query_tile=(tile,))
    seen_by = mask(pattern, grid).numpy().reshape(3, tile, 4, tile, 3, tile, 4, tile)
    share = seen_by.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(12, 12, -1).mean(-1)
    expected = np.where(share == 1, FULL, np.where(share > 0, PARTIAL, EMPTY))
    assert (view.pairs() == expected).all()
    assert view.work.visited == (expected > EMPTY).sum()


def test_show_prints_what_draw_draws(capsys):
    printed = printed_by(capsys, "Near(5)", "--grid", 9, 12, "--query", 0, 11)
    assert draw(Near(5), (9, 12), query=(0, 11)) in printed
    assert "sees 25 of 108 keys" in printed


def test_show_names_the_groups_of_heads(capsys):
    printed = printed_by(capsys, "heads(Near(3), (Same(), Full()))", "--grid", 5, 6)
    assert "Near(3): query (2, 3) sees 9 of 30 keys" in printed
    assert "(Same(), Full()): query (2, 3) sees 6 of 30 keys" in printed


def test_show_marks_a_query_that_does_not_see_itself(capsys):
    printed = printed_by(capsys, "Near(2, causal=True)", "--grid", 5, "--query", 4)
    assert "...#Q" in printed
    printed = printed_by(capsys, "Window(2)", "--grid", 4, "--key-grid", 4)
    assert "..Q#" in printed


def test_show_parts_the_frames_of_a_video(capsys):
    printed = printed_by(capsys, "(Same(), Near(3), Near(3))", "--grid", 2, 3, 4)
    assert "\n....\n....\n....\n\n.###\n.#Q#\n.###\n" in printed


def test_show_prints_a_schedule_in_depths(capsys):
    printed = printed_by(capsys, "--grid", 15, "--schedule", "Near(3)", "Near(3, dilation=3)")
    assert "\n...2221Q1222...\n" in printed


def test_show_prints_tile_classes(capsys):
    printed = printed_by(capsys, "Near(5)", "--grid", 12, "--tiles", 3, "--key-tile", 3)
    assert "\n#+..\n+#+.\n.+#+\n..+#\n" in printed
    assert "10 visits, 4 of them full" in printed


def test_show_breaks_no_line_in_a_pipe(capsys):
    printed = printed_by(capsys, "Full()", "--grid", 2, 500, "--query", 0, 0)
    assert "\nQ" + 499 * "#" + "\n" + 500 * "#" + "\n" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["Near(7)", "--grid", 64],
        ["heads(Near(3), Same())", "--grid", 9, 13, "--tiles", 3, "--schedule", "Near(3)", "Window(3)"],
        ["Near(3)", "--grid", 3, 9, 11],
        ["Near(3)", "--grid", 8, 10, "--key-grid", 4, 5],
    ],
    ids=repr,
)
def test_show_saves_a_picture(capsys, tmp_path, arguments):
    image = pytest.importorskip("PIL.Image")
    target = tmp_path / "picture.png"
    assert printed_by(capsys, *arguments, "--save", target) == f"{target}\n"
    with image.open(target) as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("RGB").resize((40, 40)).get_flattened_data())) > 10, "the picture is empty"


def test_pictures_come_out_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = (save_views(seen(Near(3), (7, 9)), tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
