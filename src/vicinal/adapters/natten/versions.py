"""Which release of NATTEN a call was written for, where releases read the same call differently.

NATTEN changed the order of its arguments twice, at 0.16 and at 0.20. A call by name means the same in all of them. A
call by position may not: `na2d(q, k, v, 7, 2)` dilates in 0.17 and strides in 0.21, without an error in either. Here it
is read in the one order it fits. If it fits several that differ, it is refused, unless `install(version=...)` said
which release the code was written for.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

CURRENT = "0.21.7"
"""The release whose public names and meanings are offered by default."""

Release = tuple[int, int]
Orders = Mapping[Release, Sequence[str]]
"""For each order the release that began it, and the names of its positional arguments."""


@dataclasses.dataclass
class Asked:
    """What `install(version=...)` asked for; None where nobody did."""

    version: str | None = None

    @property
    def release(self) -> Release | None:
        """The first two numbers of the version."""
        return None if self.version is None else release_of(self.version)

    def is_before(self, release: Release) -> bool:
        """Whether an older release than this one was asked for."""
        return self.release is not None and self.release < release


asked = Asked()


def release_of(version: Any) -> Release:
    """The first two numbers of a version.

    >>> release_of("0.17.5")
    (0, 17)
    """
    if not isinstance(version, str) or not re.fullmatch(r"\d+\.\d+(\.\d+)*", version):
        raise ValueError(f'version must be a release of NATTEN such as "{CURRENT}" or "0.17.5", got {version!r}')
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def by_name(function: str, orders: Orders, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call under their names, in whichever release's order they came.

    >>> orders = {(0, 16): ("dilation", "is_causal"), (0, 20): ("stride", "dilation", "is_causal")}
    >>> by_name("na1d", orders, (2, True), {}), by_name("na1d", orders, (2, 3), {})
    ({'dilation': 2, 'is_causal': True}, {'stride': 2, 'dilation': 3})
    """
    known = {name for names in orders.values() for name in names}
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    if not args:
        return dict(options)
    since = _chosen(orders)
    candidates = orders if since is None else {since: orders[since]}
    readings: dict[Release, dict[str, Any]] = {}
    for release, names in candidates.items():
        reading = dict(zip(names, args, strict=False))
        fits = len(args) <= len(names) and all(_fits(name, value) for name, value in reading.items())
        # a name that an order lacks speaks against it, unless that order was asked for
        if fits and not reading.keys() & options.keys() and (since is not None or set(options) <= set(names)):
            readings[release] = reading
    if not readings:
        listed = "; ".join(_described(release, names) for release, names in candidates.items())
        raise TypeError(
            f"{function}() cannot read {len(args)} positional and the keyword arguments {sorted(options)} together in "
            f"any order that NATTEN had: {listed}. Pass them by name."
        )
    meanings = list(readings.values())
    if any(not _same(meanings[0], other) for other in meanings[1:]):
        listed = "; ".join(f"{_described(release, reading)}" for release, reading in readings.items())
        raise ValueError(
            f"{function}: the positional arguments mean different things in different releases of NATTEN ({listed}). "
            f"Pass them by name, or say which release the code was written for: "
            f"vicinal.adapters.natten.install(version=...)"
        )
    return {**meanings[-1], **options}


def _chosen(orders: Orders) -> Release | None:
    """The order that holds in the release asked for."""
    if asked.release is None:
        return None
    past = [since for since in orders if since <= asked.release]
    return max(past) if past else min(orders)


def _described(release: Release, names: Sequence[str] | Mapping[str, Any]) -> str:
    return f"since {release[0]}.{release[1]} " + ", ".join(names)


_WHOLE = {"num_heads", "kernel_size", "kernel_size_d", "stride", "dilation", "dilation_d", "na_dim", "embed_dim"}
_FLAGS = {"is_causal", "bias", "rel_pos_bias", "qkv_bias", "use_experimental_ops", "return_lse", "torch_compile"}
_NUMBERS = {"scale", "qk_scale", "attn_drop", "proj_drop"}
_TENSORS = {"query", "key", "value", "attn", "rpb", "additional_keys", "additional_values"}


def _fits(name: str, value: Any) -> bool:
    """Whether an argument of this name may have this value; NATTEN takes None for any default."""
    if value is None:
        return True
    entries = value if isinstance(value, list | tuple) else (value,)
    if name in _WHOLE:
        return all(isinstance(entry, int | torch.SymInt) and not isinstance(entry, bool) for entry in entries)
    if name in _FLAGS:
        return all(isinstance(entry, bool) for entry in entries)
    if name in _NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name in _TENSORS:
        return isinstance(value, torch.Tensor)
    return True


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two readings ask for the same."""
    wanted, others = ({name: value for name, value in it.items() if _says(name, value)} for it in (one, other))
    return wanted.keys() == others.keys() and all(wanted[name] is others[name] for name in wanted)


def _says(name: str, value: Any) -> bool:
    """Whether a value differs from the default that all releases share."""
    entries = value if isinstance(value, list | tuple) else (value,)
    if name in ("stride", "dilation"):
        return value is not None and any(entry != 1 for entry in entries)
    if name == "is_causal":
        return value is not None and any(entries)
    return value is not None


def show_signature(function: Callable[..., Any], leading: Sequence[str], orders: Orders) -> None:
    """Let `inspect.signature` and `help` show every argument that a function takes by name."""
    names = [*leading, *dict.fromkeys(name for release in sorted(orders, reverse=True) for name in orders[release])]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if name in leading
        else inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in names
    ]
    vars(function)["__signature__"] = inspect.Signature(parameters)
