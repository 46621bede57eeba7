from __future__ import annotations

import json

import pytest
import torch

from vicinal.measure import bench, command, growth, machine, timing
from vicinal.measure.peers import PEERS
from vicinal.measure.problems import GROUPS, PROBLEMS, Problem, find
from vicinal.measure.progress import Lines, summary
from vicinal.measure.report import Report, not_timed, table, wrong
from vicinal.measure.task import Prepared
from vicinal.pattern import Near

TINY = Problem("tiny", (Near(3), Near(3)), (8, 8), 2, 8)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
    """What peaks are is tested on its own; here they only take time."""
    monkeypatch.setattr(machine, "_GEMM_SIZE", 64)
    monkeypatch.setattr(machine, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "_best_seconds", lambda call, device: (call(), 1e-3)[1])


def test_a_run_times_gates_and_saves(tmp_path):
    settings = bench.Settings((TINY,), peers=("halo_bmm", "halo_sdpa", "sdpa_mask", "natten"), seconds=0.1)
    path = tmp_path / "results.json"
    report = bench.run(settings, path, Lines())
    assert [row.direction for row in report.rows] == ["forward", "forward+backward"]
    for row in report.rows:
        ours, halo = row.entry("tiled"), row.entry("halo_bmm")
        assert ours is not None
        assert halo is not None
        assert halo.detail in ("4x4", "8x8")
        assert ours.error <= 1
        assert 0 < ours.best_ms <= ours.quartiles_ms[0] <= ours.median_ms <= ours.quartiles_ms[1] <= ours.worst_ms
        assert row.over_halo("tiled") == min(row.speedups["tiled"][name] for name in ("halo_bmm", "halo_sdpa"))
        assert "tiled" in summary(row)
    pairs = 64 * 9 * 2
    assert [row.flops for row in report.rows] == [4 * 8 * pairs, 14 * 8 * pairs]
    assert Report.load(path) == report
    assert any(line.startswith("natten: not run") for line in not_timed(report))
    assert not wrong(report)


def test_no_time_is_reported_for_a_wrong_answer(monkeypatch):
    def lies(task):
        return [Prepared(lambda query, key, value: query * 1.0)]

    monkeypatch.setitem(PEERS, "liar", lies)
    settings = bench.Settings((TINY,), peers=("liar",), backwards=(False,), seconds=0.05)
    (row,) = bench.run(settings, None, Lines()).rows
    entry = next(entry for entry in row.entries if entry.name == "liar")
    assert entry.median_ms is None
    assert entry.reason.startswith("wrong: output")
    assert "liar ms" not in table([row])[0]
    assert "liar" not in row.speedups["tiled"]


def test_our_own_wrong_answer_is_told_apart(monkeypatch):
    monkeypatch.setattr(bench, "attention", lambda query, key, value, pattern, backend: value * 1.0)
    settings = bench.Settings((TINY,), backends=("tiled",), peers=(), backwards=(False,), seconds=0.05)
    report = bench.run(settings, None, Lines())
    assert len(wrong(report)) == 1
    assert "tiled on tiny, float32 forward: wrong: output" in wrong(report)[0]


def test_of_several_candidates_the_fastest_is_reported(monkeypatch):
    took = {"seconds": 1e-3}
    monkeypatch.setattr(timing._Clock, "seconds", lambda self, call: (call(), took["seconds"])[1])

    def two(task):
        (right,) = bench.contenders(("tiled",), ())["tiled"](task)

        def candidate(seconds):
            def call(query, key, value):
                took["seconds"] = seconds
                return right.call(query, key, value)

            return Prepared(call, detail=f"{seconds}")

        return [candidate(0.3), candidate(0.1), candidate(0.2)]

    monkeypatch.setitem(PEERS, "two", two)
    settings = bench.Settings((TINY,), peers=("two",), backwards=(False,), seconds=0.1)
    (row,) = bench.run(settings, None, Lines()).rows
    assert (row.entry("two").detail, row.entry("two").median_ms) == ("0.1", 100.0)


def test_a_refused_back_end_says_why(monkeypatch):
    settings = bench.Settings((TINY,), backends=("tiled", "triton"), peers=(), backwards=(False,), seconds=0.05)
    (row,) = bench.run(settings, None, Lines()).rows
    entry = next(entry for entry in row.entries if entry.name == "triton")
    assert entry.reason.startswith("not run: ")
    assert entry.is_ours


def test_the_command_prints_tables_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vicinal.measure.command.find", lambda names: [TINY])
    output = tmp_path / "out.json"
    arguments = ["tiny", "--seconds", "0.05", "--peers", "halo_bmm", "--directions", "forward", "--output", str(output)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert "| problem | cpu ms | tiled ms | halo_bmm ms |" in printed.out
    assert "tiny float32 forward" in printed.err
    saved = json.loads(output.read_text())
    assert saved["rows"][0]["problem"] == "tiny"
    assert saved["machine"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("arguments", "because"),
    [
        (["nonsense"], "neither a group"),
        (["quick", "--backends", "magic"], "--backends"),
        (["quick", "--peers", "magic"], "--peers"),
        (["readme", "--root", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, because, capsys):
    assert command.main(arguments) == 2
    assert because in capsys.readouterr().err


def test_problem_names_are_unique_and_every_group_has_some():
    names = [problem.name for problem in PROBLEMS]
    assert len({*names, *GROUPS, "all"}) == len(names) + len(GROUPS) + 1
    for group in GROUPS:
        assert find([group])
    assert find(["all"]) == list(PROBLEMS)
    assert find(["map-128x128", "nat-14x14"]) == find(["nat-14x14"]) + find(["map-128x128"])


def test_the_machine_is_described_without_names_or_paths():
    import getpass
    import socket

    text = json.dumps(machine.describe())
    assert "/" not in text
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_peaks_name_the_library():
    found = machine.peaks([torch.float32, torch.bfloat16])
    for dtype in ("float32", "bfloat16"):
        gemm = found["gemm"][dtype]
        assert gemm["gflops"] == max(gemm["all"].values())
        assert gemm["all"][gemm["by"]] == gemm["gflops"]
    assert found["copy_gb_per_second"] > 0


def test_growth_measures_and_draws(tmp_path, monkeypatch):
    sizes = (Problem("a", TINY.pattern, (8, 8), 1, 8), Problem("b", TINY.pattern, (16, 16), 1, 8))
    monkeypatch.setattr(growth, "CURVES", {"tokens": sizes})
    monkeypatch.setattr(
        growth.memory, "peak", lambda problem, *_, **__: growth.memory.Peak(0, problem.tokens * 10**6, 0)
    )
    found = growth.measure("tiled", backward=False, seconds=0.05, say=lambda text: None)
    assert [point["size"] for point in found["curves"]["tokens"]["points"]] == [64, 256]
    assert found["curves"]["tokens"]["memory"] == pytest.approx({"fixed": 0, "each": 1, "explains": 1})
    growth.save(found, tmp_path / "growth.json")
    growth.plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_growth_varies_one_thing_at_a_time():
    for name, problems in growth.CURVES.items():
        sizes = [growth._SIZES[name](problem) for problem in problems]
        assert sizes == sorted(set(sizes))
        for other, size in growth._SIZES.items():
            if other != name:
                assert len({size(problem) for problem in problems}) == 1, (name, other)
