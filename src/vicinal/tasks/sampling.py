"""Drawing from a generator: the same picture for a seed, whatever is drawn beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from vicinal.data.chance import sample_random
from vicinal.models.stylenat import StyleNAT

LAST_SEED = 2**32 - 1
SMALL, AT_ONCE = 64, 16
"""Images up to this many pixels a side are drawn so many at a time by default, others one by one."""

Announce = Callable[[int], None]
"""Told how many pictures are done."""


def latents_of(seeds: Sequence[int], size: int) -> torch.Tensor:
    """A latent for each seed, `[seeds, size]`: the same wherever and beside whatever it is drawn.

    >>> torch.equal(latents_of([7], 4), latents_of(range(9), 4)[7:8])
    True
    """
    drawn = [sample_random(seed, 0, 0).standard_normal(size) for seed in checked(seeds)]
    return torch.stack([torch.from_numpy(row).float() for row in drawn]) if drawn else torch.zeros(0, size)


def checked(seeds: Sequence[int]) -> Sequence[int]:
    """The seeds, each a number that a generator of random numbers takes."""
    if len(seeds) and not (min(seeds) >= 0 and max(seeds) <= LAST_SEED):
        raise ValueError(f"seeds must be in 0 .. {LAST_SEED}, got {min(seeds)} .. {max(seeds)}")
    return seeds


@dataclass
class Sampler:
    """Draws pictures, and counts the seconds that the model itself took.

    Bits depend on how many pictures a model makes at once. So seeds are cut into blocks, `seed // batch_size`, and a
    block is always made whole: a seed gives the same bits in every call with the same `batch_size` on one machine.
    `truncation` below 1 pulls latents towards their mean: fewer failures, less variety.

    >>> sampler = Sampler(vicinal.create_model("stylenat_fashion32"), batch_size=4)
    >>> pictures = dict(sampler.draw(range(3, 6)))
    >>> sorted(pictures), pictures[5].shape, sampler.pictures
    ([3, 4, 5], torch.Size([1, 32, 32]), 8)
    """

    model: StyleNAT
    truncation: float = 1.0
    batch_size: int | None = None
    seconds: float = field(default=0.0, init=False)
    pictures: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.batch_size is None:
            self.batch_size = AT_ONCE if self.model.image_size <= SMALL else 1
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.truncation <= 1:
            raise ValueError(f"truncation must be in 0 .. 1, got {self.truncation}")
        self._mean: torch.Tensor | None = None

    @property
    def pictures_per_second(self) -> float:
        """How many the model made in a second, those that only fill a block among them."""
        return self.pictures / self.seconds if self.seconds else 0.0

    def draw(self, seeds: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Each seed with its picture uint8 `[channels, height, width]`, block by block."""
        assert self.batch_size is not None
        size = self.batch_size
        blocks: dict[int, list[int]] = {}
        for seed in checked(seeds):
            blocks.setdefault(seed // size, []).append(seed)
        for block, wanted in blocks.items():
            # the last block of all may end beyond the last seed: any latent fills it
            whole = [min(seed, LAST_SEED) for seed in range(block * size, (block + 1) * size)]
            pictures = self.synthesize(self.mapped(latents_of(whole, self.model.latent_size)))
            for seed in wanted:
                yield seed, pictures[seed - block * size]

    def batches(self, seeds: Sequence[int], size: int) -> Iterator[torch.Tensor]:
        """The pictures of the seeds as uint8 `[size, channels, height, width]`, the last batch perhaps smaller."""
        drawn = (picture for _, picture in self.draw(seeds))
        while part := list(islice(drawn, size)):
            yield torch.stack(part)

    @torch.no_grad()
    def mapped(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[batch, latent]` as the model's blocks take them, truncated where that is asked for."""
        start = time.perf_counter()
        mapped = self.model.mapping(latents.to(self.model.constant))
        self.seconds += time.perf_counter() - start
        if self.truncation == 1.0:
            return mapped
        if self._mean is None:
            self._mean = self.model.mean_latent()
        return self._mean + self.truncation * (mapped - self._mean)

    @torch.no_grad()
    def synthesize(self, mapped: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 `[batch, channels, height, width]` of mapped latents, timed."""
        start = time.perf_counter()
        made = self.model.synthesis(mapped)
        pictures = self.model.to_bytes(made).cpu()
        self.seconds += time.perf_counter() - start
        if not bool(made.isfinite().all()):
            raise ValueError("the model makes values that are no numbers: its weights are damaged")
        self.pictures += len(pictures)
        return pictures

    def between(self, seeds: Sequence[int], frames: int, announce: Announce = lambda done: None) -> torch.Tensor:
        """A closed walk through the pictures of `seeds`: uint8 `[frames, channels, height, width]`.

        The path is smooth, a Catmull-Rom curve through the mapped latents, and ends where it began.
        """
        assert self.batch_size is not None
        if frames < len(seeds) or not len(seeds):
            raise ValueError(
                f"a walk through {len(seeds)} seeds needs a seed and a frame for each, got {frames} frames"
            )
        path = curve(self.mapped(latents_of(seeds, self.model.latent_size)), frames)
        made: list[torch.Tensor] = []
        for part in path.split(self.batch_size):
            made.append(self.synthesize(part))
            announce(min(len(made) * self.batch_size, frames))
        return torch.cat(made)


def curve(points: torch.Tensor, steps: int) -> torch.Tensor:
    """A closed Catmull-Rom curve through `points` `[points, dim]` in as many equal steps: `[steps, dim]`.

    >>> curve(torch.tensor([[0.0], [1.0]]), 4).flatten().tolist()
    [0.0, 0.5, 1.0, 0.5]
    """
    at = torch.arange(steps, device=points.device, dtype=torch.float64) * (len(points) / steps)
    first = at.floor().long()
    part = (at - first)[:, None].to(points.dtype)
    before, own, following, last = (points[(first + offset) % len(points)] for offset in (-1, 0, 1, 2))
    slope = following - before
    bend = 2 * before - 5 * own + 4 * following - last
    twist = 3 * (own - following) + last - before
    return own + 0.5 * part * (slope + part * (bend + part * twist))
