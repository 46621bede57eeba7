"""The tour as one page: what was computed, put into the template."""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import json
import string
from collections.abc import Iterable, Mapping
from typing import Any

from vicinal.pattern import AxisTable, Near, Window
from vicinal.tour import gallery, live
from vicinal.tour.race import Result
from vicinal.tour.smoothing import NOISE, PATCH, Smoothed, Smoothing
from vicinal.tour.systems import Row

WIDEST_BAR = 130
"""Pixels of the longest bar."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that the page shows. `images` maps a name to the picture's place beside the page."""

    images: Mapping[str, str]
    smoothing: Smoothing
    races: tuple[Result, ...]
    live: tuple[live.Result, ...]
    systems: tuple[Row, ...]
    machine: Mapping[str, Any]
    credit: str
    version: str
    seconds: float


def render(contents: Contents) -> str:
    """The page, without anything that it would have to fetch from elsewhere but the pictures beside it."""
    folder = importlib.resources.files("vicinal.tour")
    template = string.Template((folder / "page.html").read_text("utf-8"))
    height, width = gallery.GRID
    return template.substitute(
        style=(folder / "page.css").read_text("utf-8"),
        script=(folder / "page.js").read_text("utf-8"),
        figures=_figures(contents),
        grid=f"{height} × {width}",
        grid_json=json.dumps(gallery.GRID),
        gallery=_gallery(contents.images["photo"]),
        code=_code(),
        tables=_tables(),
        stacks=contents.images["stacks"],
        tiles=contents.images["tiles"],
        smoothing_text=_smoothing_text(contents.smoothing),
        shots=_shots(contents.smoothing, contents.images),
        smoothing_rows="\n".join(_smoothing_row(result) for result in contents.smoothing.results),
        times_text=_times_text(contents.machine),
        times_rows=_times_rows(contents.races),
        live_rows=_live_rows(contents.live),
        systems_rows="\n".join(_system_row(row, contents.images) for row in contents.systems),
        footer=_footer(contents),
    )


def _figures(contents: Contents) -> str:
    best, gaussian = contents.smoothing.best, contents.smoothing.gaussian
    speedups = [result.speedup for result in contents.races if result.speedup is not None]
    built = sum(row.outcome is not None for row in contents.systems)
    figures = [(str(sum(len(part.panels) for part in gallery.SECTIONS)), "patterns drawn, no kernel written for any")]
    if speedups:
        spread = f"{min(speedups):.1f} to {max(speedups):.1f} ×"
        figures.append((spread, "the speed of torch's dense masked attention, measured below"))
    figures.append((f"{best.psnr - gaussian.psnr:+.1f} dB", "smoothing by attention against the best Gaussian blur"))
    figures.append((f"{built} of {len(contents.systems)}", "systems built on it so far"))
    return "".join(
        f"<div><b>{html.escape(figure)}</b><span>{html.escape(words)}</span></div>" for figure, words in figures
    )


def _gallery(photo: str) -> str:
    parts: list[str] = []
    for section in gallery.SECTIONS:
        cards = "\n".join(
            _card(panel, photo, f"seen{len(parts)}-{number}") for number, panel in enumerate(section.panels)
        )
        parts.append(f'<h3>{section.title}</h3><p class="lead">{section.text}</p>\n<div class="cards">{cards}</div>')
    return "\n".join(parts)


def _card(panel: gallery.Panel, photo: str, name: str) -> str:
    tables, query = html.escape(gallery.tables_json(panel)), json.dumps(panel.query)
    return (
        f'<figure><div class="photo" data-tables="{tables}" data-query="{query}"><img src="{photo}" alt="">'
        f"{gallery.drawing(panel, photo, name)}</div><figcaption><code>{html.escape(panel.written)}</code>"
        f'{html.escape(panel.notice)}<span class="number">{gallery.sight(panel)}</span></figcaption></figure>'
    )


CODE = """
import torch, vicinal
from vicinal import Full, Near, Window, heads

*sizes, num_heads, head_dim = 1, 56, 56, 4, 32
query, key, value = torch.randn(3, *sizes, num_heads, head_dim)

vicinal.attention(query, key, value, Near(7))
vicinal.attention(query, key, value, Window(7, shift=3))
cross = heads((Full(), Window(4)), (Window(4), Full()))
vicinal.attention(query, key, value, cross)

vicinal.bounds(Near(7), (56, 56))     # the tables
vicinal.pattern.mask(Near(7), (9, 9)) # the definition
"""
"""What using the library looks like; a test runs it."""


def _code() -> str:
    return html.escape(CODE.strip())


def _tables() -> str:
    """The tables of three kinds on a short axis, as numbers."""
    length = 14
    lines = [f"query                 {_numbers(range(length))}"]
    for kind in (Near(5), Near(3, dilation=3), Window(5, shift=2)):
        table = AxisTable.of(kind, length)
        lines += [
            "",
            f"{kind!r:<22}step {table.step}",
            f"  first key           {_numbers(table.start.tolist())}",
            f"  number of keys      {_numbers(table.count.tolist())}",
        ]
    return html.escape("\n".join(lines))


def _numbers(numbers: Iterable[int]) -> str:
    return " ".join(f"{number:>2}" for number in numbers)


