"""`vicinal explain` asks with sizes what `vicinal.explain` answers with tensors."""

from __future__ import annotations

import json

import pytest
import torch

import vicinal
from vicinal.cli.explain import explain_sizes
from vicinal.cli.main import main
from vicinal.pattern import Full, Near, Window, heads


def asked(capsys, *arguments):
    """What the command prints as JSON, after checking that it prints nothing else."""
    assert main(["explain", *arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def answered(*tensors, **others):
    """What the library says, as it reads after a trip through JSON."""
    return json.loads(json.dumps(vicinal.explain(*tensors, **others).to_dict()))


def test_explain_of_the_manual_equals_the_library(capsys):
    arguments = ["--grid", "56", "56", "--heads", "2", "--head-dim", "32", "--kernel", "7", "--dilation", "1"]
    query = torch.empty(1, 56, 56, 2, 32)
    assert asked(capsys, *arguments) == answered(query, query, query, Near(7))


def test_explain_with_everything_equals_the_library(capsys):
    pattern = heads(Near(7), (Full(), Window(4)))
    arguments = "--grid 11 13 --batch 2 --heads 4 --kv-heads 2 --head-dim 16 --value-dim 24 --extra-tokens 3 --bias"
    found = asked(capsys, "--pattern", repr(pattern), *arguments.split(), "--dtype", "bfloat16")
    query, key, value = (torch.empty(2, 11, 13, *last, dtype=torch.bfloat16) for last in ((4, 16), (2, 16), (2, 24)))
    bias = (torch.empty(2, 13, 13, dtype=query.dtype), torch.empty(2, 21, 7, dtype=query.dtype))
    extra = {"extra_key": query.new_empty(2, 3, 2, 16), "extra_value": query.new_empty(2, 3, 2, 24)}
    assert found == answered(query, key, value, pattern, bias=bias, **extra)
    assert found["problem"]["has_bias"]
    assert found["problem"]["has_extra_keys"]


def test_explain_with_two_grids_equals_the_library(capsys):
    found = asked(capsys, "--grid", "12", "16", "--key-grid", "6", "8", "--kernel", "3", "--backend", "reference")
    query, key = torch.empty(1, 12, 16, 1, 32), torch.empty(1, 6, 8, 1, 32)
    assert found == answered(query, key, key, Near(3), backend="reference")
    assert found["backend"] == "reference"


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ("--kernel 5", Near(5)),
        ("--kernel 5 --causal", Near(5, causal=True)),
        ("--kernel 5 3 --stride 2 1", (Near(5, stride=2), Near(3))),
        ("--kernel 3 --dilation 1 4 --causal true false", (Near(3, causal=True), Near(3, dilation=4))),
        ("--pattern (Full(),Window(4,shift=1))", (Full(), Window(4, shift=1))),
    ],
    ids=str,
)
def test_explain_reads_who_sees_whom(capsys, arguments, pattern):
    found = asked(capsys, "--grid", "15", "16", *arguments.split())
    query = torch.empty(1, 15, 16, 1, 32)
    assert found["flops"] == vicinal.explain(query, query, query, pattern).flops


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_explain_answers_for_a_device_that_is_not_here(device):
    explanation = explain_sizes(Near(7), (56, 56), heads=(2, 2), place=(device, "float16"))
    assert explanation.problem.device == device
    assert explanation.problem.dtype == torch.float16


def test_explain_leaves_no_trace_in_later_calls():
    explain_sizes(Near(3), (5, 7), use_bias=True)
    query = torch.randn(1, 5, 7, 1, 32)
    out = vicinal.attention(query, query, query, Near(3), bias=torch.zeros(1, 5, 5))
    assert type(out) is torch.Tensor
    assert out.isfinite().all()


def test_explain_for_people_names_back_ends_work_and_waste(capsys):
    assert main(["explain", "--grid", "56", "56", "--heads", "2", "--kernel", "7"]) == 0
    printed = capsys.readouterr().out
    assert "39.3 MFLOP (39,337,984)" in printed
    query = torch.empty(1, 56, 56, 2, 32)
    explanation = vicinal.explain(query, query, query, Near(7))
    assert f"back end   {explanation.backend}" in printed
    for name, reasons in explanation.refused.items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert all(reason in line for reason in reasons), "a reason was cut or wrapped"
    assert explanation.tiles["method"] in printed


def test_explain_breaks_no_line_in_a_pipe(capsys):
    members = ", ".join(f"Near({size})" for size in range(3, 43, 2))
    assert main(["explain", "--grid", "64", "64", "--pattern", f"union({members})"]) == 0
    assert f"union({members})" in capsys.readouterr().out
