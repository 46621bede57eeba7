"""`vicinal generate`: the same bits for a seed, every kind of output, its JSON, and a sentence for each mistake."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vicinal
from vicinal.cli import generate
from vicinal.cli.main import BAD_REQUEST, main
from vicinal.data.dataset import DataMissing
from vicinal.data.picture import read_picture
from vicinal.recipes import shipped

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small generator's weights, untrained but lively, in the container of the released files."""
    torch.manual_seed(0)
    model = vicinal.create_model("stylenat_fashion32")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "affine" not in name and "mapper" not in name:
            parameter.data.normal_(0, 0.15)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save({"g_ema": model.state_dict()}, path)
    return str(path)


def run(*arguments):
    return main(["generate", *map(str, arguments)])


def test_a_seed_gives_the_same_bits_in_any_call(weights, tmp_path, capsys):
    assert run("--weights", weights, "--count", 20, "--out", tmp_path / "a") == 0
    assert run("--weights", weights, "--seed", 17, "--count", 5, "--out", tmp_path / "b") == 0
    first, second = tmp_path / "a", tmp_path / "b"
    assert len(list(first.iterdir())) == 20
    assert sorted(path.name for path in second.iterdir()) == [f"{seed:06}.png" for seed in range(17, 22)]
    for seed in (17, 18, 19):
        assert (first / f"{seed:06}.png").read_bytes() == (second / f"{seed:06}.png").read_bytes()
    assert (first / "000017.png").read_bytes() != (first / "000018.png").read_bytes()
    printed = capsys.readouterr()
    assert "stylenat_fashion32, 32x32, weights: " in printed.out
    assert "images/s (32 in " in printed.out
    assert "20/20 pictures" in printed.err


def test_every_output_at_once(weights, tmp_path, capsys):
    places = {"--grid": "sheet.png", "--video": "walk.gif", "--attention": "heads.png"}
    arguments = [text for key, name in places.items() for text in (key, tmp_path / name)]
    walk = ("--seconds", 0.25, "--fps", 20, "--truncation", 0.7, "--columns", 3, "--count", 6, "--batch-size", 6)
    assert run("--weights", weights, *arguments, *walk, "--json") == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert printed.err == ""
    assert answer["files"] == [str(tmp_path / name) for name in places.values()]
    assert (answer["model"], answer["truncation"], answer["seeds"]) == ("stylenat_fashion32", 0.7, [0, 5])
    assert answer["images"] == 6 + 30
    assert answer["images_per_second"] > 0
    assert read_picture(tmp_path / "sheet.png", 1).shape == (2 * 128 + 2, 3 * 128 + 4, 1)
    with image.open(tmp_path / "walk.gif") as film:
        assert film.n_frames > 20  # frames that do not differ are written once
        assert film.size == (128, 128)
    assert not (tmp_path / "generated").exists()


def test_truncation_changes_pictures_and_its_absence_does_not(weights, tmp_path):
    for name, more in (("plain", ()), ("one", ("--truncation", 1)), ("half", ("--truncation", 0.5))):
        assert run("--weights", weights, "--count", 1, "--out", tmp_path / name, "--json", *more) == 0
    plain, one, half = ((tmp_path / name / "000000.png").read_bytes() for name in ("plain", "one", "half"))
    assert plain == one != half


def test_a_sheet_holds_the_pictures_of_the_files(weights, tmp_path):
    arguments = ("--count", 4, "--columns", 2, "--zoom", 1, "--json")
    assert run("--weights", weights, *arguments, "--out", tmp_path, "--grid", tmp_path / "sheet.png") == 0
    sheet = read_picture(tmp_path / "sheet.png", 1)
    for seed, (top, left) in enumerate(((0, 0), (0, 34), (34, 0), (34, 34))):
        assert np.array_equal(sheet[top : top + 32, left : left + 32], read_picture(tmp_path / f"{seed:06}.png", 1))


