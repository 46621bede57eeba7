"""Segmentation: targets of the three tasks, post-processing against loops, and a small model on the common loop."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vicinal.data import Digits
from vicinal.data.dataset import DataMissing, Info
from vicinal.data.layers import layered
from vicinal.data.scenes import Scenes
from vicinal.data.stream import Stream
from vicinal.metrics import Segments
from vicinal.models.compact import CompactConfig
from vicinal.models.oneformer import OneFormer, OneFormerConfig, TextConfig
from vicinal.models.oneformer.losses import LossConfig
from vicinal.models.oneformer.tokenizer import Tokenizer
from vicinal.tasks import TASKS, Moment, Rules, Segmentation, Stem, postprocess
from vicinal.tasks.joint_labels import class_map, draw_tasks, segments, target
from vicinal.tasks.overlay import color_of, overlay
from vicinal.tasks.prompts import Prompts
from vicinal.tasks.segmentation import as_segments, load_stem
from vicinal.tasks.stem import middles
from vicinal.training import AdamW, Loop, Recipe, train
from vicinal.training.checkpoint import save_weights

INFO = Info("made", ("cat", "dog", "sky", "sea"), 3, (0.5,), (0.5,), things=("cat", "dog"))
BACKBONE = CompactConfig("dinat", dim=16, depths=(0, 1, 1, 1, 1), kernel_size=3, in_channels=3)
TEXT = TextConfig(width=64, num_layers=1, vocabulary=64, context_length=12, contexts=2)
TINY = OneFormerConfig(
    BACKBONE, num_queries=8, dim=32, num_heads=2, pixel_layers=1, pixel_hidden_dim=32, query_layers=1, decoder_layers=2,
    hidden_dim=32, dropout=0.0, text=TEXT,
)  # fmt: skip


def made_layers(seed: int, size: tuple[int, int] = (12, 17)) -> torch.Tensor:
    """Truth `[3, height, width]` with void, crowds, stuff and things, and large instance numbers."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 7, (3, 4)).repeat(4, 0).repeat(5, 1)[: size[0], : size[1]]
    labels = np.array([255, 0, 0, 1, 2, 3, 1])[numbers]
    instances = np.array([0, 1, 700, 1, 0, 0, 2])[numbers]
    picture = np.zeros((*size, 3), np.uint8)
    return torch.from_numpy(layered(picture, labels, instances, numbers == 6)).permute(2, 0, 1)[3:]


@pytest.mark.parametrize("seed", range(4))
def test_targets_of_the_tasks_follow_from_the_truth_by_loops(seed):
    layers = made_layers(seed)
    truth = segments(layers)
    pixels = {}
    for row in range(layers.shape[1]):
        for column in range(layers.shape[2]):
            label, low, high = layers[:, row, column].tolist()
            if label != 255 and high < 128:
                pixels.setdefault((label, high * 256 + low), set()).add((row, column))
    wanted = {
        "panoptic": [(label, found) for (label, _), found in sorted(pixels.items())],
        "instance": [(label, found) for (label, _), found in sorted(pixels.items()) if label < 2],
        "semantic": [
            (label, set().union(*(found for (other, _), found in pixels.items() if other == label)))
            for label in sorted({label for label, _ in pixels})
        ],
    }
    for task in TASKS:
        given = target(truth, task, [0, 1])
        masks = [set(map(tuple, mask.nonzero().tolist())) for mask in given["masks"]]
        assert list(zip(given["labels"].tolist(), masks, strict=True)) == wanted[task]
    np.testing.assert_array_equal(class_map(truth), layers[0])
    assert bool(truth.crowd.any()) == bool((layers[2] >= 128).any())


def test_tasks_are_drawn_evenly_and_by_row():
    rows = torch.arange(900)
    drawn = draw_tasks(rows, Moment(3, 10, 0))
    assert all(250 < drawn.count(task) < 350 for task in TASKS)
    assert draw_tasks(rows[40:44], Moment(3, 10, 0)) == drawn[40:44]  # however the batch is dealt out
    assert draw_tasks(rows, Moment(4, 10, 0)) != drawn
    with pytest.raises(ValueError, match="task must be one of"):
        target(segments(made_layers(0)), "detection", [])


