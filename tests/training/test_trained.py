"""Weights files: what they need to be read again, and what is said of those that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from runs import tiny

from vicinal.data import Info
from vicinal.tasks import Classification, Named
from vicinal.tasks.classification import make_model
from vicinal.training import trained
from vicinal.training.checkpoint import save_weights
from vicinal.training.written import to_plain

INFO = Info("made", ("a", "b", "c"), 1, (0.3,), (0.2,), (32, 32))
SMALL = {"dim": 32, "depths": (1, 1), "num_heads": (1, 2), "dilations": "max", "drop_path_rate": 0.0}


def test_a_fine_tuned_model_does_without_the_checkpoint_it_began_with(tmp_path):
    model = make_model(Named("nat_mini", SMALL), INFO)
    recipe = replace(tiny(), task=Classification(Named("nat_mini", SMALL, pretrained=str(tmp_path / "gone.pth"))))
    written = {"recipe": json.dumps(to_plain(recipe)), "info": json.dumps(to_plain(INFO))}
    save_weights(tmp_path / "model.safetensors", model.state_dict(), written)
    found = trained.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.task.model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("{", "not one of this version"),
        ('{"kind": "vicinal.training.recipe:Loop", "speed": 3}', "not one of this version .* 'speed'"),
        ('{"kind": "vicinal.training.recipe:Gone"}', "not one of this version"),
        ('{"kind": "subprocess:Popen"}', "not of this library"),
    ],
)
def test_weights_of_another_version_are_refused_in_words(recipe, words, tmp_path):
    save_weights(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, {"recipe": recipe, "info": "{}"})
    with pytest.raises(ValueError, match=words):
        trained.load(tmp_path)