def test_an_untrained_model_says_that_it_makes_noise(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--untrained", "--model", "stylenat_fashion32", "image_size=16", "--count", 1) == 0
    printed = capsys.readouterr().out
    assert "16x16, weights: none, untrained: noise" in printed
    assert printed.endswith("\ngenerated/000000.png\n")
    assert read_picture(tmp_path / "generated" / "000000.png", 1).shape == (16, 16, 1)


def test_what_no_picture_can_hold_is_refused_before_it_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ("channels=2", "image_size=16")
    assert run("--untrained", "--model", "stylenat_fashion32", *changes) == BAD_REQUEST
    assert capsys.readouterr().err == "vicinal generate: pictures have 1 or 3 channels, stylenat_fashion32 makes 2\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "-1"], "seeds must be in 0 .. 4294967295, got -1"),
        (["--seed", "4294967295"], "seeds must be in 0"),
        (["--seed", "one"], "invalid int value: 'one'"),
        (["--count", "0"], "--count must be at least 1"),
        (["--truncation", "2"], "truncation must be in 0 .. 1, got 2.0"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--weights", "no/such.pt"], "there is no file of weights no/such.pt"),
        (["--model", "stylenat_fashion23"], "did you mean stylenat_fashion32"),
        (["--model", "nat_mini"], "makes no pictures"),
        (["--model", "stylenat_ffhq256"], "is of a generator of 32x32 images, this one makes 256x256|does not fit"),
        (["--model", "stylenat_fashion32", "image_size=16"], "generator of 32x32 images, this one makes 16x16"),
        (["--model", "stylenat_fashion32", "image_size=24"], "image_size must be a power of two from 8 on, got 24"),
        (["--model", "stylenat_fashion32", "size=16"], "there is no setting size"),
        (["image_size=16"], "need --model"),
        (["--untrained"], "exclude each other"),
        (["--video", "film.avi"], "must end in .mp4, .gif, .png"),
        (["--video", "film.gif", "--fps", "0"], "--fps in 1 .. 120"),
        (["--grid", "sheet.jpg"], "pictures end in .png"),
        (["--zoom", "0", "--grid", "sheet.png"], "--zoom must be at least 1"),
        (["--columns", "0"], "--columns must be at least 1"),
        (["--device", "abacus"], "device must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_sentence(weights, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [] if "--weights" in arguments else ["--weights", weights]
    try:
        code = run(*given, *arguments)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == BAD_REQUEST
    assert printed.out == ""
    assert any(one in printed.err for one in words.split("|"))
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "it left something behind"


@pytest.mark.parametrize("package", ["matplotlib", "PIL"])
def test_a_missing_package_is_named_before_anything_is_made(weights, tmp_path, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert run("--weights", weights, "--attention", tmp_path / "new" / "heads.png") == BAD_REQUEST
    assert f"needs {package}, which is not here: pip install vicinal[plot]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_gets_one_sentence(weights, tmp_path, capsys, monkeypatch):
    def fill(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert run("--weights", weights, "--count", 1, "--out", tmp_path, "--json") == BAD_REQUEST
    assert capsys.readouterr().err == f"vicinal generate: No space left on device: {tmp_path / '000000.png'}\n"


def test_a_folder_that_is_a_file_gets_one_sentence(weights, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--weights", weights, "--out", tmp_path / "file") == BAD_REQUEST
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_damaged_file_of_weights_gets_one_sentence(tmp_path, capsys):
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04 and no more")
    assert run("--weights", tmp_path / "weights.pt", "--out", tmp_path / "out") == BAD_REQUEST
    assert "cannot be read as plain weights" in capsys.readouterr().err


def test_without_shipped_weights_it_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(DataMissing, match="vicinal train stylenat_fashion_mnist"):
        generate.shipped_generator()
    assert run("--out", tmp_path / "out") == BAD_REQUEST
    assert "give a file of your own" in capsys.readouterr().err
