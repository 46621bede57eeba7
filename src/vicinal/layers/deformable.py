"""Downsampling that looks where it wants to: LITv2's deformable token merging."""

from __future__ import annotations

import torch
from torch import nn

from vicinal.layers.attention import pad_grid
from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.tags import Tag, tag


class DeformableMerging(nn.Module):
    """A 2x2 convolution of stride 2 whose four taps each move by a learned offset, then batch norm and GELU.

    >>> DeformableMerging(8, 16)(torch.randn(2, 6, 5, 8)).shape
    torch.Size([2, 3, 3, 16])
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        conv = nn.Conv2d(in_dim, dim, 2, 2)
        self.weight, self.bias = conv.weight, conv.bias
        self.offset = nn.Conv2d(in_dim, 8, 2, 2)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)
        # the published recipe moves the offsets slower than the rest
        tag(self.offset, weight=Tag(group="offset"), bias=Tag(weight_decay=False, group="offset"))
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, in_dim]` to `[batch, ceil(height / 2), ceil(width / 2), dim]`."""
        maps = channels_first(pad_grid(inputs, [length + length % 2 for length in inputs.shape[1:-1]])).contiguous()
        height, width = maps.shape[2:]
        precise = torch.promote_types(maps.dtype, torch.float32)  # places need more digits than half precision has
        offsets = self.offset(maps).to(precise)
        taps = []
        for tap in range(4):
            rows = torch.arange(tap // 2, height, 2, device=maps.device)[:, None] + offsets[:, 2 * tap]
            columns = torch.arange(tap % 2, width, 2, device=maps.device) + offsets[:, 2 * tap + 1]
            # grid_sample counts from -1 to 1, and takes the column first
            places = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
            found = nn.functional.grid_sample(maps.to(places.dtype), places, align_corners=False)
            taps.append(found.to(maps.dtype))
        weight = self.weight.flatten(2).permute(0, 2, 1).flatten(1)
        merged = nn.functional.conv2d(torch.cat(taps, 1), weight[..., None, None], self.bias)
        return channels_last(self.act(self.norm(merged)))

    def own_multiply_adds(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Multiply-adds of the convolution on one sample, nominal and exact, without the interpolation."""
        places = -(-grid[0] // 2) * -(-grid[1] // 2)
        cost = places * self.weight.numel()
        return cost, cost
