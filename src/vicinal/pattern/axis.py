"""Axis kinds: along one axis, which keys does each query see?

A kind turns query positions into the rows of a table: the first key, and how many keys follow it at
equal distance. Nothing else in the library knows a border rule. To add a kind, subclass `AxisKind`
as a frozen dataclass and write `rows`; every kernel, picture and count then works with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

from vicinal.pattern.numbers import as_integer, check_flag

Array: TypeAlias = Any
"""A NumPy array or a torch tensor of integers; rules use only what both understand."""

Namespace: TypeAlias = Any
"""The module that owns the arrays: `numpy` or `torch`."""

Border: TypeAlias = Literal["shift", "crop", "wrap"]


def smaller(xp: Namespace, left: Array, right: Array) -> Array:
    """Element-wise minimum, for arrays and plain integers alike."""
    if isinstance(left, int) and isinstance(right, int):
        return min(left, right)
    return xp.where(left < right, left, right)


def larger(xp: Namespace, left: Array, right: Array) -> Array:
    """Element-wise maximum, for arrays and plain integers alike."""
    if isinstance(left, int) and isinstance(right, int):
        return max(left, right)
    return xp.where(left > right, left, right)


@dataclasses.dataclass(frozen=True, repr=False)
class AxisKind:
    """Who sees whom along one axis.

    A subclass is a frozen dataclass whose fields are plain integers, booleans or strings. It writes
    `rows`, and overrides `check`, `step`, `bias_length`, `wraps` and `spans_grids` where the default
    does not hold.

    >>> import dataclasses, vicinal
    >>> from vicinal.pattern.axis import smaller
    >>> @dataclasses.dataclass(frozen=True, repr=False)
    ... class First(vicinal.AxisKind):
    ...     "Every query sees the first `size` keys."
    ...
    ...     size: int
    ...
    ...     def rows(self, center, length, xp):
    ...         return center * 0, center * 0 + smaller(xp, self.size, length)
    >>> int(vicinal.pattern.count(First(3), (10,)))
    30
    """

    spans_grids: ClassVar[bool] = False
    """Whether the query axis and the key axis may differ in length."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `ValueError` on arguments that mean nothing."""

    def take_integer(self, name: str, least: int) -> None:
        """Check that a field is an integer of at least `least`, and keep it as a plain `int`."""
        value = getattr(self, name)
        if type(value) is not int or value < least:
            object.__setattr__(self, name, as_integer(type(self).__name__, name, value, least))

    def rows(self, center: Array, length: Array, xp: Namespace) -> tuple[Array, Array]:
        """First key and number of keys of the queries at `center`, on a key axis of `length`.

        `center` holds query coordinates (on two grids: the key coordinate nearest to the query) and
        `length` is an integer or an array that broadcasts against it. Both results have the shape of
        `center`. Write plain integer arithmetic and `xp.where`: the rule runs on NumPy and torch.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define rows(center, length, xp)")

    def step(self, length: Array) -> Array:
        """Distance between one key and the next."""
        return 1

    def bias_length(self, length: int) -> int | None:
        """Length of this axis of a relative position bias, or None where the kind has none."""
        return None

    @property
    def wraps(self) -> bool:
        """Whether key coordinates are taken modulo the axis length."""
        return False

    def refusal(self, length: int) -> str | None:
        """Why this kind cannot stand on a key axis of `length`, or None."""
        return None

    def two_grid_refusal(self) -> str | None:
        """Why this kind cannot stand between a query axis and a key axis of other length, or None."""
        return None if self.spans_grids else "it is defined on one grid only"

    @property
    def key(self) -> tuple[Any, ...]:
        """The kind as a tuple of plain values, from which an equal kind can be made."""
        return (type(self), *(getattr(self, field.name) for field in dataclasses.fields(self)))

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(repr(value))
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Near(AxisKind):
    """The `kernel_size` nearest keys, `dilation` apart: neighborhood attention.

    `stride` queries in a row share the window of their leader. At an edge the window is moved inward
    (`border="shift"`), cut (`"crop"`), or continued on the other side (`"wrap"`). With `causal` a query
    sees itself and keys before it, and `border` has no effect.

    >>> import vicinal
    >>> print(vicinal.pattern.draw(Near(3), (7,), query=(0,)))
    Q##....
    >>> print(vicinal.pattern.draw(Near(3, dilation=2, border="wrap"), (8,), query=(1,)))
    .Q.#...#
    """

    kernel_size: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False
    border: Border = "shift"

    def check(self) -> None:
        self.take_integer("kernel_size", 1)
        self.take_integer("dilation", 1)
        self.take_integer("stride", 1)
        check_flag("Near", "causal", self.causal)
        if self.border not in ("shift", "crop", "wrap"):
            raise ValueError(f'Near: border must be "shift", "crop" or "wrap", got {self.border!r}')
        if self.stride > self.kernel_size:
            raise ValueError(
                f"Near: stride must be at most kernel_size ({self.kernel_size}), got {self.stride}; "
                "a larger one would leave keys that nobody sees"
            )
        if self.wraps and self.stride != 1:
            raise ValueError(f'Near: border="wrap" needs stride 1, got stride {self.stride}')

    @property
    def wraps(self) -> bool:
        return self.border == "wrap" and not self.causal

    def step(self, length: Array) -> Array:
        return self.dilation

    def bias_length(self, length: int) -> int | None:
        return 2 * self.kernel_size - 1

    def refusal(self, length: int) -> str | None:
        if self.wraps and length % self.dilation:
            return f'border="wrap" needs a dilation that divides the axis, {self.dilation} does not divide {length}'
        return None

    def two_grid_refusal(self) -> str | None:
        if self.dilation == 1 and self.stride == 1 and not self.causal and not self.wraps:
            return None
        return 'between two grids Near takes dilation 1, stride 1, no causal, and border "shift" or "crop"'

    def rows(self, center: Array, length: Array, xp: Namespace) -> tuple[Array, Array]:
        size, dilation, stride = self.kernel_size, self.dilation, self.stride
        residue, place = center % dilation, center // dilation
        # how many coordinates of the axis share the query's residue; at least 1 also for padded queries
        members = larger(xp, (length - residue + dilation - 1) // dilation, 1)
        if self.wraps:
            size = smaller(xp, size, length // dilation)
            return residue + dilation * (place - size // 2), center * 0 + size
        group = (place // stride) * stride
        if self.causal:
            leader = smaller(xp, group + stride - 1, members - 1)
            first = larger(xp, leader - size + 1, 0)
            last = place
        elif self.border == "crop":
            leader = smaller(xp, group + stride // 2, members - 1)
            first = larger(xp, leader - size // 2, 0)
            last = smaller(xp, leader + (size - 1) // 2, members - 1)
        else:
            leader = smaller(xp, group + stride // 2, members - 1)
            size = smaller(xp, size, members)
            first = smaller(xp, larger(xp, leader - size // 2, 0), members - size)
            last = first + size - 1
        return residue + dilation * first, last - first + 1


@dataclasses.dataclass(frozen=True, repr=False)
class Window(AxisKind):
    """The block of `size` that the query is in; blocks begin at `shift` and are cut at the edges.

    Alternating `Window(w)` and `Window(w, shift=w // 2)` is Swin, with no roll and no mask. On an axis
    no longer than `size` the shift is ignored.

    >>> import vicinal
    >>> print(vicinal.pattern.draw(Window(4, shift=2), (10,), query=(3,)))
    ..#Q##....
    """

    size: int
    shift: int = 0

    def check(self) -> None:
        self.take_integer("size", 1)
        self.take_integer("shift", 0)
        if self.shift >= self.size:
            raise ValueError(f"Window: shift must be below size ({self.size}), got {self.shift}")

    def bias_length(self, length: int) -> int | None:
        return 2 * self.size - 1

    def rows(self, center: Array, length: Array, xp: Namespace) -> tuple[Array, Array]:
        shift = xp.where(length > center * 0 + self.size, center * 0 + self.shift, 0)
        edge = shift + (center - shift) // self.size * self.size
        first = larger(xp, edge, 0)
        return first, smaller(xp, edge + self.size, length) - first


@dataclasses.dataclass(frozen=True, repr=False)
class Halo(AxisKind):
    """The query's block of length `block` and `halo` keys on each side of it, cut at the edges.

    >>> import vicinal
    >>> print(vicinal.pattern.draw(Halo(3, 1), (9,), query=(4,)))
    ..##Q##..
    """

    block: int
    halo: int

    def check(self) -> None:
        self.take_integer("block", 1)
        self.take_integer("halo", 0)

    def bias_length(self, length: int) -> int | None:
        return 2 * (self.block + self.halo) - 1

    def rows(self, center: Array, length: Array, xp: Namespace) -> tuple[Array, Array]:
        edge = center // self.block * self.block
        first = larger(xp, edge - self.halo, 0)
        return first, smaller(xp, edge + self.block + self.halo, length) - first


@dataclasses.dataclass(frozen=True, repr=False)
class Grid(AxisKind):
    """`size` keys spread evenly over the axis, the query among them: MaxViT's grid attention.

    >>> import vicinal
    >>> print(vicinal.pattern.draw(Grid(3), (9,), query=(4,)))
    .#..Q..#.
    """

    size: int

    def check(self) -> None:
        self.take_integer("size", 1)

    def step(self, length: Array) -> Array:
        return length // self.size

    def bias_length(self, length: int) -> int | None:
        return 2 * self.size - 1

    def refusal(self, length: int) -> str | None:
        if length % self.size:
            return f"size must divide the axis, {self.size} does not divide {length}"
        return None

    def rows(self, center: Array, length: Array, xp: Namespace) -> tuple[Array, Array]:
        return center % larger(xp, center * 0 + length // self.size, 1), center * 0 + self.size


@dataclasses.dataclass(frozen=True, repr=False)
class Full(AxisKind):
    """All keys of the axis, or with `causal` all up to the query.

    >>> import vicinal
    >>> print(vicinal.pattern.draw(Full(causal=True), (6,), query=(2,)))
    ##Q...
    """

    causal: bool = False
    spans_grids: ClassVar[bool] = True

    def check(self) -> None:
        check_flag("Full", "causal", self.causal)

    def bias_length(self, length: int) -> int | None:
        return 2 * length - 1

    def rows(self, center: Array, length: Array, xp: Namespace) -> tuple[Array, Array]:
        return center * 0, center + 1 if self.causal else center * 0 + length


@dataclasses.dataclass(frozen=True, repr=False)
class Same(AxisKind):
    """Just the query's own coordinate.

    >>> import vicinal
    >>> print(vicinal.pattern.draw((Same(), Full()), (2, 5), query=(0, 2)))
    ##Q##
    .....
    """

    def bias_length(self, length: int) -> int | None:
        return 1

    def rows(self, center: Array, length: Array, xp: Namespace) -> tuple[Array, Array]:
        return center, center * 0 + 1
