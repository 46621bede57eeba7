"""The photograph that the tour is about."""

from __future__ import annotations

import dataclasses

import torch

from vicinal.tour.extras import require


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph `[height, width, 3]` with values in 0..1, and whose it is."""

    pixels: torch.Tensor
    credit: str

    def shrunk(self, factor: int) -> torch.Tensor:
        """The pixels averaged over squares of `factor` by `factor`; what does not fill a square is cut off.

        >>> Photo(torch.ones(10, 7, 3), "nobody").shrunk(3).shape
        torch.Size([3, 2, 3])
        """
        height, width = (length // factor for length in self.pixels.shape[:2])
        squares = self.pixels[: height * factor, : width * factor].unflatten(1, (width, factor))
        return squares.unflatten(0, (height, factor)).mean((1, 3))


def coffee() -> Photo:
    """A cup of coffee on a table, 400 by 600; it comes with scikit-image."""
    data = require("skimage.data", "demo", "the tour's photograph")
    pixels = torch.from_numpy(data.coffee()).float() / 255
    return Photo(pixels, "photograph by Rachel Michetti, public domain (CC0), from scikit-image")
