"""A GAN's turns: losses, the penalty by a true double backward, consistency; a run in processes, and resumed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from vicinal.data import Batch, Digits, Info
from vicinal.data.augment import Resize
from vicinal.data.dataset import DataMissing
from vicinal.metrics import frechet_distance
from vicinal.models.checkpoint import read
from vicinal.models.stylenat import HALVES, StyleNatConfig, build
from vicinal.models.wavelet import WaveletConfig
from vicinal.recipes import find
from vicinal.tasks import Moment
from vicinal.tasks.adversarial import Adversarial, frozen, gradient_penalty, latents
from vicinal.tasks.consistency import augmented, cut, flipped, shifted
from vicinal.training import AdamW, Loop, Recipe, train
from vicinal.training.launch import train_on
from vicinal.training.report import Silent
from vicinal.training.world import World, shard

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from runs import tensors

INFO = Info("made", ("a",), 1, (0.5,), (0.5,), (16, 16))
GENERATOR = StyleNatConfig(
    16,
    widths=(16, 16, 16),
    kernel_sizes=((3,), (3,), (3,)),
    dilations=((1,), (1,), (1, 4)),
    head_dim=8,
    min_heads=2,
    depth=1,
    latent_size=8,
    mapping_depth=1,
    channels=1,
    normalization=HALVES,
)
CONFIG = Adversarial(GENERATOR, WaveletConfig(16, (8, 8, 8), 1), samples=64)
MOMENT = Moment(0, 1, 0)


def batch(size=4):
    images = torch.randint(0, 256, (size, 1, 16, 16), dtype=torch.uint8)
    rows = torch.arange(size)
    return Batch(images, torch.zeros(size, dtype=torch.int64), rows, torch.ones(size), rows)


def task(config=CONFIG):
    torch.manual_seed(0)
    made = config.build(INFO)
    with torch.no_grad():  # fresh networks are nearly silent
        for parameter in made.model.generator.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() > 1 else 0.1)
    return made


def test_losses_are_non_saturating():
    made, given = task(replace(CONFIG, consistency=0.0)), batch()
    made.model.discriminator.eval()  # the power iteration stands still
    torch.manual_seed(5)
    loss, named = made.turns[0].objective(given, MOMENT)
    generator, discriminator = made.model.generator, made.model.discriminator
    real = given.images.float() / 127.5 - 1
    torch.manual_seed(5)
    fake = generator(torch.randn(4, 8))
    expected = functional.softplus(-discriminator(real)).mean() + functional.softplus(discriminator(fake)).mean()
    torch.testing.assert_close(loss, expected)
    assert set(named) == {"discriminator", "real", "made"}
    torch.manual_seed(5)
    loss, _ = made.turns[2].objective(given, MOMENT)
    torch.manual_seed(5)
    other = torch.randn(2, 4, 8)[1]
    torch.testing.assert_close(loss, functional.softplus(-discriminator(generator(other))).mean())
    torch.manual_seed(5)
    first = latents(4, generator, 0)
    torch.manual_seed(5)
    assert not torch.allclose(first, latents(4, generator, 1))


def test_each_turn_moves_its_own_network_alone():
    made, given = task(), batch()
    own = {"discriminator": "discriminator", "penalty": "discriminator", "generator": "generator"}
    for turn in made.turns:
        made.model.zero_grad()
        turn.objective(given, MOMENT)[0].backward()
        moved = {name.split(".")[0] for name, part in made.model.named_parameters() if part.grad is not None}
        assert moved == {own[turn.name]} == {turn.optimizer}
        inside = [name for name, part in turn.objective.named_parameters() if part.grad is None]
        assert not inside, turn.name  # processes that share gradients wait for every one of them
    assert all(parameter.requires_grad for parameter in made.model.parameters())


def test_consistency_pulls_both_scores_together():
    made, given = task(), batch()
    discriminator = made.model.discriminator.eval()
    torch.manual_seed(1)
    loss, named = made.turns[0].objective(given, MOMENT)
    assert loss.item() == pytest.approx((named["discriminator"] + 10 * named["consistency"]).item(), rel=1e-5)
    torch.manual_seed(1)
    real = given.images.float() / 127.5 - 1
    fake = made.model.generator(torch.randn(4, 8)).detach()
    pairs = [(discriminator(augmented(images)), discriminator(images)) for images in (real, fake)]
    expected = sum((changed - plain).square().mean() for changed, plain in pairs)
    torch.testing.assert_close(named["consistency"], expected.detach())


def numeric(function, parameter, direction, step=1e-6):
    """The derivative of `function()` along a direction of a parameter, by central differences."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(direction, alpha=sign * step)
        values.append(function().item())
        with torch.no_grad():
            parameter.add_(direction, alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)


