"""Which room imports which, what a file may be called, what importing costs, and which names are public."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vicinal

PACKAGE = Path(vicinal.__file__).parent
TESTS = Path(__file__).parent

OPERATOR = {"ops", "pattern"}
MODEL = {"layers", *OPERATOR}
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "pattern": set(),
    "ops": {"pattern"},
    "layers": OPERATOR,
    "measure": OPERATOR,
    "parallel": MODEL,
    "models": MODEL,
    "data": MODEL,
    "metrics": MODEL,
    "adapters": {"models", *MODEL},
    "tasks": {"models", "data", "metrics", *MODEL},
    "training": {"tasks", "models", "data", "metrics", "parallel", *MODEL},
    "recipes": {"training", "tasks", "models", "data", "metrics", *MODEL},
    "tour": {"recipes", "training", "tasks", "models", "data", "metrics", "parallel", "adapters", "measure", *MODEL},
    "cli": {
        "tour",
        "recipes",
        "training",
        "tasks",
        "models",
        "data",
        "metrics",
        "parallel",
        "adapters",
        "measure",
        *MODEL,
    },
}
"""The rooms, lowest first, and what each may import beside itself and `vicinal.version`."""

NAMELESS = {"util", "utils", "helper", "helpers", "common", "misc"}

EXPECTED = [
    "AxisKind",
    "BackendRefused",
    "Bounds",
    "Explanation",
    "Full",
    "Grid",
    "Halo",
    "Heads",
    "Near",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Same",
    "Simulation",
    "Union",
    "Window",
    "__version__",
    "apply_scores",
    "attention",
    "attention_scores",
    "bias_shape",
    "bounds",
    "create_model",
    "explain",
    "heads",
    "list_models",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "pattern",
    "simulate",
    "union",
]
"""The public surface. Adding a name here is a decision; taking one away breaks somebody's code."""

OPTIONAL = [
    "matplotlib",
    "PIL",
    "skimage",
    "triton",
    "tyro",
    "rich",
    "transformers",
    "timm",
    "torchvision",
    "torch._dynamo",
]


