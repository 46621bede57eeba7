"""The problems that are measured, as data: a pattern, a grid, sizes, and the groups a problem belongs to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from vicinal.pattern import AxisKind, Heads, Near, Window, count
from vicinal.pattern.counting import attention_flops

GROUPS = ("quick", "default", "large")
"""`quick` takes about a minute, `default` minutes, `large` needs patience and memory."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention call: who sees whom, on which grid, in which sizes.

    >>> find(["nat-28x28"])[0]
    Problem(name='nat-28x28', pattern=(Near(7), Near(7)), grid=(28, 28), heads=4, head_dim=32, batch=1)
    """

    name: str
    pattern: tuple[AxisKind, ...] | Heads
    grid: tuple[int, ...]
    heads: int
    head_dim: int
    batch: int = 1
    groups: tuple[str, ...] = dataclasses.field(default=("default",), repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.pattern, tuple) and len(self.pattern) != len(self.grid):
            raise ValueError(f"Problem {self.name}: pattern must have {len(self.grid)} axis kinds, got {self.pattern}")

    @property
    def kinds(self) -> tuple[AxisKind, ...]:
        """The axis kinds where all heads have the same; none where they differ."""
        return self.pattern if isinstance(self.pattern, tuple) else ()

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of query, key and value: `[batch, *grid, heads, head_dim]`."""
        return (self.batch, *self.grid, self.heads, self.head_dim)

    @property
    def size(self) -> str:
        """The sizes in words.

        >>> find(["dinat-56x56"])[0].size
        '1x56x56 H2 D32, Near(7, dilation=8)'
        """
        kinds = self.kinds[:1] if len(set(self.kinds)) == 1 else self.kinds
        sizes = "x".join(map(str, (self.batch, *self.grid)))
        return f"{sizes} H{self.heads} D{self.head_dim}, {' '.join(map(repr, kinds or (self.pattern,)))}"

    def flops(self, *, backward: bool) -> int:
        """Operations that the definition asks for: of the forward, or of forward and backward together."""
        pairs = self.batch * count(self.pattern, self.grid, heads=self.heads)
        forward = attention_flops(pairs, self.head_dim, self.head_dim)
        return forward + attention_flops(pairs, self.head_dim, self.head_dim, backward=True) if backward else forward


def _near(*kernel_size: int, dilation: int = 1) -> tuple[AxisKind, ...]:
    return tuple(Near(size, dilation=dilation) for size in kernel_size)


def _swin(size: int, shift: int = 0) -> tuple[AxisKind, ...]:
    return (Window(size, shift), Window(size, shift))


_QUICK, _DEFAULT, _LARGE = ("quick", "default"), ("default",), ("large",)

PROBLEMS = (
    Problem("nat-56x56", _near(7, 7), (56, 56), 2, 32, groups=_QUICK),
    Problem("nat-28x28", _near(7, 7), (28, 28), 4, 32, groups=_QUICK),
    Problem("nat-14x14", _near(7, 7), (14, 14), 8, 32, groups=_QUICK),
    Problem("dinat-56x56", _near(7, 7, dilation=8), (56, 56), 2, 32, groups=_QUICK),
    Problem("nat-56x56-b8", _near(7, 7), (56, 56), 2, 32, 8, groups=_DEFAULT),
    Problem("nat-28x28-b8", _near(7, 7), (28, 28), 4, 32, 8, groups=_DEFAULT),
    Problem("nat-14x14-b8", _near(7, 7), (14, 14), 8, 32, 8, groups=_DEFAULT),
    Problem("dinat-56x56-b8", _near(7, 7, dilation=8), (56, 56), 2, 32, 8, groups=_DEFAULT),
    Problem("map-128x128", _near(13, 13), (128, 128), 4, 64, groups=_DEFAULT),
    Problem("map-256x256", _near(7, 7), (256, 256), 4, 32, groups=_DEFAULT),
    Problem("seq-16384", _near(255), (16384,), 8, 64, groups=_DEFAULT),
    Problem("video-8x32x32", _near(3, 7, 7), (8, 32, 32), 8, 64, groups=_DEFAULT),
    Problem("swin-7x7", _swin(7), (56, 56), 3, 32, groups=_DEFAULT),
    Problem("swin-7x7-shifted", _swin(7, 3), (56, 56), 3, 32, groups=_DEFAULT),
    Problem("swin-12x12", _swin(12), (96, 96), 4, 32, groups=_DEFAULT),
    Problem("swin-12x12-shifted", _swin(12, 6), (96, 96), 4, 32, groups=_DEFAULT),
    Problem("video-16x48x48", _near(9, 25, 25), (16, 48, 48), 4, 128, groups=_LARGE),
)
"""All problems: the stages of NAT, DiNAT and Swin, feature maps, a sequence and videos."""


def find(names: Iterable[str], problems: Sequence[Problem] = PROBLEMS) -> list[Problem]:
    """The problems of some names; a name may be a group's, or "all".

    >>> [problem.name for problem in find(["quick"])]
    ['nat-56x56', 'nat-28x28', 'nat-14x14', 'dinat-56x56']
    """
    wanted = list(names)
    known = {*GROUPS, "all", *(problem.name for problem in problems)}
    for name in wanted:
        if name not in known:
            own = ", ".join(problem.name for problem in problems)
            raise ValueError(f"{name!r} is neither a group ({', '.join(GROUPS)}, all) nor a problem ({own})")
    chosen = {*wanted}
    return [problem for problem in problems if chosen & {"all", problem.name, *problem.groups}]
