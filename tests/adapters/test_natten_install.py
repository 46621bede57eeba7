"""`install` and `uninstall`, each in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vicinal

SOURCE = Path(vicinal.__file__).parents[1]
PAGE = Path(__file__).parents[2] / "docs" / "natten.md"


def fresh(code: str, *paths: Path) -> None:
    """Run code in an interpreter of its own, which gets the path of our page; `paths` are searched first."""
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    search = os.pathsep.join([*map(str, paths), str(SOURCE), *before])
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(PAGE)],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout + ran.stderr == "", "neither installing nor importing may print anything"


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A folder with another package called natten, which counts as the real one."""
    package = tmp_path / "natten"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.21.6"\nna2d = "the real one"\n')
    (package / "functional.py").write_text("na2d = 'the real one'\n")
    metadata = tmp_path / "natten-0.21.6.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: natten\nVersion: 0.21.6\n")
    return tmp_path


def test_install_answers_every_way_to_import() -> None:
    fresh("""
import importlib, importlib.metadata, importlib.util, inspect, pathlib, pickle, re, sys
import torch
import vicinal

def on_disk():
    try:
        return importlib.util.find_spec("natten") is not None, importlib.metadata.version("natten")
    except importlib.metadata.PackageNotFoundError:
        return False, None

before = on_disk()
assert not any(name.startswith("vicinal.adapters") for name in sys.modules)
import vicinal.adapters.natten as ours
assert not any(name.split(".")[0] in ("natten", "transformers", "diffusers", "timm") for name in sys.modules)
assert on_disk() == before, "importing the adapter installs nothing"

for example in re.findall(r"```python\\n(.*?)```", pathlib.Path(sys.argv[1]).read_text(), re.DOTALL):
    exec(example)
assert natten2dav is ours.functional.natten2dav and sys.modules["natten"].__version__ == "0.17.5"
ours.uninstall()

ours.install()
ours.install()  # again does nothing
assert len([finder for finder in sys.meta_path if type(finder).__module__.startswith("vicinal.adapters")]) == 1

from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb, natten3dav, na2d_qk
from natten.na2d import NeighborhoodAttention2D  # 0.17's module, where today a function is
from natten.natten1d import NeighborhoodAttention1D
from natten.utils import check_all_args
from natten.utils.checks import check_all_args
from natten.utils.varlen import generate_varlen_parameters
from natten.types import Dimension2DType, CausalArg3DTypeOrDed
from natten import has_half, is_fused_na_enabled, use_fused_na, NeighborhoodAttention3D, merge_attentions
from natten.context import NattenContext, is_fna_enabled
from natten.backends import get_compatible_backends
from natten.flops import fna_flop_count
import natten
import natten.functional as functional

assert natten.functional is functional is sys.modules["natten.functional"]
assert inspect.isfunction(natten.na2d), "the function, not the module of that name"
assert natten.na2d is ours.na2d and functional.na2d is ours.na2d
assert natten.NeighborhoodAttention2D is NeighborhoodAttention2D is ours.NeighborhoodAttention2D
query = torch.randn(1, 5, 6, 2, 8)
assert natten.na2d(query, query, query, kernel_size=3).shape == query.shape

for name in ours.__all__:
    assert name in ("install", "uninstall") or hasattr(natten, name), name
assert natten.__version__ == "0.21.7" and sys.modules["natten.version"].__version__ == "0.21.7"
assert importlib.metadata.version("natten") == "0.21.7+vicinal"
assert importlib.metadata.version("torch") == torch.__version__
spec = importlib.util.find_spec("natten")
assert spec is not None and spec.name == "natten" and spec.origin == "vicinal.adapters.natten"
assert importlib.util.find_spec("natten.functional") is not None
assert importlib.util.find_spec("natten.libnatten") is None
assert importlib.reload(natten) is natten
try:
    import natten.libnatten
except ModuleNotFoundError as error:
    assert error.name == "natten.libnatten"
else:
    raise AssertionError
module = pickle.loads(pickle.dumps(NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3)))
assert type(module) is NeighborhoodAttention2D

ours.install(version="0.17.5")  # code that was written for it
assert natten.__version__ == "0.17.5" and importlib.metadata.version("natten") == "0.17.5+vicinal"
assert torch.equal(natten.na2d(query, query, query, 3, 2), natten.na2d(query, query, query, 3, dilation=2))
for wrong in ("latest", "0", 17, "0.17.5+cu121"):
    try:
        ours.install(version=wrong)
    except ValueError as error:
        assert "version must be a release of NATTEN" in str(error)
    else:
        raise AssertionError(wrong)
assert natten.__version__ == "0.17.5"

use_fused_na(True)
ours.uninstall()
ours.uninstall()  # again does nothing

import threading
threads = [threading.Thread(target=lambda: (ours.install(), ours.uninstall())) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not [name for name in sys.modules if name.split(".")[0] == "natten"]
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("vicinal.adapters")]
assert on_disk() == before
try:
    ours.na2d(query, query, query, 3, 2)
except ValueError:  # nobody says any more which release that is
    pass
else:
    raise AssertionError
""")


def test_what_was_there_before_is_passed_over_and_comes_back(stranger: Path) -> None:
    fresh(
        """
import importlib.metadata, sys
from vicinal.adapters import natten as ours

sys.modules["natten"] = None  # an import that somebody forbade
ours.install()
from natten import na2d
assert na2d is ours.na2d
ours.uninstall()
assert sys.modules.pop("natten") is None

ours.install()
import natten
assert natten.na2d is ours.na2d
assert importlib.metadata.version("natten") == "0.21.7+vicinal"
ours.uninstall()
import natten
assert natten.na2d == "the real one"
assert importlib.metadata.version("natten") == "0.21.6"
""",
        stranger,
    )


def test_another_natten_in_memory_is_left_alone(stranger: Path) -> None:
    fresh(
        """
import sys
import natten.functional
from vicinal.adapters import natten as ours
before, finders = dict(sys.modules), list(sys.meta_path)
try:
    ours.install(version="0.17.5")
except RuntimeError as error:
    assert "another natten is loaded already" in str(error) and "before anything imports natten" in str(error)
    assert natten.__file__ in str(error)
else:
    raise AssertionError
assert {name: sys.modules[name] for name in before} == before and sys.meta_path == finders
assert natten.na2d == "the real one"
query = __import__("torch").randn(1, 9, 2, 8)
assert ours.na1d(query, query, query, kernel_size=3).shape == query.shape
try:
    ours.na1d(query, query, query, 3, 2)
except ValueError:  # the version of a refused install does not count
    pass
else:
    raise AssertionError
""",
        stranger,
    )


def test_transformers_finds_it_and_forgets_it() -> None:
    pytest.importorskip("transformers")
    fresh("""
from transformers.utils.import_utils import is_natten_available
from vicinal.adapters import natten as ours
before = is_natten_available()  # it remembers this answer
ours.install()
assert is_natten_available()
ours.uninstall()
assert is_natten_available() is before
""")
