"""The same weights give what transformers gives: every map, every prediction, every loss."""

from __future__ import annotations

import pytest
import torch

from vicinal.adapters.transformers import patch_dinat, unpatch_dinat

from . import hosts

SIZE = (96, 64)


@pytest.fixture
def dinat():
    patch_dinat()
    yield
    unpatch_dinat()


def inputs():
    torch.manual_seed(1)
    images = torch.randn(2, 3, *SIZE)
    task = torch.randint(0, 50, (2, 9))
    text = torch.randint(0, 59, (2, hosts.QUERIES - 3, 9))
    text[..., 6] = 59
    return images, task, text


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["swin", "dinat"])
@torch.no_grad()
def test_oneformer_is_transformers(kind, lively, dinat):
    torch.manual_seed(0)
    theirs, ours = hosts.pair(kind, lively)
    images, task, text = inputs()
    expected = theirs(images, task, text_inputs=text, output_hidden_states=True)
    maps = ours.backbone(images)
    for found, wanted in zip(maps, expected.encoder_hidden_states, strict=True):
        close(found, wanted)
    pixels = ours.pixel_decoder(maps)
    close(pixels.mask_features, expected.pixel_decoder_hidden_states[0])
    for found, wanted in zip(pixels.maps, expected.pixel_decoder_hidden_states[1:], strict=True):
        close(found, wanted)
    close(ours.task(task.float()), expected.task_token)
    refined = ours.decoder(pixels, ours.task(task.float()))
    close(refined.last, expected.transformer_decoder_object_queries)
    output = ours(images, task, text)
    close(output.object_queries, expected.transformer_decoder_contrastive_queries)
    close(output.text_queries, expected.text_queries)
    predictions(output, expected)


def predictions(output, expected):
    close(output.class_logits, expected.class_queries_logits)
    close(output.mask_logits, expected.masks_queries_logits)
    assert len(output.auxiliary) == 4
    for (classes, masks), wanted in zip(output.auxiliary, expected.auxiliary_predictions, strict=True):
        close(classes, wanted["class_queries_logits"])
        close(masks, wanted["masks_queries_logits"])
