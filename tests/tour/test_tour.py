"""The tour: its page is complete, its pictures exist, and what it claims is so."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import vicinal
from vicinal.pattern import Near, Window, count
from vicinal.tour import gallery, race, smoothing
from vicinal.tour.build import FULL, QUICK, STACK_GRID, STACKS, TILED, build
from vicinal.tour.page import CODE, WIDEST_BAR, Contents, render
from vicinal.tour.systems import SYSTEMS, Outcome, System
from vicinal.tour.views import reach

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

PANELS = [panel for section in gallery.SECTIONS for panel in section.panels]
PACKAGE = Path(vicinal.__file__).parent


def show_a_system(folder):
    picture = folder / "made-up.png"
    picture.write_bytes(b"picture")
    return Outcome(picture, 83.5, 81.25, "accuracy, %", "guessing <always>", note="on digits & letters")


MADE_UP = System("Made-Up", "A Paper & More", "2024", "show that rows fill", run=show_a_system)


@pytest.fixture(scope="module")
def told():
    """What the tour announced."""
    return []


@pytest.fixture(scope="module")
def tour(tmp_path_factory, told):
    """A small tour, in which one more system is already built."""
    out = tmp_path_factory.mktemp("tour") / "demo"
    return build(out, scale=QUICK, systems=(*SYSTEMS, MADE_UP), announce=lambda *step: told.append(step))


@pytest.fixture(scope="module")
def page(tour):
    return tour.page.read_text("utf-8")


class Reader(HTMLParser):
    """Collects the tags of a page and checks that they close in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(tour, page):
    tags = Reader(page).tags
    places = [attrs["src"] for tag, attrs in tags if "src" in attrs] + [a["href"] for _, a in tags if "href" in a]
    assert places
    for place in places:
        assert (tour.page.parent / place).is_file(), f"{place} is not beside the page"
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert "$" not in re.sub(r"\$\{|`", "", page.split("<script>")[0]), "a placeholder was left"


def test_every_picture_exists_and_opens(tour):
    image = pytest.importorskip("PIL.Image")
    assert len(tour.images) == len(set(tour.images)) > 6
    for path in tour.images:
        if path.name != "made-up.png":
            with image.open(path) as picture:
                assert min(picture.size) >= 50


def test_the_page_has_a_row_for_each_of_the_ten_systems(page):
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS) == 10
    assert page.count('<tr class="system">') == 11
    for system in SYSTEMS:
        assert f"<b>{system.name}</b>" in page
    assert page.count("not built yet") == sum(system.run is None for system in SYSTEMS) == 6
    assert page.count('<span class="tag">re-creation</span>') == 3


def test_a_system_that_is_built_fills_its_row(tour, page):
    row = page.split('<tr class="system">')[-1].split("</tr>")[0]
    for words in ("Made-Up", "A Paper &amp; More", "83.5", "81.25", "guessing &lt;always&gt;", "digits &amp; letters"):
        assert words in row
    assert 'src="images/made-up.png"' in row
    assert tour.systems[-1].seconds >= 0


def test_progress_counts_every_step(told, tour):
    numbers, totals, titles = zip(*told, strict=True)
    assert list(numbers) == list(range(1, len(told) + 1))
    assert set(totals) == {len(told)}
    assert all(titles)


def test_smoothing_beats_doing_nothing_and_the_plain_mean(tour):
    smoothed = tour.smoothing
    for result in smoothed.results:
        assert math.isfinite(result.psnr)
        assert result.ms > 0
        assert result.psnr > smoothed.noisy.psnr
        assert result.psnr > result.plain_psnr


def test_smoothing_at_the_full_size_beats_the_best_gaussian_blur():
    """What the page's head line says; timed briefly, computed in full for the pattern that is fastest."""
    from vicinal.tour.photo import coffee

    original = coffee().shrunk(FULL.shrink)
    found = smoothing.compare_smoothings(original, (Near(7), Window(7)), seconds=0.01)
    assert found.noisy.psnr < found.gaussian.psnr - 3
    for result in found.results:
        assert result.psnr > found.gaussian.psnr + 1


def test_smoothing_is_the_non_local_means_of_its_definition():
    picture = torch.rand(9, 11, 3)
    query, key, value = smoothing.patch_attention(picture)
    got = smoothing.smooth(query, key, value, Near(5))
    patches = query[0, :, :, 0, :-1]
    row, column = 3, 7
    near = (slice(row - 2, row + 3), slice(column - 2, column + 3))
    distance = (patches[near] - patches[row, column]).square().sum(-1)
    weights = torch.exp(-distance / (smoothing.SHARPNESS * smoothing.NOISE) ** 2)
    expected = (weights[..., None] * picture[near]).sum((0, 1)) / weights.sum()
    torch.testing.assert_close(got[row, column], expected, rtol=1e-4, atol=1e-5)


