"""mIoU, AP and PQ against independent implementations on random scenes: empty ones, crowds, void, ties."""

from __future__ import annotations

import contextlib
import io
import math
import warnings

import numpy as np
import pytest
import torch

from vicinal.metrics import AveragePrecision, Instances, MeanIoU, PanopticQuality, Segments, Tallies

CLASSES, SIZE = 4, (19, 23)


def random_map(generator: np.random.Generator, most: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Numbers `[height, width]` of 0 (void) .. n, every number somewhere; rectangles over rectangles."""
    count = int(generator.integers(0, most + 1))
    numbers = np.zeros(size, np.int64)
    for number in range(1, count + 1):
        top, left = generator.integers(size[0]), generator.integers(size[1])
        numbers[top : top + 1 + generator.integers(14), left : left + 1 + generator.integers(14)] = number
    _, numbers = np.unique(np.concatenate([[0], numbers.ravel()]), return_inverse=True)
    return numbers[1:].reshape(size)


def random_segments(generator: np.random.Generator, crowds: bool = False) -> Segments:
    numbers = random_map(generator, 6)
    count = int(numbers.max())
    crowd = torch.from_numpy(generator.random(count) < (0.3 if crowds else 0.0))
    return Segments(torch.from_numpy(numbers), torch.from_numpy(generator.integers(0, CLASSES, count)), crowd)


def disturbed(truth: Segments, generator: np.random.Generator) -> Segments:
    """A prediction near the truth: shifted, some segments lost, some renamed, some on void."""
    numbers = truth.numbers.numpy().copy()
    empty = numbers == 0
    numbers = np.roll(numbers, generator.integers(-1, 2, 2), (0, 1))
    if generator.random() < 0.5:
        numbers[empty & (generator.random(numbers.shape) < 0.7)] = int(numbers.max()) + 1
    for number in range(1, int(numbers.max()) + 1):
        if generator.random() < 0.2:
            numbers[numbers == number] = 0
    kept, numbers = np.unique(np.concatenate([[0], numbers.ravel()]), return_inverse=True)
    labels = [
        int(truth.labels[old - 1]) if old <= len(truth.labels) and generator.random() < 0.8 else generator.integers(4)
        for old in kept[1:]
    ]
    return Segments(torch.from_numpy(numbers[1:].reshape(SIZE)), torch.tensor(labels, dtype=torch.long))


def pq_by_loops(pairs: list[tuple[Segments, Segments]]) -> np.ndarray:
    """The rules of the panoptic task, pixel by pixel in Python: `[classes, (overlap, hits, wrong, missed)]`."""
    sums = np.zeros((CLASSES, 4))
    for found, truth in pairs:
        pixels = list(zip(found.numbers.flatten().tolist(), truth.numbers.flatten().tolist(), strict=True))
        taken, matched = set(), set()
        for true in range(1, len(truth.labels) + 1):
            for mine in range(1, len(found.labels) + 1):
                both = sum(pixel == (mine, true) for pixel in pixels)
                union = sum(a == mine or b == true for a, b in pixels) - sum(pixel == (mine, 0) for pixel in pixels)
                same = truth.labels[true - 1] == found.labels[mine - 1]
                if both and same and not truth.crowd[true - 1] and both / union > 0.5:
                    sums[truth.labels[true - 1], 0] += both / union
                    sums[truth.labels[true - 1], 1] += 1
                    taken.add(mine)
                    matched.add(true)
        for true in range(1, len(truth.labels) + 1):
            if true not in matched and not truth.crowd[true - 1]:
                sums[truth.labels[true - 1], 3] += 1
        for mine in range(1, len(found.labels) + 1):
            label = int(found.labels[mine - 1])
            crowds = [n for n in range(1, len(truth.labels) + 1) if truth.crowd[n - 1] and truth.labels[n - 1] == label]
            area = sum(a == mine for a, _ in pixels)
            free = sum(a == mine and (b == 0 or b in crowds[-1:]) for a, b in pixels)
            if mine not in taken and area and free / area <= 0.5:
                sums[label, 2] += 1
    return sums


@pytest.mark.parametrize("crowds", [False, True])
def test_panoptic_quality_equals_the_rules_by_loops(crowds):
    generator = np.random.default_rng(int(crowds))
    pairs = []
    for _ in range(25):
        truth = random_segments(generator, crowds)
        pairs.append((disturbed(truth, generator), truth))
    metric = PanopticQuality(CLASSES, frozenset({0, 1}))
    tally = metric.tally(*zip(*pairs, strict=True))
    expected = pq_by_loops(pairs)
    np.testing.assert_allclose(tally.numpy(), expected, rtol=0, atol=1e-12)
    assert expected[:, 1].min() > 0
    quality = expected[:, 0] / (expected[:, 1] + expected[:, 2] / 2 + expected[:, 3] / 2)
    values = metric.values(tally)
    assert values["pq"] == pytest.approx(quality.mean(), abs=1e-12)
    assert values["pq_things"] == pytest.approx(quality[:2].mean(), abs=1e-12)
    assert values["pq_stuff"] == pytest.approx(quality[2:].mean(), abs=1e-12)


def test_panoptic_quality_equals_torchmetrics_without_crowds():
    detection = pytest.importorskip("torchmetrics.detection")
    generator = np.random.default_rng(3)
    theirs = detection.PanopticQuality(things={0, 1, 2, 3, 4}, stuffs={9}, allow_unknown_preds_category=True)
    pairs = []
    for _ in range(20):
        truth = random_segments(generator)
        found = disturbed(truth, generator)
        # they excuse what lies on predicted void, which the task's own rules do not: so nothing is predicted void
        whole = torch.where(found.numbers == 0, len(found.labels) + 1, found.numbers)
        found = Segments(whole, torch.cat([found.labels, torch.tensor([4])]))
        pairs.append((found, truth))
        unknown = torch.tensor([77])  # which they take for void
        maps = [torch.cat([unknown, one.labels])[one.numbers] for one in (found, truth)]
        theirs.update(
            *(torch.stack([labels, one.numbers], -1)[None] for labels, one in zip(maps, pairs[-1], strict=True))
        )
    metric = PanopticQuality(5)
    value = metric.value(metric.tally(*zip(*pairs, strict=True)))
    assert value == pytest.approx(float(theirs.compute()), abs=1e-6)
    assert 0.2 < value < 0.8


def test_panoptic_quality_of_nothing_is_no_number_and_of_no_prediction_is_zero():
    metric = PanopticQuality(CLASSES)
    empty = Segments(torch.zeros(4, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    one = Segments(torch.ones(4, 4, dtype=torch.long), torch.tensor([2]))
    assert math.isnan(metric.value(metric.tally([empty], [empty])))
    assert metric.value(metric.tally([empty], [one])) == 0.0
    assert metric.value(metric.tally([one], [one])) == 1.0
    assert metric.tally([one], [empty])[:, 2].sum() == 0  # all of it on void


def random_instances(generator: np.random.Generator, most: int, scored: bool, size: tuple[int, int]) -> Instances:
    count = int(generator.integers(0, most + 1))
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        top, left = generator.integers(size[0] - 2), generator.integers(size[1] - 2)
        mask[top : top + 2 + generator.integers(size[0]), left : left + 2 + generator.integers(size[1])] = True
    labels = torch.from_numpy(generator.integers(0, CLASSES, count))
    if not scored:
        return Instances(torch.from_numpy(masks), labels, None, torch.from_numpy(generator.random(count) < 0.2))
    return Instances(torch.from_numpy(masks), labels, torch.from_numpy(generator.integers(1, 9, count) / 9))


def moved(truth: Instances, generator: np.random.Generator) -> Instances:
    """Predictions near the truth, some twice, with scores that tie."""
    shifts = generator.integers(-3, 4, (2 * len(truth), 2))
    masks = [np.roll(mask, shift, (0, 1)) for mask, shift in zip(truth.masks.numpy().repeat(2, 0), shifts, strict=True)]
    kept = generator.random(len(masks)) < 0.6
    found = np.array(masks, bool).reshape(-1, *truth.masks.shape[1:])[kept]
    labels = truth.labels.repeat_interleave(2)[torch.from_numpy(kept)]
    return Instances(torch.from_numpy(found), labels, torch.from_numpy(generator.integers(1, 6, len(labels)) / 6))


def coco_values(pairs: list[tuple[Instances, Instances]], most: int = 100) -> list[float]:
    """pycocotools' AP, AP50, AP75 and AP by size; -1 of what does not occur."""
    coco_module = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    encode = pytest.importorskip("pycocotools.mask").encode
    truths, found, size = [], [], pairs[0][0].masks.shape[1:]
    for picture, (mine, true) in enumerate(pairs):
        for place, mask in enumerate(true.masks.numpy()):
            coded = encode(np.asfortranarray(mask.astype(np.uint8)))
            facts = {"image_id": picture, "category_id": int(true.labels[place]) + 1, "segmentation": coded}
            area = int(mask.sum())
            truths.append({"id": len(truths) + 1, "area": area, "iscrowd": int(true.crowd[place]), **facts})
        for place, mask in enumerate(mine.masks.numpy()):
            coded = encode(np.asfortranarray(mask.astype(np.uint8)))
            facts = {"image_id": picture, "category_id": int(mine.labels[place]) + 1, "segmentation": coded}
            found.append({"score": float(mine.scores[place]), **facts})
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = coco_module.COCO()
        truth.dataset = {
            "images": [{"id": number, "height": size[0], "width": size[1]} for number in range(len(pairs))],
            "categories": [{"id": number + 1} for number in range(CLASSES)],
            "annotations": truths,
        }
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(found), "segm")
        run.params.maxDets = [1, 1, most]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"]  # thresholds, recalls, classes, sizes, most
    cuts = [precision[..., 0, -1], precision[0, ..., 0, -1], precision[5, ..., 0, -1]]
    cuts += [precision[..., size, -1] for size in (1, 2, 3)]
    return [float(cut[cut > -1].mean()) if (cut > -1).any() else math.nan for cut in cuts]


