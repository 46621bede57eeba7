"""`vicinal segment`: pictures of every kind, videos, files that are written, and clear words."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vicinal.cli.main import main
from vicinal.data import Digits
from vicinal.data.panoptic_files import CITYSCAPES
from vicinal.data.scenes import CLASSES, Scenes
from vicinal.data.video import Video, Writer
from vicinal.models.compact import CompactConfig
from vicinal.models.oneformer import OneFormerConfig
from vicinal.tasks import Classification, Rules, Segmentation
from vicinal.tasks.export import mask_of
from vicinal.tasks.postprocess import class_scores
from vicinal.training import Recipe
from vicinal.training.checkpoint import save_weights
from vicinal.training.segmenter import load_published, load_segmenter, segment
from vicinal.training.written import to_plain

BACKBONE = CompactConfig("dinat", dim=16, depths=(0, 1, 1, 1, 1), kernel_size=3, in_channels=3)
TINY = OneFormerConfig(
    BACKBONE, num_queries=6, dim=32, num_heads=2, pixel_layers=1, pixel_hidden_dim=32, query_layers=1, decoder_layers=1,
    hidden_dim=32,
)  # fmt: skip


def write(path: Path, config: object, data: object) -> Path:
    """Fresh weights of a task as `vicinal train` would leave them."""
    torch.manual_seed(0)
    info = data.open("train").info
    task = config.build(info)
    recipe = Recipe("tiny", "for tests", data, config)
    metadata = {"recipe": json.dumps(to_plain(recipe)), "info": json.dumps(to_plain(info))}
    save_weights(path, task.model.state_dict(), metadata)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    task = Segmentation(TINY, rules=Rules(0.05, 0.0))  # nothing is sure of a fresh model
    return write(tmp_path_factory.mktemp("weights") / "tiny.safetensors", task, Scenes(size=64))


def pixels(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


KINDS = {
    "color.png": lambda path: Image.fromarray(pixels()).save(path),
    "tall.jpg": lambda path: Image.fromarray(pixels(90, 33)).save(path),
    "wide.webp": lambda path: Image.fromarray(pixels(20, 200)).save(path),
    "small.png": lambda path: Image.fromarray(pixels(3, 2)).save(path),
    "gray.png": lambda path: Image.fromarray(pixels()[..., 0]).save(path),
    "alpha.png": lambda path: Image.fromarray(np.dstack([pixels(), pixels()[..., :1]])).save(path),
    "deep.png": lambda path: Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257).save(path),
    "palette.png": lambda path: Image.fromarray(pixels()).quantize(16).save(path),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_every_kind_of_picture_is_segmented(tmp_path, weights, capsys, name, task):
    KINDS[name](tmp_path / name)
    size = read(tmp_path / name).shape[:2]
    out = tmp_path / "out"
    arguments = ["segment", str(tmp_path / name), "--task", task, "--weights", str(weights), "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert json.loads((out / "segments.json").read_text()) == [answer]
    assert (answer["height"], answer["width"]) == size
    assert read(out / answer["files"]["overlay"]).shape == (*size, 3)
    masks = read(out / answer["files"]["masks"]).astype(int)
    assert answer["segments"] or name == "small.png"  # of six pixels a fresh model may be sure of none
    if task == "semantic":
        assert masks.shape == size
        areas = {one["category_id"]: one["area"] for one in answer["segments"]}
        assert areas == dict(zip(*(part.tolist() for part in np.unique(masks, return_counts=True)), strict=True))
        return
    numbers = masks @ np.array([1, 256, 65536])
    for one in answer["segments"]:
        assert one["category"] == CLASSES[one["category_id"]]
        assert 0 < one["score"] <= 1
        if task == "panoptic":
            rows, columns = np.nonzero(numbers == one["id"])
            assert one["area"] == len(rows)
            left, top, width, height = one["bbox"]
            assert (left, top, left + width, top + height) == (
                *(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1),
            )
    if task == "instance":
        coded = json.loads((out / answer["files"]["coco"]).read_text())
        for one, other in zip(answer["segments"], coded, strict=True):
            assert mask_of(other["segmentation"]).sum() == one["area"]
            assert mask_of(other["segmentation"]).shape == size


def test_masks_are_written_as_pycocotools_reads_them(tmp_path, weights, capsys):
    coding = pytest.importorskip("pycocotools.mask")
    KINDS["color.png"](tmp_path / "a.png")
    arguments = ["segment", str(tmp_path / "a.png"), "--task", "instance", "--weights", str(weights), "--out", "x"]
    arguments[-1] = str(tmp_path / "out")
    assert main(arguments) == 0
    coded = json.loads((tmp_path / "out" / "a.coco.json").read_text())
    for one in coded:
        height, width = one["segmentation"]["size"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # theirs, about numpy
            theirs = coding.decode(coding.frPyObjects(one["segmentation"], height, width))
        np.testing.assert_array_equal(theirs.astype(bool), mask_of(one["segmentation"]))
    assert "ms)" in capsys.readouterr().out


def test_a_folder_is_segmented_and_equal_names_are_told_apart(tmp_path, weights, capsys):
    for folder in ("one", "two"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        KINDS["color.png"](tmp_path / "in" / folder / "same.png")
    out = tmp_path / "out"
    assert main(["segment", str(tmp_path / "in"), "--weights", str(weights), "--out", str(out), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [one["files"]["overlay"] for one in answers] == ["same.overlay.png", "same-2.overlay.png"]


def test_a_broken_picture_does_not_cost_the_answers_of_others(tmp_path, weights, capsys):
    for name in ("a.png", "c.png"):
        KINDS["color.png"](tmp_path / name)
    (tmp_path / "b.png").write_text("words")
    arguments = ["segment", str(tmp_path), "--weights", str(weights), "--out", str(tmp_path / "out"), "--json"]
    for _ in range(2):  # the second time the overlays of the first are there, and are no pictures to segment
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert [Path(one["file"]).name for one in json.loads(said.out)] == ["a.png", "c.png"]
        assert json.loads((tmp_path / "out" / "segments.json").read_text())[0]["file"].endswith("a.png")
        assert said.err.count("cannot be read as a picture") == 1 and "b.png" in said.err


def test_a_turned_photograph_is_segmented_as_it_is_looked_at(tmp_path, weights, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels(40, 64)).save(tmp_path / "turned.jpg", exif=exif)
    arguments = ["segment", str(tmp_path / "turned.jpg"), "--weights", str(weights), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert (answer["height"], answer["width"]) == (64, 40)


def test_an_animation_is_segmented_frame_by_frame(tmp_path, weights, capsys):
    with Writer(tmp_path / "moving.gif", rate=4) as writer:
        for shift in range(3):
            writer.add(np.roll(pixels(40, 64), 7 * shift, 1))
    out = tmp_path / "out"
    assert main(["segment", str(tmp_path / "moving.gif"), "--weights", str(weights), "--out", str(out)]) == 0
    assert "3 frames" in capsys.readouterr().out
    assert len(json.loads((out / "moving.frames.json").read_text())) == 3
    video = Video(out / "moving.overlay.gif")
    assert (video.frames, video.rate, next(iter(video)).shape) == (3, 4.0, (40, 64, 3))


def test_a_video_file_is_segmented_frame_by_frame(tmp_path, weights):
    pytest.importorskip("av")
    with Writer(tmp_path / "film.mp4", rate=10) as writer:
        for shift in range(4):
            writer.add(np.roll(np.full((48, 64, 3), 40 * shift, np.uint8), shift, 1))
    out = tmp_path / "out"
    assert main(["segment", str(tmp_path / "film.mp4"), "--weights", str(weights), "--out", str(out)]) == 0
    video = Video(out / "film.overlay.mp4")
    assert (len(list(video)), video.rate, next(iter(video)).shape) == (4, 10.0, (48, 64, 3))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "film.mp4").read_bytes()[:300])
    assert main(["segment", str(tmp_path / "cut.mp4"), "--weights", str(weights), "--out", str(out)]) == 2


def test_views_are_averaged(weights):
    model = load_segmenter(weights)
    picture = pixels(64, 64)
    flipped = segment(model, picture[:, ::-1].copy(), "semantic", flip=True)
    straight = segment(model, picture, "semantic", flip=True)
    np.testing.assert_array_equal(straight.segments.numbers, flipped.segments.numbers.flip(1))
    # two scales by hand, both of which need no padding
    total = torch.zeros(len(CLASSES), 64, 64)
    for size in (64, 128):
        view = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
        classes, masks = model.task.logits(torch.from_numpy(view.copy()).permute(2, 0, 1)[None], "semantic")
        masks = torch.nn.functional.interpolate(masks, (64, 64), mode="bilinear")
        total += class_scores(classes[0], masks[0])
    found = segment(model, picture, "semantic", scales=(1.0, 2.0))
    labels = torch.tensor(found.labels)[found.segments.numbers - 1]
    np.testing.assert_array_equal(labels, total.argmax(0))


def test_what_cannot_be_done_is_said(tmp_path, weights, capsys):
    picture = tmp_path / "a.png"
    KINDS["color.png"](picture)

    def said(*arguments: str) -> str:
        assert main(["segment", *arguments, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    given = ("--weights", str(weights))
    assert "there is no picture, folder or video" in said("nowhere.png", *given)
    (tmp_path / "empty").mkdir()
    assert "holds no picture and no video" in said(str(tmp_path / "empty"), *given)
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:300])
    assert "cut.png cannot be read as a picture" in said(str(cut), *given)
    (tmp_path / "cut.gif").write_bytes(b"GIF89a\0\0")
    assert "cut.gif cannot be read as a video" in said(str(tmp_path / "cut.gif"), *given)
    assert "several scales and flip are for the semantic task, not for panoptic" in said(str(picture), *given, "--flip")
    assert "scales must be above 0" in said(str(picture), *given, "--task", "semantic", "--scales", "0")
    for scale in ("nan", "inf", "9"):
        assert "scales must be above 0 and at most 8" in said(str(picture), *given, "--scales", scale)
    assert "at most 8192" in said(str(picture), *given, "--size", "100000")
    assert "--names is for published weights" in said(str(picture), *given, "--names", str(picture))
    assert main(["segment", str(picture), *given, "--out", str(picture)]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
    assert "size must be at least 32" in said(str(picture), *given, "--size", "8")
    assert "rules.least_score must be in 0 .. 1" in said(str(picture), *given, "--score", "7")
    assert "there is no" in said(str(picture), "--weights", str(tmp_path / "none.safetensors"))
    digits = write(tmp_path / "digits.safetensors", Classification(CompactConfig(dim=16, depths=(1,))), Digits())
    assert "is of a ClassificationTask, which finds no segments" in said(str(picture), "--weights", str(digits))
    assert "--model names the layout of published weights" in said(str(picture), "--model", "oneformer_swin_large_coco")
    plain = tmp_path / "plain.safetensors"
    save_weights(plain, {"a": torch.zeros(1)}, {})
    assert "does not say which recipe it is of" in said(str(picture), "--weights", str(plain))
    names = tmp_path / "names.txt"
    names.write_text("wall\n* bed\n")
    asked = ("--model", "oneformer_swin_large_cityscapes", "--weights", str(plain), "--names", str(names))
    assert "19 classes, but 2 names are given: these weights are of another data set" in said(str(picture), *asked)


def test_a_model_of_some_tasks_says_which(tmp_path):
    config = Segmentation(TINY, tasks=("semantic",))
    model = load_segmenter(write(tmp_path / "one.safetensors", config, Scenes(size=64)))
    with pytest.raises(ValueError, match="was trained for semantic alone, not panoptic"):
        segment(model, pixels(), "panoptic")


def test_weights_are_measured_on_their_own_classes_alone(tmp_path, weights, capsys):
    from vicinal.training.trained import measured, opened

    _, info, task, _ = opened(weights)
    digits = Recipe("other", "for tests", Digits(), Classification(CompactConfig(dim=16, depths=(1,))))
    with pytest.raises(ValueError, match="trained on scenes with 10 classes, but digits has 10; they differ in 0"):
        measured(task, info, digits)
    assert main(["evaluate", str(weights), "data.test=3", "loop.batch_size=2", "--json"]) == 0
    assert {"pq", "miou", "ap"} <= set(json.loads(capsys.readouterr().out))


def test_published_weights_are_taken_by_the_name_of_their_model(tmp_path, monkeypatch):
    from vicinal.models.oneformer import OneFormer, swin
    from vicinal.models.registry import families

    small = OneFormerConfig("swin_tiny", {}, 5, 19, dim=32, num_heads=2, pixel_layers=1, decoder_layers=1)
    families.cache_clear() if hasattr(families, "cache_clear") else None
    name = "oneformer_swin_large_cityscapes"
    monkeypatch.setitem(swin.VARIANTS, name, small)
    torch.manual_seed(0)
    model = OneFormer(small)
    save_weights(tmp_path / "published.safetensors", model.state_dict(), {})
    taken = load_published(name, tmp_path / "published.safetensors")
    assert taken.info.classes == tuple(CITYSCAPES.values())
    assert (taken.short, taken.most, taken.task.config.rules) == (1024, 2048, Rules(0.8, 0.8, 150))
    found = segment(taken, pixels(), "semantic", size=64)
    assert set(found.labels) <= set(range(19))
