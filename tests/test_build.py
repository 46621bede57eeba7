"""What users install: an sdist and a wheel, in fresh environments, with a compiler and without."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from .conftest import has_compiler

ROOT = Path(__file__).parents[1]
PARTS = ("src", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "CHANGELOG.md")

CALL = """
import warnings
from pathlib import Path
import sys, torch, vicinal
assert Path(vicinal.__file__).is_relative_to(sys.prefix), vicinal.__file__
query = torch.randn(1, 9, 9, 2, 16)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    out = vicinal.na2d(query, query, query, 3)
    vicinal.na2d(query, query, query, 5)
torch.testing.assert_close(out, vicinal.na2d(query, query, query, 3, backend="reference"))
explanation = vicinal.explain(query, query, query, vicinal.Near(3))
print(explanation.backend, len(told), explanation.refused.get("cpu"))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="paths as on Linux and macOS")]


class Environment:
    """A fresh virtual environment that sees this one's packages after its own."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        (own,) = (folder / "lib").glob("python*/site-packages")
        # a path in a .pth file does not bring that folder's own .pth files along, so not the editable install
        (own / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> str:
        left_out = ("PYTHONPATH", "VICINAL_CPU_LIBRARY", "VICINAL_REQUIRE_LIBRARY")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.python.parent,
            env={**inherited, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # where pip shows what a build prints
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy, so that a build leaves nothing behind in this folder."""
    copy = tmp_path / "sources"
    copy.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.egg-info")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=unwanted)
        else:
            shutil.copy(ROOT / part, copy / part)
    return copy


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
def test_sdist_makes_a_wheel_for_every_python_that_computes(
    sources: Path, environment: Environment, tmp_path: Path
) -> None:
    environment.run("-m", "pip", "install", "--quiet", "setuptools>=77")
    environment.run("setup.py", "--quiet", "sdist", cwd=sources)
    (sdist,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.[ch]*")} <= names
    environment.run(
        *("-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist)), VICINAL_REQUIRE_LIBRARY="1"
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"vicinal-[\d.]+-py3-none-(linux|macosx|win)_?\w+\.whl", wheel.name)
    inside = zipfile.ZipFile(wheel).namelist()
    assert [name for name in inside if "_cpu" in name] in (["vicinal/_cpu.so"], ["vicinal/_cpu.dylib"])
    assert not any(name.startswith("csrc") for name in inside)
    environment.run("-m", "pip", "install", "--no-deps", str(wheel))
    assert environment.run("-c", CALL).split()[:2] == ["cpu", "0"]


def test_install_without_a_compiler_works_and_says_so(sources: Path, environment: Environment) -> None:
    none = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    told = environment.run("-m", "pip", "--verbose", "install", "--no-deps", str(sources), **none)
    assert "installing without the CPU kernels, which could not be compiled" in told
    backend, warnings, reason = environment.run("-c", CALL).split(maxsplit=2)
    assert (backend, warnings) == ("tiled", "1")
    assert "its library was not built" in reason


def test_required_library_that_cannot_be_built_fails_the_install(sources: Path, environment: Environment) -> None:
    command = [str(environment.python), "-m", "pip", "install", "--no-deps", str(sources)]
    variables = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "VICINAL_REQUIRE_LIBRARY": "1"}
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
