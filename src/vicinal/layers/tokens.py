"""From images to tokens and from tokens to fewer tokens: stems and downsamplers, all `[batch, *grid, channels]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from vicinal.layers.attention import pad_grid
from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.tags import Tag, tag

MakeNorm = Callable[[int], nn.Module]


class ConvPatches(nn.Module):
    """One strided convolution with a norm before it, after it, or none: patch embeddings and most downsamplers.

    >>> ConvPatches(3, 32, kernel_size=4, stride=4, norm_after=torch.nn.LayerNorm)(torch.randn(1, 64, 48, 3)).shape
    torch.Size([1, 16, 12, 32])

    Args:
        in_dim, dim: channels in and out.
        kernel_size, stride, padding: of the convolution.
        bias: whether the convolution has one.
        norm_before, norm_after: make a norm over the channels on that side.
        use_whole_patches: append zeros until the stride divides each axis, so that no token is lost.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        bias: bool = True,
        norm_before: MakeNorm | None = None,
        norm_after: MakeNorm | None = None,
        use_whole_patches: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.use_whole_patches = use_whole_patches
        self.norm_before = None if norm_before is None else norm_before(in_dim)
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, bias=bias)
        self.norm_after = None if norm_after is None else norm_after(dim)

    def least_length(self, tokens: int) -> int:
        """The shortest axis that gives so many tokens."""
        kernel_size = 1 if self.use_whole_patches else self.conv.kernel_size[0] - 2 * int(self.conv.padding[0])
        return max(1, (tokens - 1) * self.stride + kernel_size)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, in_dim]` to `[batch, *(grid / stride), dim]`."""
        if self.norm_before is not None:
            inputs = self.norm_before(inputs)
        if self.use_whole_patches:
            inputs = pad_grid(inputs, [-(-length // self.stride) * self.stride for length in inputs.shape[1:-1]])
        out = channels_last(self.conv(channels_first(inputs)))
        return out if self.norm_after is None else self.norm_after(out)


class OverlappingStem(nn.Module):
    """NAT's tokenizer: two 3x3 convolutions of stride 2 with nothing between them, then a norm.

    >>> OverlappingStem(3, 64)(torch.randn(1, 64, 48, 3)).shape
    torch.Size([1, 16, 12, 64])
    """

    def __init__(self, in_dim: int, dim: int, norm: MakeNorm = nn.LayerNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim // 2, 3, 2, 1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm = norm(dim)

    def least_length(self, tokens: int) -> int:
        """The shortest axis that gives so many tokens."""
        return 4 * tokens - 3

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, in_dim]` to `[batch, height / 4, width / 4, dim]`."""
        result: torch.Tensor = self.norm(channels_last(self.conv2(self.conv1(channels_first(inputs)))))
        return result


class PatchMerging(nn.Module):
    """Swin's downsampler: the four tokens of a 2x2 patch side by side, a norm, a linear layer without bias.

    >>> PatchMerging(32, 64)(torch.randn(1, 7, 8, 32)).shape
    torch.Size([1, 4, 4, 64])
    """

    def __init__(self, in_dim: int, dim: int, norm: MakeNorm = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(4 * in_dim)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False)

    def least_length(self, tokens: int) -> int:
        """The shortest axis that gives so many tokens."""
        return 2 * tokens - 1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, in_dim]` to `[batch, ceil(height / 2), ceil(width / 2), dim]`."""
        inputs = pad_grid(inputs, [length + length % 2 for length in inputs.shape[1:-1]])
        # published order of the four: down the column first
        patches = inputs.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        result: torch.Tensor = self.reduction(self.norm(patches))
        return result


class LearnedPositions(nn.Module):
    """A learned vector per place, added; resized bilinearly where the grid is another.

    >>> LearnedPositions((4, 4), 8)(torch.zeros(1, 6, 4, 8)).shape
    torch.Size([1, 6, 4, 8])
    """

    def __init__(self, grid: Sequence[int], dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(*grid, dim), std=0.02))
        tag(self, table=Tag(weight_decay=False, role="position"))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        grid = tuple(inputs.shape[1:-1])
        if grid == tuple(self.table.shape[:-1]):
            return inputs + self.table
        mode = ("linear", "bilinear", "trilinear")[len(grid) - 1]
        resized = nn.functional.interpolate(channels_first(self.table[None]), size=grid, mode=mode)
        return inputs + channels_last(resized)
