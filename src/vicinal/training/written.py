"""Recipes as plain data and back, and `key=value` changes to them."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

R = TypeVar("R")

_KIND = "kind"


def to_plain(value: Any) -> Any:
    """Nested dataclasses as dictionaries that name their class, for JSON.

    >>> from vicinal.data import FashionMnist
    >>> to_plain(FashionMnist())
    {'kind': 'vicinal.data.sources:FashionMnist', 'folder': None}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_KIND: f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def from_plain(plain: Any) -> Any:
    """What `to_plain` was given; only this library's own classes are made.

    >>> from vicinal.data import Digits
    >>> from_plain(to_plain(Digits())) == Digits()
    True
    """
    if isinstance(plain, dict):
        if _KIND not in plain:
            return {key: from_plain(item) for key, item in plain.items()}
        module, _, name = plain[_KIND].partition(":")
        if not module.startswith("vicinal."):
            raise ValueError(f"{plain[_KIND]} is not of this library: pass the recipe it comes from")
        made: Any = getattr(importlib.import_module(module), name)
        if not isinstance(made, type) or not dataclasses.is_dataclass(made):
            raise ValueError(f"{plain[_KIND]} is no part of a recipe")
        return made(**{key: from_plain(item) for key, item in plain.items() if key != _KIND})
    return tuple(from_plain(item) for item in plain) if isinstance(plain, list) else plain


def override(recipe: R, changes: Sequence[str]) -> R:
    """A recipe with `key=value` changes; dots lead into its parts.

    >>> from vicinal.training import Loop
    >>> override(Loop(), ["epochs=2", "precision=bfloat16"]).epochs
    2.0
    >>> override(Loop(), ["batchsize=2"])
    Traceback (most recent call last):
    ValueError: there is no setting batchsize; did you mean batch_size?
    """
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ValueError(f"a change to a recipe is written key=value, got {change!r}")
        recipe = _changed(recipe, key.split("."), text, key)
    return recipe


def _changed(node: Any, path: list[str], text: str, key: str) -> Any:
    name, *rest = path
    if isinstance(node, Mapping):
        holds_parts = any(dataclasses.is_dataclass(item) for item in node.values())
        if name not in node and (rest or holds_parts):
            raise _unknown(key, path, list(node))
        if not rest and holds_parts:
            raise _has_parts(key, node[name])
        return {**node, name: _changed(node[name], rest, text, key) if rest else _literal(text)}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise ValueError(f"{key}: {'.'.join(path)} leads into a value, which has no parts")
    names = [field.name for field in dataclasses.fields(node)]
    if name not in names:
        raise _unknown(key, path, names)
    value = getattr(node, name)
    if rest:
        new = _changed(value, rest, text, key)
    elif dataclasses.is_dataclass(value):
        raise _has_parts(key, value)
    else:
        new = _parsed(text, typing.get_type_hints(type(node))[name], key)
    return dataclasses.replace(node, **{name: new})


def _has_parts(key: str, value: Any) -> ValueError:
    return ValueError(f"{key} has parts ({', '.join(field.name for field in dataclasses.fields(value))}): say which")


def _unknown(key: str, path: list[str], names: list[str]) -> ValueError:
    before = key.split(".")[: -len(path)]
    near = difflib.get_close_matches(path[0], names, n=1)
    hint = f"did you mean {'.'.join([*before, near[0]])}?" if near else f"there are {', '.join(names)}"
    return ValueError(f"there is no setting {'.'.join([*before, path[0]])}; {hint}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parsed(text: str, hint: Any, key: str) -> Any:
    """A value of a field's type, from text."""
    allowed = [hint] if not isinstance(hint, types.UnionType) else list(typing.get_args(hint))
    value = {"true": True, "false": False, "none": None}.get(text.lower(), _literal(text))
    for kind in allowed:
        accepted, result = _as_kind(value, text, kind)
        if accepted:
            return result
    raise ValueError(f"{key} must be {' or '.join(_kind_name(kind) for kind in allowed)}, got {text!r}")


def _as_kind(value: Any, text: str, kind: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(kind)
    if kind is type(None):
        return value is None, None
    if origin is typing.Literal:
        return text in typing.get_args(kind), text
    if kind is float:
        accepted = isinstance(value, int | float) and not isinstance(value, bool)
        return accepted, float(value) if accepted else None
    if kind is str:
        return value is not None, text
    if origin is tuple:
        items = tuple(value) if isinstance(value, tuple | list) else (value,)
        made = [_as_kind(item, str(item), typing.get_args(kind)[0]) for item in items]
        return all(accepted for accepted, _ in made), tuple(item for _, item in made)
    if kind in (int, bool):
        return type(value) is kind, value
    return False, None


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return {float: "a number", int: "a whole number", bool: "true or false", type(None): "none", str: "text"}.get(
        kind, str(kind)
    )
