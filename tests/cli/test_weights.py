"""`vicinal weights FILE` on files of published layouts, of backbones, and of nothing."""

from __future__ import annotations

import json

import torch

from vicinal.cli.main import main

from ..models import published


def test_weights_command_names_the_model(tmp_path, capsys):
    torch.save({"model": published.state(published.swin(96, (2, 2, 6, 2), classes=21841))}, tmp_path / "weights.pth")
    assert main(["weights", str(tmp_path / "weights.pth"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    best = answer["models"][0]
    assert (best["name"], best["layout"], best["fits"]) == ("swin_tiny", "published", True)
    assert best["options"] == {"num_classes": 21841}
    assert answer["wrappers"] == ['["model"]']


def test_weights_command_says_what_is_wrong(tmp_path, capsys):
    state = published.state(published.nat(64, (3, 4, 6, 5), 3))
    del state["norm.bias"]
    torch.save(state, tmp_path / "weights.pth")
    assert main(["weights", str(tmp_path / "weights.pth")]) == 0
    shown = capsys.readouterr().out
    assert "nearest" in shown
    assert "norm.bias" in shown


def test_weights_command_knows_a_backbone(tmp_path, capsys):
    state = published.state(published.dinat_s(96, (2, 2, 6, 2)))
    backbone = {f"backbone.{name}": tensor for name, tensor in state.items() if not name.startswith(("norm", "head"))}
    torch.save({"state_dict": backbone}, tmp_path / "weights.pth")
    assert main(["weights", str(tmp_path / "weights.pth")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fits create_model('dinat_s_tiny', features_only=True), layout published" in shown
    assert "not fetched here" in shown


def test_weights_command_on_no_file_is_one_sentence(capsys):
    assert main(["weights", "nowhere.pth"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
