"""Finding a recipe: by its name here, or as `file.py:function` of one's own."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from vicinal.recipes import full, generators, segmentation, small
from vicinal.training.recipe import Recipe
from vicinal.training.written import override

RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function for module in (small, segmentation, full, generators) for function in module.RECIPES
}
"""The recipes that come with the library."""


def names() -> list[str]:
    """The names of all recipes.

    >>> "dinat_fashion_mnist" in names()
    True
    """
    return list(RECIPES)


def find(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a name, or of `path/to/file.py:function`, with `key=value` changes.

    >>> find("digits", ["loop.epochs=2"]).loop.epochs
    2.0
    """
    return override(_function(name)(), changes)


def _function(name: str) -> Callable[[], Recipe]:
    if name in RECIPES:
        return RECIPES[name]
    place, _, function = name.rpartition(":")
    if place.endswith(".py") or name.endswith(".py"):
        return _from_file(Path(place or name), function if place else "recipe")
    near = difflib.get_close_matches(name, RECIPES, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)}"
    raise ValueError(f"there is no recipe {name!r}; {hint} Your own is file.py:function")


def _from_file(path: Path, function: str) -> Callable[[], Recipe]:
    if not path.is_file():
        raise ValueError(f"there is no file {path} to take a recipe from")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found: Callable[[], Recipe] | None = getattr(module, function, None)
    if found is None:
        raise ValueError(f"{path} has no function {function!r} that returns a recipe")
    return found
