"""`make bench-gpu` without a GPU: its rows, bounds and files, on tiny problems and the CPU."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import vicinal
from vicinal.measure import command, gpu, machine
from vicinal.measure.gate import Gate
from vicinal.measure.gpu_problems import GPU_PROBLEMS, find_gpu
from vicinal.measure.peers import gpu as peers
from vicinal.measure.problems import Problem
from vicinal.measure.task import NotRun, Prepared, Task
from vicinal.measure.timing import Timing
from vicinal.pattern import Near, Window, bounds, heads

TINY = Problem("tiny", (Near(3), Near(5)), (8, 16), 2, 16, groups=("small",))
HYDRA = Problem("hydra", heads(Near(3), Near(3, dilation=4)), (12, 12), 4, 16)

ON_CPU = {"device": "cpu", "dtype": torch.float32, "seconds": 0.05, "sparse_peers": {}}


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
    """What peaks are is tested on its own; here they only take time."""
    monkeypatch.setattr(machine, "_GEMM_SIZE", 64)
    monkeypatch.setattr(machine, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "_best_seconds", lambda call, device: (call(), 1e-3)[1])


@pytest.mark.parametrize("problem", GPU_PROBLEMS, ids=lambda problem: problem.name)
def test_every_row_is_a_problem_that_the_operator_takes(problem):
    query = torch.empty(problem.shape, device="meta", dtype=torch.bfloat16)
    explanation = vicinal.explain(query, query, query, problem.pattern)
    assert explanation.flops == problem.flops(backward=False)
    assert explanation.flops + explanation.flops_backward == problem.flops(backward=True)


def test_rows_are_those_that_were_asked_for():
    names = [problem.name for problem in GPU_PROBLEMS]
    assert len(set(names)) == len(names)
    text = " ".join(names)
    for words in ("nat-56x56-b64", "dinat-14x14-b64", "flux-4k-s1 ", "flux-4k-s16", "hunyuan-w18x24x24-s16x8x8"):
        assert words in text
    for words in ("hunyuan-w30x40x40-s1x1x1", "cosmos1-w16x24x16-s1x8x16", "cosmos2-w16x4x16", "seq-32768-s1"):
        assert words in text
    assert {"stylenat-256", "stylenat-1024"} <= set(names)
    assert {problem.batch for problem in find_gpu(("maps",))} == {64}
    first = find_gpu(("first",))
    assert first == GPU_PROBLEMS[: len(first)]
    assert {group for problem in first for group in problem.groups} == {"first", "maps", "sequence", "images", "video"}
    with pytest.raises(ValueError, match="'nothing' is neither a group"):
        find_gpu(("nothing",))


@pytest.mark.parametrize(
    "name",
    ["nat-28x28-b64", "flux-4k-s16", "hunyuan-w18x24x24-s1x1x1", "cosmos2-w16x12x16-s1x4x1-d1x1x5", "stylenat-256"],
)
def test_no_bound_of_tiles_is_above_that_of_the_flops(name):
    (problem,) = find_gpu((name,))
    model = gpu.modelled(problem)
    assert 1 <= model.worst_tile <= model.mean_of_tiles <= model.flops * 1.001
    assert math.prod(model.query_tile) == math.prod(model.key_tile) == 128
    if model.is_block_sparse and name.startswith("flux"):
        assert model.worst_tile == model.flops == 10.24


def test_bound_counts_what_fills_tiles_up_as_waste():
    """28 queries in tiles of 32 cost 32, but dense attention does not pay for that."""
    model = gpu.modelled(Problem("whole", (Window(28), Window(28)), (28, 28), 1, 32))
    assert model.flops == 1
    assert model.mean_of_tiles <= 1


def test_a_run_writes_valid_rows(tmp_path):
    path = tmp_path / "gpu.json"
    said: list[str] = []
    settings = gpu.Settings((TINY, HYDRA), backends=("tiled",), dense=("tiled",), **ON_CPU)
    found = gpu.run(settings, path, said.append)
    assert json.loads(path.read_text()) == found
    assert [(row["problem"], row["direction"]) for row in found["rows"]] == [
        (name, direction) for name in ("tiny", "hydra") for direction in ("forward", "forward+backward")
    ]
    for row in found["rows"]:
        entries = {entry["name"]: entry for entry in row["entries"]}
        assert list(entries) == ["tiled", "dense_tiled", "flash", "cudnn"]
        ours, own_dense, flash = entries["tiled"], entries["dense_tiled"], entries["flash"]
        assert ours["error"] <= 1
        assert math.isclose(ours["tflops"], row["flops"] / ours["median_ms"] / 1e9, abs_tol=0.006)
        assert math.isclose(flash["tflops"], row["dense_flops"] / flash["median_ms"] / 1e9, abs_tol=0.006)
        assert ours["over_dense"] > 0
        assert ours["share_of_bound"] == pytest.approx(
            ours["over_own_dense"] / row["bounds"]["mean_of_tiles"], rel=2e-3
        )
        assert own_dense["share_of_bound"] is None
        assert entries["cudnn"]["median_ms"] is None
        assert entries["cudnn"]["reason"].startswith("failed: RuntimeError")
        assert row["dense_flops"] > row["flops"]
    assert not gpu.failures(found)
    assert any(line.startswith("tiny forward: tiled") and "bounds" in line for line in said)
    cells = gpu.table(found, "forward")
    assert [line[0] for line in cells] == ["problem", "tiny", "hydra"]
    assert all(len(line) == len(cells[0]) for line in cells)


def test_the_file_is_there_after_every_row_and_a_run_goes_on_from_it(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    settings = gpu.Settings((TINY, HYDRA), backends=("tiled",), dense=(), dense_peers={}, backwards=(False,), **ON_CPU)
    measured = []
    measure = gpu.measure

    def breaks(task, gate, settings, say):
        measured.append(task.problem.name)
        if task.problem is HYDRA and len(measured) == 2:
            raise KeyboardInterrupt
        return measure(task, gate, settings, say)

    monkeypatch.setattr(gpu, "measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(settings, path, print)
    before = json.loads(path.read_text())["rows"]
    assert [row["problem"] for row in before] == ["tiny"]
    found = gpu.run(settings, path, print, resume=True)
    assert measured == ["tiny", "hydra", "hydra"]
    assert found["rows"][0] == before[0]
    other = gpu.run(dataclasses.replace(settings, problems=(TINY,)), path, print)
    assert measured[-1] == "tiny"
    assert len(other["rows"]) == 1


def test_a_run_that_is_out_of_time_begins_no_row_and_says_what_is_left(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    path = tmp_path / "gpu.json"
    settings = gpu.Settings((TINY, HYDRA), backends=("tiled",), dense=(), dense_peers={}, minutes=10, **ON_CPU)
    monkeypatch.setattr(gpu, "compare", lambda calls, **_: {name: Timing({0: 1.0}) for name in calls})
    found = gpu.run(settings, path, said.append)
    assert 0 < len(found["rows"]) < 4
    assert said[-1] == f"out of time with {4 - len(found['rows'])} rows left: run it again with --resume"
    again = gpu.run(dataclasses.replace(settings, minutes=None), path, said.append, resume=True)
    assert len(again["rows"]) == 4


def test_a_lost_gpu_ends_the_run_but_not_for_good(tmp_path, monkeypatch):
    """After an illegal access every later call of the process fails: all rows would have been called failures."""
    state = {"lost": False}

    def breaks(task):
        state["lost"] = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "_lost", lambda device: "an illegal memory access" if state["lost"] else None)
    path = tmp_path / "gpu.json"
    given = {**ON_CPU, "sparse_peers": {"broken": breaks, "later": breaks}}
    settings = gpu.Settings((TINY, HYDRA), ("tiled",), dense=(), dense_peers={}, backwards=(False,), **given)
    with pytest.raises(gpu.GpuLost, match="run it again with --resume for 1 more rows"):
        gpu.run(settings, path, print)
    (row,) = json.loads(path.read_text())["rows"]
    reasons = {entry["name"]: entry["reason"] for entry in row["entries"]}
    assert reasons["broken"].startswith("failed: RuntimeError: CUDA error")
    assert reasons["tiled"] == reasons["later"] == "not run: the GPU was lost before"
    state["lost"] = False
    after = gpu.run(dataclasses.replace(settings, sparse_peers={}), path, print, resume=True)
    assert [row["problem"] for row in after["rows"]] == ["tiny", "hydra"]


def test_rows_of_another_machine_or_other_kernels_are_not_kept():
    before = {"machine": {"gpu": "one", "torch": "2"}, "kernels": "abc", "rows": [{"problem": "tiny"}]}
    assert gpu._kept(before, before) == before["rows"]
    assert gpu._kept(before, {**before, "machine": {"gpu": "other", "torch": "2"}}) == []
    assert gpu._kept(before, {**before, "kernels": "abd"}) == []


def test_errors_of_any_class_are_the_contenders_own():
    """Triton's errors are no RuntimeErrors; one ended the run once."""

    class OutOfResources(Exception):
        pass

    def breaks(task):
        raise OutOfResources("shared memory")

    task = Task(TINY, torch.float32)
    assert gpu._ready(task, Gate(task), breaks, gpu.OURS, 0) == (None, "failed: OutOfResources: shared memory")


