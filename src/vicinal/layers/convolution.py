"""Token mixers without attention: depthwise and large-kernel convolutions, gates, pooling, focal modulation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vicinal.layers.channels import average_pool, channels_first, channels_last

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Depthwise(nn.Module):
    """A depthwise convolution over `[batch, *grid, dim]` that keeps the grid.

    >>> Depthwise(8, kernel_size=7)(torch.randn(1, 5, 6, 8)).shape
    torch.Size([1, 5, 6, 8])
    """

    def __init__(self, dim: int, kernel_size: int = 3, *, dilation: int = 1, rank: int = 2, bias: bool = True) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the grid, got {kernel_size}")
        padding = dilation * (kernel_size // 2)
        kind = _CONVOLUTIONS[rank - 1]
        self.conv = kind(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return channels_last(self.conv(channels_first(inputs)))


class PoolingDifference(nn.Module):
    """PoolFormer's mixer: the mean of the neighborhood (what of it is on the grid) minus the token itself.

    >>> bool(PoolingDifference(3)(torch.ones(1, 4, 5, 2)).any())
    False
    """

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the grid, got {kernel_size}")
        self.kernel_size = kernel_size

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape."""
        return average_pool(inputs, self.kernel_size, stride=1, padding=self.kernel_size // 2) - inputs

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"kernel_size={self.kernel_size}"


class LargeKernelAttention(nn.Module):
    """VAN's mixer: a gate from a 21x21 kernel taken apart into a small, a dilated and a pointwise convolution.

    >>> LargeKernelAttention(8)(torch.randn(1, 5, 6, 8)).shape
    torch.Size([1, 5, 6, 8])
    """

    def __init__(self, dim: int, *, rank: int = 2) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.near = Depthwise(dim, 5, rank=rank)
        self.far = Depthwise(dim, 7, dilation=3, rank=rank)
        self.point = nn.Linear(dim, dim)
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape; the input is added, inside the block's own residual."""
        inner = self.act(self.proj_in(inputs))
        result: torch.Tensor = self.proj_out(inner * self.point(self.far(self.near(inner)))) + inputs
        return result


class RecursiveGate(nn.Module):
    """HorNet's mixer: gates of growing width, each times its share of one depthwise convolution.

    >>> RecursiveGate(16, order=3)(torch.randn(1, 5, 6, 16)).shape
    torch.Size([1, 5, 6, 16])
    """

    def __init__(self, dim: int, order: int, *, kernel_size: int = 7, scale: float = 1.0, rank: int = 2) -> None:
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise ValueError(f"order must be at least 1 and 2 ** (order - 1) divide {dim} channels, got {order}")
        self.dims = [dim // 2**power for power in reversed(range(order))]
        self.scale = scale
        self.proj_in = nn.Linear(dim, 2 * dim)
        self.depthwise = Depthwise(sum(self.dims), kernel_size, rank=rank)
        self.widen = nn.ModuleList(
            nn.Linear(narrow, wide) for narrow, wide in zip(self.dims[:-1], self.dims[1:], strict=True)
        )
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape."""
        gate, rest = self.proj_in(inputs).split((self.dims[0], sum(self.dims)), -1)
        first, *others = (self.depthwise(rest) * self.scale).split(self.dims, -1)
        out = gate * first
        for widen, share in zip(self.widen, others, strict=True):
            out = widen(out) * share
        result: torch.Tensor = self.proj_out(out)
        return result


class FocalModulation(nn.Module):
    """FocalNet's mixer: gated contexts from growing depthwise kernels and the whole map modulate each token.

    >>> FocalModulation(16, levels=2, window=3)(torch.randn(1, 5, 6, 16)).shape
    torch.Size([1, 5, 6, 16])
    """

    def __init__(self, dim: int, levels: int, window: int = 3, *, rank: int = 2) -> None:
        super().__init__()
        self.dim, self.levels = dim, levels
        self.proj_in = nn.Linear(dim, 2 * dim + levels + 1)
        sizes = [window + 2 * level for level in range(levels)]
        self.contexts = nn.ModuleList(Depthwise(dim, size, bias=False, rank=rank) for size in sizes)
        self.act = nn.GELU()
        self.modulator = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape."""
        query, context, gates = self.proj_in(inputs).split((self.dim, self.dim, self.levels + 1), -1)
        total = torch.zeros_like(query)
        for level, layer in enumerate(self.contexts):
            context = self.act(layer(context))
            total = total + context * gates[..., level, None]
        whole = self.act(context.mean(tuple(range(1, context.dim() - 1)), keepdim=True))
        total = total + whole * gates[..., self.levels, None]
        result: torch.Tensor = self.proj(query * self.modulator(total))
        return result


class MobileConv(nn.Module):
    """MaxViT's convolution block: expand, depthwise, squeeze and excite, project, over its own shortcut.

    >>> norm = lambda dim: torch.nn.BatchNorm2d(dim)
    >>> MobileConv(8, 16, norm=norm, stride=2)(torch.randn(1, 5, 6, 8)).shape
    torch.Size([1, 3, 3, 16])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act: Callable[[], nn.Module] = nn.GELU,
        stride: int = 1,
        expansion: int = 4,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__()
        hidden, squeezed = expansion * out_dim, out_dim // 4
        self.stride = stride
        self.shortcut = nn.Identity() if dim == out_dim else nn.Conv2d(dim, out_dim, 1)
        self.norm_in = norm(dim)
        self.expand = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm_expand = norm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, groups=hidden, bias=False)
        self.norm_depthwise = norm(hidden)
        self.act = act()
        self.squeeze = nn.Conv2d(hidden, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, hidden, 1)
        self.project = nn.Conv2d(hidden, out_dim, 1)
        self.drop_path = nn.Identity() if drop_path is None else drop_path

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, height, width, dim]` to `[batch, *(grid / stride), out_dim]`."""
        inputs = channels_first(inputs)
        kept = inputs
        if self.stride > 1:
            kept = nn.functional.avg_pool2d(inputs, self.stride, ceil_mode=True, count_include_pad=False)
        kept = self.shortcut(kept)
        hidden = self.act(self.norm_expand(self.expand(self.norm_in(inputs))))
        hidden = self.act(self.norm_depthwise(self.depthwise(same_padding(hidden, 3, self.stride))))
        gate = self.excite(nn.functional.silu(self.squeeze(hidden.mean((2, 3), keepdim=True)))).sigmoid()
        return channels_last(kept + self.drop_path(self.project(hidden * gate)))


def same_padding(inputs: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """TensorFlow's padding of `[batch, channels, height, width]`: length / stride out, the odd zero at the end.

    >>> same_padding(torch.ones(1, 1, 6, 5), 3, 2).shape
    torch.Size([1, 1, 7, 7])
    """
    pads: list[int] = []
    for length in reversed(inputs.shape[2:]):
        total = max((-(-length // stride) - 1) * stride + kernel_size - length, 0)
        pads += [total // 2, total - total // 2]
    return nn.functional.pad(inputs, pads)
