"""The builder: a stem, stages of blocks with downsamplers, a head; and the same as features at chosen strides.

An isotropic model is a pyramid of one stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.cost import Cost, cost
from vicinal.layers.tags import set_group

Output = tuple[torch.Tensor, torch.Tensor | None]
"""What a stage gives: the map `[batch, *grid, dim]`, and tokens beside the grid `[batch, tokens, dim]` or None."""


@runtime_checkable
class Shortens(Protocol):
    """A module that makes axes shorter, and knows from which length on."""

    def least_length(self, tokens: int) -> int:
        """The shortest axis that gives so many tokens."""


@dataclass(frozen=True)
class FeatureInfo:
    """What one feature map is: image pixels per token along an axis, and channels."""

    stride: int
    channels: int


class Stage(nn.Module):
    """Blocks of one width on one grid, after a downsampler; `norm` comes last, where a family has it there.

    `stride` is how many times coarser the grid gets: 2 with a downsampler, 1 without, unless said otherwise.

    >>> Stage([torch.nn.Identity()], dim=8)(torch.ones(1, 4, 4, 8))[0].shape
    torch.Size([1, 4, 4, 8])
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        dim: int,
        stride: int | None = None,
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stride = stride if stride is not None else 1 if downsample is None else 2
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, inputs: torch.Tensor) -> Output:
        """`[batch, *grid, in_dim]` to the stage's output."""
        out = inputs if self.downsample is None else self.downsample(inputs)
        for block in self.blocks:
            out = block(out)
        return (out if self.norm is None else self.norm(out)), None


