"""Letting `import natten` find ours, for this process, and taking that back."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import threading
from collections.abc import Iterator, Sequence
from email.message import Message
from pathlib import Path
from types import ModuleType
from typing import Any

from vicinal.adapters.natten.namespace import CONTENTS, FUSED
from vicinal.adapters.natten.versions import CURRENT, asked, release_of


class _Metadata(importlib.metadata.Distribution):
    """What `importlib.metadata` says about our natten. Its version ends in `+vicinal`, so that lists tell the truth."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        metadata = Message()
        metadata["Metadata-Version"] = "2.1"
        metadata["Name"] = "natten"
        metadata["Version"] = f"{asked.version or CURRENT}+vicinal"
        metadata["Summary"] = "NATTEN's names on Vicinal's operator"
        return metadata.as_string()

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `natten` and its modules before the path is searched, and fills them from `CONTENTS`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname not in CONTENTS:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in CONTENTS)
        return importlib.machinery.ModuleSpec(fullname, self, origin="vicinal.adapters.natten", is_package=is_package)

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        if context is None or context.name is None or context.name.lower() == "natten":
            yield _Metadata()

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(CONTENTS[module.__name__])
        module.__doc__ = "NATTEN's names on Vicinal's operator: see vicinal.adapters.natten."
        if module.__name__ in ("natten", "natten.version"):
            vars(module)["__version__"] = asked.version or CURRENT


_finder = _Finder()
_lock = threading.RLock()


def install(version: str | None = None) -> None:
    """Make `import natten` mean this, in this process, with or without NATTEN on the disk.

    `version` is the release that the code was written for. It becomes `natten.__version__`, and decides where two
    releases read the same call differently; without it such calls are refused, and the version is that of the
    release whose names are offered. Called again, it changes just the version.

    >>> install()
    >>> from natten.functional import natten2dqkrpb, natten2dav
    >>> uninstall()
    """
    if version is not None:
        release_of(version)
    with _lock:
        _install(version)


def _install(version: str | None) -> None:
    if not _is_installed():
        loaded = sorted(name for name in _loaded() if sys.modules[name] is not None)
        if loaded:
            where = getattr(sys.modules[loaded[0]], "__file__", None) or "an unknown place"
            raise RuntimeError(
                f"vicinal.adapters.natten.install(): another natten is loaded already ({loaded[0]}, from {where}), and "
                f"code may hold on to it. Call install() before anything imports natten, or leave the other one be and "
                f"import from vicinal.adapters.natten"
            )
        _blocked.update(dict.fromkeys(_loaded()))  # `sys.modules["natten"] = None` forbids an import
        for name in _blocked:
            del sys.modules[name]
        sys.meta_path.insert(0, _finder)
    asked.version = version
    for name in CONTENTS:
        _finder.exec_module(importlib.import_module(name))
    # importing natten.na2d has put that module where the function belongs
    for name in FUSED:
        setattr(sys.modules["natten"], name, CONTENTS["natten"][name])
    _forget_hosts()


def uninstall() -> None:
    """Take `install` back: `import natten` means again what it meant. Does nothing where nothing is installed.

    >>> install()
    >>> uninstall()
    >>> "natten" in sys.modules
    False
    """
    with _lock:
        _uninstall()


def _uninstall() -> None:
    if not _is_installed():
        return
    sys.meta_path.remove(_finder)
    for name in _loaded():
        if _is_ours(sys.modules[name]):
            del sys.modules[name]
    sys.modules.update(_blocked)
    _blocked.clear()
    asked.version = None
    _forget_hosts()


_blocked: dict[str, Any] = {}
"""Entries of `sys.modules` that forbade an import and are to be put back."""


def _is_installed() -> bool:
    return _finder in sys.meta_path


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "natten"]


def _is_ours(module: Any) -> bool:
    return getattr(getattr(module, "__spec__", None), "loader", None) is _finder


def _forget_hosts() -> None:
    """Transformers remembers whether there is a natten; let it look again."""
    host = sys.modules.get("transformers.utils.import_utils")
    remembered: Any = getattr(host, "is_natten_available", None)
    if hasattr(remembered, "cache_clear"):
        remembered.cache_clear()
