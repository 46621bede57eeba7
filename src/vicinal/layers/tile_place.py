"""Where tokens are while a model runs: on their grid, or in tile order."""

from __future__ import annotations

import dataclasses

import torch

from vicinal.layers.rotary import Rotary
from vicinal.ops.tile_order import TileOrder


@dataclasses.dataclass
class TilePlace:
    """What the layers of one `TileOrdered` share: the order while they run in it, and what depends on positions.

    >>> place = TilePlace(TileOrder((4, 4), (2, 2), (1, 1)))
    >>> place.angles(Rotary(8, rank=2), torch.zeros(1, 16, 8)).shape
    torch.Size([16, 4])
    """

    order: TileOrder | None = None
    turned: dict[tuple[int, float, torch.device], torch.Tensor] = dataclasses.field(default_factory=dict)

    def angles(self, rotary: Rotary | None, like: torch.Tensor) -> torch.Tensor | None:
        """The angles of a rotation for every position in order; permuted once for all layers."""
        if rotary is None or self.order is None:
            return None
        kind = (sum(rotary.shares), rotary.base, like.device)
        if kind not in self.turned:
            self.turned[kind] = self.order.enter(rotary.angles(self.order.grid, like), 0)
        return self.turned[kind]
