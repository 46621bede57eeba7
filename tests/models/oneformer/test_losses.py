"""The loss beside what transformers has: bad targets, pictures without segments, several processes, the text branch."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing

from vicinal.models import OneFormerOutput, TextConfig
from vicinal.models.oneformer.losses import LossConfig, SegmentationLoss, contrastive_loss, segment_count
from vicinal.models.oneformer.matching import cost, match
from vicinal.models.oneformer.text import TextMapper

CONFIG = LossConfig(num_points=64)


def output(queries=5, classes=3, batch=2):
    torch.manual_seed(0)
    logits = torch.randn(batch, queries, classes + 1, requires_grad=True)
    masks = torch.randn(batch, queries, 8, 8, requires_grad=True)
    return OneFormerOutput(logits, masks, [(logits, masks)], torch.randn(batch, queries, 4))


def target(labels, size=(16, 16)):
    return {"labels": torch.tensor(labels, dtype=torch.long), "masks": torch.rand(len(labels), *size) < 0.5}


@pytest.mark.parametrize("labels", [([], []), ([0, 2], [])], ids=["none", "one"])
def test_pictures_without_segments_teach_that_there_is_nothing(labels):
    given = output()
    terms = SegmentationLoss(CONFIG)(given, [target(one) for one in labels])
    sum(terms.values()).backward()
    assert given.class_logits.grad.abs().sum() > 0
    assert all(term.isfinite() for term in terms.values())
    if not any(labels):
        assert terms["mask"] == terms["dice"] == 0


def test_perfect_predictions_cost_almost_nothing():
    given = target([2, 0])
    logits = torch.full((1, 4, 4), -20.0)
    logits[0, 0, 0], logits[0, 1, 2] = 20, 20
    logits[0, 2:, 3] = 20
    masks = torch.cat([given["masks"].flip(0).float() * 40 - 20, torch.full((2, 16, 16), -20.0)])[None]
    terms = SegmentationLoss(LossConfig(num_points=64, oversample=1.0, importance=0.0))(
        OneFormerOutput(logits, masks, [], torch.zeros(1, 4, 4)), [given]
    )
    assert terms["class"] < 1e-3
    pairs = match(logits, masks, [given], CONFIG)
    assert [part.tolist() for part in pairs[0]] == [[0, 1], [1, 0]]


def test_the_best_match_is_the_best_of_all():
    given, predicted = target([0, 1, 1]), output(4, batch=1)
    logits, masks = predicted.class_logits[0], predicted.mask_logits[0]
    torch.manual_seed(1)
    matrix = cost(logits, masks, given, CONFIG)
    torch.manual_seed(1)
    ((queries, segments),) = match(logits[None], masks[None], [given], CONFIG)
    least = min(
        sum(matrix[query, segment] for segment, query in enumerate(chosen)).item()
        for chosen in torch.cartesian_prod(*[torch.arange(4)] * 3).tolist()
        if len(set(chosen)) == 3
    )
    assert matrix[queries, segments].sum().item() == pytest.approx(least, abs=1e-5)


def test_a_diverged_model_is_matched_somehow():
    given = output()
    with torch.no_grad():
        given.mask_logits[:, 1] = float("nan")
        given.class_logits[:, 2] = float("inf")
    for queries, segments in match(given.class_logits, given.mask_logits, [target([0, 1]), target([2])], CONFIG):
        assert len(queries) == len(segments)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([target([0])], "targets must be one per image, got 1 for 2"),
        ([target([0]), target([3])], r"targets\[1\]: labels must be from 0 to 2, got 3"),
        ([target([-1]), target([0])], r"targets\[0\]: labels must be from 0 to 2, got -1"),
        ([target([0]), target([1], (8, 8))], "masks of one batch must be as large as its images"),
        ([target([0]), {"labels": torch.tensor([1, 2]), "masks": torch.ones(1, 16, 16)}], r"got \(2,\) and \(1, 16"),
    ],
)
def test_wrong_targets_are_a_sentence(targets, message):
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(CONFIG)(output(), targets)


@pytest.mark.parametrize("options", [{"num_points": 0}, {"oversample": 0.5}, {"importance": 1.5}])
def test_a_wrong_way_of_sampling_is_a_sentence(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be|importance from 0 to 1"):
        LossConfig(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_are_computed_in_float32_at_least(dtype):
    given = output()
    exact = OneFormerOutput(given.class_logits.double(), given.mask_logits.double(), [], given.object_queries)
    rough = OneFormerOutput(given.class_logits.to(dtype), given.mask_logits.to(dtype), [], given.object_queries)
    targets = [target([0, 2]), target([1])]
    found = []
    for one in (rough, exact):
        torch.manual_seed(1)
        found.append(SegmentationLoss(CONFIG)(one, targets))
    for name, term in found[0].items():
        assert term.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(term.double(), found[1][name], rtol=0.02, atol=0.02)


def test_the_contrast_is_symmetric_and_grows_with_confusion():
    torch.manual_seed(0)
    queries = torch.randn(3, 4, 8)
    scale = torch.tensor(14.0).log()
    same = contrastive_loss(queries, queries, scale)
    mixed = contrastive_loss(queries, queries.roll(1, 0), scale)
    assert same < 1 < mixed
    texts = torch.randn(3, 4, 8)
    torch.testing.assert_close(contrastive_loss(queries, texts, scale), contrastive_loss(texts, queries, scale))
    # the scale is clamped at 100
    torch.testing.assert_close(
        contrastive_loss(queries, texts, torch.tensor(9.0)), contrastive_loss(queries, texts, torch.tensor(100.0).log())
    )


def test_the_text_encoder_is_causal_as_published():
    torch.manual_seed(0)
    text = torch.randint(1, 50, (1, 2, 9))
    text[..., 4] = 59  # the end, behind which nothing is read
    behind = text.clone()
    behind[..., 5:] = 7
    for is_causal in (True, False):
        mapper = TextMapper(TextConfig(64, 1, 60, 9, 2, is_causal), 16).eval()
        torch.nn.init.normal_(mapper.words.weight)
        assert torch.allclose(mapper(text), mapper(behind), atol=1e-5) == is_causal


def _one_process(rank, path, found):
    distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    objects, texts = (tensor[2 * rank : 2 * rank + 2].clone().requires_grad_() for tensor in _queries())
    loss = contrastive_loss(objects, texts, torch.tensor(2.0))
    loss.backward()
    count = segment_count([{"labels": torch.zeros(rank + 1)}], torch.device("cpu"))
    found.put((rank, loss.item(), objects.grad.numpy(), count.item()))
    distributed.barrier()
    distributed.destroy_process_group()


def _queries():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 8, generator=generator), torch.randn(4, 3, 8, generator=generator)


@pytest.mark.slow
def test_two_processes_compare_all_pictures(tmp_path):
    objects, texts = _queries()
    objects.requires_grad_()
    whole = contrastive_loss(objects, texts, torch.tensor(2.0))
    whole.backward()
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    workers = [context.Process(target=_one_process, args=(rank, tmp_path / "meet", found)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers = sorted([found.get(timeout=120) for _ in workers], key=lambda answer: answer[0])
    for worker in workers:
        worker.join(60)
    assert sum(answer[1] for answer in answers) / 2 == pytest.approx(whole.item(), abs=1e-5)
    # gradients are averaged over processes afterwards, as data parallel training does
    gradient = torch.cat([torch.from_numpy(answer[2]) for answer in answers]) / 2
    torch.testing.assert_close(gradient, objects.grad, rtol=1e-4, atol=1e-6)
    assert [answer[3] for answer in answers] == [1.5, 1.5]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"labels": torch.tensor([])}, r"targets\[0\]: labels must be int32 or int64, got torch.float32"),
        ({"labels": torch.tensor([1], dtype=torch.uint8)}, "labels must be int32 or int64, got torch.uint8"),
        ({"masks": torch.full((1, 16, 16), 255, dtype=torch.uint8)}, "masks must be bool, or from 0 to 1"),
        ({"masks": torch.full((1, 16, 16), torch.nan)}, "masks must be bool, or from 0 to 1"),
        ({"masks": None}, "must have tensors labels and masks, but has none as masks"),
    ],
)
def test_targets_of_other_kinds_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        SegmentationLoss(CONFIG)(output(batch=1), [target([1]) | wrong])
