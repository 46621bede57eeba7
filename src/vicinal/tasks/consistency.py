"""Changes to images that a discriminator should not notice: balanced consistency regularization."""

from __future__ import annotations

import torch

SHIFT = 1 / 8
"""The most an image is moved, as a share of its side."""

CUT = 1 / 2
"""The side of the square that is cut out, as a share of the image's."""


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Images `[batch, channels, height, width]` flipped, moved, recolored and cut, each by draws of its own.

    In order: a flip of every second image, a shift, brightness, saturation, contrast, and a black square. All of it
    can be differentiated.

    >>> augmented(torch.randn(4, 3, 16, 16)).shape
    torch.Size([4, 3, 16, 16])
    """
    images = shifted(flipped(images))
    images = images + _draws(images) - 0.5
    images = _spread(images, images.mean(1, keepdim=True), 2 * _draws(images))
    images = _spread(images, images.mean((1, 2, 3), keepdim=True), _draws(images) + 0.5)
    return cut(images)


def _draws(images: torch.Tensor) -> torch.Tensor:
    """A number in 0..1 for each image."""
    return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)


def _spread(images: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return mean + (images - mean) * factor


def flipped(images: torch.Tensor) -> torch.Tensor:
    """Every second image mirrored, by chance."""
    return torch.where(_draws(images) < 0.5, images.flip(-1), images)


def _offsets(count: int, low: int, high: int, device: torch.device) -> torch.Tensor:
    """Whole numbers from `low` to `high`, both possible: `[count, 1]`."""
    return torch.randint(low, high + 1, (count, 1), device=device)


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Each image moved along both axes; zeros come in."""
    batch, _, *sizes = images.shape
    for axis, size in enumerate(sizes, start=2):
        most = int(size * SHIFT + 0.5)
        source = torch.arange(size, device=images.device) + _offsets(batch, -most, most, images.device)
        shape = [batch, 1, 1, 1]
        shape[axis] = size
        inside = ((source >= 0) & (source < size)).view(shape)
        index = source.clamp(0, size - 1).view(shape).expand_as(images)
        images = images.gather(axis, index) * inside
    return images


def cut(images: torch.Tensor) -> torch.Tensor:
    """Zeros on a square in each image; its middle is anywhere, so it may lie half outside."""
    batch, _, *sizes = images.shape
    is_out = torch.ones(1, dtype=torch.bool, device=images.device)
    for axis, size in enumerate(sizes, start=2):
        side = int(size * CUT + 0.5)
        start = _offsets(batch, 0, size - side % 2, images.device) - side // 2
        place = torch.arange(size, device=images.device)
        shape = [batch, 1, 1, 1]
        shape[axis] = size
        is_out = is_out & ((place >= start) & (place < start + side)).view(shape)
    return images * ~is_out
