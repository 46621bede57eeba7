"""Samples side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Images uint8 `[batch, channels, height, width]`, labels and sample numbers int64 `[batch]`.

    `weights` `[batch]` is 0 for samples that only fill the batch. `rows` numbers the samples within the whole
    batch of a step, of which this may be a part.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.indices,
            self.weights.to(device, non_blocking=True),
            self.rows,
        )

    def __len__(self) -> int:
        return self.labels.shape[0]
