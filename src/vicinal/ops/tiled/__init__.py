"""The portable back end: tiles of queries against the keys they need, in plain torch operations.

Every tile gathers its queries and the interval of keys that covers what they see, in batches ("chunks") small
enough to stay in cache, so memory grows with tokens times window and no copy of the whole input is made. On CPU
chunks of large tiles go through torch's own fused attention where that can take them; others through batched matrix
products. Plain calls (`plain`) take a shorter way.
"""

from __future__ import annotations

from typing import Any

from vicinal.ops.backend import Backend, Capability, Keeping, Problem, register
from vicinal.ops.packing import Layout, pack_tables
from vicinal.ops.tiled.backward import backward as run_backward
from vicinal.ops.tiled.forward import differentiable
from vicinal.ops.tiled.plain import backward_from_kept, forward_keeping, output_alone
from vicinal.ops.tiled.plain import forward as run_forward
from vicinal.ops.tiled.plan import plan_row
from vicinal.ops.tiled.tiles import TileSet


def _describe(problem: Problem, bounds: Any, layout: Layout) -> dict[str, Any]:
    row = pack_tables(bounds)[0].tobytes()
    plan = plan_row(row, layout.packed, problem.grid, bounded=False, biased=problem.has_bias)
    groups = []
    for members in plan.groups:
        for member in members:
            groups.append([_describe_set(tiles) for tiles in member.sets])
    return {"method": "query tiles against the keys they need", "members": groups}


def _describe_set(tiles: TileSet) -> dict[str, Any]:
    needed = sum(int((axis.high - axis.low)[axis.is_query].sum()) for axis in tiles.axes[:1])
    for axis in tiles.axes[1:]:
        needed *= int((axis.high - axis.low)[axis.is_query].sum())
    computed = tiles.num_tiles * tiles.queries * tiles.keys
    return {
        "tiles": tiles.num_tiles,
        "query_tile": [axis.queries for axis in tiles.axes],
        "key_tile": [axis.keys for axis in tiles.axes],
        "masked": tiles.needs_mask,
        "waste": round(computed / max(needed, 1), 3),
    }


register(
    Backend(
        name="tiled",
        capability=Capability(),
        forward=run_forward,
        backward=run_backward,
        differentiable=differentiable,
        describe=_describe,
        output_alone=output_alone,
        keeping=Keeping(forward_keeping, backward_from_kept),
    )
)