def test_prompts_are_those_of_the_texts_in_fewer_words():
    prompts, tokenizer = Prompts(INFO.classes, TEXT, count=6), Tokenizer()
    rows = prompts([1, 1, 3], "instance")
    whole = tokenizer([*["a photo with a dog"] * 2, "a photo with a sea", *["an instance photo"] * 3], 12)
    assert rows.shape == (6, 12)
    for one in range(6):
        for other in range(6):
            assert bool((rows[one] == rows[other]).all()) == bool((whole[one] == whole[other]).all())
    np.testing.assert_array_equal(rows.argmax(1), whole.argmax(1))  # where the text branch reads
    assert int(rows.max()) < TEXT.vocabulary
    clip = replace(TEXT, vocabulary=49408)
    np.testing.assert_array_equal(Prompts(INFO.classes, clip, 6)([1, 1, 3], "instance"), whole)
    assert Prompts(INFO.classes, TEXT, 2)([0, 1, 2], "panoptic").shape == (2, 12)  # more segments than texts
    with pytest.raises(ValueError, match=r"need \d+ words, but the text branch has text.vocabulary=8"):
        Prompts(INFO.classes, replace(TEXT, vocabulary=8), 6)


def logits_of(seed: int, queries: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and mask logits, some of them sure, with masks that overlap."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(queries, 5, generator=generator) * 4
    coarse = torch.randn(1, queries, 3, 4, generator=generator) * 4
    return classes, torch.nn.functional.interpolate(coarse, (11, 13), mode="bilinear")[0]


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_post_processing_equals_its_rules_by_loops(seed):
    classes, masks = logits_of(seed)
    rules = Rules(0.5, 0.6)
    cut, scores = postprocess.panoptic(classes, masks, [0, 1], rules)
    chances, probabilities = classes.softmax(-1), masks.sigmoid()
    kept = [q for q in range(9) if int(chances[q].argmax()) < 4 and float(chances[q].max()) > 0.5]
    expected = [[0] * 13 for _ in range(11)]
    owner = [
        [max(kept, key=lambda q: float(chances[q].max() * probabilities[q, row, column])) for column in range(13)]
        for row in range(11)
    ]
    labels, stuff = [], {}
    for q in kept:
        owned = {(row, column) for row in range(11) for column in range(13) if owner[row][column] == q}
        own = {(row, column) for row in range(11) for column in range(13) if probabilities[q, row, column] >= 0.5}
        if not owned & own or len(owned) / len(own) < 0.6:
            continue
        label = int(chances[q].argmax())
        if label not in stuff:
            labels.append(label)
            number = len(labels)
            if label > 1:
                stuff[label] = number
        else:
            number = stuff[label]
        for row, column in owned & own:
            expected[row][column] = number
    assert cut.numbers.tolist() == expected
    assert cut.labels.tolist() == labels
    assert len(scores) == len(labels)


def test_panoptic_post_processing_of_nothing_sure_is_void():
    cut, scores = postprocess.panoptic(torch.zeros(3, 5), torch.ones(3, 4, 4), [0], Rules())
    assert (int(cut.numbers.max()), len(cut.labels), len(scores)) == (0, 0, 0)


@pytest.mark.parametrize("most", [5, 100])
def test_instance_post_processing_equals_its_rules_by_loops(most):
    classes, masks = logits_of(7)
    found = postprocess.instances(classes, masks, [0, 2], Rules(most=most))
    chances, pairs = classes.softmax(-1), []
    for q in range(9):
        for label in range(4):
            pairs.append((float(chances[q, label]), q, label))
    wanted = []
    for chance, q, label in sorted(pairs, reverse=True)[:most]:
        inside = masks[q] > 0
        if label in (0, 2) and bool(inside.any()):
            wanted.append((chance * float(masks[q].sigmoid()[inside].mean()), label, q))
    wanted.sort(reverse=True)
    np.testing.assert_allclose(found.scores, [score for score, _, _ in wanted], rtol=1e-5)
    assert found.labels.tolist() == [label for _, label, _ in wanted]
    for mask, (_, _, q) in zip(found.masks, wanted, strict=True):
        np.testing.assert_array_equal(mask, masks[q] > 0)


def test_semantic_scores_are_sums_over_queries():
    classes, masks = logits_of(1)
    scores = postprocess.class_scores(classes, masks)
    by_hand = sum(classes[q].softmax(-1)[2] * masks[q, 3, 5].sigmoid() for q in range(9))
    assert float(scores[2, 3, 5]) == pytest.approx(float(by_hand), rel=1e-5)


def test_rules_and_tasks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"rules.least_score must be in 0 .. 1, got 2"):
        Rules(2.0)
    with pytest.raises(ValueError, match="tasks must be some of panoptic, semantic, instance, got detection"):
        Segmentation(TINY, tasks=("detection",))
    with pytest.raises(ValueError, match="things of made are not among its classes"):
        Segmentation(TINY).build(replace(INFO, things=("cow",)))


