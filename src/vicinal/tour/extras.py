"""Optional packages, asked for where they are used."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch


class MissingExtra(ImportError):
    """A package is missing that one of vicinal's extras brings; the message says which."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or raise `MissingExtra` with the command that installs it.

    >>> require("no_such_module", "plot", "drawing")
    Traceback (most recent call last):
    vicinal.tour.extras.MissingExtra: drawing needs no_such_module, which is not here: pip install vicinal[plot]
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is here, but something that it needs itself is not
        raise MissingExtra(f"{purpose} needs {package}, which is not here: pip install vicinal[{extra}]") from None


@functools.cache
def mend_torchvision() -> None:
    """Let torchvision be imported where its compiled half was built for another torch than the one that is here.

    The wheel on PyPI is built for CUDA. Beside a torch without CUDA its library does not load, and then its import,
    and with it that of transformers' and timm's models, fails at a missing operator. Declared here, without a kernel,
    that operator costs nothing and is not called by anything that only wants the import. Without effect elsewhere.
    """
    spec = importlib.util.find_spec("torchvision")
    library = None if spec is None or spec.origin is None else Path(spec.origin).parent / "_C.so"
    if library is None or not library.is_file() or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        ctypes.CDLL(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
