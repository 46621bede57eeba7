"""The residual block that every family is made of: slots for norm, mixer, channel mixer, scale, drop path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from vicinal.layers import plain_block
from vicinal.layers.norm import Modulated
from vicinal.layers.one_pass import AddsTo, is_bare
from vicinal.layers.tags import LAYER_SCALE, tag

NormPlace = Literal["pre", "post", "branch"]


class DropPath(nn.Module):
    """Leaves a residual branch out, sample by sample, while training; what stays is scaled up.

    >>> DropPath(0.5).eval()(torch.ones(1, 2)).tolist()
    [[1.0, 1.0]]
    """

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate must be a probability in 0 <= p < 1, got {drop_rate}")
        self.drop_rate = drop_rate

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        if not self.training or self.drop_rate == 0.0:
            return inputs
        keep = 1.0 - self.drop_rate
        shape = (inputs.shape[0], *(1,) * (inputs.dim() - 1))
        # drawn in single precision: half precision has too few numbers between 0 and 1 for small rates
        return inputs * (torch.rand(shape, device=inputs.device) < keep).to(inputs.dtype) / keep

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"drop_rate={self.drop_rate}"


class Block(nn.Module):
    """A residual block over `[batch, *grid, dim]`: a token mixer, then a channel mixer, each over a shortcut.

    >>> from vicinal.layers.attention import PatternAttention
    >>> from vicinal.layers.mlp import Mlp
    >>> block = Block(32, PatternAttention(32, 2, Near(5)), Mlp(32, 64), layer_scale=1e-5)
    >>> block(torch.randn(1, 8, 9, 32)).shape
    torch.Size([1, 8, 9, 32])

    Args:
        dim: channels.
        mixer: a module from `[batch, *grid, dim]` to the same shape; None leaves the branch out.
        mlp: the channel mixer, likewise.
        norm: makes a norm from `dim`; one that makes `Modulated` needs a condition in the call.
        norm_place: `"pre"` normalizes what a branch reads, `"branch"` what it writes, `"post"` the sum.
        layer_scale: the first value of a learned factor per channel on each branch; None for no factor.
        drop_rate: drop path.
        positions: modules whose output is added before each branch (DaViT's convolutions), or None.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module | None,
        mlp: nn.Module | None,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_place: NormPlace = "pre",
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        positions: tuple[nn.Module | None, nn.Module | None] = (None, None),
    ) -> None:
        super().__init__()
        if norm_place not in ("pre", "post", "branch"):
            raise ValueError(f'norm_place must be "pre", "post" or "branch", got {norm_place!r}')
        self.norm_place = norm_place
        self.position1, self.position2 = positions
        self.norm1 = None if mixer is None else norm(dim)
        self.mixer = mixer
        self.norm2 = None if mlp is None else norm(dim)
        self.mlp = mlp
        self.gamma1 = _scale(dim, layer_scale if mixer is not None else None)
        self.gamma2 = _scale(dim, layer_scale if mlp is not None else None)
        tag(self, gamma1=LAYER_SCALE, gamma2=LAYER_SCALE)
        self.drop_path = DropPath(drop_rate) if drop_rate else nn.Identity()

    def forward(self, inputs: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, *grid, dim]` to the same shape."""
        plain = plain_block.run(self, inputs) if condition is None else None
        if plain is not None:
            return plain
        out = self._branch(inputs, self.position1, self.norm1, self.mixer, self.gamma1, condition)
        return self._branch(out, self.position2, self.norm2, self.mlp, self.gamma2, condition)

    def _branch(
        self,
        inputs: torch.Tensor,
        position: nn.Module | None,
        norm: nn.Module | None,
        inner: nn.Module | None,
        gamma: torch.Tensor | None,
        condition: torch.Tensor | None,
    ) -> torch.Tensor:
        if position is not None:
            inputs = inputs + position(inputs)
        if inner is None or norm is None:
            return inputs
        out = _normed(norm, inputs, condition) if self.norm_place == "pre" else inputs
        if isinstance(inner, AddsTo) and gamma is None and self._adds_at_once(inner):
            result: torch.Tensor = inner(out, inputs)
            return result
        out = inner(out)
        if self.norm_place == "branch":
            out = _normed(norm, out, condition)
        if gamma is not None:
            out = gamma * out
        out = inputs + self.drop_path(out)
        return _normed(norm, out, condition) if self.norm_place == "post" else out

    def _adds_at_once(self, inner: nn.Module) -> bool:
        """Whether a branch's result goes to the sum as it is, and nobody wants to see it alone."""
        is_whole = isinstance(self.drop_path, nn.Identity) or not self.training
        return self.norm_place == "pre" and is_whole and is_bare(inner) and is_bare(self.drop_path)


def _scale(dim: int, value: float | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((dim,), value))


def _normed(norm: nn.Module, inputs: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor
    if not isinstance(norm, Modulated):
        result = norm(inputs)
        return result
    if condition is None:
        raise ValueError("a block with modulated norms needs a condition in the call")
    result = norm(inputs, condition)
    return result


def drop_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Drop path rates that grow from 0 to `last` over all blocks, one list per stage.

    >>> drop_rates((1, 2), 0.2)
    [[0.0], [0.1, 0.2]]
    """
    if not 0.0 <= last < 1.0:
        raise ValueError(f"drop_path_rate must be a probability in 0 <= p < 1, got {last}")
    total = sum(depths)
    rates = [last * index / max(total - 1, 1) for index in range(total)]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