def test_pictures_without_truth_are_refused():
    data = Digits().open("train")
    task = Segmentation(TINY).build(data.info)
    batch = next(Stream(data, (), batch_size=2).training())
    with pytest.raises(DataMissing, match="learns from layered pictures of 6 channels"):
        task.objective(batch, Moment(0, 1, 0))


def test_overlays_color_classes_and_write_names():
    cut = Segments(torch.tensor([[1] * 30 + [2] * 30] * 40), torch.tensor([0, 2]))
    picture = np.full((40, 60, 3), 100, np.uint8)
    plain, named = overlay(picture, cut, INFO, names=False), overlay(picture, cut, INFO)
    assert plain.shape == named.shape == picture.shape
    assert (plain[5, 5] == np.round(45 + 0.55 * np.array(color_of(0)))).all()
    assert (plain[:, 29] == 255).all()  # the border
    assert (plain != named).any()
    with pytest.raises(ValueError, match="but the picture is"):
        overlay(picture[:10], cut, INFO)


def test_instances_are_drawn_with_the_best_on_top():
    classes, masks = torch.tensor([[9.0, 0, 0], [5.0, 0, 0]]), torch.full((2, 2, 3), -9.0)
    masks[0, :, :2], masks[1, :, 1:] = 9.0, 9.0
    found = postprocess.instances(classes, masks, [0], Rules())
    assert as_segments(found).numbers[0].tolist() == [1, 1, 2]


