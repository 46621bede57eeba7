"""The same weights give what transformers gives: every map, every prediction, every loss."""

from __future__ import annotations

import pytest
import torch

from vicinal.adapters.transformers import patch_dinat, unpatch_dinat
from vicinal.models.layout import to_theirs
from vicinal.models.oneformer.losses import LossConfig, SegmentationLoss, match

from . import hosts

SIZE = (96, 64)


@pytest.fixture
def dinat():
    patch_dinat()
    yield
    unpatch_dinat()


def inputs(size=SIZE):
    torch.manual_seed(1)
    images = torch.randn(2, 3, *size)
    task = torch.randint(0, 50, (2, 9))
    text = torch.randint(0, 59, (2, hosts.QUERIES - 3, 9))
    text[..., 6] = 59
    return images, task, text


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


KINDS = pytest.mark.parametrize("kind", ["swin", "dinat"])
SIZES = pytest.mark.parametrize("size", [SIZE, (75, 109)], ids=lambda size: f"{size[0]}x{size[1]}")


def layer_outputs(model, layers):
    """What each of these modules gives when the model runs, in their order."""
    found = [[] for _ in layers]
    for layer, outputs in zip(layers, found, strict=True):
        layer.register_forward_hook(
            lambda module, given, out, outputs=outputs: outputs.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    return found


@pytest.mark.parametrize("kind", ["swin", "dinat", "convnext"])
@SIZES
@torch.no_grad()
def test_oneformer_is_transformers(kind, size, lively, dinat):
    torch.manual_seed(0)
    theirs, ours = hosts.pair(kind, lively)
    images, task, text = inputs(size)
    module = theirs.model.transformer_module.decoder
    inside = layer_outputs(
        theirs,
        [
            *theirs.model.pixel_level_module.decoder.encoder.layers,
            *module.query_transformer.decoder.layers,
            *module.layers,
        ],
    )
    found_inside = layer_outputs(
        ours,
        [*ours.pixel_decoder.layers, *ours.decoder.class_transformer.layers, *ours.decoder.layers],
    )
    expected = theirs(images, task, text_inputs=text, output_hidden_states=True)
    output = ours(images, task, text)
    for index, ((found,), (wanted,)) in enumerate(zip(found_inside, inside, strict=True)):
        # their queries stand before the batch
        close(found, wanted if index < hosts.PIXEL_LAYERS else wanted.transpose(0, 1))
    close(output.object_queries, expected.transformer_decoder_contrastive_queries)
    close(output.text_queries, expected.text_queries)
    predictions(output, expected, expected.auxiliary_predictions)
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


def predictions(output, expected, auxiliary):
    close(output.class_logits, expected.class_queries_logits)
    close(output.mask_logits, expected.masks_queries_logits)
    assert len(output.auxiliary) == 4
    for (classes, masks), wanted in zip(output.auxiliary, auxiliary, strict=True):
        close(classes, wanted["class_queries_logits"])
        close(masks, wanted["masks_queries_logits"])


@KINDS
@SIZES
@torch.no_grad()
def test_mask2former_is_transformers(kind, size, lively, dinat):
    torch.manual_seed(0)
    theirs, ours = hosts.pair(kind, lively, has_task=False)
    images, _, _ = inputs(size)
    expected = theirs(images, output_hidden_states=True, output_auxiliary_logits=True)
    maps = ours.backbone(images)
    pixels = ours.pixel_decoder(maps)
    for found, wanted in zip(maps, expected.encoder_hidden_states, strict=True):
        close(found, wanted)
    for found, wanted in zip(pixels.maps, expected.pixel_decoder_hidden_states, strict=True):
        close(found, wanted)
    close(pixels.mask_features, expected.pixel_decoder_last_hidden_state)
    close(ours.decoder(pixels).last, expected.transformer_decoder_last_hidden_state)
    predictions(ours(images), expected, expected.auxiliary_logits)


def targets():
    torch.manual_seed(2)
    return [
        {"labels": torch.tensor(labels), "masks": torch.rand(len(labels), *SIZE) < share}
        for labels, share in (([1, 4, 1], 0.3), ([0, 2], 0.6))
    ]


@KINDS
@pytest.mark.parametrize("has_task", [True, False], ids=["oneformer", "mask2former"])
def test_every_loss_term_is_transformers(has_task, kind, lively, dinat):
    torch.manual_seed(0)
    theirs, ours = hosts.pair(kind, lively, has_task=has_task)
    images, task, text = inputs()
    given = targets()
    labels = {
        "mask_labels": [target["masks"].float() for target in given],
        "class_labels": [target["labels"] for target in given],
    }
    terms = {}
    # their model gives the sum alone; its terms pass through here
    weigh = theirs.get_loss_dict
    theirs.get_loss_dict = lambda **arguments: terms.update(weigh(**arguments)) or terms
    torch.manual_seed(3)
    asked = {"task_inputs": task, "text_inputs": text} if has_task else {}
    expected = theirs(images, **asked, **labels)
    torch.manual_seed(3)
    output = ours(images, task, text) if has_task else ours(images)
    found = SegmentationLoss(LossConfig(num_points=hosts.POINTS))(output, given)
    assert len(found) == len(terms) == 3 * 5 + has_task
    for name, value in found.items():
        term, _, index = name.partition("_")
        theirs_name = {"class": "loss_cross_entropy"}.get(term, f"loss_{term}") + (f"_{index}" if index else "")
        close(value.reshape(()), terms[theirs_name].reshape(()))
    close(sum(found.values()), expected.loss.reshape(()))
    expected.loss.backward()
    sum(found.values()).backward()
    back = to_theirs(family_layout(kind, has_task), {name: gradient(one) for name, one in ours.named_parameters()})
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and name in back:
            scale = parameter.grad.abs().max()
            assert (back[name] - parameter.grad).abs().max() <= 1e-3 * scale + 1e-5, name
            compared += 1
    assert compared > 200


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def family_layout(kind, has_task):
    return hosts.family(hosts.backbone(kind)[1], has_task).layouts["transformers"]


@pytest.mark.parametrize(("queries", "segments"), [(9, 3), (9, 9), (4, 7), (20, 0)])
@torch.no_grad()
def test_the_match_is_transformers(queries, segments, lively):
    # on random predictions: queries of a model with random weights are so alike that rounding chooses among them
    theirs, _ = hosts.pair("swin", lively)
    torch.manual_seed(4)
    classes, masks = torch.randn(3, queries, hosts.CLASSES + 1), 3 * torch.randn(3, queries, 12, 16)
    given = [
        {"labels": torch.randint(hosts.CLASSES, (segments,)), "masks": torch.rand(segments, 48, 64) < 0.4}
        for _ in range(3)
    ]
    torch.manual_seed(5)
    wanted = theirs.matcher(masks, classes, [one["masks"].float() for one in given], [one["labels"] for one in given])
    torch.manual_seed(5)
    found = match(classes, masks, given, LossConfig(num_points=hosts.POINTS))
    for one, other in zip(found, wanted, strict=True):
        assert len(one[0]) == min(queries, segments)
        assert [part.tolist() for part in one] == [part.tolist() for part in other]
