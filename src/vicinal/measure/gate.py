"""The gate: no time is reported for an answer that is wrong.

A contender's output and gradients are compared with the definition, written out densely in float64: everything where
the problem is small, and of a large one some queries and some keys of every head. What error is allowed is derived:
twice that of the same computation done eagerly in the precision that is measured, plus its rounding, in the root mean
square. The largest single error, which fluctuates more but shows a wrong border, may be four times the eager one's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vicinal.measure.task import Task, Tensors
from vicinal.pattern import bounds
from vicinal.pattern.bounds import Member
from vicinal.pattern.table import AxisTable

MOST_SCORES = 1 << 23
"""Scores the oracle writes out at most (more only where a single key is seen by more queries)."""

CHUNK_SCORES = 1 << 22
ALLOWED, ALLOWED_LARGEST = 2.0, 4.0
"""How many times the eager computation's error is allowed: in the root mean square, and in the largest error."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far an answer is from the definition; `worst` is the largest error as a share of what is allowed."""

    worst: float
    errors: dict[str, float]
    reason: str = ""

    @property
    def is_right(self) -> bool:
        """Whether every error is within its bound."""
        return not self.reason


def _sizes(error: torch.Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude."""
    return float(error.square().mean().sqrt()), float(error.abs().max())


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Of one sample and head: the queries whose output is checked, and the keys whose gradients are."""

    batch: int
    head: int
    queries: torch.Tensor
    keys: torch.Tensor


class Gate:
    """The right answer of a task at its sampled places, and the error that is allowed there.

    >>> from vicinal.measure.problems import find
    >>> from vicinal.measure.task import Task
    >>> task = Task(find(["nat-14x14"])[0], torch.float32)
    >>> gate = Gate(task)
    >>> gate.check((vicinal.attention(task.query, task.key, task.value, task.problem.pattern),)).is_right
    True
    >>> gate.check((task.value,)).is_right
    False
    """

    names = ("output", "gradient of query", "gradient of key", "gradient of value")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.samples = list(_samples(task))
        self.right = self._gathered(torch.float64)
        eager = self._gathered(task.dtype)
        rounding = torch.finfo(task.dtype).eps
        self.allowed = []
        for ours, right in zip(eager, self.right, strict=True):
            mean, largest = _sizes(ours.double() - right)
            size, largest_size = _sizes(right)
            self.allowed.append((ALLOWED * mean + rounding * size, ALLOWED_LARGEST * largest + rounding * largest_size))

    def check(self, answer: Sequence[torch.Tensor]) -> Verdict:
        """Compare an answer: the output, and with the backward the gradients of query, key and value."""
        errors: dict[str, float] = {}
        worst, reason = 0.0, ""
        for name, given, right, allowed in zip(self.names, answer, self.right, self.allowed, strict=False):
            if given.shape != self.task.problem.shape:
                return Verdict(math.inf, errors, f"{name} has shape {tuple(given.shape)}")
            if not bool(given.isfinite().all()):
                return Verdict(math.inf, errors, f"{name} is not finite everywhere")
            sizes = _sizes(self._picked(given.detach(), name).double() - right)
            errors[name] = sizes[0]
            worst = max(worst, *(size / bound for size, bound in zip(sizes, allowed, strict=True)))
            for size, bound, kind in zip(sizes, allowed, ("root mean square", "largest"), strict=True):
                if size > bound and not reason:
                    reason = f"{name}: {kind} error {size:.1e}, {bound:.1e} is allowed"
        return Verdict(worst, errors, reason)

    def _picked(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The sampled places of a tensor `[batch, *grid, heads, head_dim]`."""
        rows = tensor.flatten(1, -3)
        of_keys = name in self.names[2:]
        return torch.cat([rows[own.batch, own.keys if of_keys else own.queries, own.head] for own in self.samples])

    def _gathered(self, dtype: torch.dtype) -> Tensors:
        """The sampled places of the definition, computed in `dtype`."""
        found = [_dense(self.task, sample, dtype) for sample in self.samples]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _samples(task: Task) -> Iterator[_Sample]:
    problem = task.problem
    generator = np.random.default_rng(0)
    pairs = problem.batch * problem.heads
    most = MOST_SCORES // (pairs * problem.tokens)
    everything = np.arange(problem.tokens)
    for number in range(pairs):
        batch, head = divmod(number, problem.heads)
        queries = keys = everything
        if most < problem.tokens:
            queries = generator.choice(problem.tokens, min(problem.tokens, max(most // 2, 16)), False)
            # border rules go wrong in the corners, and every sample and head begins with another of these keys
            ends = np.array([0, problem.tokens - 1])
            queries = np.union1d(queries, ends)
            keys = everything[:0]
            if task.backward:
                wanted = np.roll(np.concatenate([ends, generator.choice(problem.tokens, 16)]), -number)
                keys, seers = _keys_and_seers(_member(task, head), wanted, most // 2, is_needed=number == 0)
                queries = np.union1d(queries, seers)
        yield _Sample(batch, head, torch.from_numpy(queries), torch.from_numpy(keys))


def _keys_and_seers(member: Member, wanted: np.ndarray, most: int, *, is_needed: bool) -> tuple[np.ndarray, np.ndarray]:
    """As many of the wanted keys as `most` queries see together, and these queries.

    The first key is taken whatever it costs where it is needed, or where it costs little.
    """
    keys: list[int] = []
    seers = np.zeros(math.prod(len(table) for table in member), dtype=np.bool_)
    for key in wanted:
        more = seers | _seen(member, None, np.array([key]))[:, 0]
        spares = not keys and (is_needed or more.sum() * len(seers) <= CHUNK_SCORES)
        if more.sum() > most and not spares:
            break
        keys, seers = [*keys, int(key)], more
    return np.array(sorted(set(keys)), dtype=np.int64), np.flatnonzero(seers)


def _member(task: Task, head: int) -> Member:
    """The tables of one head; the problems measured here have no union."""
    table = bounds(task.problem.pattern, task.problem.grid)
    ends = np.cumsum(table.split(task.problem.heads))
    return table.groups[int(np.searchsorted(ends, head, "right"))].members[0]


def _seen(member: Member, queries: np.ndarray | None, keys: np.ndarray | None) -> np.ndarray:
    """Which of some queries see which of some keys (None: all): bool `[queries, keys]`."""
    grid = tuple(len(table) for table in member)
    key_grid = tuple(table.length for table in member)
    query_places = np.unravel_index(np.arange(math.prod(grid)) if queries is None else queries, grid)
    number = len(query_places[0])
    if keys is None:  # all of them are a box, so that each axis is looked at once and not for every key
        whole = np.ones((number, *(1,) * len(member)), dtype=np.bool_)
        for axis, (table, query_place) in enumerate(zip(member, query_places, strict=True)):
            near = _near(table, query_place, np.arange(table.length)[None])
            whole = whole & near.reshape(
                number, *(table.length if axis == other else 1 for other in range(len(member)))
            )
        return whole.reshape(number, -1)
    whole = np.ones((number, len(keys)), dtype=np.bool_)
    for table, query_place, key_place in zip(member, query_places, np.unravel_index(keys, key_grid), strict=True):
        whole &= _near(table, query_place, key_place)
    return whole


def _near(table: AxisTable, query_place: np.ndarray, key_place: np.ndarray) -> np.ndarray:
    """Which queries see which keys along an axis: bool `[queries, keys]`."""
    distance = key_place - table.start[query_place, None]
    if table.wraps:
        distance %= table.length
    near = (distance >= 0) & (distance < table.step * table.count[query_place, None])
    return near if table.step == 1 else near & (distance % table.step == 0)


def _dense(task: Task, sample: _Sample, dtype: torch.dtype) -> Tensors:
    """Output at the sampled queries; with the backward also the three gradients at the sampled places."""
    query, key, value, grad_out = (
        tensor.flatten(1, -3)[sample.batch, :, sample.head].to(dtype)
        for tensor in (task.query, task.key, task.value, task.grad_out)
    )
    key, value = key.clone().requires_grad_(task.backward), value.clone().requires_grad_(task.backward)
    member, scale = _member(task, sample.head), task.problem.head_dim**-0.5
    parts: list[Tensors] = []
    sums = [torch.zeros_like(key, dtype=torch.float64) for _ in range(2)]
    for places in sample.queries.split(max(1, CHUNK_SCORES // task.problem.tokens)):
        own = query[places].requires_grad_(task.backward)
        seen = torch.from_numpy(_seen(member, places.numpy(), None)).to(task.device)
        scores = ((own * scale) @ key.T).masked_fill(~seen, -torch.inf)
        out = scores.softmax(1) @ value
        if not task.backward:
            parts.append((out,))
            continue
        grad_query, *grads = torch.autograd.grad(out, (own, key, value), grad_out[places])
        parts.append((out.detach(), grad_query))
        sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
    queried = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    if not task.backward:
        return queried
    return (*queried, *(total[sample.keys].to(dtype) for total in sums))
