"""Generators against discriminators: a GAN's three turns in every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from vicinal.data.batch import Batch
from vicinal.data.dataset import DataMissing, Info
from vicinal.layers.block import Block
from vicinal.metrics import Moments, frechet_distance
from vicinal.models.stylenat import StyleNAT, StyleNatConfig
from vicinal.models.wavelet import WaveletConfig, WaveletDiscriminator
from vicinal.tasks.consistency import augmented
from vicinal.tasks.protocol import Losses, Moment, Panel, Turn, WithoutHooks
from vicinal.tasks.sampling import latents_of

POOLED = 8
"""Side of the thumbnails whose distance is watched during training."""

SHOWN = 24
"""Samples of a sheet."""


@dataclass(frozen=True)
class Adversarial:
    """A style-based generator against a discriminator on wavelets.

    The losses are non-saturating. `penalty` is R1's weight, taken every `penalty_every` steps and as many times as
    strong; `consistency` that of balanced consistency on images augmented. In an evaluation the first `samples` images
    are compared with as many made.
    """

    generator: StyleNatConfig
    discriminator: WaveletConfig
    penalty: float = 10.0
    penalty_every: int = 16
    consistency: float = 10.0
    samples: int = 2000

    def __post_init__(self) -> None:
        for name in ("penalty", "consistency"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("penalty_every", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        ours, theirs = self.generator, self.discriminator
        if (ours.image_size, ours.channels) != (theirs.image_size, theirs.channels):
            raise ValueError(
                "generator and discriminator must be for the same images, got "
                f"{ours.image_size} pixels in {ours.channels} channels and {theirs.image_size} in {theirs.channels}"
            )

    def build(self, info: Info) -> AdversarialTask:
        """The task, with fresh weights."""
        if info.channels != self.generator.channels:
            raise DataMissing(
                f"{info.name} has {info.channels} channels, the generator makes {self.generator.channels}: "
                "say data.channels, or task.generator.channels and task.discriminator.channels"
            )
        return AdversarialTask(self)


class Pair(nn.Module):
    """Both networks, for a checkpoint; a checkpoint's reader takes the generator out of it."""

    def __init__(self, config: Adversarial) -> None:
        super().__init__()
        self.generator = StyleNAT(config.generator)
        self.discriminator = WaveletDiscriminator(config.discriminator)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A module whose parameters take no gradients, though what goes through it does.

    >>> layer = torch.nn.Linear(2, 1)
    >>> with frozen(layer):
    ...     layer(torch.ones(1, 2)).requires_grad
    False
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def gradient_penalty(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The squared norm of the gradient of `outputs` by `inputs` `[batch, ...]`, a mean over the batch.

    It can be differentiated again, through everything that lies between.

    >>> inputs = torch.ones(2, 3, requires_grad=True)
    >>> gradient_penalty(inputs.square().sum(), inputs).item()
    12.0
    """
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return exact(gradient).square().flatten(1).sum(1).mean()


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in single precision at least, which losses are taken in.

    >>> exact(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def latents(count: int, generator: StyleNAT, turn: int) -> torch.Tensor:
    """Fresh latents. Each turn of a step begins with the same seed, so each takes draws of its own."""
    drawn = torch.randn(turn + 1, count, generator.latent_size, device=generator.constant.device)
    return drawn[turn]


class DiscriminatorObjective(nn.Module):
    """Tell real from made, and alike of what was only augmented."""

    def __init__(self, config: Adversarial, pair: Pair) -> None:
        super().__init__()
        self.discriminator = pair.discriminator
        self.held = [pair.generator]  # in a list, so that it is no submodule: it is not this turn's to move
        self.consistency = config.consistency

    def forward(self, batch: Batch, moment: Moment) -> Losses:
        """The loss of the discriminator, and its parts."""
        (generator,) = self.held
        real = generator.from_bytes(batch.images)
        with torch.no_grad():
            made = exact(generator(latents(len(real), generator, turn=0)))
        scores_real, scores_made = exact(self.discriminator(real)), exact(self.discriminator(made))
        loss = functional.softplus(-scores_real).mean() + functional.softplus(scores_made).mean()
        named = {
            "discriminator": loss.detach(),
            "real": scores_real.detach().mean(),
            "made": scores_made.detach().mean(),
        }
        if self.consistency:
            apart = sum(
                (exact(self.discriminator(augmented(images))) - scores).square().mean()
                for images, scores in ((real, scores_real), (made, scores_made))
            )
            assert isinstance(apart, torch.Tensor)
            loss = loss + self.consistency * apart
            named["consistency"] = apart.detach()
        return loss, named


class PenaltyObjective(nn.Module):
    """R1: real images are where the score is flat."""

    def __init__(self, config: Adversarial, pair: Pair) -> None:
        super().__init__()
        self.discriminator = pair.discriminator
        self.held = [pair.generator]
        # as strong as it would be at every step
        self.weight = config.penalty / 2 * config.penalty_every

    def forward(self, batch: Batch, moment: Moment) -> Losses:
        """Half the weighted squared gradient of the scores by the images."""
        (generator,) = self.held
        real = generator.from_bytes(batch.images).requires_grad_()
        with torch.enable_grad():
            scores = exact(self.discriminator(real))
            penalty = gradient_penalty(scores, real)
        # the last bias does not move the gradient; processes that share gradients expect one for every parameter
        return self.weight * penalty + 0 * scores.sum(), {"penalty": penalty.detach()}


class GeneratorObjective(nn.Module):
    """Make what the discriminator takes for real."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.generator = pair.generator
        self.held = [pair.discriminator]

    def forward(self, batch: Batch, moment: Moment) -> Losses:
        """The non-saturating loss."""
        (discriminator,) = self.held
        made = self.generator(latents(len(batch.images), self.generator, turn=1))
        with frozen(discriminator):
            loss = functional.softplus(-exact(discriminator(made))).mean()
        return loss, {"generator": loss.detach()}


class AdversarialTask(WithoutHooks):
    """A generator and its discriminator under training.

    >>> gray = {"channels": 1, "normalization": ((0.5,), (0.5,))}
    >>> config = StyleNatConfig(16, (8, 8, 8), latent_size=8, mapping_depth=1, min_heads=2, **gray)
    >>> task = Adversarial(config, WaveletConfig(16, (8, 8, 8), 1)).build(Info("made", ("a",), 1, (0.5,), (0.5,)))
    >>> [(turn.name, turn.every) for turn in task.turns]
    [('discriminator', 1), ('penalty', 16), ('generator', 1)]
    """

    best = ("pixel_distance", False)

    def __init__(self, config: Adversarial) -> None:
        self.config = config
        self.model = Pair(config)
        discriminator = Turn("discriminator", DiscriminatorObjective(config, self.model), "discriminator")
        penalty = Turn(
            "penalty", PenaltyObjective(config, self.model), "discriminator", config.penalty_every, is_clipped=False
        )
        generator = Turn("generator", GeneratorObjective(self.model), "generator")
        self.turns: tuple[Turn, ...] = (
            (discriminator, penalty, generator) if config.penalty else (discriminator, generator)
        )

    def units(self) -> list[nn.Module]:
        """The generator's blocks."""
        return [module for module in self.model.generator.modules() if isinstance(module, Block)]

    def evaluation(self) -> AdversarialEvaluation:
        """How far thumbnails of samples are from those of test images."""
        return AdversarialEvaluation(self)

    @torch.no_grad()
    def sample(self, seeds: Sequence[int]) -> torch.Tensor:
        """A sample uint8 `[seeds, channels, height, width]` for each seed, the same in any process."""
        generator = self.model.generator
        drawn = latents_of(seeds, generator.latent_size).to(generator.constant)
        return generator.to_bytes(generator(drawn).float())

    def draw(self, batch: Batch) -> list[Panel]:
        """Samples, from the same latents whenever it is asked."""
        return [Panel(image.permute(1, 2, 0).cpu().numpy(), "") for image in self.sample(range(SHOWN))]


class AdversarialEvaluation:
    """The Fréchet distance of thumbnails: cheap enough to be watched, blind to what is smaller than they are."""

    def __init__(self, task: AdversarialTask) -> None:
        self.task = task
        size = task.config.generator.channels * POOLED**2
        self.real = self.made = Moments.of(torch.zeros(0, size))

    def add(self, batch: Batch) -> None:
        """Take up those of a batch that are among the first `samples`, and make an image for each."""
        counts = (batch.weights.cpu() > 0) & (batch.indices < self.task.config.samples)
        seeds = batch.indices[counts].tolist()
        if seeds:
            self.real = self.real + Moments.of(thumbnails(batch.images[counts]))
            self.made = self.made + Moments.of(thumbnails(self.task.sample(seeds)))

    def values(self) -> dict[str, float]:
        """The distance, over all processes."""
        return {"pixel_distance": frechet_distance(self.real.across_processes(), self.made.across_processes())}


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Bytes `[batch, channels, height, width]` as vectors: their means on an 8x8 grid, in 0..1.

    >>> thumbnails(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape
    torch.Size([2, 64])
    """
    return functional.adaptive_avg_pool2d(images.float() / 255, POOLED).flatten(1)
