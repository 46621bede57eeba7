"""What a call would do: which back end, why not the others, how much arithmetic, cut up how."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vicinal.ops import checks, resolve
from vicinal.ops.api import Call, under_autocast
from vicinal.ops.backend import Problem, find, refusals
from vicinal.pattern.bounds import AnyPattern, bounds
from vicinal.pattern.counting import attention_flops, count


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The answer of `explain`.

    `backend` is the one chosen, `refused` maps every other name to all its reasons (none: it could, but another
    is preferred), `flops` counts the forward and `flops_backward` the backward, `tiles` says how the chosen back
    end cuts the problem up, and `notes` what else a caller should know.
    """

    backend: str
    refused: dict[str, list[str]]
    flops: int
    flops_backward: int
    tiles: dict[str, Any]
    problem: Problem
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        problem = dataclasses.asdict(self.problem)
        problem["dtype"] = str(self.problem.dtype).removeprefix("torch.")
        return {
            "backend": self.backend,
            "refused": self.refused,
            "flops": self.flops,
            "flops_backward": self.flops_backward,
            "tiles": self.tiles,
            "problem": problem,
            "notes": list(self.notes),
        }


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AnyPattern,
    *,
    bias: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    extra_key: torch.Tensor | None = None,
    extra_value: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
    extra_query: torch.Tensor | None = None,
    grids: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What `attention` would do with the same arguments; tensors may be on the meta device.

    >>> query = torch.empty(1, 56, 56, 2, 32, device="meta")
    >>> explanation = explain(query, query, query, Near(7), backend="tiled")
    >>> explanation.backend, explanation.flops
    ('tiled', 39337984)
    """
    query, key, value, extra_key, extra_value, extra_query = under_autocast(
        query, key, value, extra_key, extra_value, extra_query
    )
    call = Call(query, key, value, pattern, bias, extra_key, extra_value, extra_lengths, grids, scale)
    sizes = call.sizes(call.grid, bias is not None)
    packed, name = resolve.chosen(call.pattern_key, sizes, backend)
    if bias is not None:
        checks.flatten_bias(bias, *resolve.bias_shapes(packed), query)
    problem, layout = resolve.make_problem(call.pattern_key, *sizes)
    notes = []
    if name != "reference":
        notes.append("a second derivative (create_graph=True) runs the portable back end's plain torch form")
    if extra_query is not None:
        checks.check_extra_query(extra_query, query)
    pairs, exact = _pairs(call, pattern, extra_query)
    if not exact:
        notes.append("the sizes in grids or extra_lengths are not known here: flops are those of the padded batch")
    tiles: dict[str, Any] = {"method": "one plan for each size in grids"}
    if grids is None:
        tiles = find(name).describe(problem, bounds(pattern, call.grid, call.key_grid), layout)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    return Explanation(
        backend=name,
        refused={other: reasons for other, reasons in refusals(problem).items() if other != name},
        flops=attention_flops(pairs, head_dim, value_dim),
        flops_backward=attention_flops(pairs, head_dim, value_dim, backward=True),
        tiles=tiles,
        problem=problem,
        notes=tuple(notes),
    )


def _pairs(call: Call, pattern: AnyPattern, extra_query: torch.Tensor | None) -> tuple[int, bool]:
    """(query, key) pairs over batch and heads, and whether they are exact."""
    batch, heads = call.query.shape[0], call.query.shape[-2]
    extra_queries = 0 if extra_query is None else extra_query.shape[1]
    known = all(tensor is None or tensor.device.type == "cpu" for tensor in (call.grids, call.extra_lengths))
    tokens = 0 if call.extra_key is None else call.extra_key.shape[1]
    lengths = [tokens] * batch
    if call.extra_lengths is not None and known:
        lengths = call.extra_lengths.tolist()
    own = [(call.grid, call.key_grid)] * batch
    if call.grids is not None and known:
        own = [(tuple(sizes), tuple(sizes)) for sizes in call.grids.tolist()]
    pairs = 0
    for (grid, key_grid), length in zip(own, lengths, strict=True):
        num_queries, num_keys = _size(grid), _size(key_grid)
        pairs += count(pattern, grid, key_grid, heads=heads) + heads * num_queries * length
        pairs += heads * extra_queries * (num_keys + length)
    return pairs, known


def _size(grid: tuple[int, ...]) -> int:
    size = 1
    for length in grid:
        size *= length
    return size
