from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest

from vicinal.measure import Timing, compare, timing


@pytest.fixture
def takes(monkeypatch) -> Callable[[float], Callable[[], float]]:
    """Calls that say how many seconds they take, on a clock that believes them."""
    monkeypatch.setattr(timing._Clock, "seconds", lambda self, call: call())
    return lambda seconds: lambda: seconds


def test_calls_take_turns():
    order: list[str] = []
    calls = {"first": lambda: order.append("first"), "second": lambda: order.append("second")}
    timings = compare(calls, rounds=4)
    turns = [name for place, name in enumerate(order) if place == 0 or order[place - 1] != name]
    assert turns == ["first", "second"] * 5  # the warm-up, then four rounds
    assert [timing.rounds for timing in timings.values()] == [4, 4]


def test_slow_calls_take_part_in_fewer_rounds_spread_over_all(takes):
    timings = compare({"slow": takes(0.5), "fast": takes(1e-3)}, seconds=10.0)
    assert (timings["slow"].median_ms, timings["fast"].median_ms) == (500.0, 1.0)
    assert timings["fast"].samples_ms.keys() == set(range(40))
    rounds = list(timings["slow"].samples_ms)
    assert 15 <= len(rounds) <= 20
    assert {later - earlier for earlier, later in itertools.pairwise(rounds)} <= {2, 3}
    assert timings["fast"].speedup_over(timings["slow"]) == pytest.approx(500)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("many", [1, 3, 10])
def test_total_time_is_bounded(seconds, many, takes):
    each = {f"{took} {number}": took for number in range(many) for took in (1e-5, 1e-3, 0.02, 0.1)}
    timings = compare({name: takes(took) for name, took in each.items()}, seconds=seconds)
    least = sum(took * timing.LEAST_ROUNDS for took in each.values() if took * timing.LEAST_ROUNDS < 2 * seconds)
    turn = min(timing.SLICE_SECONDS, seconds / timing.FEW_ROUNDS / len(each))
    repeats = {name: max(1, turn / took) for name, took in each.items()}
    total = sum(timings[name].rounds * repeats[name] * took for name, took in each.items())
    assert total <= 1.2 * max(seconds, least) + sum(each.values())


def test_a_turn_is_the_median_of_its_calls_and_its_first_call_is_told_apart(monkeypatch):
    times = itertools.cycle([9.0, 1.0, 2.0])
    monkeypatch.setattr(timing._Clock, "seconds", lambda self, call: next(times))
    monkeypatch.setattr(timing, "_warm_up", lambda call, clock: timing.SLICE_SECONDS / 3)
    found = compare({"any": lambda: None}, rounds=4)["any"]
    assert (found.median_ms, found.first_ms, len(found.firsts_ms)) == (2000.0, 9000.0, 4)


def test_a_call_beyond_all_bounds_runs_once(takes):
    assert compare({"endless": takes(100.0), "fast": takes(1e-4)}, seconds=1.0)["endless"].rounds == 1


def test_garbage_collection_is_off_while_timing_and_comes_back():
    states: list[bool] = []
    assert gc.isenabled()
    compare({"look": lambda: states.append(gc.isenabled())}, rounds=1)
    assert not any(states)
    assert gc.isenabled()

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        compare({"fails": fails})
    assert gc.isenabled()


def test_speedup_compares_rounds_pair_by_pair():
    # the machine was ten times slower in rounds 2 and 3, and only one of the two took part in all
    ours, theirs = Timing({0: 1.0, 1: 1.0, 2: 10.0, 3: 10.0}), Timing({1: 3.0, 3: 30.0})
    assert ours.speedup_over(theirs) == 3.0
    assert theirs.speedup_over(ours) == pytest.approx(1 / 3)


def test_quartiles_of_few_rounds_are_the_extremes():
    assert Timing({0: 5.0, 1: 1.0}).quartiles_ms == (1.0, 5.0)
    assert Timing({number: float(number) for number in range(5)}).quartiles_ms == (1.0, 3.0)


def test_nothing_to_compare_is_no_error():
    assert compare({}) == {}


def test_progress_hears_every_round():
    heard: list[tuple[int, int]] = []
    compare({"nothing": lambda: None}, rounds=3, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]