def test_the_penalty_is_differentiated_twice_through_the_discriminator():
    made, given = task(), batch()
    made.model.double()
    with torch.no_grad():
        for _ in range(20):
            made.model.discriminator(torch.randn(4, 1, 16, 16, dtype=torch.float64))
    made.model.discriminator.eval()
    objective = made.turns[1].objective
    assert made.turns[1].every == 16
    assert not made.turns[1].is_clipped
    loss, named = objective(given, MOMENT)
    torch.testing.assert_close(loss.detach(), 10 / 2 * 16 * named["penalty"])
    loss.backward()
    for name, parameter in made.model.discriminator.named_parameters():
        direction = torch.randn_like(parameter)
        expected = numeric(lambda: objective(given, MOMENT)[0], parameter, direction)
        found = (parameter.grad * direction).sum().item()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6 * abs(loss.item())), name


def test_a_penalty_is_differentiated_twice_through_the_generator_s_attention():
    generator = task().model.generator.double()
    z, noise = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 1, 16, 16, dtype=torch.float64)

    def penalty():
        w = generator.mapping(z).detach().requires_grad_()
        return gradient_penalty(generator.synthesis(w) * noise, w)

    scale = penalty()
    scale.backward()
    reached = []
    for name, parameter in generator.named_parameters():
        if ".mixer." in name:
            direction = torch.randn_like(parameter)
            found = (parameter.grad * direction).sum().item()
            assert found == pytest.approx(numeric(penalty, parameter, direction), rel=1e-3, abs=1e-6 * scale.item()), (
                name
            )
            reached += [name.split(".mixer.")[1]] if abs(found) > 1e-4 * scale.item() else []
    assert {"rpb", "rpb.0", "rpb.1", "qkv.weight", "proj.weight"} <= set(reached)


def test_augmentations_are_drawn_for_each_image_and_can_be_differentiated():
    images = torch.randn(6, 3, 16, 16, requires_grad=True)
    torch.manual_seed(2)
    first = augmented(images)
    torch.manual_seed(2)
    assert torch.equal(first, augmented(images))
    first.square().sum().backward()
    assert images.grad.abs().flatten(1).sum(1).min() > 0
    same = torch.randn(1, 3, 16, 16).expand(8, -1, -1, -1)
    assert len({tuple(image.flatten().tolist()) for image in augmented(same)}) == 8


def test_flips_shifts_and_cuts_do_what_their_names_say():
    torch.manual_seed(0)
    images = torch.randn(64, 2, 16, 24)
    turned = flipped(images)
    kinds = [
        int(torch.equal(new, old.flip(-1))) - int(torch.equal(new, old))
        for new, old in zip(turned, images, strict=True)
    ]
    assert set(kinds) == {1, -1}
    moves = set()
    for new, old in zip(shifted(images), images, strict=True):
        wide = functional.pad(old, (3, 3, 2, 2))
        fits = [
            (row, column)
            for row in range(5)
            for column in range(7)
            if torch.equal(new, wide[:, row : row + 16, column : column + 24])
        ]
        assert len(fits) == 1
        moves.update(fits)
    assert len(moves) > 15
    holes = (cut(torch.ones(64, 1, 16, 24)) == 0).flatten(1).sum(1)
    assert holes.max() == 8 * 12
    assert holes.min() >= 4 * 6


def test_a_frozen_network_passes_gradients_on():
    layer, inputs = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with frozen(layer):
        out = layer(inputs)
    out.sum().backward()
    assert layer.weight.grad is None
    assert inputs.grad is not None
    assert layer.weight.requires_grad


def dealt(given, rank, count=40):
    """What the second of two processes gets of a batch, or the first; beyond `count` it is only filled up."""
    weights = (torch.arange(40) < count).float()
    return Batch(given.images[rank::2], given.labels[rank::2], given.indices[rank::2], weights, given.rows[rank::2])


