"""Recipes for segmentation, their comparison, and the small weights that come with the library."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from vicinal.data.scenes import CLASSES, Scenes
from vicinal.models.oneformer import OneFormerConfig, TextConfig
from vicinal.recipes import compare_tasks, find, segmentation
from vicinal.recipes.segmentation import BACKBONE
from vicinal.tasks import TASKS, Rules, Segmentation
from vicinal.training.recipe import Poly
from vicinal.training.segmenter import load_segmenter
from vicinal.training.written import from_plain, to_plain

PUBLISHED = [f"oneformer_dinat_large_{data}_training" for data in ("ade20k", "cityscapes", "coco")]


def test_every_recipe_can_be_written_and_read_again():
    for make in segmentation.RECIPES:
        assert from_plain(json.loads(json.dumps(to_plain(make())))) == make()


def test_a_task_alone_has_a_third_of_the_budget_and_nothing_else_differs():
    joint = find("scenes_oneformer")
    for task in TASKS:
        alone = find(f"scenes_{task}")
        assert alone.task == replace(joint.task, tasks=(task,))
        assert alone.loop == replace(joint.loop, epochs=joint.loop.epochs / 3)
        assert (alone.data, alone.train_steps, alone.optimizers, alone.schedule) == (
            *(joint.data, joint.train_steps, joint.optimizers, joint.schedule),
        )
    silent = find("scenes_oneformer_without_text")
    assert silent.task == replace(joint.task, model=replace(joint.task.model, text=None))
    assert replace(silent, name=joint.name, task=joint.task) == joint


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_settings_and_say_that_nobody_ran_them(name):
    recipe = find(name)
    assert recipe.status.startswith("not run")
    optimizer = recipe.optimizers["main"]
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.scales) == (1e-4, 0.05, {"backbone": 0.1})
    assert (recipe.loop.batch_size, recipe.loop.clip_norm, recipe.task.tasks) == (16, 0.01, TASKS)
    loss = recipe.task.loss
    assert (loss.class_weight, loss.mask_weight, loss.dice_weight, loss.contrastive_weight) == (2.0, 5.0, 5.0, 0.5)
    assert (loss.no_object, loss.num_points, loss.oversample, loss.importance) == (0.1, 12544, 3.0, 0.75)
    assert recipe.task.rules.least_score == (0.5 if "ade20k" in name else 0.8)
    assert recipe.task.model.text == TextConfig()
    iterations = {"ade20k": 160_000, "cityscapes": 90_000, "coco": 737_500}[name.split("_")[3]]
    images = {"ade20k": 20_210, "cityscapes": 2_975, "coco": 118_287}[name.split("_")[3]]
    assert round(recipe.loop.epochs * (images // 16)) == iterations
    if "coco" not in name:
        assert recipe.schedule == Poly(power=0.9)


def test_the_steps_of_the_coco_recipe_are_at_the_published_iterations():
    recipe = find("oneformer_dinat_large_coco_training")
    epoch = 118_287 // 16
    for iteration, factor in ((100, 1.0), (655_550, 1.0), (655_560, 0.1), (710_180, 0.1), (710_190, 0.01)):
        assert recipe.schedule.factor(iteration / epoch, recipe.loop.epochs) == pytest.approx(factor)


def test_the_comparison_runs_is_read_again_and_ships_small_weights(tmp_path, monkeypatch):
    """All of it, with a model and runs so small that nothing is learned."""
    text = TextConfig(width=64, num_layers=1, vocabulary=64, context_length=12, contexts=2)
    model = OneFormerConfig(BACKBONE, num_queries=6, dim=32, num_heads=2, pixel_layers=1, decoder_layers=1, text=text)
    scenes = Scenes(size=64, train=4, test=2)

    def small(make):
        recipe = make()
        if isinstance(recipe.task, Segmentation):
            kept = replace(model, text=None) if recipe.task.model.text is None else model
            recipe = replace(recipe, task=replace(recipe.task, model=kept, rules=Rules(0.1, 0.1)))
        return replace(recipe, data=scenes, loop=replace(recipe.loop, epochs=1, batch_size=2, pictures=False))

    stem = segmentation.scenes_stem
    monkeypatch.setattr(segmentation, "scenes_stem", lambda: small(stem))
    shortened = [lambda make=make: small(make) for make in (compare_tasks.ORDER[0], compare_tasks.ORDER[2])]
    monkeypatch.setattr(compare_tasks, "ORDER", tuple(shortened))
    summary = compare_tasks.compare(tmp_path)
    assert set(summary["table"]) == {"scenes_oneformer", "scenes_semantic"}
    assert set(summary["table"]["scenes_semantic"]) == {"miou"}
    assert set(summary["table"]["scenes_oneformer"]) == {"miou", "ap", "pq"}
    monkeypatch.setattr(compare_tasks, "train", None)  # it must not be called again
    assert compare_tasks.compare(tmp_path)["runs"] == summary["runs"]
    compare_tasks.ship(tmp_path / "scenes_oneformer", tmp_path / "small.safetensors")
    assert not any(name.startswith("text.") for name in load_file(tmp_path / "small.safetensors"))
    assert load_segmenter(tmp_path / "small.safetensors").info.classes == CLASSES
