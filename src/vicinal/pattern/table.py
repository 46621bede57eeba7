"""The table of one axis: for each query the first key, and how many follow it at equal distance."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from vicinal.pattern.axis import AxisKind
from vicinal.pattern.numbers import as_integer

Integers = npt.NDArray[np.int64]

_UNROLL = (
    "shift: the queries' keys lie at both ends of this wrapping axis; slice the queries first, and take a range "
    "that contains all their keys in one piece"
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AxisTable:
    """What the queries of one axis see: `start[i], start[i] + step, ...`, `count[i]` keys in all.

    `length` is the length of the key axis. With `wraps`, coordinates are taken modulo `length`, and a
    `start` may lie up to one turn outside the axis. `center` and `bias_length` say where a relative
    position bias is read: at `(unwrapped key - center) / step + (bias_length - 1) / 2`; without them the
    table takes no bias.

    The invariant every consumer builds on is checked here: queries fall into residue classes modulo
    `step`; within a class the starts are congruent modulo `step`, different classes see different
    residues, and neither the first nor the last key ever decreases.

    >>> table = AxisTable.of(Near(3), 5)
    >>> table.start.tolist(), table.count.tolist()
    ([0, 0, 1, 2, 2], [3, 3, 3, 3, 3])
    """

    start: Integers
    count: Integers
    step: int
    length: int
    wraps: bool = False
    center: Integers | None = None
    bias_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "count", "center"):
            value = getattr(self, name)
            if value is not None:
                given = np.asarray(value)
                if given.size and given.dtype.kind not in "iu":
                    raise ValueError(f"AxisTable: {name} must hold integers, got {given.dtype}")
                frozen = np.array(given, dtype=np.int64)
                frozen.setflags(write=False)
                object.__setattr__(self, name, frozen)
        for name in ("step", "length", "bias_length"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_integer("AxisTable", name, value, 1))
        self._check()

    def __reduce__(self) -> tuple[Any, ...]:
        # copies are made anew: NumPy's own would come back writable
        return AxisTable, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @staticmethod
    def of(kind: AxisKind, query_length: int, key_length: int | None = None) -> AxisTable:
        """The table of an axis kind, for a query axis and (if it differs) a key axis."""
        length = query_length if key_length is None else key_length
        refusal = kind.two_grid_refusal() if length != query_length else None
        refusal = refusal or kind.refusal(length)
        if refusal:
            sizes = f"{query_length} queries and {length} keys" if length != query_length else f"length {length}"
            raise ValueError(f"pattern: {kind!r} does not fit an axis of {sizes}: {refusal}")
        query = np.arange(query_length, dtype=np.int64)
        center = query if length == query_length else (2 * query + 1) * length // (2 * query_length)
        start, count = kind.rows(center, length, np)
        return AxisTable(
            start=np.broadcast_to(start, query.shape),
            count=np.broadcast_to(count, query.shape),
            step=int(kind.step(length)),
            length=length,
            wraps=kind.wraps,
            center=center,
            bias_length=kind.bias_length(length),
        )

    @property
    def last(self) -> Integers:
        """The last key each query sees, unwrapped; `start - step` where it sees none."""
        return self.start + self.step * (self.count - 1)

    def __len__(self) -> int:
        return len(self.start)

    @functools.cached_property
    def digest(self) -> bytes:
        """A fingerprint: equal tables have equal digests."""
        fingerprint = hashlib.blake2b(digest_size=16)
        fingerprint.update(repr((self.step, self.length, self.wraps, self.bias_length, len(self))).encode())
        for array in (self.start, self.count, self.center):
            fingerprint.update(b"-" if array is None else array.tobytes())
        return fingerprint.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AxisTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        wraps = ", wraps" if self.wraps else ""
        return f"AxisTable({len(self)} queries, {self.length} keys, step {self.step}{wraps})"

    def _check(self) -> None:
        start, count, step = self.start, self.count, self.step
        if start.ndim != 1 or start.shape != count.shape or not len(start):
            raise ValueError(
                f"AxisTable: start and count must be two vectors of one length >= 1, got {start.shape}, {count.shape}"
            )
        if self.center is not None and self.center.shape != start.shape:
            raise ValueError(f"AxisTable: center must have the shape of start {start.shape}, got {self.center.shape}")
        if (count < 0).any():
            raise ValueError(f"AxisTable: count must not be negative, got {count.min()} at query {count.argmin()}")
        self._check_range()
        self._check_bias()
        first, last = start, self.last
        for name, edge in (("first", first), ("last", last)):
            falls = np.flatnonzero(edge[step:] < edge[:-step])
            if len(falls):
                query = int(falls[0])
                raise ValueError(
                    f"AxisTable: the {name} key must not decrease within a residue class modulo step {step}, but it "
                    f"falls from {edge[query]} to {edge[query + step]} between queries {query} and {query + step}"
                )
        if ((start[step:] - start[:-step]) % step).any():
            raise ValueError(f"AxisTable: starts of one residue class must be congruent modulo step {step}")
        residues = start[:step] % step
        if len(np.unique(residues)) != len(residues):
            raise ValueError(f"AxisTable: two residue classes modulo step {step} see keys of the same residue")

    def _check_range(self) -> None:
        seen = self.count > 0
        if self.wraps:
            if self.length % self.step:
                raise ValueError(f"AxisTable: a wrapping table needs step to divide {self.length}, got {self.step}")
            if (self.count * self.step > self.length).any():
                raise ValueError("AxisTable: a query of a wrapping table sees a key twice")
            if (self.start < -self.length).any() or (self.start >= 2 * self.length).any():
                raise ValueError(f"AxisTable: a wrapping start must lie in {-self.length}..{2 * self.length - 1}")
        elif (self.start[seen] < 0).any() or (self.last[seen] >= self.length).any():
            raise ValueError(f"AxisTable: keys must lie in 0..{self.length - 1}")

    def _check_bias(self) -> None:
        if self.bias_length is None:
            return
        if self.center is None or self.bias_length % 2 == 0:
            raise ValueError(f"AxisTable: bias_length must be odd and stand beside a center, got {self.bias_length}")
        seen = self.count > 0
        first, last = (self.start - self.center)[seen], (self.last - self.center)[seen]
        reach = self.step * (self.bias_length // 2)
        if (first % self.step).any() or (first < -reach).any() or (last > reach).any():
            raise ValueError(
                f"AxisTable: keys must lie at most {self.bias_length // 2} steps of {self.step} from the query's "
                f"center for a bias of length {self.bias_length}"
            )

    def mask(self) -> npt.NDArray[np.bool_]:
        """The table written out: `mask[i, j]` is whether query i sees key j."""
        seen = np.zeros((len(self), self.length), dtype=np.bool_)
        for query, (start, count) in enumerate(zip(self.start, self.count, strict=True)):
            seen[query, (start + self.step * np.arange(count)) % self.length] = True
        return seen

    def sees(self, query: Any, key: Any) -> Any:
        """Whether queries see keys, by arithmetic; the two arrays of coordinates broadcast."""
        distance = key - self.start[query]
        if self.wraps:
            distance = distance % self.length
        return (distance >= 0) & (distance % self.step == 0) & (distance < self.step * self.count[query])

    def slice(self, start: int, stop: int) -> AxisTable:
        """The table of the queries `start <= i < stop`."""
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"slice: need 0 <= start < stop <= {len(self)}, got start {start}, stop {stop}")
        center = None if self.center is None else self.center[start:stop]
        return dataclasses.replace(self, start=self.start[start:stop], count=self.count[start:stop], center=center)

    def shift(self, offset: int, length: int | None = None) -> AxisTable:
        """The table against the keys `offset <= j < offset + length`, renumbered from 0.

        Keys outside that range are no longer seen, and the range may reach beyond the axis. A wrapping
        table is unrolled: its result does not wrap, and each query's keys must lie in one turn.
        """
        length = self.length if length is None else as_integer("shift", "length", length, 1)
        if self.wraps:
            offset = offset % self.length
        start = self.start - offset
        last = self.last - offset
        if self.wraps:
            if length > self.length:
                raise ValueError(f"shift: a wrapping axis of {self.length} has no range of {length} different keys")
            turn = self._turn(start, last, length)
            start, last = start + turn * self.length, last + turn * self.length
        residue = start % self.step
        top = length - 1 - (length - 1 - residue) % self.step
        first = np.clip(start, residue, top + self.step)
        last = np.clip(last, residue - self.step, top)
        count = np.where(self.count > 0, np.maximum((last - first) // self.step + 1, 0), 0)
        center = None if self.center is None else self.center - offset
        if self.wraps and center is not None:
            center = center + turn * self.length
        try:
            return dataclasses.replace(self, start=first, count=count, length=length, wraps=False, center=center)
        except ValueError:
            if not self.wraps:
                raise
            raise ValueError(_UNROLL) from None

    def _turn(self, start: Integers, last: Integers, length: int) -> Integers:
        """How many turns of the axis bring each query's keys into `0 <= key < length`."""
        turns = np.arange(-2, 3)[:, None]
        hits = (last + turns * self.length >= 0) & (start + turns * self.length < length) & (self.count > 0)
        if (hits.sum(0) > 1).any():
            raise ValueError(_UNROLL)
        nearest = np.abs(start[None] + turns * self.length).argmin(0)
        return np.where(hits.any(0), hits.argmax(0), nearest) - 2

    def transpose(self) -> AxisTable:
        """Who sees me: the table of the keys over the queries. It takes no bias."""
        query_length, step = len(self), self.step
        turning = self.wraps and query_length == self.length
        classes = min(step, query_length)
        unused = sorted(set(range(step)) - set(range(classes)))
        residue_of_class = {int(self.start[residue]) % step: residue for residue in range(classes)}
        start = np.empty(self.length, dtype=np.int64)
        count = np.empty(self.length, dtype=np.int64)
        for residue in range(min(step, self.length)):
            keys = np.arange(residue, self.length, step)
            if residue in residue_of_class:
                begin, end = self._watchers(residue_of_class[residue], keys, turning)
                start[keys] = residue_of_class[residue] + step * begin
                count[keys] = np.maximum(end - begin, 0)
            else:
                start[keys], count[keys] = unused.pop(), 0
        return AxisTable(start=start, count=count, step=step, length=query_length, wraps=turning)

    def _watchers(self, residue: int, keys: Integers, turning: bool) -> tuple[Integers, Integers]:
        """For each key the range of class members that see it, as places within the class."""
        first, last = self.start[residue :: self.step], self.last[residue :: self.step]
        members = len(first)
        if not self.wraps:
            return np.searchsorted(last, keys, "left"), np.searchsorted(first, keys, "right")
        turns = np.array([-2, -1, 0, 1, 2])
        if turning:
            unrolled_first = (first + turns[:, None] * self.length).ravel()
            unrolled_last = (last + turns[:, None] * self.length).ravel()
            if (np.diff(unrolled_first) >= 0).all() and (np.diff(unrolled_last) >= 0).all():
                begin = np.searchsorted(unrolled_last, keys, "left")
                end = np.searchsorted(unrolled_first, keys, "right")
                # whole turns of the queries change nothing; the first key's watchers stand near query 0
                turned = (int(begin[0]) + members // 2) // members * members
                return begin - turned, end - turned
        # sliced queries: each key's watchers, if they are one range of them
        begins = np.stack([np.searchsorted(last, keys + turn * self.length, "left") for turn in turns])
        ends = np.stack([np.searchsorted(first, keys + turn * self.length, "right") for turn in turns])
        seen = begins < ends
        pick = seen.argmax(0)[None]
        begin, end = np.take_along_axis(begins, pick, 0)[0], np.take_along_axis(ends, pick, 0)[0]
        # a key that nobody sees stands behind the watchers of the keys before it
        latest = np.maximum.accumulate(np.where(seen.any(0), end, 0))
        begin, end = np.where(seen.any(0), begin, latest), np.where(seen.any(0), end, latest)
        if (seen.sum(0) > 1).any() or (np.diff(begin) < 0).any() or (np.diff(end) < 0).any():
            raise ValueError(
                "transpose: the queries of this part of a wrapping table see keys across the seam of the axis; "
                "transpose before slicing, or shift first, which unrolls it"
            )
        return begin, end
