"""The examples in docstrings run, and every public function and class has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vicinal
import vicinal.pattern

SOURCE = Path(vicinal.__file__).parent
MODULES = sorted(
    ".".join(("vicinal", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.name != "__main__.py"  # importing it would run a command
)

WITHOUT_EXAMPLE = {
    "BackendRefused",  # raised, never made by a user
    "Explanation",  # the answer of explain(...), which shows it
    "Group",  # a plain record inside Bounds
    "Heads",  # made by heads(...), which shows how
    "Union",  # made by union(...), which shows how
}

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (vicinal, vicinal.pattern)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name)) or inspect.isclass(getattr(module, name))
}


def run_examples(module: ModuleType, names: dict[str, Any]) -> tuple[int, str]:
    """How many examples of a module fail, and doctest's account of them."""
    account: list[str] = []
    runner = doctest.DocTestRunner()  # no ELLIPSIS: the pictures are full of dots
    for test in doctest.DocTestFinder().find(module, globs={**vars(module), **names}):
        runner.run(test, out=account.append)
    return runner.failures, "".join(account)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, doctest_namespace):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "vicinal":
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    failed, account = run_examples(module, doctest_namespace)
    assert not failed, account


def test_a_wrong_example_is_found():
    module = ModuleType("wrong")
    module.__doc__ = ">>> 1 + 1\n3\n"
    failed, account = run_examples(module, {})
    assert failed == 1
    assert "Expected:\n    3\nGot:\n    2" in account


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name):
    # an inherited docstring would describe something else
    documented = vars(PUBLIC[name]).get("__doc__") if inspect.isclass(PUBLIC[name]) else PUBLIC[name].__doc__
    assert documented, f"{name} has no docstring"
    if name.rsplit(".", 1)[1] not in WITHOUT_EXAMPLE:
        assert doctest.DocTestParser().get_examples(documented), f"the docstring of {name} shows no `>>>` example"


def test_every_exemption_from_an_example_is_used():
    shown = {name.rsplit(".", 1)[1] for name, it in PUBLIC.items() if ">>>" in (it.__doc__ or "")}
    public = {name.rsplit(".", 1)[1] for name in PUBLIC}
    assert not WITHOUT_EXAMPLE - (public - shown)
