from __future__ import annotations

import gc
import time

import pytest

from vicinal.measure import Timing, compare


def test_calls_take_turns():
    order: list[str] = []
    calls = {"first": lambda: order.append("first"), "second": lambda: order.append("second")}
    timings = compare(calls, rounds=4)
    turns = [name for place, name in enumerate(order) if place == 0 or order[place - 1] != name]
    assert turns == ["first", "second"] * 5  # the warm-up, then four rounds
    assert [timing.rounds for timing in timings.values()] == [4, 4]


def test_a_slow_call_is_slower_and_takes_part_in_fewer_rounds():
    timings = compare({"slow": lambda: time.sleep(0.05), "fast": lambda: None}, seconds=0.4)
    assert timings["slow"].median_ms >= 50
    assert timings["fast"].speedup_over(timings["slow"]) > 10
    assert 3 <= timings["slow"].rounds < timings["fast"].rounds
    assert timings["slow"].samples_ms.keys() <= timings["fast"].samples_ms.keys()


def test_total_time_is_bounded():
    begin = time.perf_counter()
    compare({str(number): lambda: time.sleep(0.01) for number in range(4)}, seconds=0.3)
    assert time.perf_counter() - begin < 5  # generous: the machine may be busy


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
    # the machine was ten times slower in rounds 2 and 3, and only one of the two took part in both
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
