"""Peers that need no tiles: a dense mask, a block mask that a compiler sees, and keys gathered query by query."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vicinal.measure.task import HEADS_FIRST, NotRun, Prepared, Task
from vicinal.ops.engines.flex import compiled_for
from vicinal.pattern import bounds, mask
from vicinal.pattern.table import AxisTable

MOST_DENSE_TOKENS = 8192
MOST_FLEX_TOKENS = 4096
"""Its block mask is built from the full one, query by key, and compiling takes seconds for each problem."""

MOST_GATHERED_BYTES = 1 << 30


def axis_tables(task: Task) -> tuple[AxisTable, ...]:
    """The table of each axis; refuses problems whose heads differ."""
    if not task.problem.kinds:
        raise NotRun("written for one pattern on all heads")
    return bounds(task.problem.pattern, task.problem.grid).groups[0].members[0]


def additive(seen: torch.Tensor, task: Task) -> torch.Tensor:
    """A mask as something to add to scores: 0 where seen, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=task.dtype).masked_fill_(~seen, -torch.inf).to(task.device)


def sdpa_mask(task: Task) -> list[Prepared]:
    """Scaled dot-product attention over all keys, with a dense additive mask."""
    tokens = task.problem.tokens
    if tokens > MOST_DENSE_TOKENS:
        raise NotRun(f"a dense mask of {tokens} x {tokens} is too large")
    dense = additive(mask(task.problem.pattern, task.problem.grid).reshape(tokens, tokens), task)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, keys, values = (tensor.flatten(2, -2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=dense).view(query.shape)

    return [Prepared(call, HEADS_FIRST)]


def flex(task: Task) -> list[Prepared]:
    """FlexAttention, compiled, with a block mask; on a CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask

    problem, is_gpu = task.problem, task.device.type == "cuda"
    if task.backward and task.device.type == "cpu":
        raise NotRun("FlexAttention has no backward on CPU")
    if problem.tokens > MOST_FLEX_TOKENS and task.device.type == "cpu":
        raise NotRun(f"building its block mask visits {problem.tokens} x {problem.tokens} pairs")
    first = [torch.from_numpy(table.start.astype(np.int32)).to(task.device) for table in axis_tables(task)]
    count = [torch.from_numpy(table.count.astype(np.int32)).to(task.device) for table in axis_tables(task)]
    steps = [table.step for table in axis_tables(task)]

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = query >= 0
        for axis in reversed(range(len(steps))):
            length, step = problem.grid[axis], steps[axis]
            place, query = query % length, query // length
            distance, key = key % length - first[axis][place], key // length
            seen = seen & (distance >= 0) & (distance % step == 0) & (distance < step * count[axis][place])
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own deprecations say nothing about the problem
        # compiled, it is built without the full mask
        tokens = problem.tokens
        blocks = create_block_mask(sees, None, None, tokens, tokens, device=task.device, _compile=is_gpu)
        compiled = compiled_for(blocks, False, with_lse=False)

        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            rows, keys, values = (tensor.flatten(2, -2) for tensor in (query, key, value))
            out: torch.Tensor = compiled(rows, keys, values, problem.head_dim**-0.5)
            return out.view(query.shape)

        prepared = Prepared(call, HEADS_FIRST)
        try:
            task.runner(prepared)()
        except (RuntimeError, NotImplementedError) as error:
            raise NotRun(f"it does not compile here: {str(error).splitlines()[0]}") from error
    return [prepared]


def gather(task: Task) -> list[Prepared]:
    """Each query's own keys and values copied side by side, then two batched products."""
    problem, tables = task.problem, axis_tables(task)
    index, seen = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=np.bool_)
    for table in tables:
        places = np.arange(table.count.max())
        sees = places < table.count[:, None]
        keys = np.where(sees, table.start[:, None] + table.step * places, 0)
        size = (index.shape[0] * len(table), index.shape[1] * len(places))
        index = (index[:, None, :, None] * table.length + keys[None, :, None, :]).reshape(size)
        seen = (seen[:, None, :, None] & sees[None, :, None, :]).reshape(size)
    gathered = 2 * problem.batch * problem.heads * index.size * problem.head_dim * task.dtype.itemsize
    if gathered > MOST_GATHERED_BYTES:
        raise NotRun(f"the gathered keys and values would take {gathered / 1e9:.1f} GB")
    rows = torch.from_numpy(index.reshape(-1)).to(task.device)
    bias = None if seen.all() else additive(torch.from_numpy(seen), task)[:, None]
    scale = problem.head_dim**-0.5

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        own = (*query.shape[:2], *index.shape, query.shape[-1])
        keys = key.flatten(2, -2).index_select(2, rows).view(own)
        values = value.flatten(2, -2).index_select(2, rows).view(own)
        scores = (query.flatten(2, -2) * scale).unsqueeze(-2) @ keys.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return (scores.softmax(-1) @ values).view(query.shape)

    return [Prepared(call, HEADS_FIRST)]
