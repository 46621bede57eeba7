"""Reading checkpoint files: containers, prefixes, downloads. Nothing in a file is ever executed."""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch

from vicinal.models.layout import State

_CONTAINERS = ("model", "state_dict", "state_dict_ema", "model_state_dict", "state_dicts", "g_ema")
_WHOLE_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Taken off where every name has it: what parallel training, compilation and Lightning put around a model."""

_PREFIXES = (
    "backbone.",
    "encoder.backbone.",
    "model.pixel_level_module.encoder.",
    "generator.",  # a generator beside the discriminator it was trained with
    "pixel_level_module.encoder.",  # where all names began with "model."
)
_DEEPEST = 4
"""Containers in containers that are looked into; a pickle may hold itself."""

_ENDINGS = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors, and what was taken off on the way to them: containers and prefixes, outermost first."""

    state: State
    wrappers: tuple[str, ...] = ()


def read(path: str | Path, container: str | None = None, *, is_whole: bool = False) -> Checkpoint:
    """The tensors of a safetensors file or of a torch file; a torch file may hold nothing but tensors and plain values.

    Of a detector or a segmenter only the backbone is read, unless `is_whole`. `container` names what to take of a file
    that holds several models ("d", the discriminator of a GAN).

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"model": {"module.weight": torch.ones(2)}}, file.name)
    ...     read(file.name).wrappers
    ('["model"]', 'module.')
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    # a safetensors file begins with the length of its header, 8 bytes, and the header, whatever its name says
    content = _read_safetensors(path) if path.suffix == ".safetensors" or start[8:] == b"{" else _read_torch(path)
    return unwrap(content, container, is_whole=is_whole)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols and archives; what is wrong is said below
            # training scripts put their settings beside the weights, in an object that holds values and does nothing
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - bytes that are no checkpoint make the unpickler raise nearly anything
        # torch's own words would advise to run what is in the file
        objects = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {objects[1]}, not only tensors" if objects else "it is none, or damaged"
        raise ValueError(
            f"{path} cannot be read as plain weights ({reason}); save its tensors alone, with torch.save or safetensors"
        ) from None


def unwrap(content: Any, container: str | None = None, *, is_whole: bool = False) -> Checkpoint:
    """The tensors in what a file holds; `container` and `is_whole` as in `read`.

    >>> unwrap({"state_dict": {"backbone.a": torch.ones(1), "decode_head.b": torch.ones(1)}}).state.keys()
    dict_keys(['a'])
    """
    wrappers: list[str] = []
    names = _CONTAINERS if container is None else ("state_dicts", container)
    state = _tensors(content, wrappers, names)
    if not isinstance(content, Mapping):
        raise ValueError(f"a checkpoint must hold named tensors, got {type(content).__name__}")
    if not state:
        raise ValueError("the checkpoint holds no named tensors")
    for prefix in _WHOLE_PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            wrappers.append(prefix)
    # once each: the heads of a detector, which have another name, are left out
    for prefix in () if is_whole else _PREFIXES:
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if inside:
            state = inside
            wrappers.append(prefix)
    return Checkpoint(state, tuple(wrappers))


def _tensors(content: Any, wrappers: list[str], names: Sequence[str], depth: int = 0) -> State:
    """The named tensors in the innermost container; a container without any (a configuration) is passed over."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return {}
    for name in names:
        inner: list[str] = []
        found = _tensors(content.get(name), inner, names, depth + 1)
        if found:
            wrappers += [f'["{name}"]', *inner]
            return found
    return {
        name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


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
            return _fetch(address, target)
        except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
            reason = getattr(error, "reason", error)
    raise ConnectionError(
        f"cannot download {addresses[0]} ({reason}); fetch it by hand and give its path as pretrained"
    )


def _fetch(address: str, target: Path) -> Path:
    """Download to `target`, which is there only when all of it is."""
    with urlopen(address, timeout=20) as answer:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
            try:
                while piece := answer.read(1 << 20):
                    part.write(piece)
                promised = answer.headers["Content-Length"]
                if promised is not None and part.tell() != int(promised):  # a cut connection ends without an error
                    raise ConnectionError(f"only {part.tell()} of {promised} bytes came")
            except BaseException:
                Path(part.name).unlink()
                raise
    return Path(part.name).rename(target)
