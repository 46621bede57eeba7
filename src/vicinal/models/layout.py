"""Two-way maps between our parameter names and those of published checkpoints and other libraries.

A `Layout` is a list of rules. Each pairs a template of our names with templates of theirs and says how the tensors
become each other. `{i}` and `{j}` stand for whole numbers, `{rest}` for anything; theirs may write `{i-1}`, `{i+1}` or
`{i*2+1}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

State = dict[str, torch.Tensor]
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class How:
    """How some tensors of theirs become some of ours, and back; `ours` may look at the shapes that ours have."""

    ours: Callable[[Tensors, list[torch.Size]], Tensors]
    theirs: Callable[[Tensors], Tensors]


SAME = How(lambda theirs, shapes: theirs, lambda ours: ours)


def split(*parts: int) -> How:
    """One of ours is several of theirs, one after the other on the first axis: `split(1, 1, 1)` query, key, value.

    The parts say how the length of ours is shared out.
    """

    def theirs(ours: Tensors) -> Tensors:
        share = ours[0].shape[0] // sum(parts)
        return list(ours[0].split([share * part for part in parts]))

    return How(lambda theirs, shapes: [torch.cat(theirs)], theirs)


def stacked() -> How:
    """Several of ours are the rows of one of theirs (two layer scales)."""
    return How(lambda theirs, shapes: list(theirs[0].unbind()), lambda ours: [torch.stack(ours)])


def reshaped(*ones: int) -> How:
    """The same numbers in our shape; theirs has extra axes of length 1 (a 1x1 convolution, a batch axis)."""
    return How(
        lambda theirs, shapes: [
            tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor
            for tensor, shape in zip(theirs, shapes, strict=True)
        ],
        lambda ours: [_with_ones(tensor, ones) for tensor in ours],
    )


def _with_ones(tensor: torch.Tensor, ones: Sequence[int]) -> torch.Tensor:
    for axis in ones:
        tensor = tensor.unsqueeze(axis)
    return tensor


def swin_table() -> How:
    """A position bias `[heads, 2w-1, 2w-1]` by key minus query; theirs `[(2w-1)^2, heads]` by query minus key."""
    return How(
        lambda theirs, shapes: [_from_swin_table(theirs[0])],
        lambda ours: [ours[0].flip(1, 2).flatten(1).t().contiguous()],
    )


def _from_swin_table(table: torch.Tensor) -> torch.Tensor:
    rows, heads = table.shape
    size = round(rows**0.5)
    if size * size != rows:
        return table  # not square: its shape will be reported as it is
    return table.t().reshape(heads, size, size).flip(1, 2)


@dataclass(frozen=True)
class Rule:
    """Names of ours, names of theirs, and how the tensors become each other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    how: How = SAME


def rule(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], how: How = SAME) -> Rule:
    """A `Rule`; one name may be given without a tuple around it."""
    return Rule((ours,) if isinstance(ours, str) else ours, (theirs,) if isinstance(theirs, str) else theirs, how)


