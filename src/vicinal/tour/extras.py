"""Optional packages, asked for where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


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