@pytest.mark.parametrize(("size", "most", "near"), [((41, 53), 6, True), ((130, 120), 5, True), ((20, 20), 9, False)])
def test_average_precision_equals_pycocotools(size, most, near):
    generator = np.random.default_rng(most)
    pairs = []
    for _ in range(20):
        truth = random_instances(generator, most, False, size)
        found = moved(truth, generator) if near else random_instances(generator, most, True, size)
        pairs.append((found, truth))
    assert any(len(found) == 0 for found, _ in pairs)
    assert any(bool(truth.crowd.any()) for _, truth in pairs)
    metric = AveragePrecision(CLASSES)
    values = metric.values(metric.tally(*zip(*pairs, strict=True), range(len(pairs))))
    np.testing.assert_allclose(list(values.values()), coco_values(pairs), rtol=0, atol=1e-9)
    if near:
        assert 0.1 < values["ap"] < 0.95


def test_average_precision_takes_the_best_of_each_class_in_a_picture():
    generator = np.random.default_rng(0)
    truth = random_instances(generator, 9, False, (41, 53))
    pairs = [(moved(truth, generator), truth) for _ in range(5)]
    metric = AveragePrecision(CLASSES, most=2)
    values = metric.values(metric.tally(*zip(*pairs, strict=True), range(5)))
    np.testing.assert_allclose(list(values.values()), coco_values(pairs, most=2), rtol=0, atol=1e-9)