@dataclass(frozen=True)
class Layout:
    """How a family is laid out elsewhere.

    `prefix` stands before all of their names but those that begin with one of `bare`. `ignored` matches names of
    theirs that carry nothing learned (index buffers); `derived` makes those that a strict load over there wants.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    bare: tuple[str, ...] = ()
    ignored: str = r"$^"
    derived: Callable[[Mapping[str, torch.Tensor]], State] = field(default=lambda state: {})

    def pairs(self, names: Iterable[str]) -> list[Rule]:
        """Which of our names become which of theirs: rules without templates.

        A rule for several of ours holds where all of them are there; so the next one may say what holds elsewhere.
        """
        wanted = dict.fromkeys(names)
        found = []
        for name in wanted:
            pairs = (pair for one in self.rules if (pair := _apply(one, name)) is not None)
            pair = next((pair for pair in pairs if all(ours in wanted for ours in pair.ours)), None)
            if pair is None:
                raise AssertionError(f"no rule for {name}")
            if pair.ours[0] == name:  # a pair of several is found once, at its first name
                found.append(pair)
        return found

    def name(self, bare: str) -> str:
        """One of their names, with the prefix where it has one."""
        return bare if bare.startswith(self.bare) else self.prefix + bare

    def bare_name(self, name: str) -> str:
        """One of their names without the prefix."""
        return name.removeprefix(self.prefix)


def _apply(one: Rule, name: str) -> Rule | None:
    for template in one.ours:
        match = _pattern(template).fullmatch(name)
        if match:
            values = match.groupdict()
            return Rule(
                tuple(_fill(ours, values) for ours in one.ours),
                tuple(_fill(theirs, values) for theirs in one.theirs),
                one.how,
            )
    return None


_PATTERNS: dict[str, re.Pattern[str]] = {}


def _pattern(template: str) -> re.Pattern[str]:
    if template not in _PATTERNS:
        text = re.escape(template)
        text = re.sub(r"\\\{(i|j)\\\}", r"(?P<\1>\\d+)", text)
        _PATTERNS[template] = re.compile(re.sub(r"\\\{(rest)\\\}", r"(?P<\1>.+)", text))
    return _PATTERNS[template]


def _fill(template: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        text = values[match["name"]]
        if match["factor"] is None and match["offset"] is None:
            return text
        return str(int(text) * int((match["factor"] or "*1")[1:]) + int(match["offset"] or 0))

    return re.sub(r"\{(?P<name>\w+)(?P<factor>\*\d+)?(?P<offset>[+-]\d+)?\}", value, template)


@dataclass(frozen=True)
class Fit:
    """What a checkpoint lacks, has too much of, and has in another shape, in the checkpoint's own names."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.missing or self.extra or self.misshapen)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for word, names in (("missing", self.missing), ("extra", self.extra), ("misshapen", self.misshapen))
            if names
        ]
        return "; ".join(parts) or "everything fits"


def to_ours(layout: Layout, theirs: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> tuple[State, Fit]:
    """Their checkpoint under our names, for a model whose tensors have `shapes`, and how well it fits."""
    given = {layout.bare_name(name): tensor for name, tensor in theirs.items()}
    state: State = {}
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for pair in layout.pairs(shapes):
        used.update(pair.theirs)
        absent = [name for name in pair.theirs if name not in given]
        if absent:
            missing += absent
            continue
        wanted = [shapes[name] for name in pair.ours]
        try:
            made = pair.how.ours([given[name] for name in pair.theirs], wanted)
        except (RuntimeError, ValueError, IndexError):  # of shapes that cannot even be put together
            had = [tuple(given[name].shape) for name in pair.theirs]
            misshapen.append(f"{layout.name(pair.theirs[0])}: {had} for {[tuple(shape) for shape in wanted]}")
            continue
        for name, tensor, shape in zip(pair.ours, made, wanted, strict=True):
            state[name] = tensor
            if tensor.shape != shape:
                misshapen.append(f"{layout.name(pair.theirs[0])}: {tuple(tensor.shape)} for {tuple(shape)}")
    ignored = re.compile(layout.ignored)
    extra = [name for name in given if name not in used and not ignored.search(name)]
    return state, Fit(
        tuple(layout.name(name) for name in missing), tuple(layout.name(name) for name in extra), tuple(misshapen)
    )


def to_theirs(layout: Layout, ours: Mapping[str, torch.Tensor]) -> State:
    """Our tensors under their names, with the buffers that a strict load over there wants."""
    state: State = {}
    for pair in layout.pairs(ours):
        made = pair.how.theirs([ours[name] for name in pair.ours])
        state.update(zip(pair.theirs, made, strict=True))
    state.update(layout.derived(state))
    return {layout.name(name): tensor for name, tensor in state.items()}