def test_wrong_and_broken_answers_get_no_time_and_cost_nobody_else_theirs(monkeypatch):
    def lies(task):
        return [Prepared(lambda query, key, value: query * 1.0)]

    def breaks(task):
        raise RuntimeError("out of shared memory\nand more")

    settings = gpu.Settings(
        (TINY,),
        backends=("tiled",),
        dense=(),
        dense_peers={},
        backwards=(False,),
        **{**ON_CPU, "sparse_peers": {"liar": lies, "broken": breaks}},
    )
    (row,) = gpu.run(settings, None, print)["rows"]
    entries = {entry["name"]: entry for entry in row["entries"]}
    assert entries["liar"]["reason"].startswith("wrong: output")
    assert entries["broken"]["reason"] == "failed: RuntimeError: out of shared memory"
    assert entries["tiled"]["median_ms"] > 0
    assert entries["tiled"]["over_dense"] is None
    monkeypatch.setattr("vicinal.measure.bench.attention", lambda query, *_, **__: query * 1.0)
    found = gpu.run(dataclasses.replace(settings, sparse_peers={}), None, print)
    assert gpu.failures(found)[0].startswith("tiled on tiny forward: wrong")


def test_dense_attention_that_takes_too_long_is_not_run():
    task = Task(TINY, torch.float32)
    found, reason = gpu._ready(task, Gate(task), peers.DENSE["flash"], gpu.DENSE_PEER, 10**15)
    assert found is None
    assert reason.startswith("not run: dense attention would take about")


