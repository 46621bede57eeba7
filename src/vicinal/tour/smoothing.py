"""Attention at work on a photograph: non-local means, the smoothing that compares patches, is attention.

A pixel's query and key is the patch around it, its value is its color. Softmax over `-|patch - patch'|^2 / h^2` is then
the classic filter, and the pattern says which pixels it may look at: nothing here is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from vicinal.measure import compare
from vicinal.ops import attention
from vicinal.pattern import Halo, Near, Pattern, Window, count, union

NOISE = 0.1
"""Standard deviation of the noise, where black is 0 and white is 1."""

PATCH = 3
"""Height and width of the patches that are compared."""

SHARPNESS = 1.1
"""`h` in units of the noise: two patches further apart than this count little. Chosen once for all patterns, on
another photograph (scikit-image's `chelsea`)."""

PATTERNS: tuple[Pattern, ...] = (
    Near(7),
    Near(15),
    Near(7, dilation=3),
    Window(7),
    Halo(8, 4),
    union(Near(7), Near(7, dilation=3)),
)


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """A picture `[height, width, 3]` and its peak signal-to-noise ratio in dB.

    `plain_psnr` is that of the baseline: the same pixels with equal weights. `keys` is how many pixels one looks
    at, on average, and `ms` what the attention took.
    """

    name: str
    picture: torch.Tensor
    psnr: float
    plain_psnr: float | None = None
    keys: float | None = None
    ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """The whole comparison: the photograph, its noisy copy, the best Gaussian blur, and attention's results."""

    original: torch.Tensor
    noisy: Smoothed
    gaussian: Smoothed
    results: tuple[Smoothed, ...]

    @property
    def best(self) -> Smoothed:
        """The best of attention's results."""
        return max(self.results, key=lambda result: result.psnr)


def psnr(picture: torch.Tensor, original: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of values that belong in 0..1.

    >>> round(psnr(torch.full((4, 4, 3), 0.6), torch.full((4, 4, 3), 0.5)), 3)
    20.0
    """
    return float(-10 * (picture.clamp(0, 1) - original).square().mean().log10())


def compare_smoothings(
    original: torch.Tensor,
    patterns: Sequence[Pattern] = PATTERNS,
    *,
    seconds: float = 3.0,
    begin: Callable[[str], None] = lambda _: None,
) -> Smoothing:
    """Add noise to a picture `[height, width, 3]` and smooth it under several patterns.

    `seconds` is about how long the timing takes, and `begin` is told what is being done.
    """
    generator = torch.Generator().manual_seed(0)
    noisy = original + NOISE * torch.randn(original.shape, generator=generator)
    query, key, value = patch_attention(noisy)
    results = []
    for pattern in patterns:
        begin(f"smoothing with {pattern}")
        picture = smooth(query, key, value, pattern)
        averaged = attention(query, key, value, pattern, scale=0.0)[0, ..., 0, :]
        results.append(
            Smoothed(
                name=repr(pattern),
                picture=picture,
                psnr=psnr(picture, original),
                plain_psnr=psnr(averaged, original),
                keys=count(pattern, original.shape[:2]) / (original.shape[0] * original.shape[1]),
            )
        )
    begin("timing the smoothing")
    calls = {result.name: _call(query, key, value, pattern) for result, pattern in zip(results, patterns, strict=True)}
    timings = compare(calls, seconds=seconds)
    return Smoothing(
        original=original,
        noisy=Smoothed("noisy", noisy, psnr(noisy, original)),
        gaussian=best_gaussian(noisy, original),
        results=tuple(dataclasses.replace(result, ms=timings[result.name].median_ms) for result in results),
    )


def patch_attention(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `[1, height, width, 1, dim]` with which attention is non-local means.

    For one query `-|q - k|^2 / 2` and `q.k - |k|^2 / 2` differ by a constant, which a softmax does not notice. So the
    key gets one more entry, `-|k|^2 / 2`, and the query a 1 against it.

    >>> [tuple(tensor.shape) for tensor in patch_attention(torch.rand(9, 12, 3))]
    [(1, 9, 12, 1, 28), (1, 9, 12, 1, 28), (1, 9, 12, 1, 3)]
    """
    height, width = picture.shape[:2]
    channels_first = F.pad(picture.movedim(-1, 0)[None], (PATCH // 2,) * 4, mode="reflect")
    patches = F.unfold(channels_first, PATCH).transpose(1, 2).reshape(1, height, width, 1, -1)
    patches = patches / patches.shape[-1] ** 0.5  # distances are then means over the patch, whatever its size
    query = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
    key = torch.cat([patches, -0.5 * patches.square().sum(-1, keepdim=True)], -1)
    return query, key, picture[None, :, :, None].contiguous()


def smooth(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Each pixel as the mean of those it sees, weighted by how alike their patches are: `[height, width, 3]`."""
    out: torch.Tensor = attention(query, key, value, pattern, scale=2 / (SHARPNESS * NOISE) ** 2)
    return out[0, ..., 0, :]


def _call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern) -> Callable[[], torch.Tensor]:
    return lambda: smooth(query, key, value, pattern)


def gaussian_blur(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    """A picture `[height, width, 3]` blurred by a Gaussian of `sigma` pixels.

    >>> float(gaussian_blur(torch.ones(8, 9, 3), 1.0).sub(1).abs().max()) < 1e-6
    True
    """
    radius = min(round(4 * sigma), min(picture.shape[:2]) - 1)
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    blurred = F.pad(picture.movedim(-1, 0)[None], (radius,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(blurred, kernel[..., None], groups=3), kernel[:, :, None], groups=3)
    return blurred[0].movedim(0, -1)


def best_gaussian(noisy: torch.Tensor, original: torch.Tensor) -> Smoothed:
    """The baseline: the Gaussian blur whose width suits this very picture best, which only the original can tell."""
    blurs = {sigma / 20: gaussian_blur(noisy, sigma / 20) for sigma in range(10, 41)}
    sigma = max(blurs, key=lambda width: psnr(blurs[width], original))
    return Smoothed(f"Gaussian blur, sigma {sigma:.2f}", blurs[sigma], psnr(blurs[sigma], original))
