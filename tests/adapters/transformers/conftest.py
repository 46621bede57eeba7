"""Fixtures of the tests of the transformers adapter."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_names_left(monkeypatch):
    """Names registered in a test are forgotten after it."""
    transformers = pytest.importorskip("transformers")
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
