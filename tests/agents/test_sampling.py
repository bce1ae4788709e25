"""Statistics say what they claim, and sampling stops for the reason it gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents.sampling import Timed, decide, half_width, sample, statistic
from lut_db.plans import Plan

LATENCIES = st.lists(st.floats(0.001, 1e4), min_size=4, max_size=200)


@given(LATENCIES, st.sampled_from(["median", "interquartile_mean"]))
def test_a_statistic_lies_within_the_middle_half(values: list[float], name: str) -> None:
    low, high = np.percentile(values, (25, 75), method="lower")[0], np.max(values)
    ordered = sorted(values)
    cut = len(values) // 4
    assert ordered[cut] - 1e-9 <= statistic(values, name) <= ordered[len(values) - cut - 1] + 1e-9
    assert half_width(values, name) >= 0
    assert low <= high


@given(LATENCIES, st.floats(0.1, 10))
def test_statistics_scale(values: list[float], factor: float) -> None:
    for name in ("median", "interquartile_mean"):
        assert statistic(np.array(values) * factor, name) == pytest.approx(statistic(values, name) * factor)
        assert half_width(np.array(values) * factor, name) == pytest.approx(half_width(values, name) * factor)


@pytest.mark.parametrize("name", ["median", "interquartile_mean"])
def test_the_interval_covers_the_truth_as_often_as_it_says(name: str) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        values = rng.normal(10, 1, 40)
        covered += abs(statistic(values, name) - 10) <= half_width(values, name)
    assert 0.91 <= covered / 1000 <= 0.99


def timed(times: list[float], seconds: float = 0.0, noise: list[float] | None = None) -> Timed:
    return Timed(times_ms=times, canaries_ms=[1.0] * len(times), done=len(times), seconds=seconds, noise=noise or [])


def test_why_sampling_stops() -> None:
    plan = Plan(min_runs=10, max_runs=40, max_seconds=5, relative_half_width=0.01)
    noisy = list(np.random.default_rng(0).uniform(1, 2, 100))
    assert decide(timed(noisy[:9]), plan) is None
    assert decide(timed([1.0] * 10), plan) == "confident"
    assert decide(timed(noisy[:12]), plan) is None
    assert decide(timed(noisy[:40]), plan) == "max_runs"
    assert decide(timed(noisy[:12], seconds=6), plan) == "max_seconds"
    assert decide(timed([], seconds=6), plan) is None, "it never ends without a sample"
    assert decide(timed(noisy[:20], noise=[0.30, 0.301, 0.299]), plan) == "settled"
    assert decide(timed(noisy[:20], noise=[0.30, 0.20, 0.25]), plan) is None


def recording(calls: list[str], name: str):
    def time(runs: int) -> list[float]:
        calls.extend([name] * runs)
        return [1.0] * runs

    return time


def test_every_timed_run_lies_between_two_canaries() -> None:
    calls: list[str] = []
    plan = Plan(warmup_runs=2, round_runs=3, min_runs=6, max_runs=6)
    records = sample([recording(calls, name) for name in "ab"], recording(calls, "canary"), plan, seed=0)
    for name, record in zip("ab", records, strict=True):
        assert len(record.times_ms) == len(record.canaries_ms) == len(record.runs) == record.done == 6
        runs = [position for position, call in enumerate(calls) if call == name]
        for number in record.runs:
            assert calls[runs[number] - 1] == calls[runs[number] + 1] == "canary"


def test_a_tool_that_tells_means_is_run_in_rounds() -> None:
    asked: list[int] = []

    def mean_of(runs: int) -> list[float]:
        asked.append(runs)
        return [1.0]

    plan = Plan(warmup_runs=2, round_runs=5, min_runs=20, max_runs=20)
    (record,) = sample([mean_of], lambda runs: [2.0] * runs, plan, seed=0, burst=None)
    assert asked == [2, 5, 5, 5, 5]
    assert record.done == 20
    assert record.runs == [1, 2, 3, 4], "the first latency was the warm-up's"
    assert list(record.ratios) == [0.5] * 4
