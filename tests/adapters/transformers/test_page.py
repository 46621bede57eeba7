"""The page about transformers keeps its word: its code runs, on small models in place of downloaded ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers

from vicinal.adapters.transformers import unpatch_dinat

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
CONFIGS = {
    "DinatForImageClassification": lambda: transformers.DinatConfig(depths=[1, 2], num_heads=[1, 2], embed_dim=16),
    "Dinov2Model": lambda: transformers.Dinov2Config(**SMALL),
    "ViTModel": lambda: transformers.ViTConfig(**SMALL, intermediate_size=32),
}


@pytest.fixture
def no_downloads(monkeypatch):
    """`from_pretrained` builds a small model with random weights."""
    for name, config in CONFIGS.items():
        model = getattr(transformers, name)

        def build(place, model=model, config=config, **options):
            assert "/" in place
            return model._from_config(config(), **options)

        monkeypatch.setattr(model, "from_pretrained", build)
    yield
    unpatch_dinat()


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_on_the_page_runs(block):
    names: dict[str, object] = {}
    exec(block, names)
    found = names["logits"] if "logits" in names else names["features"]
    assert found.isfinite().all()


def test_the_page_shows_every_function():
    from vicinal.adapters import transformers as adapter

    assert len(BLOCKS) == 3
    text = PAGE.read_text("utf-8")
    for name in adapter.__all__:
        assert name in text or name == "LayerPatterns", name