def test_without_a_gpu_the_command_says_so_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["gpu", "maps"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    sentence = "this benchmark needs a GPU that torch can use (CUDA or ROCm), and there is none here"
    assert printed.err == f"python -m vicinal.measure: {sentence}\n"


def test_peers_that_there_are_not_are_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["gpu", "maps", "--peers", "flex_rows", "bogus"]) == 2
    assert "--peers: 'bogus' is none of flex_rows, flex_tiles" in capsys.readouterr().err


def test_tensors_in_tile_order_and_their_gradients_come_back_as_they_were():
    member = bounds(TINY.pattern, (7, 9)).groups[0].members[0]
    layout = peers._in_order(*peers.chosen_orders(member))
    tensors = tuple(torch.randn(1, 7, 9, 2, 4) for _ in range(3))
    entered = layout.enter(tensors)
    for own, again in zip(tensors, layout.leave_inputs(entered), strict=True):
        assert torch.equal(own, again)
    grad = layout.enter_out(tensors[0])
    assert torch.equal(layout.leave_out(grad), tensors[0])
    assert math.isclose(grad.double().square().sum(), tensors[0].double().square().sum(), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("make", "problem", "words"),
    [
        (peers.sliding_tile, TINY, "windows and strides of whole tiles of 6x8x8"),
        (peers.sliding_tile, find_gpu(("hunyuan-w18x24x24-s16x8x8",))[0], "windows and strides of whole tiles"),
        (peers.flex_tiles, HYDRA, "written for one pattern on all heads"),
        (peers.flex_tiles, dataclasses.replace(TINY, head_dim=8), "takes head dims from 16"),
        (peers.natten, HYDRA, "neighborhoods with a shifted border only"),
    ],
    ids=["sta", "sta-stride", "flex-heads", "flex-dim", "natten-heads"],
)
def test_peers_say_what_they_do_not_take(make, problem, words):
    class Sizes:
        """A task without its tensors, which would be large."""

    task = Sizes()
    task.problem, task.backward, task.device, task.dtype = problem, False, torch.device("cpu"), torch.float32
    with pytest.raises(NotRun, match=words):
        make(task)


def test_sliding_tile_attention_is_called_in_its_own_order(monkeypatch):
    """Stands in for its package: attention over whole tiles, on tokens in tile order."""
    import importlib.machinery
    import sys
    from types import ModuleType

    grid = (18, 48, 80)
    problem = Problem("sta", (Near(18, stride=6), Near(24, stride=8), Near(24, stride=8)), grid, 1, 4)
    order = peers.TileOrder(grid, peers.STA_TILE, (1, 1, 1))
    seen = []

    def sliding_tile_attention(query, key, value, window, text_length, has_text, seq_shape):
        seen.append((window, text_length, has_text, seq_shape))
        tokens = [order.leave(tensor.transpose(1, 2)) for tensor in (query, key, value)]
        return order.enter(vicinal.attention(*tokens, problem.pattern)).transpose(1, 2)

    module = ModuleType("fastvideo_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("fastvideo_kernel", None)
    module.sliding_tile_attention = sliding_tile_attention
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", module)
    task = Task(problem, torch.float32)
    (prepared,) = peers.sliding_tile(task)
    monkeypatch.setattr(vicinal, "attention", lambda query, key, value, pattern: value)
    (out,) = task.answer(prepared)
    assert torch.equal(out, task.value)
    assert seen == [([(3, 3, 3)], 0, False, "18x48x80")]


@pytest.mark.slow
def test_flex_in_tile_order_passes_the_gate():
    task = Task(TINY, torch.float32)
    gate = Gate(task)
    for make in (peers.flex_tiles, peers.flex_rows):
        (prepared,) = make(task)
        assert gate.check(task.answer(prepared)).is_right


@pytest.mark.gpu
def test_a_small_run_on_a_gpu(tmp_path):
    settings = gpu.Settings((TINY,), backends=("flex",), dense=(), dtype=torch.float16, seconds=0.2)
    found = gpu.run(settings, tmp_path / "gpu.json", print)
    for row in found["rows"]:
        entries = {entry["name"]: entry for entry in row["entries"]}
        assert entries["flex"]["median_ms"] > 0
        assert entries["flex"]["peak_mb"] is not None
        assert entries["flash"]["tflops"] > 0
