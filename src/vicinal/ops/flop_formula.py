"""What the operators cost, for `torch.utils.flop_counter`.

That module imports Triton where it is installed, which takes longer than all of this library; so the formulas are
handed over when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from vicinal.ops.packing import Layout, unpack_row
from vicinal.pattern.bounds import Group
from vicinal.pattern.counting import attention_flops, group_pairs

_MODULE = "torch.utils.flop_counter"


def _pairs(query: torch.Tensor, key: torch.Tensor, tensors: Sequence[Any], layout: Sequence[int]) -> int:
    """(query, key) pairs over batch and heads; from the sizes alone where the tables cannot be read."""
    tables, _, extra_key, _, extra_lengths = tensors
    decoded = Layout.unpack(layout)
    grid, batch, heads = tuple(query.shape[1:-2]), query.shape[0], query.shape[-2]
    num_queries = query[0, ..., 0, 0].numel() if batch else 0
    tokens = 0 if extra_key is None else extra_key.shape[1]
    if type(tables) is not torch.Tensor or tables.device.type != "cpu":
        window = sum(group.heads * group.window for group in decoded.groups)
        return int(batch * num_queries * (window + heads * tokens))
    rows, lengths = tables.numpy(), [tokens] * batch
    if type(extra_lengths) is torch.Tensor and extra_lengths.device.type == "cpu":
        lengths = extra_lengths.tolist()
    known: dict[bytes, tuple[int, int]] = {}
    total = 0
    for sample in range(batch):
        row = rows[sample % len(rows)]
        if row.tobytes() not in known:
            groups = unpack_row(row, decoded, grid)
            pairs = sum(
                place.heads * group_pairs(Group(members)) for place, members in zip(decoded.groups, groups, strict=True)
            )
            own_queries = 1
            for table in groups[0][0]:
                own_queries *= len(table)
            known[row.tobytes()] = (pairs, own_queries)
        pairs, own_queries = known[row.tobytes()]
        total += pairs + heads * own_queries * lengths[sample]
    return total


def attend(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    """Operations of `vicinal::attend`."""
    del out_val
    query, key, value, *tensors = arguments[:8]
    return attention_flops(_pairs(query, key, tensors, arguments[8]), query.shape[-1], value.shape[-1])


def attend_backward(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    """Operations of `vicinal::attend_backward`."""
    del out_val
    query, key, value, *tensors = arguments[4:12]
    pairs = _pairs(query, key, tensors, arguments[12])
    return attention_flops(pairs, query.shape[-1], value.shape[-1], backward=True)


def bilinear(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    """Operations of `vicinal::scores`, `apply` and `spread`: one product over all pairs of the window."""
    del out_val
    first, second, tables, layout = arguments[:4]
    weights = Layout.unpack(layout)
    pairs = _pairs(first, second, (tables, None, None, None, None), layout)
    is_weights = first.shape[-1] == weights.window
    return 2 * pairs * (second.shape[-1] if is_weights else first.shape[-1])


def _register(module: ModuleType) -> None:
    ops = torch.ops.vicinal
    module.register_flop_formula(ops.attend, get_raw=True)(attend)
    module.register_flop_formula(ops.attend_backward, get_raw=True)(attend_backward)
    for operator in (ops.scores, ops.apply, ops.spread):
        module.register_flop_formula(operator, get_raw=True)(bilinear)


class _Watch(importlib.abc.MetaPathFinder):
    """Steps in once, when the counter's module is imported, and then goes away."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def hand_over() -> None:
    """Register the formulas now, if the counter is there already, or as soon as it is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Watch())
