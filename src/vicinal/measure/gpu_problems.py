"""The problems of `make bench-gpu`, as data: feature maps of NAT, and what image and video models run at full size."""

from __future__ import annotations

import dataclasses

from vicinal.measure.problems import Problem
from vicinal.pattern import AxisKind, Near, heads

Sizes = tuple[int, ...]


def _strided(window: Sizes, stride: Sizes | None = None, dilation: Sizes | None = None) -> tuple[AxisKind, ...]:
    ones = (1,) * len(window)
    return tuple(map(Near, window, dilation or ones, stride or ones))


def _maps() -> list[Problem]:
    """The stages of NAT-Tiny and DiNAT-Tiny at 224 pixels."""
    stages = ((56, 2, 8), (28, 4, 4), (14, 8, 2), (7, 16, 1))
    plain = [
        Problem(f"nat-{side}x{side}-b64", _strided((7, 7)), (side, side), count, 32, 64, groups=("maps",))
        for side, count, _ in stages
    ]
    dilated = [
        Problem(
            f"dinat-{side}x{side}-b64",
            _strided((7, 7), dilation=(apart, apart)),
            (side, side),
            count,
            32,
            64,
            groups=("maps",),
        )
        for side, count, apart in stages[:3]
    ]
    return plain + dilated


def _flux() -> list[Problem]:
    """FLUX.1-dev at 4096 pixels: 24 heads of 128."""
    return [
        Problem(f"flux-4k-s{step}", _strided((80, 80), (step, step)), (256, 256), 24, 128, groups=("images",))
        for step in (1, 16)
    ]


def _hunyuan() -> list[Problem]:
    """HunyuanVideo, 24 heads of 128; strides 6, 8, 8 are the blocks of Sliding Tile Attention."""
    small, large = (18, 24, 24), (30, 40, 40)
    rows = ((small, (1, 1, 1)), (small, (16, 8, 8)), (small, (6, 8, 8)), (large, (1, 1, 1)), (large, (1, 32, 8)))
    return [
        Problem(
            f"hunyuan-w{_words(window)}-s{_words(stride)}",
            _strided(window, stride),
            (30, 48, 80),
            24,
            128,
            groups=("video",),
        )
        for window, stride in rows
    ]


def _cosmos() -> list[Problem]:
    """Cosmos at 720p: Predict1-7B with 32 heads of 128, and the layers of Predict2-2B with 16."""
    grid = (16, 44, 80)
    first = (((16, 32, 48), (1, 1, 1)), ((16, 32, 48), (1, 8, 16)), ((16, 24, 16), (1, 8, 16)))
    second = (
        ((16, 4, 16), (1, 1, 1), (1, 11, 5)),
        ((16, 12, 16), (1, 4, 1), (1, 1, 5)),
        ((16, 12, 24), (1, 4, 8), (1, 1, 1)),
        ((16, 20, 40), (1, 4, 8), (1, 1, 1)),
        ((16, 28, 56), (1, 1, 1), (1, 1, 1)),
    )
    rows = [
        Problem(
            f"cosmos1-w{_words(window)}-s{_words(stride)}", _strided(window, stride), grid, 32, 128, groups=("video",)
        )
        for window, stride in first
    ]
    rows += [
        Problem(
            f"cosmos2-w{_words(window)}-s{_words(stride)}-d{_words(dilation)}",
            _strided(window, stride, dilation),
            grid,
            16,
            128,
            groups=("video",),
        )
        for window, stride, dilation in second
    ]
    return rows


def _others() -> list[Problem]:
    """A long sequence, and the top layers of StyleNAT, whose heads differ in dilation."""
    rows = [
        Problem(f"seq-32768-s{step}", _strided((2048,), (step,)), (32768,), 1, 128, groups=("sequence",))
        for step in (1, 256)
    ]
    for side, head_dim, apart, batch in ((256, 32, 32, 4), (1024, 8, 128, 1)):
        pattern = heads(Near(7), Near(7, dilation=apart))
        rows.append(Problem(f"stylenat-{side}", pattern, (side, side), 4, head_dim, batch, groups=("images",)))
    return rows


def _words(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))


_FIRST = (
    "hunyuan-w18x24x24-s1x1x1",
    "nat-56x56-b64",
    "hunyuan-w18x24x24-s16x8x8",
    "flux-4k-s1",
    "dinat-56x56-b64",
    "nat-14x14-b64",
    "flux-4k-s16",
    "seq-32768-s1",
    "stylenat-1024",
    "cosmos2-w16x12x24-s1x4x8-d1x1x1",
)
"""One of each sort, those that say most before the others: time on a GPU may end at any row."""


def _in_order() -> tuple[Problem, ...]:
    every = {problem.name: problem for problem in (*_maps(), *_others(), *_flux(), *_hunyuan(), *_cosmos())}
    first = [every.pop(name) for name in _FIRST]
    return (*(dataclasses.replace(one, groups=("first", *one.groups)) for one in first), *every.values())


GPU_PROBLEMS = _in_order()
"""All of them, in the order in which they are measured."""


def find_gpu(names: tuple[str, ...], problems: tuple[Problem, ...] = GPU_PROBLEMS) -> tuple[Problem, ...]:
    """The problems of some names or groups; "all" for all.

    >>> [problem.name for problem in find_gpu(("sequence",))]
    ['seq-32768-s1', 'seq-32768-s256']
    """
    groups = sorted({group for problem in problems for group in problem.groups})
    known = {"all", *groups, *(problem.name for problem in problems)}
    for name in names:
        if name not in known:
            own = ", ".join(problem.name for problem in problems)
            raise ValueError(f"{name!r} is neither a group ({', '.join(groups)}, all) nor a problem ({own})")
    wanted = {*names}
    return tuple(problem for problem in problems if wanted & {"all", problem.name, *problem.groups})
