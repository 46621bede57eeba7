"""Files, containers and prefixes; nothing in a file is executed, and no network is a sentence."""

from __future__ import annotations

import os
import urllib.error

import pytest
import torch
from safetensors.torch import save_file

from vicinal.models import checkpoint

STATE = {"a.weight": torch.arange(3.0), "a.bias": torch.ones(1)}


@pytest.mark.parametrize(
    ("content", "wrappers"),
    [
        (STATE, ()),
        ({"model": STATE, "epoch": 3}, ('["model"]',)),
        ({"meta": {}, "state_dict": STATE}, ('["state_dict"]',)),
        ({"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}}, ('["state_dict"]', "module.")),
        ({f"module.backbone.{name}": tensor for name, tensor in STATE.items()}, ("module.", "backbone.")),
    ],
    ids=["plain", "model", "state_dict", "module", "backbone"],
)
def test_containers_and_prefixes_come_off(content, wrappers, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    found = checkpoint.read(tmp_path / "weights.pth")
    assert found.wrappers == wrappers
    assert set(found.state) == set(STATE)
    assert torch.equal(found.state["a.weight"], STATE["a.weight"])


def test_safetensors_are_read(tmp_path):
    save_file(STATE, tmp_path / "weights.safetensors")
    assert torch.equal(checkpoint.read(tmp_path / "weights.safetensors").state["a.weight"], STATE["a.weight"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "more": Evil()}, "weights.pth")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        checkpoint.read("weights.pth")
    assert not os.path.exists("executed")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_broken_file_is_a_sentence(name, tmp_path):
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=name):
        checkpoint.read(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}], ids=["list", "no tensors"])
def test_a_file_without_named_tensors_is_refused(content):
    with pytest.raises(ValueError, match="tensors"):
        checkpoint.unwrap(content)


@pytest.mark.parametrize("source", ["shi-labs/dinat-mini-in1k-224", "https://example.org/weights.pth"])
def test_no_network_is_one_sentence(source, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(checkpoint, "urlopen", unreachable)
    with pytest.raises(ConnectionError, match=r"cannot download .*no route to host.*give its path") as caught:
        checkpoint.find(source)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.*"))


def test_what_was_downloaded_is_kept(monkeypatch, tmp_path):
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return open(tmp_path / "there.pth", "rb")

    torch.save(STATE, tmp_path / "there.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(checkpoint, "urlopen", answer)
    for _ in range(2):
        assert set(checkpoint.read(checkpoint.find("https://example.org/w.pth")).state) == set(STATE)
    assert asked == ["https://example.org/w.pth"]


def test_a_path_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no file"):
        checkpoint.find("nowhere/weights.pth")
