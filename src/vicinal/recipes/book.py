"""Finding a recipe: by its name here, or as `file.py:function` of one's own."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vicinal.recipes import full, generators, segmentation, small
from vicinal.training.recipe import Recipe
from vicinal.training.written import override

RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function for module in (small, segmentation, full, generators) for function in module.RECIPES
}
"""The recipes that come with the library."""

_OWN: set[str] = set()
"""Names of files of recipes that were read."""


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
    recipe = _function(name)()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} should return a vicinal.training.Recipe, got {type(recipe).__name__}")
    return override(recipe, changes)


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
    if path.stem in sys.modules and path.stem not in _OWN:
        raise ValueError(f"{path} has the name of a module that is in use; give the file another name")
    module = importlib.util.module_from_spec(specification)
    # known by its name, which dataclasses ask for, and found by it, also by the processes of a run
    _OWN.add(path.stem)
    sys.modules[path.stem] = module
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))
    specification.loader.exec_module(module)
    found: Callable[[], Recipe] | None = getattr(module, function, None)
    if found is None:
        raise ValueError(f"{path} has no function {function!r} that returns a recipe")
    return found
