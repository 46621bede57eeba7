"""A user's mistake gets one sentence and exit code 2; a bug of ours keeps its traceback; terminals are respected."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from vicinal.cli import explain, show, terminal, tour
from vicinal.cli.main import BAD_REQUEST, INTERRUPTED, main
from vicinal.tour.build import QUICK
from vicinal.version import __version__


def refused(capsys, *arguments):
    """The sentence of a command that is refused."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == BAD_REQUEST
    assert printed.out == ""
    assert printed.err.endswith("\n")
    sentence = printed.err[:-1]
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    assert sentence.startswith("vicinal")
    return sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "Near(7", "--grid", 9], "cannot read 'Near(7'"),
        (["show", "Neer(7)", "--grid", 9], "Neer"),
        (["show", "Near(0)", "--grid", 9], "kernel_size must be at least 1"),
        (["show", "Near", "--grid", 9], "write Near(...)"),
        (["show", "__import__('os')", "--grid", 9], "cannot read"),
        (["show", "Grid(5)", "--grid", 9], "5 does not divide 9"),
        (["show", "Near(3)", "--grid", 9, 0], "grid[1] must be at least 1"),
        (["show", "Near(3)", "--grid", 2, 2, 2, 2], "1 to 3 axis lengths"),
        (["show", "Near(3)", "--grid", 99999, 99999], "too large for a picture"),
        (["show", "Near(3)", "--grid", 9, "--query", 9], "inside the grid"),
        (["show", "Near(3)", "--grid", 9, "--tiles", 0], "must be at least 1"),
        (["show", "Near(3)", "--grid", 9, "--tiles", 2, 2], "1 or 1 sizes"),
        (["show", "Near(3)", "--grid", 9, "--key-tile", 2], "--key-tile goes with --tiles"),
        (["show", "Near(3)", "--grid", 9000, "--tiles", 1], "too many for a picture"),
        (["show", "--grid", 9], "give a pattern"),
        (["show", "Near(3)"], "--grid"),
        (["show", "Near(3)", "--grid", "nine"], "nine"),
        (["show", "Near(3)", "--grid", 9, "--save", "/no/such/folder/a.png"], "No such file or directory: /no/such"),
        (["show", "Near(3)", "--grid", 9, "--save", "a.nonsense"], "must end in .png"),
        (["explain", "--grid", 9], "--kernel 7 or --pattern"),
        (["explain", "--grid", 9, "--kernel", 3, 3], "kernel_size must be one value or 1 values"),
        (["explain", "--grid", 9, "--kernel", 3, "--stride", 4], "stride must be at most kernel_size"),
        (["explain", "--grid", 9, "--pattern", "Near(3)", "--kernel", 3], "leave out --kernel"),
        (["explain", "--grid", 9, "--kernel", 3, "--heads", 3, "--kv-heads", 2], "divides"),
        (["explain", "--grid", 9, "--kernel", 3, "--heads", 0], "--heads"),
        (["explain", "--grid", 9, "--kernel", 3, "--device", "abacus"], "abacus"),
        (["explain", "--grid", 9, "--kernel", 3, "--backend", "abacus"], "abacus"),
        (["explain", "--grid", 9999, "--kernel", 3, "--backend", "reference", "--key-grid", 99999], "'reference'"),
        (["explain", "--grid", 9, "--pattern", "union(Near(3), Same())", "--bias"], "a union takes no bias"),
        (["explain", "--grid", 9, "--kernel", 3, "--dtype", "int8"], "int8"),
        (["explain", "--grid", 9, "--kernel", 3, "--headz", 2], "--headz"),
        (["explode"], "explode"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_sentence(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_a_folder_that_cannot_be_made_gets_one_sentence(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(capsys, "tour", "--out", tmp_path / "file")


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("matplotlib", ["show", "Near(3)", "--grid", 9, "--save", "a.png"], "plot"),
        ("skimage", ["tour"], "demo"),
        ("PIL", ["tour"], "demo"),
    ],
)
def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path, package, arguments, extra):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    sentence = refused(capsys, *arguments)
    assert package in sentence
    assert f"pip install vicinal[{extra}]" in sentence
    assert list(tmp_path.iterdir()) == [], "it left something behind"


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyError("ours"), AssertionError("ours")], ids=repr)
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr(show, "run", fail)
    with pytest.raises(type(error), match="ours"):
        main(["show", "Near(3)", "--grid", "9"])


def test_a_value_error_of_another_library_is_a_bug(monkeypatch):
    monkeypatch.setattr(show, "run", lambda options: int("not from vicinal"))
    with pytest.raises(ValueError, match="not from vicinal"):
        main(["show", "Near(3)", "--grid", "9"])


def test_control_c_ends_quietly(capsys, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "run", interrupt)
    assert main(["explain", "--grid", "9", "--kernel", "3"]) == INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"vicinal {__version__}\n"


@pytest.mark.parametrize("command", [[], ["explain"], ["show"], ["tour"]], ids=str)
def test_help_is_printed(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: vicinal" in capsys.readouterr().out


def test_color_is_for_terminals_and_no_color_is_respected(capsys, monkeypatch):
    arguments = ["show", "Near(3)", "--grid", "5", "7"]
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    main(arguments)
    assert "\x1b" not in capsys.readouterr().out, "color in a pipe"
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(arguments)
    assert "\x1b[36m#" in capsys.readouterr().out, "no color where it is asked for"
    monkeypatch.setenv("NO_COLOR", "1")
    main(arguments)
    assert "\x1b[36m" not in capsys.readouterr().out, "color in spite of NO_COLOR"


def test_progress_in_a_pipe_is_a_line_for_each_step(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with tour.progress(terminal.console(stderr=True)) as announce:
        announce(1, 2, "looking")
        announce(2, 2, "counting")
    assert capsys.readouterr().err == "[1/2] looking\n[2/2] counting\n"


def test_the_tour_prints_its_path_last(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tour, "FULL", QUICK)
    assert main(["tour", "--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "demo" / "index.html") in printed.splitlines()[-1]
    assert re.search(r"systems: \d+ of 10 built", printed)
    assert "Near(7)" in printed


def command(*arguments):
    """The command in a process of its own, its output and errors read through pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "vicinal.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )


@pytest.mark.parametrize(
    "arguments",
    [["show", "Near(3)", "--grid", "999", "999"], ["explain", "--grid", "9", "--kernel", "3", "--json"]],
    ids=lambda arguments: arguments[0],
)
def test_a_reader_that_leaves_early_ends_it_quietly(arguments):
    with command(*arguments) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) != 0
