"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class Average:
    """Keeps an average of the parameters and buffers of `model`, sharded as they are.

    Early on it forgets faster, with decay (1 + steps) / (10 + steps), so that the fresh weights do not linger.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> average = Average(layer, decay=0.9)
    >>> _ = layer.weight.data.fill_(1.0)
    >>> average.update(step=10_000)
    >>> with average.applied():
    ...     bool(layer.weight < 1)
    True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take up the weights after step `step` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.model.state_dict().items():
            kept, now = _local(self.values[name]), _local(tensor)
            if kept.is_floating_point():
                kept.lerp_(now, weight)
            else:
                kept.copy_(now)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, for as long as the context lasts."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self.model.state_dict().items():
            kept, now = _local(self.values[name]), _local(tensor)
            held = now.clone()
            now.copy_(kept)
            kept.copy_(held)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
