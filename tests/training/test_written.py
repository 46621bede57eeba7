"""Recipes as text and back, and changes to them."""

from __future__ import annotations

import json
import pickle

import pytest

from vicinal.models.compact import CompactConfig
from vicinal.recipes import find, names
from vicinal.training import Loop
from vicinal.training.written import from_plain, override, to_plain


@pytest.mark.parametrize("name", names())
def test_every_recipe_survives_being_written_down(name):
    recipe = find(name)
    again = from_plain(json.loads(json.dumps(to_plain(recipe))))
    assert to_plain(again) == to_plain(recipe)
    assert type(again.task) is type(recipe.task)


def test_changes_reach_every_depth():
    recipe = find(
        "digits",
        [
            "loop.epochs=3",
            "loop.precision=bfloat16",
            "loop.ema_decay=none",
            "loop.compile=true",
            "task.model.depths=1,2,3",
            "task.model.mixer=swin",
            "optimizers.main.learning_rate=1e-4",
            "optimizers.main.scales.stem=0.1",
        ],
    )
    assert recipe.loop == Loop(
        **{**vars(find("digits").loop), "epochs": 3.0, "precision": "bfloat16", "ema_decay": None, "compile": True}
    )
    assert recipe.task.model == CompactConfig("swin", 32, (1, 2, 3), 3)
    assert recipe.optimizers["main"].learning_rate == 1e-4
    assert recipe.optimizers["main"].scales == {"stem": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("loop.epoch=3", r"no setting loop\.epoch; did you mean loop\.epochs"),
        ("lop.epochs=3", "no setting lop; did you mean loop"),
        ("loop.epochs=many", "must be a number, got 'many'"),
        ("loop.batch_size=1.5", "must be a whole number"),
        ("loop.compile=1", "must be true or false"),
        ("loop.precision=half", "'float32' or 'bfloat16' or 'float16'"),
        ("loop=3", "has parts"),
        ("loop.epochs.more=3", "has no parts"),
        ("task.model.depths=a,b", "depths must be"),
        ("loop.epochs", "written key=value"),
        ("loop.epochs=-1", r"loop\.epochs must be above 0"),
        ("loop.ema_decay=1.5", "ema_decay"),
        ("optimizers.min.learning_rate=1", r"did you mean optimizers\.main"),
        ("optimizers.min=3", r"did you mean optimizers\.main"),
        ("optimizers.main=3", r"optimizers\.main has parts \(learning_rate"),
        ("optimizers.main.learning_rate=-1", "learning_rate must be at least 0"),
        ("optimizers.main.betas=0.9", "betas must be two numbers"),
        ("optimizers.main.betas=2,3", "betas must be two numbers"),
        ("loop.epochs=1e400", r"loop\.epochs must be above 0 and finite"),
        ("loop.seed=-1", r"loop\.seed must be in 0"),
        ("loop.workers=-1", r"loop\.workers must be at least 0"),
        ("loop.threads=-1", r"loop\.threads must be at least 0"),
    ],
)
def test_wrong_changes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        override(find("digits"), [change])


def test_unknown_recipes_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="did you mean digits"):
        find("digit")
    with pytest.raises(ValueError, match="no file"):
        find("nowhere.py:mine")


def test_only_our_own_classes_are_made_from_text():
    with pytest.raises(ValueError, match="not of this library"):
        from_plain({"kind": "subprocess:Popen", "args": "ls"})
    with pytest.raises(ValueError, match="no part of a recipe"):
        from_plain({"kind": "vicinal.cli.main:main"})


def test_a_recipe_of_ones_own_is_read_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from vicinal.recipes import find\ndef quick():\n    return find('digits', ['loop.epochs=1'])\n")
    assert find(f"{file}:quick", ["loop.seed=4"]).loop.seed == 4
    with pytest.raises(ValueError, match="no function 'slow'"):
        find(f"{file}:slow")


def test_a_recipe_of_ones_own_may_have_parts_of_its_own(tmp_path):
    (tmp_path / "own_parts.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, replace\n"
        "from vicinal.data import Digits\nfrom vicinal.recipes import find\n"
        "@dataclass(frozen=True)\nclass Mine(Digits):\n    share: float = 1.0\n"
        "def quick():\n    return replace(find('digits'), data=Mine())\n"
        "def nothing():\n    pass\n"
    )
    recipe = find(f"{tmp_path / 'own_parts.py'}:quick", ["data.share=0.5"])
    assert pickle.loads(pickle.dumps(recipe)).data.share == 0.5  # as it goes to other processes
    with pytest.raises(ValueError, match=r"should return a vicinal\.training\.Recipe, got NoneType"):
        find(f"{tmp_path / 'own_parts.py'}:nothing")
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ValueError, match="another name"):
        find(f"{tmp_path / 'json.py'}:quick")


def test_full_size_recipes_say_that_nobody_ran_them():
    for name in names():
        if "imagenet" in name or "22k" in name:
            assert find(name).status.startswith("not run")
