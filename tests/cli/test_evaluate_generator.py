"""`vicinal evaluate` of a generator: real and made pictures alike prepared, the extractor named, bad input told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vicinal.cli import evaluate
from vicinal.cli.main import BAD_REQUEST, main
from vicinal.data import ImageFolders, Info
from vicinal.data.saving import save_png
from vicinal.metrics import Moments, frechet_distance
from vicinal.recipes.book import find
from vicinal.recipes.shipped import FOLDER
from vicinal.tasks.image_distance import Features, compare
from vicinal.tasks.sampling import Sampler
from vicinal.training.checkpoint import save_weights
from vicinal.training.generator import measure, open_generator
from vicinal.training.written import to_plain

pytest.importorskip("PIL.Image")


class Brightness:
    """Mean and spread of pixels."""

    name = "mean and spread of pixels"

    def __call__(self, images):
        values = images.float().flatten(1)
        return torch.stack([values.mean(1), values.std(1)], 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the small recipe on made pictures of 28x28, which its steps frame to 32x32; the weights are fresh."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        (folder / "data" / split / "made").mkdir(parents=True)
        for number in range(12):
            save_png(random.integers(0, 256, (28, 28, 1), np.uint8), folder / "data" / split / "made" / f"{number}.png")
    source = find("stylenat_fashion_mnist", ())
    recipe = replace(source, data=ImageFolders(str(folder / "data"), channels=1))
    torch.manual_seed(0)
    pair = recipe.task.build(Info("made", ("a",), 1, (0.5,), (0.5,))).model
    save_weights(folder / "model.safetensors", pair.state_dict(), {"recipe": json.dumps(to_plain(recipe))})
    return folder


def test_a_measurement_is_that_of_the_recipes_test_pictures_and_of_the_first_seeds(run):
    generator, told = open_generator(run), []
    found = measure(generator, Brightness(), count=10, announce=told.append)
    data = generator.recipe.data.open("test")
    framed = torch.zeros(10, 1, 32, 32, dtype=torch.uint8)
    framed[:, :, 2:30, 2:30] = torch.stack([torch.tensor(data.read(n)[0]).permute(2, 0, 1) for n in range(10)])
    made = torch.stack([picture for _, picture in Sampler(generator.model).draw(range(10))])
    expected = frechet_distance(Moments.of(Brightness()(framed)), Moments.of(Brightness()(made)))
    assert found.frechet == pytest.approx(expected, rel=1e-9)
    assert (found.real, found.generated, found.extractor) == (10, 10, Brightness.name)
    assert told[-1] == 20
    sets = [Features(Brightness()), Features(Brightness())]
    sets[0].add(framed)
    sets[1].add(made)
    assert compare(*sets) == found


def test_the_command_prints_it(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_extractor", lambda inception, size: Brightness())
    assert main(["evaluate", str(run), "--count", "8"]) == 0
    printed = capsys.readouterr().out
    for words in (f"features: {Brightness.name}", "pictures: 8 real, 8 generated", "Fréchet distance: ", "recall: "):
        assert words in printed
    assert main(["evaluate", str(run), "--count", "8", "--json", "--split", "train"]) == 0
    trained_on = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(run), "--count", "8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["frechet"] != trained_on["frechet"], "the splits hold other pictures"
    assert answer["recipe"] == "stylenat_fashion_mnist"
    assert answer["extractor"] == Brightness.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "1"], "count must be at least 2"),
        (["--count", "3"], "k must be at least 1 and below the number of vectors, got 3 for 3 real"),
        (["data.folder=no/such"], "there is no folder"),
    ],
)
def test_a_mistake_gets_one_sentence(run, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(evaluate, "open_extractor", lambda inception, size: Brightness())
    assert main(["evaluate", str(run), *arguments]) == BAD_REQUEST
    assert words in capsys.readouterr().err


def test_options_of_generators_are_refused_for_classifiers(capsys):
    assert main(["evaluate", str(FOLDER / "nat_fashion_mnist.safetensors"), "--count", "5"]) == BAD_REQUEST
    assert "--count is for generators" in capsys.readouterr().err


def test_weights_that_do_not_tell_their_data_are_not_measured(tmp_path):
    generator = open_generator(None, "stylenat_fashion32")
    with pytest.raises(ValueError, match="does not say which data"):
        measure(generator, Brightness(), count=4)