def _smoothing_text(smoothing: Smoothing) -> str:
    height, width = smoothing.original.shape[:2]
    return (
        f"Non-local means, the filter that averages pixels whose surroundings look alike, <em>is</em> attention: query "
        f"and key are the {PATCH} × {PATCH} patch around a pixel, the value is its color, and nothing is learned. Here "
        f"it removes noise (standard deviation {NOISE:.2f} of white) from the photograph at {width} × {height}, under "
        f"several patterns; windows show their seams. The number is the peak signal-to-noise ratio, higher is "
        f"better. Baselines: the Gaussian blur of the width that suits this very picture best, and for each pattern "
        f"the plain mean of the same pixels. How sharply patches are told apart was chosen on another photograph, "
        f"once for all patterns."
    )


def _shots(smoothing: Smoothing, images: Mapping[str, str]) -> str:
    shown = [
        ("original", "the photograph", ""),
        ("noisy", "with noise", f"{smoothing.noisy.psnr:.2f} dB"),
        ("gaussian", smoothing.gaussian.name, f"{smoothing.gaussian.psnr:.2f} dB"),
    ]
    shots = [_shot(images[key], html.escape(name), number) for key, name, number in shown]
    for number, result in enumerate(smoothing.results):
        name = f"<code>{html.escape(result.name)}</code>"
        figure = f"{result.psnr:.2f} dB <small>{result.ms:.0f} ms</small>"
        shots.append(_shot(images[f"smooth{number}"], name, figure, result is smoothing.best))
    return "\n".join(shots)


def _shot(image: str, name: str, number: str, is_best: bool = False) -> str:
    kind = "shot best" if is_best else "shot"
    return (
        f'<figure class="{kind}"><img src="{image}" alt=""><figcaption><span>{name}</span><b>{number}</b></figcaption>'
        "</figure>"
    )


def _smoothing_row(result: Smoothed) -> str:
    return (
        f'<tr><td><code>{html.escape(result.name)}</code></td><td class="right">{result.keys:.0f}</td>'
        f'<td class="right"><b>{result.psnr:.2f}</b></td><td class="right">{result.plain_psnr:.2f}</td>'
        f'<td class="right">{result.ms:.0f}</td></tr>'
    )


def _times_text(machine: Mapping[str, Any]) -> str:
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        "The same call with torch alone: <code>scaled_dot_product_attention</code> over all keys, with the mask that "
        "<code>vicinal.pattern.mask</code> writes out. Both answers were first compared with the definition in "
        "float64 (output, and every gradient where the backward is timed); a wrong one would get no time. Medians of "
        f"calls that took turns, float32, {threads} of {html.escape(str(machine['cpu']))}."
    )


def _times_rows(races: Iterable[Result]) -> str:
    results = list(races)
    most = max((result.speedup or 0.0 for result in results), default=1.0)
    rows = []
    for result in results:
        what = f"{html.escape(result.title)}<small>{html.escape(result.problem.size)}</small>"
        rows.append(f"<tr><td>{what}</td><td>{result.direction.replace('+', ' + ')}</td>{_times(result, most, 2)}</tr>")
    return "\n".join(rows)


def _live_rows(results: Iterable[live.Result]) -> str:
    results = list(results)
    most = max((result.speedup or 0.0 for result in results), default=1.0)
    return "\n".join(
        f"<tr><td>{html.escape(result.title)}<small>{html.escape(result.detail)}</small></td>"
        f"{_times(result, most, 0)}</tr>"
        for result in results
    )


def _times(result: Result | live.Result, most: float, digits: int) -> str:
    """Three cells: both times and a bar, or why there are none."""
    if result.ours is None or result.dense is None or result.speedup is None:
        return f'<td colspan="3" class="later">no times: {html.escape(result.reason)}</td>'
    kind = "slower" if result.speedup < 1 else ""
    bar = f'<i class="{kind}" style="width:{max(3, round(WIDEST_BAR * result.speedup / most))}px"></i>'
    return (
        f'<td class="right">{result.ours.median_ms:.{digits}f}</td>'
        f'<td class="right">{result.dense.median_ms:.{digits}f}</td>'
        f'<td><div class="bar">{bar}{result.speedup:.1f} ×</div></td>'
    )


def _system_row(row: Row, images: Mapping[str, str]) -> str:
    system, outcome = row.system, row.outcome
    tag = '<span class="tag">re-creation</span>' if system.is_recreation else ""
    what = (
        f"<td><b>{html.escape(system.name)}</b>{tag}<br>{html.escape(system.purpose)}"
        f"<small>{html.escape(system.paper)}, {html.escape(system.published)}</small>"
    )
    if outcome is None:
        empty = '<td><div class="empty"></div></td>'
        return f'<tr class="system">{empty}{what}</td><td colspan="3" class="right later">not built yet</td></tr>'
    note = f"<small>{html.escape(outcome.note)}</small>" if outcome.note else ""
    return (
        f'<tr class="system"><td><img src="{html.escape(images[system.name])}" alt=""></td>{what}{note}</td>'
        f'<td class="right"><b>{_number(outcome.number)}</b><small>{html.escape(outcome.unit)}</small></td>'
        f'<td class="right">{_number(outcome.baseline)}<small>{html.escape(outcome.baseline_name)}</small></td>'
        f'<td class="right">{row.seconds:.1f}</td></tr>'
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:g}"


def _footer(contents: Contents) -> str:
    machine = contents.machine
    return html.escape(
        f"Made by vicinal {contents.version} in {contents.seconds:.0f} s with torch {machine['torch']}, Python "
        f"{machine['python']}. Everything but the times comes out the same on every run. Image: {contents.credit}."
    )
