"""Drawing from a generator: seeds, truncation, walks, which file is of which model, and what is refused."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.tasks.sampling import LAST_SEED, Sampler, curve, generator_of, latents_of, open_generator

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
    made = open_generator(None, "stylenat_ffhq256", SMALL).model
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
    open_generator(None, "stylenat_fashion32")
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_weights_are_the_same_each_time():
    first, second = (open_generator(None, "stylenat_fashion32").model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


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


def test_the_model_of_a_file_is_found(tmp_path):
    made = vicinal.create_model("stylenat_fashion32")
    torch.save({"g_ema": made.state_dict()}, tmp_path / "weights.pt")
    found = open_generator(tmp_path / "weights.pt")
    assert (found.name, found.weights) == ("stylenat_fashion32", str(tmp_path / "weights.pt"))
    assert torch.equal(found.model.constant, made.constant)
    assert not found.model.training


def test_weights_of_another_resolution_and_of_no_generator_get_a_sentence(tmp_path, model):
    torch.save(vicinal.create_model("stylenat_fashion32").state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match="generator of 32x32 images, this one makes 16x16"):
        open_generator(tmp_path / "small.pt", "stylenat_fashion32", {"image_size": 16})
    torch.save(vicinal.create_model("nat_mini").state_dict(), tmp_path / "nat.pt")
    with pytest.raises(ValueError, match=r"nat\.pt is of no generator known here; the nearest is stylenat_"):
        generator_of(tmp_path / "nat.pt")
    torch.save(model.state_dict(), tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt is of no generator known here.* give the model's name"):
        generator_of(tmp_path / "own.pt")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda model: drawn(model, [-1]), "seeds must be in 0"),
        (lambda model: drawn(model, [2**32]), "seeds must be in 0"),
        (lambda model: Sampler(model, truncation=1.5), "truncation must be in 0 .. 1, got 1.5"),
        (lambda model: Sampler(model, truncation=float("nan")), "truncation must be"),
        (lambda model: Sampler(model, batch_size=0), "batch_size must be at least 1"),
        (lambda model: Sampler(model).between([1, 2, 3], 2), "a seed and a frame for each"),
        (lambda model: open_generator(None, "nat_mini"), "nat_mini makes no pictures; generators are stylenat"),
        (lambda model: open_generator(None, "stylenat"), "there is no model 'stylenat'; did you mean stylenat_"),
        (lambda model: open_generator(None), "which model"),
        (lambda model: open_generator("no/such.pt"), "there is no file of weights no/such.pt"),
        (lambda model: open_generator(None, "stylenat_fashion32", {"image_size": 24}), "power of two"),
        (lambda model: open_generator(None, "stylenat_fashion32", device="abacus"), "device must be"),
        (lambda model: open_generator(None, "stylenat_fashion32", device="meta"), "device must be cpu, cuda, mps"),
    ],
)
def test_wrong_input_is_refused(model, wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong(model)