def test_an_evaluation_is_of_the_first_samples_however_they_are_dealt_out():
    made, given = task(), batch(80)
    whole, first, second, filled = (made.evaluation() for _ in range(4))
    whole.add(given)
    assert whole.real.count == whole.made.count == 64
    first.add(dealt(given, 0))
    second.add(dealt(given, 1))
    together = frechet_distance(first.real + second.real, first.made + second.made)
    assert together == pytest.approx(whole.values()["pixel_distance"], rel=1e-3)
    filled.add(dealt(given, 1, count=30))
    assert filled.real.count == filled.made.count == 30
    assert len(made.draw(given)) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalty": -1.0}, "penalty must be at least 0"),
        ({"penalty_every": 0}, "penalty_every must be at least 1"),
        (
            {"discriminator": WaveletConfig(32, (8, 8, 8, 8), 1)},
            "for the same images, got 16 pixels in 1 channels and 32",
        ),
    ],
)
def test_a_wrong_option_is_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_data_in_color_are_refused_by_a_gray_generator():
    with pytest.raises(DataMissing, match="made has 3 channels, the generator makes 1"):
        CONFIG.build(replace(INFO, channels=3))


def test_recipes_have_the_published_settings():
    recipe = find("stylenat_ffhq256")
    assert recipe.status.startswith("not run")
    discriminator, generator = (recipe.optimizers[name] for name in ("discriminator", "generator"))
    assert generator.learning_rate == pytest.approx(5e-5)
    assert generator.betas == (0.0, 0.99)
    assert discriminator.learning_rate == pytest.approx(2e-4 * 16 / 17)
    assert discriminator.betas == pytest.approx((0.0, 0.99 ** (16 / 17)))
    assert (generator.weight_decay, discriminator.weight_decay, recipe.loop.clip_norm) == (0.0, 0.0, 5.0)
    assert recipe.loop.ema_decay == pytest.approx(0.99778, abs=1e-5)
    assert (recipe.task.penalty, recipe.task.penalty_every, recipe.task.consistency) == (10.0, 16, 10.0)
    assert [recipe.schedule.factor(step, 1000) for step in (0, 775, 1000)] == [1.0, 1.0, 0.0]
    steps = recipe.loop.epochs * (70_000 // recipe.loop.batch_size)
    assert steps == pytest.approx(1_000_000, rel=1e-3)
    ours, baseline = find("stylenat_fashion_mnist"), find("stylenat_local_fashion_mnist")
    assert set(sum(baseline.task.generator.dilations, ())) == {1}
    same = replace(baseline.task.generator, dilations=ours.task.generator.dilations)
    assert replace(baseline, name=ours.name, task=replace(baseline.task, generator=same)) == ours


def tiny(**loop):
    """Four steps on digits made 16 pixels large, with a penalty at every second."""
    adam = AdamW(learning_rate=1e-3, weight_decay=0.0, betas=(0.0, 0.99))
    settings = {"epochs": 4 / 179, "batch_size": 8, "ema_decay": 0.9, "clip_norm": 5.0, "log_every": 1}
    return Recipe(
        name="tiny_gan",
        status="for tests",
        data=Digits(),
        task=replace(CONFIG, penalty_every=2, samples=8),
        train_steps=(Resize(16),),
        test_steps=(Resize(16),),
        optimizers={"discriminator": adam, "generator": adam},
        loop=Loop(**{**settings, "checkpoint_every": 2, "evaluate_every": 1, "pictures": False, **loop}),
    )


class Crashes(Silent):
    """In the middle of a run."""

    def step(self, step, images, losses):
        if step == 3:
            raise ZeroDivisionError


def test_a_resumed_run_is_the_same_run_and_its_weights_are_a_generator_s(tmp_path):
    pytest.importorskip("sklearn")
    outcome = train(tiny(), tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path / "cut", report=Crashes())
    train(tiny(), tmp_path / "cut", resume=True)
    ours, theirs = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert any("optimizer.discriminator" in name for name in theirs)
    assert any(name.startswith(".average.generator") for name in theirs)
    build(GENERATOR).load_state_dict(read(outcome.weights).state)


def test_sharding_is_refused_in_words():
    with pytest.raises(ValueError, match="called by turns: ddp"):
        shard(task(), World(0, 2, torch.device("cpu"), mesh=object()), "fsdp2")


@pytest.mark.slow
def test_two_processes_train_together_and_one_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    folder = tmp_path / "run"
    outcome = train_on(2, tiny(), folder, report=Silent())
    assert (outcome.facts["processes"], outcome.step) == (2, 4)
    assert outcome.metrics["pixel_distance"] >= 0
    fresh = task().model.state_dict()
    after = {name.removeprefix(".model."): part for name, part in tensors(folder).items() if name.startswith(".model.")}
    assert set(after) == set(fresh)
