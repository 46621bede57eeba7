"""Recipes that come with the library, their weights, and the comparison of mixers."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from safetensors.torch import load_file

from vicinal.data import Stream
from vicinal.models.compact import Mixer, build
from vicinal.recipes import compare, find, shipped
from vicinal.recipes.small import mixer_fashion_mnist
from vicinal.training.recipe import Cosine

WEIGHTS = sorted(path.stem for path in shipped.FOLDER.glob("*.safetensors"))
CLASSIFIERS = sorted(
    path.stem for path in shipped.FOLDER.glob("*_fashion_mnist.safetensors") if path.stem != shipped.GENERATOR
)


def test_mixers_cost_the_same_and_have_the_same_budget():
    recipes = [mixer_fashion_mnist(mixer) for mixer in get_args(Mixer)]
    costs = [build(recipe.task.model).cost(28).nominal for recipe in recipes]
    assert max(costs) / min(costs) < 1.01
    settings = [(recipe.loop, recipe.schedule, recipe.optimizers, recipe.train_steps) for recipe in recipes]
    assert all(setting == settings[0] for setting in settings)


def test_full_recipes_have_the_published_settings():
    nat = find("nat_tiny_imagenet")
    assert nat.schedule == Cosine(warmup=20, start=1e-3, final=5e-3, cooldown=10)
    assert (nat.loop.batch_size, nat.loop.epochs, nat.loop.clip_norm) == (1024, 310, 5.0)
    assert (nat.optimizers["main"].learning_rate, nat.optimizers["main"].weight_decay) == (1e-3, 0.05)
    fine = find("dinat_large_22k_to_1k_384")
    assert (fine.optimizers["main"].weight_decay, fine.task.mixing, fine.loop.epochs) == (1e-10, None, 30)


@pytest.mark.parametrize("name", WEIGHTS)
def test_shipped_weights_are_small_and_have_a_card(name):
    path = shipped.FOLDER / f"{name}.safetensors"
    assert path.stat().st_size <= 5_000_000
    card = (shipped.FOLDER / f"{name}.md").read_text()
    assert "licence" in card.lower()
    assert f"{sum(tensor.numel() for tensor in load_file(path).values()):,}" in card


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shipped_classifiers_beat_the_baseline(name):
    model = shipped.shipped(name)
    evaluation = model.task.evaluation()
    for batch in Stream(shipped.sample(model), (), batch_size=100).evaluation():
        evaluation.add(batch)
    assert evaluation.values()["accuracy"] > shipped.LINEAR_BASELINE[500]


def test_there_are_weights():
    assert {"dinat_fashion_mnist", "nat_fashion_mnist"} <= set(WEIGHTS)


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    recipe = find("digits", ["loop.epochs=0.3", "loop.pictures=false", "task.model.depths=1,1", "task.model.dim=16"])
    first = compare.run_one(recipe, tmp_path / "nat-0")
    assert first["steps"] == 3
    assert 0 <= first["metrics"]["accuracy"] <= 1
    monkeypatch.setattr(compare, "train", None)  # it must not be called again
    assert compare.run_one(recipe, tmp_path / "nat-0") == first
    summary = compare.summarized([first, {**first, "metrics": {"accuracy": 1.0}}], {})
    compare.draw(summary, tmp_path / "mixers.png")
    assert (tmp_path / "mixers.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(json.dumps(summary))["mixers"]["dinat"]["runs"] == 2
