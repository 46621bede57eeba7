"""Problems after NATTEN's own public test tables (its tests/test_fna.py, test_hopper_fna.py and test_flex.py).

Heads, kv_heads, head_dim, grid, and the window. Grids are cut below 1000 tokens and head dims to 16 where theirs were
larger: a dense computation in float64 stands beside every one of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class NattenProblem:
    """One row of a table."""

    heads: int
    kv_heads: int
    head_dim: int
    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...] | None = None
    value_dim: int | None = None

    @property
    def window(self) -> dict[str, Any]:
        causal = (False,) * len(self.grid) if self.is_causal is None else self.is_causal
        return {"kernel_size": self.kernel_size, "stride": self.stride, "dilation": self.dilation, "is_causal": causal}

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        shapes = ((self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, value_dim))
        query, key, value = (torch.randn(1, *self.grid, *shape, dtype=dtype) for shape in shapes)
        return query, key, value

    def __str__(self) -> str:
        parts = (self.grid, self.kernel_size, self.stride, self.dilation)
        sizes = "-".join("x".join(map(str, part)) for part in parts)
        causal = "".join("c" if flag else "." for flag in self.is_causal or ())
        return f"{sizes}{causal and '-' + causal}-h{self.heads}:{self.kv_heads}"


PROBLEMS = (
    NattenProblem(2, 1, 8, (128,), (3,), (2,), (5,)),
    NattenProblem(1, 1, 16, (128,), (8,), (7,), (5,), (True,)),
    NattenProblem(2, 1, 8, (125,), (15,), (1,), (1,)),
    NattenProblem(1, 1, 16, (256,), (3,), (2,), (10,), (True,)),
    NattenProblem(3, 3, 16, (256,), (255,), (82,), (1,)),
    NattenProblem(1, 1, 16, (32,), (32,), (1,), (1,)),
    NattenProblem(4, 1, 8, (5, 25), (5, 16), (1, 16), (1, 1)),
    NattenProblem(4, 2, 8, (5, 25), (5, 16), (4, 16), (1, 1), (False, True)),
    NattenProblem(1, 1, 8, (5, 25), (5, 16), (5, 16), (1, 1), (True, False)),
    NattenProblem(2, 2, 16, (19, 29), (8, 8), (1, 1), (2, 3)),
    NattenProblem(1, 1, 16, (19, 29), (8, 8), (3, 5), (2, 3), (True, True)),
    NattenProblem(2, 1, 16, (16, 16), (4, 4), (2, 3), (1, 1)),
    NattenProblem(3, 1, 16, (28, 30), (11, 13), (1, 1), (1, 1)),
    NattenProblem(1, 1, 16, (28, 28), (13, 13), (1, 1), (2, 2)),
    NattenProblem(1, 1, 16, (16, 16), (7, 7), (1, 1), (1, 1), value_dim=24),
    NattenProblem(1, 1, 16, (20, 12), (20, 12), (1, 1), (1, 1)),
    NattenProblem(1, 1, 16, (4, 4, 4), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    NattenProblem(1, 1, 8, (8, 4, 8), (7, 3, 7), (1, 1, 1), (1, 1, 1)),
    NattenProblem(2, 1, 8, (7, 6, 9), (3, 4, 3), (2, 3, 3), (2, 1, 3), (False, True, True)),
    NattenProblem(2, 2, 8, (6, 8, 9), (5, 8, 7), (2, 3, 4), (1, 1, 1)),
)
