"""Whether the transformers that is installed is one that these adapters know."""

from __future__ import annotations

import importlib

OLDEST = 5
"""The first major version with the attention and mask interfaces that the adapters use."""

INSTALL = "pip install vicinal[transformers]"


class HostChanged(RuntimeError):
    """What an adapter replaces in its host has another shape than the adapter was written for."""


def check_host() -> None:
    """Raise `ImportError` where transformers is missing or too old.

    >>> check_host()
    """
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise  # it is here, but something that it needs itself is not
        message = f"vicinal.adapters.transformers needs transformers, which is not installed: {INSTALL}"
        raise ModuleNotFoundError(message, name="transformers") from None
    version = str(transformers.__version__)
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < OLDEST:
        raise ImportError(
            f"vicinal.adapters.transformers needs transformers {OLDEST} or newer, found {version}: {INSTALL}",
            name="transformers",
        )
