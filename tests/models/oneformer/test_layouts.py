"""Strict loads of published key sets of whole models, and the way back to them."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.adapters.transformers import patch_dinat, unpatch_dinat
from vicinal.models import TextConfig, loading, registry
from vicinal.models.layout import to_ours, to_theirs

from .. import published, published_others
from . import hosts, published_segmenters

WIDTHS = (192, 384, 768, 1536)
DINAT, SWIN = (3, 4, 18, 5), (2, 2, 18, 2)

SETS = {
    "oneformer_dinat_large_ade20k": lambda: published_segmenters.segmenter(
        published.nat(192, DINAT, 2, kernel=11), WIDTHS, 250, 150
    ),
    "oneformer_dinat_large_cityscapes": lambda: published_segmenters.segmenter(
        published.nat(192, DINAT, 2), WIDTHS, 250, 19
    ),
    "oneformer_swin_large_coco": lambda: published_segmenters.segmenter(
        published.swin(192, SWIN, window=12), WIDTHS, 150, 133
    ),
    "oneformer_convnext_large_mapillary": lambda: published_segmenters.segmenter(
        published_others.convnext((3, 3, 27, 3), WIDTHS), WIDTHS, 250, 65
    ),
    "mask2former_dinat_large_ade20k_semantic": lambda: published_segmenters.segmenter(
        published.nat(192, DINAT, 2, kernel=11), WIDTHS, 100, 150, has_task=False
    ),
}


def meta(name, **options):
    with torch.device("meta"):
        return registry.create_model(name, **options)


@pytest.mark.parametrize("name", SETS)
def test_published_keys_load_strictly_and_come_back(name):
    theirs = {key: torch.empty(shape, device="meta") for key, shape in SETS[name]()}
    has_task = name.startswith("oneformer")
    model = meta(name, text=TextConfig() if has_task else None)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    layout = registry.families()[name].layouts["published"]
    ours, fit = to_ours(layout, theirs, shapes)
    assert fit.is_exact, str(fit)
    assert {key: tensor.shape for key, tensor in ours.items()} == shapes
    back = to_theirs(layout, model.state_dict())
    assert {key: tensor.shape for key, tensor in back.items()} == {key: one.shape for key, one in theirs.items()}
    # without the text branch the same file fits, and a backbone of another kind does not
    bare = meta(name)
    assert loading.match(theirs, bare, registry.families()[name])[2].is_exact
    theirs["sem_seg_head.predictor.more"] = torch.empty(1, device="meta")
    assert not loading.match(theirs, bare, registry.families()[name])[2].is_exact


def test_the_file_a_training_of_transformers_4_wrote_is_read():
    backbone = {
        key.removeprefix("swin."): shape
        for key, shape in published.swin_hub(96, (2, 2, 6, 2))
        if not key.startswith(("swin.layernorm", "classifier"))
    }
    for level in range(4):
        backbone |= dict(published.vectors(f"hidden_states_norms.stage{level + 1}", 96 * 2**level))
    family = registry.families()["oneformer_swin_tiny_ade20k"]
    model = meta("oneformer_swin_tiny_ade20k")
    # the rest is transformers 5's own, which test_parity loads for real
    rest = to_theirs(family.layouts["hub"], {k: v for k, v in model.state_dict().items() if k[:9] != "backbone."})
    theirs = rest | {
        f"model.pixel_level_module.encoder.{key}": torch.empty(shape, device="meta") for key, shape in backbone.items()
    }
    found, _, fit = loading.match(theirs, model, family)
    assert fit.is_exact, str(fit)
    assert found == "hub"


@pytest.mark.parametrize(("kind", "has_task"), [("swin", True), ("swin", False), ("dinat", True)])
def test_transformers_takes_our_weights_strictly(kind, has_task, lively):
    patch_dinat()
    try:
        theirs, ours = hosts.pair(kind, lively, has_task=has_task)
    finally:
        unpatch_dinat()
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    layout = hosts.family(hosts.backbone(kind)[1], has_task).layouts["transformers"]
    theirs.load_state_dict(to_theirs(layout, ours.state_dict()), strict=True)
    for name, tensor in theirs.state_dict().items():
        if "encoder.swin.layernorm" not in name and name != "criterion.empty_weight":  # nothing there is learned
            assert torch.equal(tensor.float(), before[name].float()), name  # their scale is a double


def test_a_published_file_loads_by_its_path(tmp_path):
    _, name, options = hosts.backbone("dinat")
    small = hosts.config(name, options, text=None)
    fields = {key: getattr(small, key) for key in small.__dataclass_fields__ if key != "backbone"}
    torch.manual_seed(0)
    trained = vicinal.create_model("oneformer_dinat_large_ade20k", **{**fields, "text": hosts.TEXT}).eval()
    family = registry.families()["oneformer_dinat_large_ade20k"]
    theirs = to_theirs(family.layouts["published"], trained.state_dict())
    torch.save({"model": theirs, "iteration": 3}, tmp_path / "weights.pth")
    loaded = vicinal.create_model("oneformer_dinat_large_ade20k", tmp_path / "weights.pth", **fields).eval()
    images, task = torch.randn(1, 3, 64, 64), torch.randint(0, 50, (1, 9))
    torch.testing.assert_close(loaded(images, task).mask_logits, trained(images, task).mask_logits, rtol=0, atol=0)
    # our own file of a training, with its text branch
    torch.save(trained.state_dict(), tmp_path / "ours.pt")
    again = vicinal.create_model("oneformer_dinat_large_ade20k", tmp_path / "ours.pt", **fields).eval()
    torch.testing.assert_close(again(images, task).mask_logits, loaded(images, task).mask_logits, rtol=0, atol=0)
    # position biases for another kernel are interpolated
    wider = {**fields, "backbone_options": {**fields["backbone_options"], "kernel_size": 5}}
    larger = vicinal.create_model("oneformer_dinat_large_ade20k", tmp_path / "weights.pth", **wider)
    assert larger.backbone.stages[0].blocks[0].mixer.rpb.shape[1:] == (9, 9)
    # other classes: everything but the classifier
    other = vicinal.create_model(
        "oneformer_dinat_large_ade20k", tmp_path / "weights.pth", **{**fields, "num_classes": 7}
    )
    assert other.decoder.classes.weight.shape[0] == 8
    assert torch.equal(other.decoder.norm.weight, trained.decoder.norm.weight)
    with pytest.raises(loading.CheckpointMismatch, match=r"1 misshapen .*\(9, 64\) for \(12, 64\)"):
        vicinal.create_model("oneformer_dinat_large_ade20k", tmp_path / "weights.pth", **{**fields, "num_queries": 12})


@pytest.mark.parametrize("name", ["oneformer_swin_large_coco", "mask2former_dinat_large_ade20k_semantic"])
def test_a_whole_checkpoint_is_identified(name):
    theirs = {key: torch.empty(shape, device="meta") for key, shape in SETS[name]()}
    assert registry.holds_segmenter(theirs)
    best, *others = registry.identify(theirs)
    assert (best.name, best.problems, best.options) == (name, 0, {})
    assert best.layout == "published"
    assert all(other.problems for other in others)


def test_a_segmenter_for_other_classes_is_identified_with_them():
    theirs = dict(published_segmenters.segmenter(published.nat(192, DINAT, 2, kernel=11), WIDTHS, 250, 9))
    found = registry.identify({key: torch.empty(shape, device="meta") for key, shape in theirs.items()})
    assert found[0].problems == 0
    assert found[0].options == {"num_classes": 9}
    assert found[0].name in ("oneformer_dinat_large_ade20k", "oneformer_dinat_large_mapillary")
