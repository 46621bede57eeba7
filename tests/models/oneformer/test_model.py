"""What every segmenter keeps to, in small sizes: the contract beside that of the classifiers."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

import vicinal
from vicinal.layers.tags import parameter_groups, parameter_tags
from vicinal.models import OneFormer, OneFormerConfig, TextConfig, registry
from vicinal.models.compact import CompactConfig
from vicinal.models.oneformer.losses import LossConfig, SegmentationLoss
from vicinal.models.oneformer.queries import _seen

NAMES = [name for name in registry.list_models() if registry.families()[name].kind == "segmenter"]
ONE_PER_FAMILY = sorted({id(registry.families()[name]): name for name in NAMES}.values())
ODD = (75, 109)
BACKBONES = {
    "dinat": {"dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "kernel_size": 3, "drop_path_rate": 0.0},
    "swin": {"dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4, "drop_path_rate": 0.0},
    "convnext": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "drop_path_rate": 0.0},
}
TEXT = TextConfig(width=64, num_layers=1, vocabulary=60, context_length=9, contexts=3)


def small(name, *, text=False, **changes):
    """The configuration of a name with few, narrow layers."""
    config = registry.config_of(name)
    return dataclasses.replace(
        config,
        backbone_options=BACKBONES[config.backbone.partition("_")[0]],
        num_queries=7,
        num_classes=5,
        text=TEXT if text and config.task else None,
        dim=64,
        num_heads=4,
        pixel_layers=1,
        pixel_hidden_dim=32,
        query_layers=1,
        decoder_layers=3,
        hidden_dim=48,
        dropout=0.0,
        **changes,
    )


@cache
def built(name) -> OneFormer:
    torch.manual_seed(0)
    return OneFormer(small(name)).eval()


def tasks(model, batch):
    return ["panoptic", "instance", "semantic"][:batch] if model.config.task else None


@pytest.mark.parametrize(
    ("name", "parameters"),
    # published as 219M, 223M and 220M
    [
        ("oneformer_swin_large_ade20k", 218_811_147),
        ("oneformer_dinat_large_ade20k", 223_219_881),
        ("mask2former_dinat_large_coco_panoptic", 219_944_344),
    ],
)
def test_parameters_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        model = vicinal.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_parts_have_the_published_parameters():
    with torch.device("meta"):
        model = vicinal.create_model("oneformer_dinat_large_ade20k", text=TextConfig())
    millions = {
        part: sum(parameter.numel() for parameter in getattr(model, part).parameters()) / 1e6
        for part in ("backbone", "pixel_decoder", "decoder", "task", "text")
    }
    assert round(millions["backbone"] + millions["pixel_decoder"], 2) == 205.40
    assert round(millions["decoder"], 3) == 17.734
    assert round(millions["task"], 4) == 0.0858
    assert round(millions["text"], 2) == 17.54


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@torch.no_grad()
def test_any_image_size(name):
    model = built(name)
    output = model(torch.randn(2, 3, *ODD), tasks(model, 2))
    assert output.class_logits.shape == (2, 7, 6)
    assert output.mask_logits.shape[:2] == (2, 7)
    for length, found in zip(ODD, output.mask_logits.shape[2:], strict=True):
        assert found in (length // 4, -(-length // 4))
    assert len(output.auxiliary) == 3
    for classes, masks in [*output.auxiliary, (output.class_logits, output.mask_logits)]:
        assert classes.isfinite().all()
        assert masks.isfinite().all()
    tiny = model(torch.randn(1, 3, 32, 32), tasks(model, 1))  # one token on the coarsest map
    assert tiny.mask_logits.shape == (1, 7, 8, 8)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(name):
    model = built(name)
    images, task = torch.randn(2, 3, 64, 96), tasks(model, 2)
    both, alone = model(images, task), model(images[1:], task and task[1:])
    torch.testing.assert_close(both.mask_logits[1:], alone.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.class_logits[1:], alone.class_logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_task_changes_the_answer():
    model = built("oneformer_dinat_large_ade20k")
    images = torch.randn(1, 3, 64, 64)
    answers = [model(images, [task]).mask_logits for task in ("panoptic", "semantic", "instance")]
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    assert (answers[1] - answers[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_step_of_training_reaches_every_parameter_and_lowers_the_loss(name):
    torch.manual_seed(0)
    model = OneFormer(small(name, text=True)).train()
    groups = parameter_groups(model, 2e-4, 0.05, {"backbone": 0.1})
    optimizer = torch.optim.AdamW(groups)
    images = torch.randn(2, 3, 64, 64)
    targets = [{"labels": torch.tensor([1, 3]), "masks": torch.rand(2, 64, 64) < 0.5} for _ in range(2)]
    text = None
    if model.config.task:
        text = torch.randint(1, 50, (2, 4, 9))
        text[..., -1] = 59
    loss = SegmentationLoss(LossConfig(num_points=128))
    losses = []
    for _ in range(5):
        torch.manual_seed(1)  # the same points, so that steps compare
        total = sum(loss(model(images, tasks(model, 2), text), targets).values())
        optimizer.zero_grad()
        total.backward()
        without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not without
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]


def test_a_frozen_backbone_trains():
    # torch 2.13's group norm ends the process where its input needs no gradient and has the channels last
    model = OneFormer(small("oneformer_dinat_large_ade20k")).train()
    model.backbone.requires_grad_(False)
    output = model(torch.randn(1, 3, 64, 64), ["semantic"])
    (output.mask_logits.square().sum() + output.class_logits.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.pixel_decoder.parameters())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_parameters_are_tagged():
    model = OneFormer(small("oneformer_dinat_large_ade20k", text=True))
    tags = parameter_tags(model)
    for name, parameter in model.named_parameters():
        is_embedding = any(part in name for part in ("level_embed", "query_positions", "words", "contexts", "rpb"))
        assert tags[name].weight_decay == (parameter.dim() > 1 and not is_embedding and name != "text.positions"), name
        assert (tags[name].group == "backbone") == name.startswith("backbone."), name


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@torch.no_grad()
def test_autocast(name):
    model = built(name)
    images = torch.randn(1, 3, 64, 64)
    # from the pixels on: a backbone's own precision is tested with the backbone
    maps = model.backbone(images)
    exact = model.pixel_decoder(maps).mask_features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.pixel_decoder(maps).mask_features
        output = model(images, tasks(model, 1))
    assert (found.float() - exact).norm() < 0.1 * exact.norm()
    assert output.mask_logits.isfinite().all()


def test_export():
    model = OneFormer(small("oneformer_dinat_large_ade20k")).eval()
    images, task = torch.randn(1, 3, 64, 64), torch.randint(0, 49408, (1, 77))
    program = torch.export.export(model, (images, task), strict=False)
    with torch.no_grad():
        found, expected = program.module()(images, task), model(images, task)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_compile():
    config = dataclasses.replace(small("oneformer_dinat_large_ade20k"), decoder_layers=2, dim=32, num_heads=2)
    model = OneFormer(config).eval()
    images, task = torch.randn(1, 3, 64, 64), torch.randint(0, 49408, (1, 77))
    found, expected = torch.compile(model, fullgraph=True)(images, task), model(images, task)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits, rtol=1e-3, atol=1e-3)


def test_save_and_load(tmp_path):
    model = built("oneformer_swin_large_ade20k")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = OneFormer(model.config).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = other(images, ["panoptic"]), model(images, ["panoptic"])
    torch.testing.assert_close(found.mask_logits, expected.mask_logits, rtol=0, atol=0)


def test_queries_whose_mask_is_empty_see_everything():
    logits = torch.full((1, 2, 4, 4), -5.0)
    logits[0, 0, :2] = 5.0
    seen = _seen(logits, torch.zeros(1, 1, 2, 2))
    assert seen.tolist() == [[[[True, True, False, False], [True, True, True, True]]]]


def test_a_compact_pyramid_is_a_backbone():
    compact = CompactConfig(dim=16, depths=(1, 1, 1, 1, 1), in_channels=3, kernel_size=3)
    config = OneFormerConfig(compact, num_queries=4, num_classes=2, dim=32, num_heads=2, decoder_layers=1)
    output = OneFormer(config)(torch.randn(1, 3, 64, 96), ["semantic"])
    assert output.mask_logits.shape == (1, 4, 16, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "oneformer_swin_large_coco"}, "features_only: oneformer_swin_large_coco gives segments"),
        ({"backbone": "nat_isotropic_small"}, r"maps of strides \(4, 8, 16, 32\), got \(16,\)"),
        ({"backbone": "dinat_mni"}, "did you mean dinat_mini"),
        ({"dim": 30}, "dim must be a multiple of num_heads"),
        ({"num_queries": 3, "text": TEXT}, "num_queries must be more than"),
        ({"task": False, "text": TEXT}, "text needs task"),
        ({"num_queries": 20, "text": TextConfig(width=100)}, "text.width must be a multiple of 64"),
    ],
)
def test_a_wrong_configuration_is_a_sentence(changes, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        OneFormer(OneFormerConfig(**{"backbone": "dinat_mini", "num_queries": 9, **changes}))


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (None, None, "task is needed"),
        (["panoptic", "panoptic"], None, r"task must be one text per image, \(1, 77\)"),
        (["everything"], None, "task must be a list of panoptic, semantic, instance"),
        ("panoptic", None, "one per image, got 'panoptic'"),
        (["panoptic"], torch.zeros(1, 4, 9, dtype=torch.long), "has no text branch"),
    ],
)
def test_a_wrong_call_is_a_sentence(task, text, message):
    with pytest.raises(ValueError, match=message):
        built("oneformer_dinat_large_ade20k")(torch.zeros(1, 3, 32, 32), task, text)


def test_a_mask2former_takes_no_task_and_a_text_has_its_length():
    with pytest.raises(ValueError, match="it is a Mask2Former"):
        built("mask2former_dinat_large_coco_instance")(torch.zeros(1, 3, 32, 32), ["panoptic"])
    model = OneFormer(small("oneformer_dinat_large_ade20k", text=True))
    for shape, message in (((1, 5, 9), "must have 4 texts per image, got 5"), ((1, 4, 8), r"\[batch, texts, 9\]")):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(1, 3, 32, 32), ["panoptic"], torch.zeros(shape, dtype=torch.long))


def test_a_segmenter_gives_no_feature_maps():
    with pytest.raises(ValueError, match="take the maps of its backbone, 'dinat_large'"):
        vicinal.create_model("oneformer_dinat_large_coco", features_only=True)


@pytest.mark.parametrize("images", [torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
def test_pictures_of_other_kinds_are_refused(images):
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, height, width\] of a floating type"):
        built(ONE_PER_FAMILY[0])(images, ["panoptic"])
