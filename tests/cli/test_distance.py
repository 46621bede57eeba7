"""`vicinal distance`: its answer, its JSON, and sentences for what cannot be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vicinal.cli import distance
from vicinal.cli.main import BAD_REQUEST, main

image = pytest.importorskip("PIL.Image")


class Colors:
    name = "mean and spread of colors"

    def __call__(self, images):
        values = images.float()
        return torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(distance, "open_extractor", lambda inception, size: Colors())
    random = np.random.default_rng(0)
    for name, low in (("real", 0), ("made", 40)):
        (tmp_path / name).mkdir()
        for number in range(10):
            image.fromarray(random.integers(low, 256, (8, 8, 3), np.uint8)).save(tmp_path / name / f"{number}.png")
    return str(tmp_path / "real"), str(tmp_path / "made")


def test_the_answer_names_the_extractor_and_the_numbers(folders, capsys):
    assert main(["distance", *folders]) == 0
    printed = capsys.readouterr()
    assert "features: mean and spread of colors" in printed.out
    assert "pictures: 10 real, 10 generated" in printed.out
    for words in ("Fréchet distance: ", "precision: ", "recall: ", "of 10 pictures: "):
        assert words in printed.out
    assert printed.err.splitlines()[-1] == "20/20 pictures"


def test_json_is_the_same_as_plain_values(folders, capsys):
    assert main(["distance", *folders, "--json", "--k", "2"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert printed.err == ""
    assert answer["extractor"] == Colors.name
    assert (answer["real"], answer["generated"], answer["k"]) == (10, 10, 2)
    assert answer["frechet"] > 1
    main(["distance", folders[0], folders[0], "--json"])
    same = json.loads(capsys.readouterr().out)
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--k", "10"], "got 10 for 10 real"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_a_mistake_gets_one_sentence(folders, capsys, change, words):
    assert main(["distance", *folders, "--json", *change]) == BAD_REQUEST
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_a_folder_that_is_not_there_gets_one_sentence(folders, capsys):
    assert main(["distance", folders[0], folders[1] + "none"]) == BAD_REQUEST
    assert "there is no folder" in capsys.readouterr().err
