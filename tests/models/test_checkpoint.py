"""Files, containers and prefixes; nothing in a file is executed, and no network is a sentence."""

from __future__ import annotations

import io
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


class Answer(io.BytesIO):
    """What `urlopen` gives."""

    def __init__(self, content, promised=None):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if promised is None else promised)}


def test_what_was_downloaded_is_kept(monkeypatch, tmp_path):
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return Answer((tmp_path / "there.pth").read_bytes())

    torch.save(STATE, tmp_path / "there.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(checkpoint, "urlopen", answer)
    for _ in range(2):
        assert set(checkpoint.read(checkpoint.find("https://example.org/w.pth")).state) == set(STATE)
    assert asked == ["https://example.org/w.pth"]


def test_a_path_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no file"):
        checkpoint.find("nowhere/weights.pth")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model."])
def test_what_stands_around_a_model_comes_off(prefix):
    assert set(checkpoint.unwrap({f"{prefix}{name}": tensor for name, tensor in STATE.items()}).state) == set(STATE)


def test_a_prefix_that_some_names_lack_belongs_to_them():
    mixed = {"model.a": torch.ones(1), "b": torch.ones(1)}
    assert set(checkpoint.unwrap(mixed).state) == set(mixed)


def test_a_container_without_tensors_is_passed_over():
    assert set(checkpoint.unwrap({"model": {"name": "nat"}, "state_dict": STATE}).state) == set(STATE)


def test_a_file_that_holds_itself_ends(tmp_path):
    ring = {}
    ring["model"] = ring
    torch.save(ring, tmp_path / "ring.pth")
    with pytest.raises(ValueError, match="no named tensors"):
        checkpoint.read(tmp_path / "ring.pth")


def test_names_that_are_no_text_are_left_out():
    assert set(checkpoint.unwrap({0: torch.ones(1), "a": torch.ones(1)}).state) == {"a"}


@pytest.mark.parametrize(
    "content", [b"hello world, this is no checkpoint\n", b"c\x8d\xff\n.", b"\x80\x04K", b"", b"PK\x03\x04"], ids=repr
)
def test_bytes_that_are_no_checkpoint_are_a_sentence(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as plain weights"):
        checkpoint.read(tmp_path / "weights.pth")


def test_a_refusal_names_the_object_and_does_not_advise_to_run_it(tmp_path):
    torch.save({"model": STATE, "more": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"it holds posix\.mkdir, not only tensors") as caught:
        checkpoint.read(tmp_path / "weights.pth")
    assert "False" not in str(caught.value)


def test_safetensors_under_another_name_are_read(tmp_path):
    save_file(STATE, tmp_path / "weights.bin")
    assert set(checkpoint.read(tmp_path / "weights.bin").state) == set(STATE)


def test_a_download_that_ends_early_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(checkpoint, "urlopen", lambda address, timeout: Answer(b"half", promised=100))
    with pytest.raises(ConnectionError, match="only 4 of 100 bytes came"):
        checkpoint.find("https://example.org/w.pth")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
