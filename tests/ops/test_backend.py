"""Choosing a back end: capabilities are data, refusals are complete, nothing is replaced in silence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vicinal
from vicinal import BackendRefused
from vicinal.ops import backend as backends
from vicinal.ops.backend import Backend, Capability, Problem
from vicinal.pattern import Full, Near, Window, heads, union

PROBLEM = Problem("cpu", torch.float32, (8, 9), (8, 9), heads=4, kv_heads=2, head_dim=32, value_dim=48)

FEATURES = {
    "has_bias": ({"has_bias": True}, "a position bias"),
    "has_extra_keys": ({"has_extra_keys": True}, "extra keys"),
    "has_extra_lengths": ({"has_extra_lengths": True}, "extra_lengths"),
    "has_grids": ({"has_grids": True}, "grids (padded batches)"),
    "groups": ({"num_groups": 2}, "per-head patterns"),
    "members": ({"num_members": 2}, "unions"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_capability_refuses_exactly_the_features_it_lacks(feature: str) -> None:
    fields, words = FEATURES[feature]
    problem = dataclasses.replace(PROBLEM, **fields)
    assert Capability(lacks=frozenset({feature})).refusals(problem) == [f"does not support {words}"]
    assert Capability(lacks=frozenset({feature})).refusals(PROBLEM) == []
    assert Capability(lacks=frozenset(FEATURES) - {feature}).refusals(problem) == []


def test_capability_gives_every_reason_at_once() -> None:
    capability = Capability(
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        max_head_dim=40,
        max_tokens=10,
        lacks=frozenset({"has_bias", "members"}),
    )
    reasons = capability.refusals(dataclasses.replace(PROBLEM, has_bias=True, num_members=3))
    assert len(reasons) == 6
    for words in ("runs on cuda", "float16, bfloat16", "head dims up to 40", "at most 10", "a position bias", "unions"):
        assert any(words in reason for reason in reasons), words


def test_capability_that_says_nothing_refuses_nothing() -> None:
    assert (
        Capability().refusals(
            dataclasses.replace(PROBLEM, **{k: v for f, _ in FEATURES.values() for k, v in f.items()})
        )
        == []
    )


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A back end called `cpu` that takes little, in place of any other; it notes when it is used."""
    used: list[str] = []
    tiled = backends.find("tiled")

    def forward(inputs: Any) -> Any:
        used.append("forward")
        return tiled.forward(inputs)

    def backward(*arguments: Any) -> Any:
        used.append("backward")
        return tiled.backward(*arguments)

    def again(inputs: Any) -> Any:
        used.append("differentiable")
        return tiled.differentiable(inputs)

    capability = Capability(dtypes=(torch.float64,), max_head_dim=16, lacks=frozenset({"has_bias", "groups"}))
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    backends.register(Backend("cpu", capability, forward, backward, again, tiled.describe))
    forget_choices()
    yield used
    forget_choices()


def forget_choices() -> None:
    """Choices are remembered for as long as the process lives; back ends do not come and go except here."""
    from vicinal.ops import resolve

    resolve._choose.cache_clear()


def test_automatic_choice_takes_the_first_that_can(picky: list[str]) -> None:
    query = torch.randn(1, 9, 2, 8, dtype=torch.float64).requires_grad_()
    vicinal.attention(query, query, query, Near(3)).sum().backward()
    assert picky == ["forward", "backward"]
    picky.clear()
    vicinal.attention(query.float(), query.float(), query.float(), Near(3))
    vicinal.attention(query, query, query, heads(Near(3), Full()))
    vicinal.attention(query, query, query, Near(3), bias=torch.zeros(2, 5))
    assert picky == []


def test_second_derivative_goes_through_the_differentiable_form(picky: list[str]) -> None:
    query = torch.randn(1, 9, 2, 8, dtype=torch.float64).requires_grad_()
    out = vicinal.attention(query, query, query, Near(3), backend="cpu")
    (slope,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    slope.square().sum().backward()
    assert picky == ["forward", "differentiable", "backward"]  # the last for the slope of the score itself


def test_named_back_end_that_refuses_raises_with_every_reason(picky: list[str]) -> None:
    query = torch.randn(1, 9, 2, 32)
    with pytest.raises(BackendRefused) as refusal:
        vicinal.attention(query, query, query, heads(Near(3), Full()), bias=(query, query), backend="cpu")
    for words in (
        "'cpu' cannot take this problem",
        "takes float64",
        "head dims up to 16",
        "a position bias",
        "per-head patterns",
    ):
        assert words in str(refusal.value)
    assert picky == []


def test_extra_queries_are_asked_for_before_anything_runs(picky: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their call sees the whole grid, which a back end may refuse although it takes the grid's own."""
    capability = Capability(max_tokens=12)
    backends.register(dataclasses.replace(backends.find("cpu"), capability=capability))
    forget_choices()
    query = torch.randn(1, 12, 2, 8)
    extra = torch.randn(1, 13, 2, 8)
    with pytest.raises(BackendRefused, match="at most 12"):
        vicinal.attention(query, query, query, Near(3), extra_query=extra, backend="cpu")
    assert picky == []


def test_reference_refuses_what_would_not_fit_into_memory() -> None:
    query = torch.empty(1, 300, 300, 1, 4)
    with pytest.raises(BackendRefused, match="reference writes out the dense mask, at most 16384"):
        vicinal.attention(query, query, query, Near(3), backend="reference")
    explanation = vicinal.explain(query, query, query, Near(3))
    assert any("dense mask" in reason for reason in explanation.refused["reference"])


@pytest.mark.parametrize(
    "name", [name for name in backends.PREFERENCE if name not in backends.known(with_engines=True)]
)
def test_planned_back_end_refuses_by_name(name: str) -> None:
    query = torch.zeros(1, 5, 1, 4)
    with pytest.raises(BackendRefused, match=f"{name} is not part of this version"):
        vicinal.attention(query, query, query, Near(3), backend=name)


def test_no_back_end_at_all_lists_the_reasons_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Capability(lacks=frozenset({"members"}))
    replaced = {name: dataclasses.replace(known, capability=none) for name, known in backends._BACKENDS.items()}
    monkeypatch.setattr(backends, "_BACKENDS", replaced)
    with pytest.raises(BackendRefused, match=r"tiled does not support unions; reference does not support unions"):
        backends.choose(dataclasses.replace(PROBLEM, num_members=2), None)


@pytest.mark.parametrize("name", backends.usable())
def test_named_back_end_is_the_one_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    found = backends.find

    def noted(asked: str) -> Backend:
        used.append(asked)
        return found(asked)

    monkeypatch.setattr(backends, "find", noted)
    query = torch.randn(1, 6, 5, 2, 4).requires_grad_()
    extra = torch.randn(1, 2, 2, 4)
    out, _ = vicinal.attention(query, query, query, union(Near(3), Window(4)), extra_query=extra, backend=name)
    out.sum().backward()
    assert set(used) == {name}
