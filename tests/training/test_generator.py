"""Generators from files: which model a file is of, by its own account or by its keys, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import vicinal
from vicinal.data import Info
from vicinal.recipes.book import find
from vicinal.training.checkpoint import save_weights
from vicinal.training.generator import generator_of, open_generator
from vicinal.training.written import to_plain


def test_fresh_weights_are_the_same_each_time_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = (open_generator(None, "stylenat_fashion32").model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_of_a_file_is_found(tmp_path):
    made = vicinal.create_model("stylenat_fashion32")
    torch.save({"g_ema": made.state_dict()}, tmp_path / "weights.pt")
    found = open_generator(tmp_path / "weights.pt")
    assert (found.name, found.weights) == ("stylenat_fashion32", str(tmp_path / "weights.pt"))
    assert torch.equal(found.model.constant, made.constant)
    assert not found.model.training


def test_weights_of_another_resolution_and_of_no_generator_get_a_sentence(tmp_path):
    torch.save(vicinal.create_model("stylenat_fashion32").state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match="generator of 32x32 images, this one makes 16x16"):
        open_generator(tmp_path / "small.pt", "stylenat_fashion32", {"image_size": 16})
    torch.save(vicinal.create_model("nat_mini").state_dict(), tmp_path / "nat.pt")
    with pytest.raises(ValueError, match=r"nat\.pt is of no generator known here; the nearest is stylenat_"):
        generator_of(tmp_path / "nat.pt")
    own = vicinal.create_model("stylenat_fashion32", latent_size=32)
    torch.save(own.state_dict(), tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt is of no generator known here.* give the model's name"):
        generator_of(tmp_path / "own.pt")


def test_a_run_is_what_it_says_it_is_for_weights_do_not_tell_dilations(tmp_path):
    recipe = find("stylenat_local_fashion_mnist", ())
    pair = recipe.task.build(Info("made", ("a",), 1, (0.5,), (0.5,))).model
    save_weights(tmp_path / "model.safetensors", pair.state_dict(), {"recipe": json.dumps(to_plain(recipe))})
    found = open_generator(tmp_path)
    assert found.name == "stylenat_local_fashion_mnist"
    assert found.model.config == recipe.task.generator
    assert found.model.config != vicinal.create_model("stylenat_fashion32").config
    assert torch.equal(found.model.constant, pair.generator.constant)


def test_a_run_of_a_classifier_gets_a_sentence(tmp_path):
    recipe = replace(find("digits", ()), name="other")
    save_weights(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, {"recipe": json.dumps(to_plain(recipe))})
    with pytest.raises(ValueError, match="is of a Classification, which makes no pictures"):
        open_generator(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: open_generator(None, "nat_mini"), "nat_mini makes no pictures; generators are stylenat"),
        (lambda: open_generator(None, "stylenat"), "there is no model 'stylenat'; did you mean stylenat_"),
        (lambda: open_generator(None), "which model"),
        (lambda: open_generator("no/such.pt"), "there is no file of weights no/such.pt"),
        (lambda: open_generator(None, "stylenat_fashion32", {"image_size": 24}), "power of two"),
        (lambda: open_generator(None, "stylenat_fashion32", device="abacus"), "device must be"),
        (lambda: open_generator(None, "stylenat_fashion32", device="meta"), "device must be cpu, cuda, mps"),
    ],
)
def test_wrong_input_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
