"""Reading checkpoint files: containers, prefixes, downloads. Nothing in a file is ever executed."""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch

from vicinal.models.layout import State

_CONTAINERS = ("model", "state_dict", "state_dict_ema", "model_state_dict")
_PREFIXES = ("module.", "backbone.", "encoder.backbone.", "model.pixel_level_module.encoder.")
_ENDINGS = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors, and what was taken off on the way to them: containers and prefixes, outermost first."""

    state: State
    wrappers: tuple[str, ...] = ()


def read(path: str | Path) -> Checkpoint:
    """The tensors of a safetensors file or of a torch file; a torch file may hold nothing but tensors and plain values.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"model": {"module.weight": torch.ones(2)}}, file.name)
    ...     read(file.name).wrappers
    ('["model"]', 'module.')
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return unwrap(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise ValueError(
            f"{path} cannot be read as plain weights ({reason}); save its tensors alone, with torch.save or safetensors"
        ) from None
    return unwrap(content)


def unwrap(content: Any) -> Checkpoint:
    """The tensors in what a file holds.

    >>> unwrap({"state_dict": {"backbone.a": torch.ones(1), "decode_head.b": torch.ones(1)}}).state.keys()
    dict_keys(['a'])
    """
    wrappers = []
    while isinstance(content, Mapping):
        inner = next((name for name in _CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
        wrappers.append(f'["{inner}"]')
    if not isinstance(content, Mapping):
        raise ValueError(f"a checkpoint must hold named tensors, got {type(content).__name__}")
    state = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    if not state:
        raise ValueError("the checkpoint holds no tensors")
    for prefix in _PREFIXES:  # once each: the heads of a detector, which have another name, are left out
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if inside:
            state = inside
            wrappers.append(prefix)
    return Checkpoint(state, tuple(wrappers))


def find(source: str | Path) -> Path:
    """The file that a path, an address or a Hugging Face repository id names, downloaded where it is not here."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    text = str(source)
    if text.startswith(("https://", "http://")):
        return _download([text])
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not text.endswith(_ENDINGS):
        base = f"https://huggingface.co/{text}/resolve/main/"
        return _download([base + "model.safetensors", base + "pytorch_model.bin"])
    raise ValueError(f"pretrained: there is no file {text!r}, and it is no address or repository id either")


def _download(addresses: list[str]) -> Path:
    folder = Path(torch.hub.get_dir()) / "vicinal"
    for address in addresses:
        target = folder / re.sub(r"\W+", "_", address.split("://")[1].rsplit(".", 1)[0])
        target = target.with_suffix(Path(address).suffix)
        if target.is_file():
            return target
        try:
            with urlopen(address, timeout=20) as answer:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
                    while piece := answer.read(1 << 20):
                        part.write(piece)
            return Path(part.name).rename(target)
        except (URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
    raise ConnectionError(
        f"cannot download {addresses[0]} ({reason}); fetch it by hand and give its path as pretrained"
    )
