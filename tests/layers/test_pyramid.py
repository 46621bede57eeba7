"""The builder: strides, features, heads, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicinal.layers.pyramid import FeatureInfo, Features, Head, PoolFirstHead, Pyramid, Stage
from vicinal.layers.tags import parameter_tags
from vicinal.layers.tokens import ConvPatches, OverlappingStem, PatchMerging


def pyramid(num_classes=4):
    stages = [
        Stage([nn.Linear(8, 8)], dim=8),
        Stage([nn.Linear(16, 16)], dim=16, downsample=PatchMerging(8, 16), norm=nn.LayerNorm(16)),
        Stage([], dim=16, downsample=ConvPatches(16, 16, kernel_size=4, stride=4), stride=4),
    ]
    return Pyramid(OverlappingStem(3, 8), stages, Head(16, num_classes))


def test_strides_add_up():
    assert pyramid().feature_info == (FeatureInfo(4, 8), FeatureInfo(8, 16), FeatureInfo(32, 16))


def test_logits_features_and_vectors_agree():
    model = pyramid().eval()
    images = torch.randn(2, 3, 64, 96)
    maps = model.features(images)
    assert [tuple(features.shape) for features in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 16, 2, 3)]
    vector = model.head.norm(maps[-1].movedim(1, -1)).mean((1, 2))
    torch.testing.assert_close(model.embed(images), vector)
    torch.testing.assert_close(model(images), model.head.classifier(vector))
    torch.testing.assert_close(pyramid(0)(images).shape, torch.Size([2, 16]))


@pytest.mark.parametrize("stages", [(), (1, 0), (0, 3), (1, 1), (-1,)], ids=str)
def test_stages_that_are_none_are_refused(stages):
    with pytest.raises(ValueError, match="stages must be rising numbers from 0 to 2"):
        Features(pyramid(), stages)


def test_features_are_those_of_the_model():
    model = pyramid().eval()
    images = torch.randn(1, 3, 64, 64)
    chosen = Features(model, (0, 2))
    assert [info.stride for info in chosen.feature_info] == [4, 32]
    for found, expected in zip(chosen(images), model.features(images)[::2], strict=True):
        assert torch.equal(found, expected)
    assert set(Features(model, (0,)).left_out) == {
        name for name in model.state_dict() if name.startswith(("stages.1", "stages.2", "head"))
    }


def test_a_norm_for_every_map():
    normed = Features(pyramid(), (0, 1), use_norms=True)
    with torch.no_grad():
        normed.norms["1"].bias.fill_(7.0)
    first, second = normed(torch.randn(1, 3, 64, 64))
    assert abs(first.mean().item()) < 1e-5
    assert abs(second.mean().item() - 7) < 1e-4


def test_heads_differ_in_where_the_norm_stands():
    features = torch.randn(2, 3, 4, 8)
    before, after = Head(8, 0), PoolFirstHead(8, 0)
    norm = nn.functional.layer_norm
    torch.testing.assert_close(before(features, None), norm(features, (8,)).mean((1, 2)))
    torch.testing.assert_close(after(features, None), norm(features.mean((1, 2)), (8,)))
    with pytest.raises(ValueError, match="num_classes"):
        before.reset(-1)


def test_every_part_is_a_learning_rate_group():
    groups = {name.split(".")[0]: tag.group for name, tag in parameter_tags(pyramid()).items() if "stages" not in name}
    assert groups == {"stem": "stem", "head": "head"}
    assert parameter_tags(pyramid())["stages.1.blocks.0.weight"].group == "stage1"


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (3, 64), (1, 64, 64, 3)], ids=str)
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, height, width\]"):
        pyramid()(torch.zeros(shape))


def test_merging_takes_the_four_tokens_down_the_column_first():
    merging = PatchMerging(1, 4, norm=lambda _: nn.Identity())
    nn.init.eye_(merging.reduction.weight)
    assert merging(torch.arange(4.0).reshape(1, 2, 2, 1)).flatten().tolist() == [0.0, 2.0, 1.0, 3.0]
    assert merging(torch.ones(1, 3, 5, 1)).shape == (1, 2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fresh_classifier_keeps_the_models_precision(dtype):
    head = Head(8, 10).to(dtype)
    head.reset(3)
    assert head(torch.ones(1, 4, 4, 8, dtype=dtype), None).dtype == dtype


@pytest.mark.parametrize("classes", ["10", 2.5])
def test_classes_that_are_no_number_are_refused(classes):
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        Head(8, classes)