class Head(nn.Module):
    """From the last map to logits: a norm of every token, their mean, a linear layer.

    Other heads override `embed`. Zero classes leave the linear layer out.

    >>> Head(8, 10)(torch.ones(2, 4, 4, 8), None).shape
    torch.Size([2, 10])
    """

    def __init__(self, dim: int, num_classes: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(dim) if norm is None else norm
        self.classifier: nn.Linear | None = None
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """A fresh linear layer for other classes; 0 for none."""
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be a whole number of at least 0, got {num_classes!r}")
        # a model that was moved or cast keeps its place and its precision; a norm without weights leaves the defaults
        like = next(self.parameters(), None)
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        self.classifier = nn.Linear(self.dim, num_classes, device=device, dtype=dtype) if num_classes else None
        if self.classifier is not None:
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    def embed(self, features: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        """One vector per sample, `[batch, dim]`."""
        result: torch.Tensor = self.norm(features).flatten(1, -2).mean(1)
        return result

    def forward(self, features: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        """`[batch, num_classes]`, or what `embed` gives where there is no linear layer."""
        embedded = self.embed(features, extra)
        return embedded if self.classifier is None else self.classifier(embedded)


class PoolFirstHead(Head):
    """The mean of all tokens first, then the norm (ConvNeXt, HorNet).

    >>> PoolFirstHead(8, 10)(torch.ones(2, 4, 4, 8), None).shape
    torch.Size([2, 10])
    """

    def embed(self, features: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        """One vector per sample, `[batch, dim]`."""
        result: torch.Tensor = self.norm(features.flatten(1, -2).mean(1))
        return result


class Pyramid(nn.Module):
    """A backbone with a classifier: images `[batch, channels, height, width]` to logits `[batch, classes]`.

    >>> model = vicinal.create_model("nat_mini")
    >>> [(info.stride, info.channels) for info in model.feature_info]
    [(4, 64), (8, 128), (16, 256), (32, 512)]

    Args:
        stem: images, channels last, to tokens.
        stages: in order, finest first.
        head: the classifier.
        stem_stride: image pixels per token after the stem.
        in_channels: of the images.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[Stage], head: Head, *, stem_stride: int = 4, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.in_channels = in_channels
        self.feature_info = feature_info(stages, stem_stride)
        self.least_image = least_image(stem, stages)
        set_group(stem, "stem")
        for index, stage in enumerate(stages):
            set_group(stage, f"stage{index}")
        set_group(head, "head")
        # convolutions read the channels last; weights that lie otherwise would be copied in every call
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form

    def outputs(self, images: torch.Tensor) -> Iterator[Output]:
        """The output of every stage, channels last, as they come."""
        return run_stages(self.stem, self.stages, images, self.in_channels, self.least_image)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """One vector per image, `[batch, dim]`: what the classifier sees."""
        for last in self.outputs(images):  # noqa: B007 - the last one is wanted
            pass
        return self.head.embed(*last)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The map of every stage, `[batch, channels, height, width]`, finest first."""
        return [channels_first(features) for features, _ in self.outputs(images)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]`."""
        for last in self.outputs(images):  # noqa: B007 - the last one is wanted
            pass
        result: torch.Tensor = self.head(*last)
        return result

    def cost(self, image_size: int | Sequence[int] = 224) -> Cost:
        """Parameters and multiply-adds for one image of `image_size`; see `vicinal.layers.cost`."""
        sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        return cost(self, 1, self.in_channels, *sizes)


class Features(nn.Module):
    """The maps of chosen stages of a pyramid, finest first, each `[batch, channels, height, width]`.

    Nothing that the maps do not need is kept. With `use_norms` each goes through a norm of its own, as detection
    and segmentation code does.

    >>> backbone = vicinal.create_model("nat_mini", features_only=True, stages=(1, 3))
    >>> [tuple(maps.shape) for maps in backbone(torch.randn(1, 3, 64, 64))]
    [(1, 128, 8, 8), (1, 512, 2, 2)]
    """

    def __init__(self, model: Pyramid, stages: Sequence[int] | None = None, *, use_norms: bool = False) -> None:
        super().__init__()
        count = len(model.stages)
        given: object = range(count) if stages is None else stages
        chosen = tuple(stage for stage in range(count) if isinstance(given, Sequence) and stage in given)
        if not chosen or not isinstance(given, Sequence) or list(given) != list(chosen):
            raise ValueError(f"stages must be rising numbers from 0 to {count - 1}, got {stages!r}")
        self.chosen = chosen
        self.in_channels = model.in_channels
        self.stem = model.stem
        self.stages = nn.ModuleList(list(model.stages)[: chosen[-1] + 1])
        self.least_image = least_image(self.stem, self.stages)
        self.feature_info = tuple(model.feature_info[stage] for stage in chosen)
        self.norms: nn.ModuleDict | None = None
        if use_norms:
            self.norms = nn.ModuleDict(
                {str(stage): nn.LayerNorm(model.feature_info[stage].channels) for stage in chosen}
            )
        kept = set(self.state_dict())
        self.left_out = tuple(name for name in model.state_dict() if name not in kept)
        if use_norms:  # files of the whole backbone have the other norms too
            others = [stage for stage in range(count) if stage not in chosen]
            self.left_out += tuple(f"norms.{stage}.{part}" for stage in others for part in ("weight", "bias"))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The chosen maps."""
        maps = []
        outputs = run_stages(self.stem, self.stages, images, self.in_channels, self.least_image)
        for index, (features, _) in enumerate(outputs):
            if index in self.chosen:
                normed = features if self.norms is None else self.norms[str(index)](features)
                maps.append(channels_first(normed))
        return maps


def run_stages(
    stem: nn.Module, stages: nn.ModuleList, images: torch.Tensor, in_channels: int, least: int = 1
) -> Iterator[Output]:
    """The output of each stage on images `[batch, in_channels, *grid]`, no side shorter than `least`."""
    if images.dim() < 3 or images.shape[1] != in_channels:
        raise ValueError(f"images must be [batch, {in_channels}, height, width], got {tuple(images.shape)}")
    if least > 1 and any(length < least for length in images.shape[2:]):
        raise ValueError(f"images must have at least {least} pixels on each side, got {tuple(images.shape)}")
    features = stem(channels_last(images))
    for stage in stages:
        features, extra = stage(features)
        yield features, extra


def feature_info(stages: Sequence[Stage], stem_stride: int) -> tuple[FeatureInfo, ...]:
    """Stride and channels of each stage's map."""
    found, stride = [], stem_stride
    for stage in stages:
        stride *= stage.stride
        found.append(FeatureInfo(stride, stage.dim))
    return tuple(found)


def least_image(stem: nn.Module, stages: Iterable[nn.Module]) -> int:
    """The shortest side of an image of which every layer gets something; 1 where layers fill up what they lack.

    >>> vicinal.create_model("convnext_tiny").least_image, vicinal.create_model("nat_mini").least_image
    (32, 1)
    """
    least = 1
    for stage in reversed(list(stages)):
        if not isinstance(stage, Stage):
            continue
        pools = [pool.least_length(1) for pool in stage.blocks.modules() if isinstance(pool, Shortens)]
        least = _before(stage.downsample, max([least, *pools]))
    return _before(stem, least)


def _before(module: nn.Module | None, tokens: int) -> int:
    """The shortest axis from which a chain of layers makes so many tokens."""
    for layer in () if module is None else reversed(list(module.modules())):
        if isinstance(layer, Shortens):
            tokens = layer.least_length(tokens)
    return tokens
