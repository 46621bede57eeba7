"""`vicinal train`, `evaluate`, `predict` and `data`, from the outside."""

from __future__ import annotations

import json
import sys

import pytest

from vicinal.cli.main import BAD_REQUEST, main

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

QUICK = ["loop.epochs=1", "task.model.dim=16", "task.model.depths=1,1", "loop.log_every=5"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["train", "digits", *QUICK, "--out", str(folder)]) == 0
    return folder


def test_train_leaves_a_run_folder(run_folder):
    assert {path.name for path in run_folder.iterdir()} == {
        "checkpoints",
        "curves.png",
        "metrics.jsonl",
        "model.safetensors",
        "predictions.png",
        "recipe.json",
    }
    for picture in ("curves.png", "predictions.png"):
        assert (run_folder / picture).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((run_folder / "recipe.json").read_text())["loop"]["epochs"] == 1


def test_changes_may_follow_options(tmp_path, capsys):
    assert main(["train", "digits", "--out", str(tmp_path / "never"), "loop.epochs=7", "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["loop"]["epochs"] == 7
    with pytest.raises(SystemExit):
        main(["train", "digits", "--out", str(tmp_path / "never"), "--shwo", "loop.epochs=7"])
    assert "unrecognized arguments: --shwo;" in capsys.readouterr().err


def test_train_in_a_pipe_is_plain_lines(run_folder, tmp_path, capsys):
    assert main(["train", "digits", *QUICK, "loop.pictures=false", "--out", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "accuracy" in out
    assert err.startswith("digits: ")
    assert "images/s" in err


def test_train_tells_programs_in_json(tmp_path, capsys):
    arguments = ["train", "digits", *QUICK, "loop.pictures=false", "--json", "--out", str(tmp_path / "a")]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert next(event["event"] for event in events) == "begin"
    assert events[-1]["event"] == "end"
    assert 0 < events[-1]["metrics"]["accuracy"] <= 1
    assert err == ""
    assert main([*arguments, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"] == events[-1]["metrics"]


def test_evaluate_measures_what_training_measured(run_folder, capsys):
    assert main(["evaluate", str(run_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert found["accuracy"] == lines[-1]["accuracy"]
    assert found["recipe"] == "digits"
    assert main(["evaluate", str(run_folder)]) == 0
    assert f"accuracy: {found['accuracy']:.4f}" in capsys.readouterr().out


def test_predict_names_classes(run_folder, tmp_path, capsys):
    from PIL import Image

    from vicinal.data import Digits

    pixels = Digits().open("test").read(0)[0]
    Image.fromarray(pixels[..., 0]).resize((16, 16)).save(tmp_path / "digit.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "black.png")
    arguments = ["predict", str(tmp_path), "--model", str(run_folder), "--top", "2"]
    assert main([*arguments, "--json", "--save", str(tmp_path / "sheet.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(one["classes"]) for one in found] == [2, 2]
    assert all(0 < sum(one["probabilities"]) <= 1.000001 for one in found)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("%") >= 4


def test_predictions_come_also_where_nothing_can_be_drawn(run_folder, tmp_path, capsys, monkeypatch):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    sheet = tmp_path / "sheet.png"
    assert main(["predict", str(tmp_path / "black.png"), "--model", str(run_folder), "--save", str(sheet)]) == 2
    out, err = capsys.readouterr()
    assert "black.png: " in out
    assert err.count("\n") == 1
    assert "pip install vicinal[plot]" in err
    assert not sheet.exists()


def test_predict_names_at_least_one_class(run_folder, tmp_path, capsys):
    picture = tmp_path / "black.png"
    pytest.importorskip("PIL.Image").new("L", (8, 8)).save(picture)
    assert main(["predict", str(picture), "--model", str(run_folder), "--top", "0"]) == BAD_REQUEST
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_data_says_what_is_there(capsys, monkeypatch, tmp_path):
    assert main(["data", "digits", "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"] == {
        "train": {"samples": 1437, "classes": 10, "unreadable": []},
        "test": {"samples": 360, "classes": 10, "unreadable": []},
    }
    assert main(["data", "fashion_mnist", f"folder={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "no: missing: train-images-idx3-ubyte" in out
    assert "what to do: " in out
    assert "apt-get" in out
    assert main(["data"]) == 0
    assert "shards" in capsys.readouterr().out


def test_recipes_are_listed(capsys):
    assert main(["train"]) == 0
    out = capsys.readouterr().out
    assert "dinat_fashion_mnist" in out
    assert "not run" in out
    assert main(["train", "--json"]) == 0
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} >= {"digits", "nat_tiny_imagenet"}
    assert main(["train", "digits", "loop.epochs=4", "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["loop"]["epochs"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digit"], "did you mean digits"),
        (["train", "digits", "loop.epoch=1"], "did you mean loop.epochs"),
        (["train", "digits", "--processes", "3"], "multiple of processes"),
        (["train", "nat_tiny_imagenet"], "no such file"),
        (["evaluate", "nowhere"], "there is no nowhere"),
        (["predict", "a.png", "--model", "nowhere.safetensors"], "there is no nowhere.safetensors"),
        (["data", "digit"], "did you mean digits"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == BAD_REQUEST
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
