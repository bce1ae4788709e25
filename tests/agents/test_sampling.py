"""Statistics say what they claim, and sampling stops for the reason it gives."""

from __future__ import annotations

from itertools import groupby
from math import inf
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import t as student

from device_agents import sampling
from device_agents.backends import LoadFailed
from device_agents.sampling import (
    CANARY_RUNS,
    CANARY_WAKE_RUNS,
    WAKE_RUNS,
    Part,
    Timed,
    Visit,
    chosen,
    decide,
    half_width,
    sample,
    statistic,
)
from lut_db.plans import Plan, Statistic

LATENCIES = st.lists(st.floats(0.001, 1e4), min_size=4, max_size=200)


NAMES = (*get_args(Statistic), "second_fifth")


@given(LATENCIES, st.sampled_from(NAMES))
def test_a_statistic_is_the_mean_of_the_part_that_it_names(values: list[float], name: str) -> None:
    ordered = sorted(values)
    count = len(values)
    first, last = {
        "fastest_fifth": (0, -(-count // 5)),
        "second_fifth": (-(-count // 5), 2 * -(-count // 5)),
        "median": ((count - 1) // 2, count // 2 + 1),
        "interquartile_mean": (count // 4, count - count // 4),
    }[name]
    assert statistic(values, name) == pytest.approx(np.mean(ordered[first:last]))
    assert sorted(np.array(values)[chosen(values, name)]) == ordered[first:last]
    assert half_width([[value] for value in values], name) >= 0


@given(LATENCIES, st.floats(0.1, 10))
def test_statistics_scale(values: list[float], factor: float) -> None:
    for name in NAMES:
        assert statistic(np.array(values) * factor, name) == pytest.approx(statistic(values, name) * factor)
        visits = np.array_split(values, 3)
        scaled = half_width([visit * factor for visit in visits], name)
        assert scaled == pytest.approx(half_width(visits, name) * factor, abs=1e-9)


@pytest.mark.parametrize("name", [*NAMES, None])
@pytest.mark.parametrize("disturbance", [0.0, 1.0])
def test_the_interval_covers_the_truth_as_often_as_it_says(name: Part | None, disturbance: float) -> None:
    """Also where samples of one visit have much in common, as on a device that others use too."""
    rng = np.random.default_rng(0)

    def draw(visits: int) -> NDArray[np.float64]:
        return 10 + disturbance * rng.normal(0, 1, (visits, 1)) + rng.normal(0, 1, (visits, 8))

    def value(samples: NDArray[np.float64]) -> float:
        return float(samples.mean()) if name is None else statistic(samples.ravel(), name)

    truth, covered = value(draw(100_000)), 0
    for _ in range(1000):
        visits = draw(8)
        covered += abs(value(visits) - truth) <= half_width(list(visits), name)
    assert 0.86 <= covered / 1000 <= 0.99


def timed(runs: int, *widths: float, seconds: float = 0.0) -> Timed:
    return Timed([Visit([1.0] * runs, 0, runs, seconds)] if runs else [], widths=list(widths))


@pytest.mark.parametrize("visits", range(2, 32))
def test_the_interval_of_visits_that_repeat_themselves_is_students(visits: int) -> None:
    values = np.random.default_rng(visits).normal(5.0, 1.0, visits)
    students = student.ppf(0.975, visits - 1) * values.std(ddof=1) / np.sqrt(visits)
    assert half_width([[value, value] for value in values], None) == pytest.approx(students, rel=0.04)


def test_why_sampling_stops() -> None:
    plan = Plan(min_runs=10, settle_runs=20, max_runs=40, max_seconds=5, relative_half_width=0.01)
    assert decide(timed(9, 0.001), plan) is None, "not before the least number of runs"
    assert decide(timed(10, 0.009), plan) == "confident"
    assert decide(timed(12, 0.02), plan) is None
    assert decide(timed(40, 0.02), plan) == "max_runs"
    assert decide(timed(12, 0.02, seconds=6), plan) == "max_seconds"
    assert decide(timed(0, seconds=6), plan) is None, "it never ends without a sample"
    stuck = (0.05, 0.051, 0.0495, 0.052)
    assert decide(timed(20, *stuck), plan) == "settled"
    assert decide(timed(19, *stuck), plan) is None, "not before it could have settled"
    assert decide(timed(20, 0.05, 0.04, 0.03, 0.02), plan) is None, "more runs help"


def recording(calls: list[str], name: str):
    def time(runs: int) -> list[float]:
        calls.extend([name] * runs)
        return [1.0] * runs

    return time


def test_the_heavy_canary_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LOOK_S", 0.0)
    calls: list[str] = []
    plan = Plan(warmup_runs=0, round_runs=3, min_runs=6, settle_runs=6, max_runs=6)
    heavy = [recording(calls, name) for name in ("heavy 0", "heavy 1")]
    graphs = [recording(calls, name) for name in "ab"]
    sampled = sample(graphs, [recording(calls, "canary")], plan, seed=0, heavy_canaries=heavy)
    assert (len(sampled.looks), len(sampled.heavy_looks)) == (5, 3), "with the first look, the third and the last"
    assert [len(times_ms) for _, times_ms in sampled.heavy_looks] == [CANARY_RUNS] * 3
    assert calls.count("heavy 0") + calls.count("heavy 1") == 3 * (WAKE_RUNS + CANARY_RUNS)
    apart = sampling.Sampled([], [(0, [9.0])], [(0, [1.0, 1.2]), (1, [3.0]), (0, [1.1])])
    assert apart.heavy_canary_ms("median") == pytest.approx((1.1 + 3.0) / 2), "the mean over its sessions"


def test_what_is_counted_was_run_with_warm_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LOOK_S", 0.0)
    calls: list[str] = []
    plan = Plan(warmup_runs=2, round_runs=3, min_runs=6, settle_runs=6, max_runs=6)
    canaries = [recording(calls, name) for name in ("canary 0", "canary 1")]
    sampled = sample([recording(calls, name) for name in "ab"], canaries, plan, seed=0)
    looks = [len(times_ms) for _, times_ms in sampled.looks]
    assert looks == [CANARY_RUNS] * 5, "before each of four visits, and at the end"
    assert calls[:4] == ["a", "a", "b", "b"]
    visits = [list(group) for _, group in groupby(calls[4:])]
    assert [visit[0][:6] == "canary" for visit in visits] == [True, False] * 4 + [True]
    assert [len(visit) for visit in visits] == [CANARY_WAKE_RUNS + CANARY_RUNS, WAKE_RUNS + 3] * 4 + [
        CANARY_WAKE_RUNS + CANARY_RUNS
    ]
    for record in sampled.graphs:
        assert record.done == len(record.times_ms) == 6
        first, second = 2 + WAKE_RUNS, 2 + WAKE_RUNS + 3 + WAKE_RUNS
        assert record.positions == [*range(first, first + 3), *range(second, second + 3)]


def test_a_graph_that_fails_is_timed_no_more() -> None:
    calls: list[str] = []
    failed = LoadFailed("crashed", "it crashed")

    def failing(after: int):
        left = iter(range(after))

        def time(runs: int) -> list[float]:
            if next(left, None) is None:
                raise failed
            calls.extend(["bad"] * runs)
            return [1.0] * runs

        return time

    plan = Plan(warmup_runs=2, round_runs=3, min_runs=9, settle_runs=9, max_runs=9)
    for after, runs in ((0, 0), (1, 2), (2, 2 + WAKE_RUNS), (3, 2 + WAKE_RUNS + 3)):
        calls.clear()
        graphs = [recording(calls, "good"), failing(after), recording(calls, "good")]
        sampled = sample(graphs, [recording([], "canary")], plan, seed=0)
        assert [record.failure for record in sampled.graphs] == [None, failed, None]
        assert [len(record.times_ms) for record in sampled.graphs][::2] == [9, 9]
        assert calls.count("bad") == runs


class Slow:
    """A graph whose runs take so many seconds, and the clock that they move on."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = seconds
        self.now = 0.0
        monkeypatch.setattr(sampling.time, "perf_counter", lambda: self.now)

    def time(self, runs: int) -> list[float]:
        self.now += self.seconds * runs
        return [self.seconds * 1e3] * runs


def test_what_is_slow_does_not_take_more_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(3.0, monkeypatch)
    plan = Plan(warmup_runs=2, round_runs=10, min_runs=60, settle_runs=80, max_runs=100, max_seconds=20.0)
    (record,) = sample([slow.time], [lambda runs: [1.0] * runs], plan, seed=0).graphs
    assert record.stop == "max_seconds"
    assert 0 < record.done < 10
    assert slow.now - 2 * 3.0 <= 20.0 + 2 * 3.0


def test_a_long_visit_is_followed_by_a_long_look(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(2.0, monkeypatch)
    plan = Plan(warmup_runs=0, round_runs=2, min_runs=6, settle_runs=6, max_runs=6, max_seconds=60.0)
    sampled = sample([slow.time], [lambda runs: [1.0] * runs], plan, seed=0)
    assert [len(look) for _, look in sampled.looks] == [CANARY_RUNS, *[CANARY_RUNS * sampling.MOST_LOOKS] * 3]
    assert len(sampled.canary_over_time("median")) == 4


@given(st.lists(st.floats(min_value=0.5, max_value=2.0), min_size=1, max_size=60))
def test_the_canary_over_time_is_of_all_looks_in_order(speeds: list[float]) -> None:
    looks = [(number % 3, [speed] * 4) for number, speed in enumerate(speeds)]
    parts = sampling.Sampled([], looks).canary_over_time("median")
    assert len(parts) == max(1, min(sampling.PARTS, len(looks) // 5))
    assert min(speeds) <= min(parts) <= max(parts) <= max(speeds)
    if speeds == sorted(speeds):
        assert parts == sorted(parts)


def test_small_graphs_share_a_look_at_the_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LOOK_S", 3600.0)
    plan = Plan(round_runs=3, min_runs=6, settle_runs=6, max_runs=6)
    sampled = sample([recording([], "a")] * 50, [recording([], "canary")], plan, seed=0)
    assert sum(len(times_ms) for _, times_ms in sampled.looks) == 2 * CANARY_RUNS, "at the start and at the end"


def test_a_tool_that_tells_means_is_run_in_rounds() -> None:
    asked: list[int] = []

    def mean_of(runs: int) -> list[float]:
        asked.append(runs)
        return [1.0]

    plan = Plan(warmup_runs=2, round_runs=5, min_runs=20, settle_runs=20, max_runs=20)
    sampled = sample([mean_of], [lambda runs: [2.0] * runs], plan, seed=0, starts=True)
    (record,) = sampled.graphs
    assert asked == [5, 5, 5, 5], "the tool warms up by itself"
    assert record.done == 20
    assert record.positions == [0, 1, 2, 3]
    assert sum(len(times_ms) for _, times_ms in sampled.looks) == 25
    assert sampled.canary_ms("median") == 2.0


class Disturbed:
    """A device on which everything takes half as long again in some spells, and the clock that its runs move on. It may
    have another core, with spells of its own."""

    def __init__(
        self, spells: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch,
        elsewhere: list[tuple[float, float]] | None = None,
    ) -> None:  # fmt: skip
        self.spells, self.elsewhere = spells, elsewhere
        self.moves = 0
        self.now = 0.0
        monkeypatch.setattr(sampling.time, "perf_counter", lambda: self.now)

    def move(self) -> bool:
        if self.elsewhere is None:
            return False
        if self.moves:  # the first time it is told where to begin
            self.spells, self.elsewhere = self.elsewhere, self.spells
        self.moves += 1
        return True

    def graph(self, latency_ms: float, told: list[float]):
        def time(runs: int) -> list[float]:
            for _ in range(runs):
                disturbed = any(begin <= self.now < end for begin, end in self.spells)
                told.append(latency_ms * (1.5 if disturbed else 1.0))
                self.now += told[-1] / 1e3
            return told[-runs:]

        return time


SPELLS_PLAN = Plan(
    warmup_runs=2, round_runs=8, min_runs=40, settle_runs=40, max_runs=40, statistic="interquartile_mean"
)


def test_nothing_that_was_timed_while_the_device_was_disturbed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    spells = [(0.3, 0.5), (0.9, 2.4)]
    device = Disturbed(spells, monkeypatch)
    runs: list[list[float]] = [[], []]
    graphs = [device.graph(3.0, runs[0]), device.graph(7.0, runs[1])]
    sampled = sample(graphs, [device.graph(2.0, [])], SPELLS_PLAN, seed=0, patience_s=60.0)
    assert 1.6 < sampled.disturbed_s < 2.5
    for record, latency_ms, told in zip(sampled.graphs, (3.0, 7.0), runs, strict=True):
        assert record.times_ms == [latency_ms] * 40
        assert [told[position] for position in record.positions] == record.times_ms, "its profile has all of its runs"
        assert record.stop is not None
    assert {statistic(times_ms, SPELLS_PLAN.statistic) for _, times_ms in sampled.looks} == {2.0}


def test_a_device_is_waited_for_until_it_is_as_quiet_as_it_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Disturbed([(0.0, 1.0)], monkeypatch)
    sampled = sample(
        [device.graph(3.0, [])], [device.graph(2.0, [])], SPELLS_PLAN, seed=0, slowest_ms=2.6, patience_s=9.0
    )
    assert sampled.graphs[0].times_ms == [3.0] * 40
    assert sampled.disturbed_s == pytest.approx(1.0, abs=0.1)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 2)), max_size=6), st.floats(0, 3), st.integers(0, 3),
    st.sampled_from([inf, 2.6]),
)  # fmt: skip
def test_patience_ends_and_sampling_with_it(
    spells: list[tuple[float, float]], patience_s: float, seed: int, slowest_ms: float
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = Disturbed([(begin, begin + length) for begin, length in spells], monkeypatch)
        told: list[list[float]] = [[], []]
        graphs = [device.graph(latency_ms, runs) for latency_ms, runs in zip((3.0, 7.0), told, strict=True)]
        canary = device.graph(2.0, [])
        sampled = sample(graphs, [canary], SPELLS_PLAN, seed, slowest_ms=slowest_ms, patience_s=patience_s)
        once_s = 1.5e-3 * (5 * (WAKE_RUNS + 8) * (3 + 7) + 11 * (CANARY_WAKE_RUNS + CANARY_RUNS) * 2)
        assert sampled.disturbed_s <= patience_s + once_s + 0.1, "the last to be taken back is all of it, at most"
        for record, runs in zip(sampled.graphs, told, strict=True):
            assert record.done == len(record.times_ms) == 40
            assert [runs[position] for position in record.positions] == record.times_ms
        if patience_s == 0:
            assert sampled.disturbed_s == 0
            assert len(told[0]) == 2 + 5 * (WAKE_RUNS + 8)


def test_a_device_that_is_quiet_now_and_then_is_worth_waiting_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is disturbed for longer than a device that never gets quiet is waited for, and all that counts is quiet."""
    monkeypatch.setattr(sampling, "WAIT_S", 5.0)
    spells = [(second + 0.2, second + 1.0) for second in range(1000)]
    device = Disturbed(spells, monkeypatch)
    plan = SPELLS_PLAN.model_copy(update=dict.fromkeys(("min_runs", "settle_runs", "max_runs"), 800))
    sampled = sample([device.graph(3.0, [])], [device.graph(2.0, [])], plan, seed=0, patience_s=600.0)
    assert sampled.graphs[0].times_ms == [3.0] * 800
    assert sampled.disturbed_s > 10
    device = Disturbed([(0.2, 1e9)], monkeypatch)
    sampled = sample([device.graph(3.0, [])], [device.graph(2.0, [])], plan, seed=0, patience_s=600.0)
    assert 5 <= sampled.disturbed_s < 5 + 2, "not for one that was quiet once"


def test_a_disturbed_core_is_left_for_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for elsewhere, moves, waited_s in (([(0.0, 0.3), (1.1, 9.0)], 2, 0.2), ([(0.0, 9.0)], None, 0.7), (None, 0, 0.7)):
        device = Disturbed([(0.3, 1.0)], monkeypatch, elsewhere)
        told: list[float] = []
        plan = SPELLS_PLAN.model_copy(update=dict.fromkeys(("min_runs", "settle_runs", "max_runs"), 400))
        graph, canary = device.graph(3.0, told), device.graph(2.0, [])
        sampled = sample([graph], [canary], plan, seed=0, patience_s=60.0, move=device.move)
        assert sampled.graphs[0].times_ms == [3.0] * 400
        assert [told[position] for position in sampled.graphs[0].positions] == [3.0] * 400
        assert sampled.moves == max(0, device.moves - 1)
        assert sampled.disturbed_s < waited_s + 0.1
        assert moves is None or sampled.moves == moves


def test_where_any_speed_will_do_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Disturbed([(0.0, 1e9)], monkeypatch)
    plan = SPELLS_PLAN.model_copy(update={"drift_tolerance": 50.0})
    sampled = sample([device.graph(3.0, [])], [device.graph(2.0, [])], plan, seed=0, patience_s=60.0)
    assert sampled.disturbed_s == 0


def test_what_was_timed_before_the_device_got_quiet_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Disturbed([(0.0, 0.4)], monkeypatch)
    graphs = [device.graph(latency_ms, []) for latency_ms in (3.0, 7.0)]
    sampled = sample(graphs, [device.graph(2.0, [])], SPELLS_PLAN, seed=0, patience_s=60.0)
    assert [set(record.times_ms) for record in sampled.graphs] == [{3.0}, {7.0}]
    assert [record.done for record in sampled.graphs] == [40, 40]
    assert sampled.disturbed_s == pytest.approx(0.4, abs=0.1)


def test_one_slow_look_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Disturbed([], monkeypatch)
    told: list[float] = []
    canary = device.graph(2.0, [])
    looks: list[list[float]] = []

    def time(runs: int) -> list[float]:
        slow = len(looks) == 2 * 2 + 1  # the third look, after its runs that are not counted
        looks.append([3.0] * runs if slow else canary(runs))
        return looks[-1]

    sampled = sample([device.graph(3.0, told)], [time], SPELLS_PLAN, seed=0, patience_s=60.0)
    assert [3.0] * CANARY_RUNS in looks
    assert sampled.disturbed_s == 0
    assert len(told) == 2 + 5 * (WAKE_RUNS + 8)


def test_the_canary_is_looked_at_without_any_graph() -> None:
    sampled = sample([], [recording([], "canary")], Plan(), seed=0)
    assert sampled.canary_ms("median") == 1.0