def imported(source: str, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, wherever in it the import stands.

    `from vicinal.ops import tiled` gives `vicinal.ops.tiled`. A relative import that leaves the package gives
    a name that begins with a dot.
    """
    package = module if is_package else module[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = node.level - 1
            base = () if not node.level else package[: len(package) - above] if above < len(package) else (".",)
            for alias in node.names:
                yield node.lineno, ".".join((*base, *filter(None, [node.module]), alias.name))


def complaints(source: str, module: tuple[str, ...], is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module of the package."""
    found = []
    room = module[1]
    for line, name in imported(source, module, is_package):
        where = f"{'.'.join(module)}, line {line}: imports {name}"
        parts = name.split(".")
        if not parts[0]:
            found.append(f"{where}, from outside the package by a relative path")
        elif parts[0] == "vicinal":
            other = parts[1] if len(parts) > 1 else "vicinal"
            if other not in MAY_IMPORT:
                found.append(f"{where}, which is no room; import from the room that has it")
            elif other not in {room, "version", *MAY_IMPORT[room]}:
                found.append(f"{where}, which is above or beside it")
        elif parts[0] in ("tests", "benchmarks", "recipes", "examples"):
            found.append(f"{where}, which is not installed with the package")
    return found


def modules() -> Iterator[tuple[Path, tuple[str, ...], bool]]:
    """Every module of the package but its front door, as path, dotted name, and whether it is a package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("vicinal", *path.relative_to(PACKAGE).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        if len(parts) > 1:
            yield path, parts, is_package


def test_every_room_has_its_place_in_the_order():
    unknown = {module[1] for _, module, _ in modules()} - {*MAY_IMPORT, "__main__"}
    assert not unknown, f"give {unknown} a place in MAY_IMPORT"
    lower: set[str] = set()
    for room, below in MAY_IMPORT.items():
        assert below <= lower, f"{room} may import {below - lower}, which do not stand below it"
        lower.add(room)


def test_imports_run_one_way():
    found = [
        complaint
        for path, module, is_package in modules()
        if module[1] != "__main__"
        for complaint in complaints(path.read_text(), module, is_package)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vicinal.pattern.axis", "from vicinal.ops import tiling"),
        ("vicinal.pattern.axis", "from vicinal.ops.tiling import cut"),
        ("vicinal.pattern.axis", "import vicinal.ops.tiling"),
        ("vicinal.pattern.axis", "from vicinal import ops"),
        ("vicinal.pattern.axis", "from ..ops import tiling"),
        ("vicinal.pattern.axis", "from .. import ops"),
        ("vicinal.pattern.axis", "from .... import ops"),
        ("vicinal.pattern.axis", "import vicinal"),
        ("vicinal.ops.tiled", "from vicinal import attention"),
        ("vicinal.ops.tiled", "def f():\n    from vicinal.layers import blocks"),
        ("vicinal.ops.triton.forward", "from ...layers import blocks"),
        ("vicinal.layers.blocks", "from vicinal.models import nat"),
        ("vicinal.models.nat", "from vicinal.data import photos"),
        ("vicinal.metrics.image", "from vicinal.data import photos"),
        ("vicinal.measure.timing", "from vicinal.layers import blocks"),
        ("vicinal.parallel.halo", "from vicinal.models import nat"),
        ("vicinal.adapters.timm", "from vicinal.tasks import classification"),
        ("vicinal.tasks.classification", "import vicinal.training.loop as loop"),
        ("vicinal.training.loop", "from vicinal.cli import main"),
        ("vicinal.cli.main", "from tests.conftest import seeded"),
    ],
)
def test_an_upward_import_is_found(module, line):
    assert len(complaints(line, tuple(module.split(".")))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vicinal.pattern.axis", "import torch, numpy\nfrom vicinal.pattern.numbers import as_integer"),
        ("vicinal.pattern.axis", "from . import numbers\nfrom .numbers import as_integer"),
        ("vicinal.ops.triton.forward", "from ..tiling import cut\nfrom ...pattern import Bounds"),
        ("vicinal.ops.tiled", "from vicinal.version import __version__"),
        ("vicinal.training.loop", "from vicinal.parallel import halo\nfrom vicinal.tasks import protocol"),
        ("vicinal.cli.main", "from vicinal.measure import timing\nfrom vicinal.tour import page"),
    ],
)
def test_a_downward_import_is_allowed(module, line):
    assert complaints(line, tuple(module.split("."))) == []


def test_a_package_counts_its_relative_imports_from_itself():
    assert complaints("from .tiled import run", ("vicinal", "ops"), is_package=True) == []
    assert complaints("from ..pattern import Bounds", ("vicinal", "ops"), is_package=True) == []
    assert len(complaints("from ..layers import blocks", ("vicinal", "ops"), is_package=True)) == 1


def test_no_file_or_folder_is_named_after_nothing():
    found = [
        str(path)
        for root in (PACKAGE, TESTS)
        for path in root.rglob("*")
        if path.stem.lower().removeprefix("test_") in NAMELESS
    ]
    assert not found, "name each after the one thing it is about: " + ", ".join(found)


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own that finds the package this test runs on."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        # compiled files may be written: without them every import compiles the source again, which no user sees
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_import_prints_nothing():
    ran = fresh("import vicinal")
    assert (ran.stdout, ran.stderr) == ("", "")


LOOK = f"""
import json, sys, time
import torch
before = set(sys.modules)
begin = time.process_time()
import vicinal
spent = time.process_time() - begin
added = sorted(name for name in {OPTIONAL!r} if name in sys.modules and name not in before)
print(json.dumps([spent, added, torch.cuda.is_initialized()]))
"""


def test_import_takes_under_100_ms_and_touches_nothing_optional():
    best = float("inf")
    for _ in range(5):
        spent, added, has_device = json.loads(fresh(LOOK).stdout)
        assert added == []
        assert not has_device
        best = min(best, spent)
        if best < 0.1:
            return
    pytest.fail(f"importing vicinal takes {1000 * best:.0f} ms beyond torch, the best of five")


def test_the_public_surface_is_frozen():
    assert sorted(vicinal.__all__) == EXPECTED
    assert vicinal.__all__ == sorted(vicinal.__all__)
    for name in EXPECTED:
        assert getattr(vicinal, name) is not None


def test_the_pattern_room_offers_what_the_design_names():
    names = {"bounds", "mask", "count", "flops", "receptive_field", "draw"}
    assert names <= set(vicinal.pattern.__all__)
    for name in vicinal.pattern.__all__:
        assert getattr(vicinal.pattern, name) is not None


def test_every_extra_that_is_advised_exists():
    import re
    import tomllib

    root = Path(vicinal.__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("the package is installed without the project around it")
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [*(root / "src").rglob("*.py"), *(root / "docs").rglob("*.md"), root / "README.md"]
    advised = {
        (path.name, name.strip())
        for path in files
        for names in re.findall(r"vicinal\[([a-z, -]+)\]", path.read_text("utf-8"))
        for name in names.split(",")
    }
    assert advised
    assert not [(path, name) for path, name in advised if name not in extras]
