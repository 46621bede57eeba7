"""Panoptic data: made scenes, the real formats on small made files, jitter, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vicinal.data.augment import ColorJitter, Flip, Resize
from vicinal.data.dataset import DataMissing
from vicinal.data.jitter import OnColors, ScaleJitter, ShortSide
from vicinal.data.layers import VOID, layered, of_masks
from vicinal.data.panoptic_files import Ade20k, Cityscapes, CocoPanoptic
from vicinal.data.scenes import CLASSES, Scenes
from vicinal.data.sources import SOURCES
from vicinal.data.sprites import COINS, KINDS, SIGNS, sprites
from vicinal.data.stream import Stream


def test_scenes_are_a_function_of_seed_and_number():
    first, again, other = (Scenes(size=48, seed=seed).open("train") for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.read(5)[0], again.read(5)[0])
    assert (first.read(5)[0] != other.read(5)[0]).any()
    assert (first.read(5)[0] != first.read(6)[0]).any()


def test_training_and_test_scenes_share_no_object():
    for signs in SIGNS.values():
        assert not set(signs["train"]) & set(signs["test"])
    assert not set(COINS["train"]) & set(COINS["test"])
    for kind in KINDS:
        for one in sprites("train")[kind]:
            assert all((one.paint != other.paint).any() for other in sprites("test")[kind])


def test_scenes_have_a_class_for_every_pixel_and_an_instance_for_every_thing():
    data = Scenes(size=64).open("test")
    seen = set()
    for index in range(40):
        labels, instances = data.read(index)[0][..., 3], data.read(index)[0][..., 4]
        seen |= set(np.unique(labels).tolist())
        assert ((instances > 0) == (labels < len(KINDS))).all()
        for number in range(1, int(instances.max()) + 1):
            assert len(np.unique(labels[instances == number])) == 1
    assert seen == set(range(len(CLASSES)))
    with pytest.raises(IndexError):
        data.read(len(data))


def test_scenes_come_as_batches_with_their_truth():
    stream = Stream(Scenes(size=48).open("train"), (Flip(), OnColors(ColorJitter(0.3))), batch_size=3, seed=1)
    batch = next(stream.training(2))
    assert batch.images.shape == (3, 6, 48, 48)


def picture(folder: Path, size: tuple[int, int], name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)


def save(numbers: np.ndarray, path: Path, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers.astype(dtype)).save(path)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    numbers = np.zeros((6, 8), np.int64)
    numbers[:, 2:4], numbers[:, 4:6], numbers[:, 6:] = 70000, 300, 5
    categories = [
        {"id": 1, "name": "person", "isthing": 1},
        {"id": 44, "name": "bottle", "isthing": 1},
        {"id": 92, "name": "banner", "isthing": 0},
    ]
    segments = [
        {"id": 70000, "category_id": 1, "iscrowd": 0},
        {"id": 300, "category_id": 1, "iscrowd": 1},
        {"id": 5, "category_id": 92, "iscrowd": 0},
    ]
    for split in ("train2017", "val2017"):
        picture(tmp_path / split, (6, 8), "000007.jpg")
        colors = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], -1)
        save(colors, tmp_path / "annotations" / f"panoptic_{split}" / "000007.png")
        content = {
            "images": [{"id": 7, "file_name": "000007.jpg", "height": 6, "width": 8}],
            "annotations": [{"image_id": 7, "file_name": "000007.png", "segments_info": segments}],
            "categories": categories,
        }
        (tmp_path / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_panoptic_is_read(coco):
    data = CocoPanoptic(str(coco)).open("train")
    assert data.info.classes == ("person", "bottle", "banner")
    assert data.info.things == ("person", "bottle")
    layers, index = data.read(0)
    assert (index, layers.shape) == (0, (6, 8, 6))
    assert layers[0, ::2, 3].tolist() == [VOID, 0, 0, 2]
    assert layers[0, ::2, 4].tolist() == [0, 1, 2, 0]
    assert layers[0, ::2, 5].tolist() == [0, 0, 128, 0]


def test_what_is_wrong_with_coco_files_is_named(coco):
    maps = coco / "annotations" / "panoptic_val2017" / "000007.png"
    whole = maps.read_bytes()
    source = CocoPanoptic(str(coco))
    maps.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataMissing, match=r"000007.png cannot be read .* repair or remove it"):
        source.open("test").read(0)
    save(np.full((6, 8, 3), 9), maps)
    with pytest.raises(DataMissing, match="has a segment 592137 that its list does not name"):
        source.open("test").read(0)
    maps.write_bytes(whole)
    photograph = coco / "val2017" / "000007.jpg"
    photograph.write_bytes(photograph.read_bytes()[:200])
    with pytest.raises(DataMissing, match=r"000007.jpg cannot be read as a picture"):
        source.open("test").read(0)
    picture(coco / "val2017", (7, 8), "000007.jpg")
    with pytest.raises(DataMissing, match=r"the picture is \(7, 8\), but the map of classes is \(6, 8\)"):
        source.open("test").read(0)
    file = coco / "annotations" / "panoptic_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segments_info"][0]["category_id"] = 3
    file.write_text(json.dumps(content))
    with pytest.raises(DataMissing, match="3 is missing"):
        source.open("test")
    file.write_text(file.read_text()[:40])
    with pytest.raises(DataMissing, match="cannot be read as a panoptic file"):
        source.open("test")
    with pytest.raises(DataMissing, match="there is no"):
        CocoPanoptic(str(coco), year="2014").open("test")


def test_cityscapes_is_read(tmp_path):
    numbers = np.array([[7, 3, 26000, 26001], [11, 26, 24002, 30001]])  # 3 and 30 are not evaluated
    for split in ("train", "val"):
        picture(tmp_path / "leftImg8bit" / split / "aachen", (2, 4), "aachen_0_leftImg8bit.png")
        save(numbers, tmp_path / "gtFine" / split / "aachen" / "aachen_0_gtFine_instanceIds.png", np.uint16)
    data = Cityscapes(str(tmp_path)).open("test")
    layers = data.read(0)[0]
    assert layers[..., 3].tolist() == [[0, VOID, 13, 13], [2, 13, 11, VOID]]
    numbers = layers[..., 4] + 256 * (layers[..., 5].astype(int) & 127)
    assert numbers.tolist() == [[0, 0, 1, 2], [0, 1001, 3, 0]]
    assert (layers[..., 5] >> 7).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert len(data.info.classes) == 19
    assert data.info.things[0] == "person"
    assert len(data.info.things) == 8
    (tmp_path / "gtFine" / "val" / "aachen" / "aachen_0_gtFine_instanceIds.png").unlink()
    with pytest.raises(DataMissing, match="there is no label map"):
        data.read(0)


def ade(folder: Path) -> None:
    for split in ("training", "validation"):
        picture(folder / "images" / split, (2, 4), "ADE_0.jpg")
        save(np.array([[0, 1, 2, 2], [1, 3, 2, 2]]), folder / "annotations" / split / "ADE_0.png")
        parts = np.zeros((2, 4, 3), np.int64)
        parts[0, 2], parts[0, 3] = (5, 1, 0), (5, 2, 0)
        save(parts, folder / "annotations_instance" / split / "ADE_0.png")
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t1\t1\twall", "2\t0.1\t1\t1\tbed, cot", "3\t0.1\t1\t1\tsky"]
    (folder / "objectInfo150.txt").write_text("\n".join(rows))
    (folder / "categoryMapping.txt").write_text("instance scene name\n5 2 bed\n")


def test_ade20k_is_read(tmp_path):
    ade(tmp_path)
    data = Ade20k(str(tmp_path)).open("train")
    assert data.info.classes == ("wall", "bed", "sky")
    assert data.info.things == ("bed",)
    layers = data.read(0)[0]
    assert layers[..., 3].tolist() == [[VOID, 0, 1, 1], [0, 2, VOID, VOID]]
    assert layers[0, :, 4].tolist() == [0, 0, 2, 3]
    (tmp_path / "categoryMapping.txt").write_text("6 2 bed\n")
    with pytest.raises(DataMissing, match="things of class 5, which is in no list"):
        Ade20k(str(tmp_path)).open("train").read(0)
    (tmp_path / "categoryMapping.txt").write_text("5 200 bed\n")
    with pytest.raises(DataMissing, match="class 200 is not in objectInfo150"):
        Ade20k(str(tmp_path)).open("train")
    (tmp_path / "annotations" / "training" / "ADE_0.png").unlink()
    save(np.full((2, 4), 9), tmp_path / "annotations" / "training" / "ADE_0.png")
    (tmp_path / "categoryMapping.txt").write_text("5 2 bed\n")
    with pytest.raises(DataMissing, match=r"labels must be in 0 .. 2 or 255 for void, got 8"):
        Ade20k(str(tmp_path)).open("train").read(0)


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "coco_panoptic"])
def test_absent_data_say_what_to_do(name, tmp_path):
    source = type(SOURCES[name])(str(tmp_path))
    assert not any(look.found for look in source.look())
    with pytest.raises(DataMissing, match=r"data\.folder=FOLDER"):
        source.open("train")


def test_truth_that_does_not_fit_is_named():
    flat, colors = np.zeros((4, 4), np.int64), np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(DataMissing, match=r"labels must be in 0 .. 2 or 255 for void, got 3"):
        layered(colors, flat + 3, flat, classes=3)
    with pytest.raises(DataMissing, match="instances must be in 0"):
        layered(colors, flat, flat + 40000)
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :3], masks[1, 2:] = True, True
    with pytest.raises(DataMissing, match=r"masks overlap in 4 pixels, such as \(2, 0\) of masks 0 and 1"):
        of_masks(colors, masks, np.array([0, 1]))


def test_truth_is_not_mixed_by_steps_for_plain_pictures():
    with pytest.raises(ValueError, match="layered pictures, whose truth must not be mixed"):
        Resize(20)(np.zeros((8, 8, 6), np.uint8), np.random.default_rng(0))


@pytest.mark.parametrize("step", [ScaleJitter((40, 56), (0.3, 2.0)), ShortSide((24, 80), 100, crop=(40, 56))])
def test_jitter_moves_truth_with_colors(step):
    image = np.zeros((30, 50, 6), np.uint8)
    image[:, 20:35, :3], image[:, 20:35, 3], image[:, 20:35, 4] = 200, 3, 7
    sizes = set()
    for seed in range(20):
        moved = step(image, np.random.default_rng(seed))
        assert moved.shape == (40, 56, 6)
        inside = moved[..., 3] == 3
        assert ((moved[..., 4] == 7) == inside).all()
        assert set(np.unique(moved[..., 3]).tolist()) <= {0, 3, VOID}
        assert (moved[moved[..., 3] == VOID][:, :3] == 128).all()
        if inside.any():
            assert moved[inside][:, 0].mean() > 150
        sizes.add(int(inside.sum()))
    assert len(sizes) > 1
