"""Drawing from a generator: seeds, truncation, walks, and what is refused."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.tasks.sampling import LAST_SEED, Sampler, curve, latents_of

SMALL = {
    "image_size": 16,
    "widths": (32, 16, 16),
    "kernel_sizes": ((3,),) * 3,
    "dilations": ((1,),) * 3,
    "head_dim": 8,
    "latent_size": 12,
    "mapping_depth": 2,
}


@pytest.fixture(scope="module")
def model():
    """A generator whose pictures differ from latent to latent."""
    torch.manual_seed(0)
    made = vicinal.create_model("stylenat_ffhq256", **SMALL).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2 and "affine" not in name and "mapper" not in name:
            parameter.normal_(0, 0.2)
    return made


def drawn(model, seeds, **options):
    return dict(Sampler(model, **options).draw(seeds))


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_a_seed_gives_the_same_bits_whatever_is_drawn_beside_it(model, batch_size):
    alone, among = drawn(model, [11], batch_size=batch_size), drawn(model, range(3, 20), batch_size=batch_size)
    assert torch.equal(alone[11], among[11])
    assert list(among) == list(range(3, 20))
    assert not torch.equal(among[11], among[12])
    assert among[11].shape == (3, 16, 16)


def test_pictures_are_those_of_the_model(model):
    latents = latents_of([4], model.latent_size)
    expected = model.to_bytes(model(latents))[0]
    assert torch.equal(drawn(model, [4], batch_size=1)[4], expected)


def test_seeds_leave_the_global_generator_alone(model):
    before = torch.get_rng_state()
    drawn(model, range(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_are_normal_and_a_seeds_own():
    latents = latents_of(range(400), 64)
    assert latents.mean().abs() < 0.02
    assert (latents.std() - 1).abs() < 0.02
    apart = (latents @ latents.T / 64 - torch.eye(400)).fill_diagonal_(0)
    assert apart.abs().max() < 0.75, "two seeds share their numbers"
    assert latents_of([LAST_SEED], 4).shape == (1, 4)


def test_truncation_is_off_by_default_and_pulls_to_the_mean(model):
    latents = latents_of(range(4), model.latent_size)
    plain = Sampler(model)
    assert torch.equal(plain.mapped(latents), model.mapping(latents))
    mean = model.mean_latent()
    half = Sampler(model, truncation=0.5).mapped(latents)
    torch.testing.assert_close(half - mean, 0.5 * (model.mapping(latents) - mean))
    none = drawn(model, [1, 2], truncation=0.0)
    assert torch.equal(none[1], none[2])


def test_a_walk_passes_through_the_pictures_of_its_seeds_and_is_closed(model):
    sampler, told = Sampler(model, batch_size=4), []
    walk = sampler.between([5, 6, 9], 30, told.append)
    assert walk.shape == (30, 3, 16, 16)
    for place, seed in ((0, 5), (10, 6), (20, 9)):
        apart = walk[place].int() - drawn(model, [seed], batch_size=4)[seed].int()
        assert apart.abs().max() <= 1
    steps = (walk.roll(-1, 0).float() - walk.float()).abs().mean((1, 2, 3))
    assert steps[-1] < 3 * steps.median(), "it jumps where it closes"
    assert told[-1] == 30
    assert sampler.pictures == 30
    assert sampler.pictures_per_second > 0


def test_a_curve_is_smooth_where_its_parts_meet():
    points = torch.randn(5, 3, dtype=torch.float64)
    fine = curve(points, 5000)
    slopes = fine.roll(-1, 0) - fine
    bends = (slopes.roll(-1, 0) - slopes).abs().max()
    assert bends < 1e-2 * slopes.abs().max()
    torch.testing.assert_close(fine[::1000], points)


def test_damaged_weights_are_told():
    broken = vicinal.create_model("stylenat_ffhq256", **SMALL).eval().requires_grad_(False)
    broken.to_pixels[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="its weights are damaged"):
        drawn(broken, [0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda model: drawn(model, [-1]), "seeds must be in 0"),
        (lambda model: drawn(model, [2**32]), "seeds must be in 0"),
        (lambda model: Sampler(model, truncation=1.5), "truncation must be in 0 .. 1, got 1.5"),
        (lambda model: Sampler(model, truncation=float("nan")), "truncation must be"),
        (lambda model: Sampler(model, batch_size=0), "batch_size must be at least 1"),
        (lambda model: Sampler(model).between([1, 2, 3], 2), "a seed and a frame for each"),
    ],
)
def test_wrong_input_is_refused(model, wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong(model)
