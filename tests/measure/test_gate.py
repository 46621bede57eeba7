from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.measure import gate as gates
from vicinal.measure.gate import Gate
from vicinal.measure.problems import Problem, find
from vicinal.measure.task import Task
from vicinal.pattern import Near, Window

PROBLEM = Problem("map", (Near(5), Near(3, dilation=2)), (13, 17), 2, 8, 2)
whole_and_sampled = pytest.mark.parametrize("most", [1 << 23, 20_000], ids=["whole", "sampled"])


def answer(task: Task) -> tuple[torch.Tensor, ...]:
    query, key, value = (tensor.clone().requires_grad_() for tensor in (task.query, task.key, task.value))
    out = vicinal.attention(query, key, value, task.problem.pattern)
    return (out.detach(), *torch.autograd.grad(out, (query, key, value), task.grad_out))


@whole_and_sampled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_answer_passes(most, dtype, monkeypatch):
    monkeypatch.setattr(gates, "MOST_SCORES", most)
    task = Task(PROBLEM, dtype, backward=True)
    verdict = Gate(task).check(answer(task))
    assert verdict.is_right, verdict.reason
    assert set(verdict.errors) == {"output", "gradient of query", "gradient of key", "gradient of value"}


def test_sampling_looks_at_every_sample_and_head_and_at_the_corners(monkeypatch):
    monkeypatch.setattr(gates, "MOST_SCORES", 20_000)
    gate = Gate(Task(PROBLEM, torch.float32, backward=True))
    assert {(own.batch, own.head) for own in gate.samples} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(len(own.keys) for own in gate.samples)
    assert all(len(own.queries) < PROBLEM.tokens for own in gate.samples)
    assert all({0, PROBLEM.tokens - 1} <= set(own.queries.tolist()) for own in gate.samples)


@whole_and_sampled
@pytest.mark.parametrize("place", range(4), ids=Gate.names)
def test_each_result_is_looked_at(most, place, monkeypatch):
    monkeypatch.setattr(gates, "MOST_SCORES", most)
    task = Task(PROBLEM, torch.float32, backward=True)
    given = list(answer(task))
    given[place] = given[place] * 1.001
    verdict = Gate(task).check(given)
    assert not verdict.is_right
    assert verdict.reason.startswith(Gate.names[place])


def test_one_wrong_query_in_a_corner_is_found():
    task = Task(PROBLEM, torch.bfloat16)
    out = vicinal.attention(task.query, task.key, task.value, PROBLEM.pattern)
    out[1, -1, -1, 1] += 0.5
    assert not Gate(task).check((out,)).is_right


@pytest.mark.parametrize(
    ("spoil", "because"),
    [
        (lambda out: out[..., :-1], "shape"),
        (lambda out: torch.where(out == out.amax(), torch.nan, out), "finite"),
        (torch.zeros_like, "error"),
        (lambda out: out.roll(1, 2), "error"),
    ],
    ids=["shape", "nan", "zeros", "moved"],
)
def test_a_wrong_answer_is_turned_away(spoil, because):
    task = Task(PROBLEM, torch.float32)
    out = vicinal.attention(task.query, task.key, task.value, PROBLEM.pattern)
    verdict = Gate(task).check((spoil(out),))
    assert not verdict.is_right
    assert because in verdict.reason


def test_another_border_rule_is_a_wrong_answer():
    task = Task(Problem("shifted", (Window(4, 2), Window(4, 2)), (12, 12), 1, 8), torch.float32)
    out = vicinal.attention(task.query, task.key, task.value, (Window(4), Window(4)))
    assert not Gate(task).check((out,)).is_right


def test_a_forward_is_checked_by_a_gate_that_knows_the_backward_too():
    task = Task(find(["nat-14x14"])[0], torch.float32, backward=True)
    out = vicinal.attention(task.query, task.key, task.value, task.problem.pattern)
    assert Gate(task).check((out,)).is_right
    assert not Gate(task).check((out, out, out)).is_right
