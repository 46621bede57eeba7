"""`vicinal simulate` prints what `vicinal.simulate` finds."""

from __future__ import annotations

import json

import pytest

import vicinal
from vicinal import Near
from vicinal.cli.main import main

VIDEO = "--grid 30 48 80 --window 18 24 24 --stride 1 8 8 --query-tile 4 8 8 --key-tile 2 8 8"


def test_simulate_of_the_manual_equals_the_library(capsys):
    assert main(["simulate", *VIDEO.split(), "--attention-share", ".607", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    pattern = (Near(18), Near(24, stride=8), Near(24, stride=8))
    tiles = {"query_tile": (4, 8, 8), "key_tile": (2, 8, 8)}
    expected = vicinal.simulate(pattern, (30, 48, 80), **tiles, attention_share=0.607)
    assert json.loads(printed.out) == json.loads(json.dumps(expected.to_dict()))


def test_simulate_for_people_names_the_bounds(capsys):
    assert main(["simulate", *VIDEO.split(), "--attention-share", ".607", "--search"]) == 0
    printed = capsys.readouterr().out
    for words in ("9.09x, end to end 2.18x", "11.11x, end to end 2.23x", "91.0%", "16 x 8 x 8", "the worst query tile"):
        assert words in printed


def test_simulate_searches_and_says_so_in_json(capsys):
    arguments = "--grid 20 24 --pattern Near(8) --query-tile 4 4 --key-tile 4 4 --search --json"
    assert main(["simulate", *arguments.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["search"][0]["attention_bound"] >= found["attention_bound"]
    assert found["end_to_end_bound"] is None


def test_window_of_minus_one_is_the_whole_axis(capsys):
    arguments = "--grid 6 44 80 --window -1 20 40 --query-tile 2 4 8 --key-tile 2 4 8 --json"
    assert main(["simulate", *arguments.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert round(100 * found["sparsity"]) == 77
    assert found["pattern"] == "(Near(6), Near(20), Near(40))"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--grid 9 --query-tile 4 --key-tile 4", "give --window 18 24 24 or --pattern"),
        (
            "--grid 9 --window 3 --pattern Near(3) --query-tile 4 --key-tile 4",
            "--pattern says it all: leave out --window",
        ),
        ("--grid 9 9 --window 3 3 3 --query-tile 4 --key-tile 4", "one for each of the 2 axes"),
        ("--grid 9 9 --window 3 --query-tile 4 4 4 --key-tile 4", "query_tile must be one integer or 2 of them"),
        ("--grid 9 --window 3 --stride 4 --query-tile 4 --key-tile 4", "stride must be at most kernel_size"),
        ("--grid 9 --window 3 --query-tile 4 --key-tile 4 --attention-share 2", "between 0 and 1"),
        ("--grid 9 --window 3 --query-tile 3 --key-tile 4 --search", "a power of two"),
    ],
)
def test_simulate_answers_a_mistake_with_a_sentence(capsys, arguments, words):
    assert main(["simulate", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert "Traceback" not in printed.err
