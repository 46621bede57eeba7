"""Our models as backbones of transformers' dense models."""

from __future__ import annotations

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from vicinal.adapters.backbones import VicinalBackbone, VicinalBackboneConfig  # noqa: E402

SMALL = {"dim": 16, "num_heads": [1, 1, 2, 4], "depths": [1, 1, 1, 1]}


def config(**changes):
    return VicinalBackboneConfig(**{"name": "nat_mini", "options": SMALL, "out_indices": [1, 2, 3, 4], **changes})


def test_maps_have_the_channels_they_tell():
    backbone = VicinalBackbone(config(out_features=["stage2", "stage4"], out_indices=None)).eval()
    maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [features.shape[1] for features in maps] == backbone.channels == [32, 128]


def test_norms_only_where_asked_for():
    with_norms = {name for name, _ in VicinalBackbone(config()).named_parameters()}
    without = {name for name, _ in VicinalBackbone(config(use_norms=False)).named_parameters()}
    assert {name.split(".")[1] for name in with_norms - without} == {"norms"}


def test_the_stem_is_no_feature_map():
    with pytest.raises(ValueError, match="stage1 and later"):
        config(out_indices=[0, 1])


def test_save_and_load(tmp_path):
    backbone = VicinalBackbone(config()).eval()
    backbone.save_pretrained(tmp_path)
    again = VicinalBackbone.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 64, 64)
    for found, expected in zip(again(images).feature_maps, backbone(images).feature_maps, strict=True):
        torch.testing.assert_close(found, expected)


def test_it_is_found_by_its_configuration():
    assert isinstance(transformers.AutoBackbone.from_config(config()), VicinalBackbone)
    assert transformers.AutoConfig.for_model("vicinal_backbone").model_type == "vicinal_backbone"


@pytest.mark.parametrize("name", ["UperNet", "Mask2Former"])
def test_dense_models_take_it(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "UperNet":
            whole = transformers.UperNetConfig(
                backbone_config=config(), hidden_size=16, auxiliary_in_channels=64, auxiliary_channels=8, num_labels=3
            )
            model = transformers.UperNetForSemanticSegmentation(whole).eval()
            logits = model(torch.randn(1, 3, 64, 64)).logits
            assert logits.shape == (1, 3, 64, 64)
        else:
            whole = transformers.Mask2FormerConfig(
                backbone_config=config(),
                feature_size=32,
                mask_feature_size=32,
                hidden_dim=32,
                encoder_feedforward_dim=16,
                dim_feedforward=16,
                num_attention_heads=2,
                encoder_layers=1,
                decoder_layers=2,
                num_queries=4,
            )
            model = transformers.Mask2FormerForUniversalSegmentation(whole).eval()
            logits = model(torch.randn(1, 3, 64, 64)).masks_queries_logits
            assert logits.shape == (1, 4, 16, 16)
    assert logits.isfinite().all()


def test_maps_may_be_counted_from_the_end():
    backbone = VicinalBackbone(config(out_indices=[2, -1])).eval()
    assert [features.shape[1] for features in backbone(torch.randn(1, 3, 64, 64)).feature_maps] == [32, 128]