def test_times_are_positive_and_both_answers_were_right(tour):
    assert len(tour.races) == 2 * len(QUICK.problems)
    for result in tour.races:
        assert result.reason == ""
        assert result.ours.median_ms > 0
        assert result.dense.median_ms > 0
        assert math.isfinite(result.speedup)


def test_a_wrong_answer_gets_no_time(monkeypatch, tour):
    monkeypatch.setattr(race, "attention", lambda query, key, value, pattern: value + 0 * (query + key))
    results = race.race(QUICK.problems, seconds=0.01)
    assert all(result.ours is None and "vicinal is wrong" in result.reason for result in results)
    contents = Contents(
        images=dict.fromkeys(("photo", "stacks", "tiles", "original", "noisy", "gaussian", "smooth0"), "images/a.png"),
        smoothing=tour.smoothing,
        races=tuple(results),
        live=(),
        systems=(),
        machine={"cpu": "an abacus", "threads": 1, "torch": "2", "python": "3"},
        credit="nobody",
        version="0",
        seconds=1.0,
    )
    page = render(contents)
    assert page.count("no times: vicinal is wrong") == len(results)
    assert "torch's dense masked attention" not in page, "a head line without a measurement"


def test_bars_are_as_long_as_the_speedups(tour, page):
    widths = [int(width) for width in re.findall(r'style="width:(\d+)px"', page)]
    expected = []
    for results in (tour.races, tour.live):
        speedups = [result.speedup for result in results if result.speedup is not None]
        expected += [max(3, round(WIDEST_BAR * speedup / max(speedups))) for speedup in speedups]
    assert widths == expected


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.written)
def test_a_panel_draws_what_its_query_sees(panel):
    drawing = gallery.drawing(panel, "photo.png", "name")
    groups = re.findall(r'class="keys group\d" d="([^"]*)"', drawing)
    whole = vicinal.pattern.mask(panel.pattern, gallery.GRID)
    whole = whole if len(groups) > 1 else whole[None]
    for path, group in zip(groups, whole, strict=True):
        places = [(int(row), int(column)) for column, row in re.findall(r"M(\d+) (\d+)", path)]
        assert places == [tuple(place) for place in group[panel.query].nonzero().tolist()]
    assert vicinal.pattern.parse(panel.written) == panel.pattern


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.written)
def test_the_tables_on_the_page_are_all_the_script_needs(panel):
    """What `page.js` does, in Python: keys of a query from the plain tables alone."""
    rows, columns = gallery.GRID
    groups = gallery.plain_tables(vicinal.bounds(panel.pattern, gallery.GRID))
    whole = vicinal.pattern.mask(panel.pattern, gallery.GRID)
    for members, group in zip(groups, whole if len(groups) > 1 else whole[None], strict=True):
        for query in ((0, 0), (rows - 1, 5), (11, columns - 2)):
            found = torch.zeros(rows, columns, dtype=torch.bool)
            for axes in members:
                keys = [
                    [
                        (axis["start"][at] + axis["step"] * number) % axis["length"]
                        for number in range(axis["count"][at])
                    ]
                    for axis, at in zip(axes, query, strict=True)
                ]
                found[torch.tensor(keys[0])[:, None], torch.tensor(keys[1])[None]] = True
            assert torch.equal(found, group[query])


def test_the_pages_sentences_are_true():
    near, swin, dinat = (int((reach(layers, STACK_GRID).layers > 0).sum()) for layers in STACKS)
    assert near < swin < dinat
    work = [
        view.work for pattern in TILED for view in vicinal.tour.views.tile_maps(pattern, (28, 28), query_tile=(4, 4))
    ]
    assert work[0].full < work[0].visited, "without a stride some tiles are partial"
    assert work[1].full == work[1].visited, "with a stride that fits, none is"
    sizes = {panel.written: count(panel.pattern, gallery.GRID) for panel in PANELS}
    assert sizes["Near(9)"] == 81 * math.prod(gallery.GRID), "every query sees 81 keys"


def test_the_code_on_the_page_runs():
    exec(CODE, {})


def test_everything_but_the_times_comes_out_the_same(tmp_path, tour):
    again = build(tmp_path / "again", scale=QUICK, systems=(*SYSTEMS, MADE_UP))
    assert [path.name for path in again.images] == [path.name for path in tour.images]
    for first, second in zip(tour.images, again.images, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    figures = [
        [dataclasses.replace(result, ms=None, picture=None) for result in one.smoothing.results]
        for one in (tour, again)
    ]
    assert figures[0] == figures[1]


def test_the_pages_parts_are_installed_with_the_package():
    project = PACKAGE.parents[1] / "pyproject.toml"
    if not project.is_file():
        pytest.skip("the package is installed, not in its checkout")
    listed = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["vicinal"]
    found = {path for pattern in listed for path in PACKAGE.glob(pattern)}
    missing = [path.name for path in (PACKAGE / "tour").glob("page.*") if path.suffix != ".py" and path not in found]
    assert not missing, f"add them to package-data in pyproject.toml: {missing}"