def small_recipe(task: object, **loop) -> Recipe:
    settings = {"epochs": 1, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "pictures": False}
    return Recipe(
        "small", "for tests", Scenes(size=64, train=16, test=6), task, (), (), {"main": AdamW(2e-3)},
        loop=Loop(**{**settings, **loop}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stem(tmp_path_factory):
    """The weights of a stem that was trained for four steps."""
    folder = tmp_path_factory.mktemp("stem")
    outcome = train(small_recipe(Stem(BACKBONE, dim=8)), folder / "run")
    assert 0 <= outcome.metrics["miou"] <= 1
    return outcome.weights


def test_a_stem_points_to_the_middle_of_things():
    numbers = torch.zeros(8, 8, dtype=torch.long)
    numbers[2:5, 1:6] = 1
    offsets, counted = middles(numbers, torch.tensor([0]), [0])
    assert int(counted.sum()) == 15
    assert offsets[:, 3, 3].tolist() == [0.0, 0.0]
    assert offsets[:, 2, 1].tolist() == [1.0, 2.0]  # eighths of eight pixels


def test_a_model_trains_is_stopped_and_goes_on_as_if_it_was_not(tmp_path, stem):
    task = Segmentation(TINY, loss=LossConfig(num_points=64), rules=Rules(0.1, 0.1), stem=str(stem), freeze_stem=True)
    whole = train(small_recipe(task), tmp_path / "whole")
    assert whole.step == 4
    assert {"pq", "miou", "ap", "pq_things", "pq_stuff"} <= set(whole.metrics)
    assert all(0 <= value <= 1 for value in whole.metrics.values())
    part = tmp_path / "part"
    train(small_recipe(task), part)
    for later in (part / "checkpoints").glob("step-00000004"):
        later.rename(part / "gone")
    (part / "checkpoints" / "best.json").unlink()
    again = train(small_recipe(task), part, resume=True)
    one, other = (load_file(folder / "model.safetensors") for folder in (part, tmp_path / "whole"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)
    assert again.metrics == whole.metrics


def test_a_frozen_stem_stays_and_a_wrong_one_is_refused(tmp_path, stem):
    task = Segmentation(TINY, stem=str(stem), freeze_stem=True).build(Scenes().open("train").info)
    task.prepare(iter(()))
    taken = OneFormer(TINY)
    load_stem(taken, stem)
    for name, tensor in taken.backbone.state_dict().items():
        torch.testing.assert_close(task.model.backbone.state_dict()[name], tensor, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in task.model.backbone.parameters())
    other = OneFormer(replace(TINY, backbone=replace(BACKBONE, dim=32)))
    with pytest.raises(ValueError, match="holds another backbone than the model's"):
        load_stem(other, stem)
    with pytest.raises(ValueError, match="there is no stem"):
        load_stem(other, tmp_path / "none.safetensors")


def test_a_published_backbone_is_taken_from_its_own_file(tmp_path):
    from vicinal.models.registry import create_model

    config = OneFormerConfig("dinat_mini", num_queries=4, dim=32, num_heads=2, pixel_layers=1, decoder_layers=1)
    whole = create_model("dinat_mini")
    save_weights(tmp_path / "dinat_mini.safetensors", whole.state_dict(), {})
    model = OneFormer(config)
    load_stem(model, tmp_path / "dinat_mini.safetensors")
    torch.testing.assert_close(model.backbone.state_dict()["stages.0.blocks.0.mixer.qkv.weight"],
                               whole.state_dict()["stages.0.blocks.0.mixer.qkv.weight"])  # fmt: skip


def test_a_task_alone_is_measured_by_its_metric_alone(stem):
    data = Scenes(size=64, test=3).open("test")
    names = {"panoptic": "pq", "semantic": "miou", "instance": "ap"}
    for one, metric in names.items():
        task = Segmentation(TINY, tasks=(one,), rules=Rules(0.1, 0.1)).build(data.info)
        task.objective.eval()
        evaluation = task.evaluation()
        for batch in Stream(data, (), batch_size=2).evaluation():
            evaluation.add(batch)
        values = evaluation.values()
        assert task.best == (metric, True)
        assert metric in values
        assert not (set(names.values()) - {metric}) & set(values)


def test_the_truth_itself_would_be_perfect(monkeypatch):
    data = Scenes(size=64, test=5).open("test")
    task = Segmentation(TINY).build(data.info)
    batch = next(Stream(data, (), batch_size=5).evaluation())
    truths = [segments(layers) for layers in batch.images[:, 3:]]

    def found(images, name):
        if name == "semantic":
            return [class_map(truth) for truth in truths]
        if name == "panoptic":
            return truths
        things = [target(truth, "instance", task.objective.things) for truth in truths]
        from vicinal.metrics import Instances

        return [Instances(one["masks"], one["labels"], torch.ones(len(one["labels"]))) for one in things]

    monkeypatch.setattr(task, "found", found)
    evaluation = task.evaluation()
    evaluation.add(batch)
    values = evaluation.values()
    assert (values["pq"], values["miou"], values["ap"]) == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_a_small_model_learns_a_few_scenes_by_heart(tmp_path):
    task = Segmentation(TINY, loss=LossConfig(num_points=256), rules=Rules(0.3, 0.5))
    recipe = small_recipe(task, epochs=40, evaluate_every=40, checkpoint_every=100)
    train(replace(recipe, data=Scenes(size=64, train=4, test=1)), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["mask"] + line["dice"] + line["class"] for line in lines if line["split"] == "train"]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
