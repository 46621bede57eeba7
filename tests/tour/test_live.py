"""The live line of the tour: both answers agree before anything is timed, and what cannot run says why."""

from __future__ import annotations

import functools
import sys
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from vicinal.cli.tour import print_live
from vicinal.tour import live
from vicinal.tour.page import _live_rows

pytest.importorskip("transformers")

from transformers.models.dinat import modeling_dinat

TINY = live.QUICK_MODELS[0]
TINY_ONEFORMER = live.Model(
    "a tiny OneFormer",
    64,
    functools.partial(live._oneformer, **live.SMALL),
    live._masks,
    live._task,
)


@pytest.mark.parametrize("model", [TINY, TINY_ONEFORMER], ids=lambda model: model.title)
def test_a_model_is_timed_on_both_attentions(model):
    before = vars(modeling_dinat.NeighborhoodAttention)["forward"], modeling_dinat.requires_backends
    state, told = torch.get_rng_state(), []
    [result] = live.run_models([model], seconds=0.02, begin=told.append)
    assert result.reason == ""
    assert result.ours.median_ms > 0
    assert result.dense.median_ms > 0
    assert result.speedup > 0
    assert result.detail.startswith("64 × 64 pixels")
    assert told == [f"running {model.title}"]
    assert (vars(modeling_dinat.NeighborhoodAttention)["forward"], modeling_dinat.requires_backends) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_answer_gets_no_time(monkeypatch):
    right = live._bias_and_mask
    monkeypatch.setattr(live, "_bias_and_mask", lambda module, grid: right(module, grid).flip(1))
    [result] = live.run_models([TINY], seconds=0.02)
    assert result.ours is None
    assert result.speedup is None
    assert "the answers lie" in result.reason


def test_without_the_host_the_page_and_the_summary_say_so(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("vicinal.adapters.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    results = live.run_models(live.MODELS, seconds=0.02)
    assert [result.title for result in results] == [model.title for model in live.MODELS]
    rows, out = _live_rows(results), StringIO()
    print_live(SimpleNamespace(live=results), Console(file=out, width=80))
    for words in (rows, out.getvalue()):
        assert words.count("needs transformers, which is not installed: pip install vicinal[transformers]") == 2


def test_a_model_that_lacks_a_package_says_which():
    def build(host):
        raise ImportError("the model needs\n scipy")

    [result] = live.run_models([live.Model("a model", 64, build, live._logits)], seconds=0.02)
    assert result.reason == "the model needs scipy"


def test_the_hosts_default_configuration_is_dinat_mini():
    from transformers import DinatConfig

    config = DinatConfig()
    assert (config.embed_dim, list(config.depths), config.kernel_size) == (64, [3, 4, 6, 5], 7)
    assert [model.size for model in live.MODELS] == [224, 224]
