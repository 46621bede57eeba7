"""What every test stands on: fixed seeds, fresh memory full of NaN, names for docstring examples."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from vicinal.measure.peers.installed import mend_torchvision

if not torch.cuda.is_available():
    # must be there before anything imports Triton, whose own functions are made for one or the other when it is
    os.environ.setdefault("TRITON_INTERPRET", "1")

mend_torchvision()

# On a laptop every run draws new examples; in CI a failure must come back when the run is repeated.
hypothesis.settings.register_profile("local", deadline=None, max_examples=60)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=120, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def has_compiler() -> bool:
    """Whether the CPU kernels could have been compiled here; where they could, tests fail without them."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))


def pytest_configure(config: pytest.Config) -> None:
    if not has_compiler():
        config.addinivalue_line("filterwarnings", "ignore:vicinal runs on the CPU without its compiled kernels")
    config.addinivalue_line(
        "markers", "plain_memory: leave fresh memory as it comes, for example where time or memory is measured"
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or among others, in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill fresh tensors with NaN (integers with their maximum), so that what a kernel forgets to write shows.

    Torch does this itself, also for what C++ allocates, but only while deterministic algorithms are on. On the
    CPU those merely serialize writes through an index list (`index_put`, `index_copy`, `scatter`); results stay
    the same. `warn_only` keeps operations usable that have no deterministic form.
    """
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    mode, filling = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all(), "torch no longer fills fresh memory; tests would miss unwritten outputs"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(scope="session")
def doctest_namespace() -> dict[str, Any]:
    """The names that docstring examples may use without importing them."""
    import vicinal
    import vicinal.pattern

    names = {name: getattr(vicinal.pattern, name) for name in vicinal.pattern.__all__}
    return {"vicinal": vicinal, "torch": torch, **names}
