"""OneFormer and Mask2Former of transformers on DiNAT backbones: they run, learn, and survive a round trip."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers import (
    DinatConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
)
from transformers.models.dinat import modeling_dinat

from vicinal.adapters.transformers import patch_dinat, unpatch_dinat

from .dense import dense_forward

WORDS, LENGTH, TEXTS = 99, 7, 6
SIZE = (96, 64)


@pytest.fixture(autouse=True)
def patched():
    patch_dinat()
    yield
    unpatch_dinat()


def backbone():
    return DinatConfig(
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 4, 8],
        embed_dim=16,
        kernel_size=3,
        dilations=[[2], [1, 4], [1], [1]],
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


SMALL = dict(
    num_queries=8,
    hidden_dim=64,
    encoder_feedforward_dim=32,
    dim_feedforward=32,
    encoder_layers=1,
    decoder_layers=3,
    num_attention_heads=4,
    dropout=0.0,
    train_num_points=64,
    num_labels=4,
)


def oneformer():
    config = OneFormerConfig(
        backbone_config=backbone(),
        conv_dim=64,  # another width than hidden_dim: transformers 5.23 forgets to load those projections
        mask_dim=64,
        query_dec_layers=1,
        text_encoder_width=64,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=WORDS,
        text_encoder_context_length=LENGTH,
        text_encoder_n_ctx=2,
        task_seq_len=LENGTH,
        is_training=True,
        **SMALL,
    )
    return OneFormerForUniversalSegmentation(config)


def mask2former():
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone(), feature_size=64, mask_feature_size=32, **SMALL)
    )


def inputs(build):
    common = {"pixel_values": torch.randn(1, 3, *SIZE)}
    if build is oneformer:
        common["task_inputs"] = torch.randint(1, WORDS, (1, LENGTH)).float()
        common["text_inputs"] = torch.randint(1, WORDS, (1, TEXTS, LENGTH))
    return common


def labels():
    return {"mask_labels": [(torch.rand(2, *SIZE) > 0.5).float()], "class_labels": [torch.tensor([0, 2])]}


BOTH = pytest.mark.parametrize("build", [oneformer, mask2former])
pytestmark = pytest.mark.filterwarnings("ignore:.*is not a supported model")


@BOTH
def test_the_model_on_dense_attention_says_the_same(monkeypatch, build):
    model = build().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    given = inputs(build)
    with torch.no_grad():
        ours = model(**given)
        monkeypatch.setattr(modeling_dinat.NeighborhoodAttention, "forward", dense_forward)
        dense = model(**given)
    assert ours.class_queries_logits.shape == (1, 8, 5)
    assert ours.masks_queries_logits.shape[:2] == (1, 8)
    torch.testing.assert_close(ours.class_queries_logits, dense.class_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.masks_queries_logits, dense.masks_queries_logits, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()


@BOTH
def test_the_loss_reaches_every_parameter_of_the_backbone(build):
    model = build().train()
    model(**inputs(build), **labels()).loss.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.model.pixel_level_module.encoder.named_parameters()}
    assert sum(name.endswith("rpb") for name in grads) == 5
    for name, grad in grads.items():
        assert grad is not None, f"{name} gets no gradient"
        assert grad.isfinite().all(), name
        # a bias of all keys alike cancels in the softmax
        assert grad.abs().max() > 0 or name.endswith("key.bias"), name


@BOTH
def test_a_step_of_training_lowers_the_loss(build):
    model = build().train()
    given, wanted = inputs(build), labels()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)  # the loss samples points
        loss = model(**given, **wanted).loss.sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@BOTH
def test_weights_survive_a_round_trip(tmp_path, build):
    model = build().eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert isinstance(again.config.backbone_config, DinatConfig)
    given = inputs(build)
    with torch.no_grad():
        ours, theirs = model(**given), again(**given)
    weights = again.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(ours.masks_queries_logits, theirs.masks_queries_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.class_queries_logits, theirs.class_queries_logits, rtol=1e-5, atol=1e-5)