def test_average_precision_does_not_depend_on_batches():
    generator = np.random.default_rng(1)
    truths = [random_instances(generator, 5, False, (30, 30)) for _ in range(9)]
    found = [moved(truth, generator) for truth in truths]
    metric = AveragePrecision(CLASSES)
    whole = metric.tally(found, truths, range(9))
    pieces = metric.tally(found[5:], truths[5:], range(5, 9)) + metric.tally(found[:5], truths[:5], range(5))
    assert metric.values(whole) == metric.values(pieces.gathered())
    extra = metric.tally([*found, found[0]], [*truths, truths[0]], range(10), torch.tensor([1.0] * 9 + [0.0]))
    assert metric.values(extra) == metric.values(whole)


def test_average_precision_of_nothing_is_no_number_and_of_no_prediction_is_zero():
    metric = AveragePrecision(CLASSES)
    none = Instances(torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    one = Instances(torch.ones(1, 4, 4, dtype=torch.bool), torch.tensor([2]))
    assert math.isnan(metric.value(metric.tally([none], [none], [0])))
    assert metric.value(metric.tally([none], [one], [0])) == 0.0


@pytest.mark.parametrize("has_void", [False, True])
def test_mean_iou_equals_torchmetrics(has_void):
    classification = pytest.importorskip("torchmetrics.classification")
    truth, found = torch.randint(0, 5, (6, 17, 11)), torch.randint(0, 5, (6, 17, 11))
    found = torch.where(torch.rand(truth.shape) < 0.6, truth, found)
    if has_void:
        truth[torch.rand(truth.shape) < 0.3] = 255
    theirs = classification.MulticlassJaccardIndex(7, ignore_index=255)  # two classes that never occur
    metric = MeanIoU(7)
    assert metric.value(metric.tally(found, truth)) == pytest.approx(float(theirs(found, truth)), abs=1e-6)


def test_mean_iou_adds_up_and_counts_void_predictions_as_misses():
    truth, found = torch.randint(0, 3, (6, 9, 7)), torch.randint(0, 3, (6, 9, 7))
    found[0, :4] = 255
    whole, pieces = Tallies({"miou": MeanIoU(3)}), Tallies({"miou": MeanIoU(3)})
    whole.add(found, truth)
    for part in torch.arange(6).split([1, 3, 2]):
        pieces.add(found[part], truth[part])
    assert whole.values() == pieces.values()
    expected = []
    for label in range(3):
        here, there = found == label, truth == label
        expected.append(float((here & there).sum() / (here | there).sum()))
    assert whole.values()["miou"] == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert math.isnan(MeanIoU(3).value(MeanIoU(3).tally(found, torch.full_like(truth, 255))))


def test_what_does_not_fit_is_named():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :3], masks[1, 2:] = True, True
    with pytest.raises(ValueError, match=r"must not overlap: 4 pixels .* \(2, 0\) in masks 0 and 1"):
        Segments.of_masks(masks, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="numbers must be 0"):
        Segments(torch.full((2, 2), 3), torch.tensor([0, 1]))
    metric = PanopticQuality(2)
    odd, good = (
        Segments(torch.ones(2, 2, dtype=torch.long), torch.tensor([2])),
        Segments.of_masks(torch.ones(1, 2, 2, dtype=torch.bool), torch.tensor([1])),
    )
    with pytest.raises(ValueError, match=r"predicted labels must be in 0 .. 1, got 2"):
        metric.tally([odd], [good])
    with pytest.raises(ValueError, match=r"true labels must be in 0 .. 1, got 2"):
        metric.tally([good], [odd])
    with pytest.raises(ValueError, match=r"true class maps must hold 0 .. 2 or 255 for void, got 3"):
        MeanIoU(3).tally(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), 3))
    with pytest.raises(ValueError, match="need scores"):
        AveragePrecision(1).tally(
            [Instances(masks, torch.tensor([0, 0]))], [Instances(masks, torch.tensor([0, 0]))], [0]
        )
    with pytest.raises(ValueError, match="of one size"):
        metric.tally([good], [Segments.of_masks(torch.ones(1, 3, 2, dtype=torch.bool), torch.tensor([1]))])


def gather(rank: int, address: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    generator = np.random.default_rng(1)
    truths = [random_instances(generator, 5, False, (30, 30)) for _ in range(6)]
    found = [moved(truth, generator) for truth in truths]
    metric = AveragePrecision(CLASSES)
    mine = metric.tally(found[rank::2], truths[rank::2], range(rank, 6, 2))
    queue.put((metric.values(mine.gathered())["ap"], metric.value(metric.tally(found, truths, range(6)))))
    torch.distributed.destroy_process_group()


def test_average_precision_over_two_processes_is_that_of_one(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    address = f"file://{tmp_path / 'meet'}"
    workers = [context.Process(target=gather, args=(rank, address, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for _ in workers:
        gathered, whole = queue.get()
        assert gathered == whole
