"""The fit of a correction: known coefficients, positive always, an outlier, honest intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_db.errors import InvalidInput, MeasurementRefused
from lut_db.estimates import Sums
from profiler_server.correction import FLOOR, fit_correction, rank_correlation

KINDS = ("add", "channel_bypass", "convolution", "squeeze_excite")


def draw(count: int, scales: dict[str, float], offset_ms: float, noise: float, seed: int):
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        sums = {kind: float(rng.uniform(0.2, 3.0)) for kind in scales}
        latency_ms = offset_ms + sum(scales[kind] * value for kind, value in sums.items())
        samples.append((Sums(sums, int(rng.uniform(1e5, 1e7))), latency_ms * float(np.exp(rng.normal(0, noise)))))
    return samples


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.7, 1.5), min_size=4, max_size=4), st.floats(0, 0.3), st.integers(0, 1000))
def test_known_coefficients_are_recovered(values: list[float], offset_ms: float, seed: int) -> None:
    scales = dict(zip(KINDS, values, strict=True))
    samples = draw(40, scales, offset_ms, 0.003, seed)
    correction, _ = fit_correction(samples)
    errors = np.abs([correction.apply(sums) / latency_ms - 1 for sums, latency_ms in samples])
    # A little growth that is none and an offset can stand for each other, at the cost of one network or two: no more
    # than is published.
    assert errors.mean() < 0.01
    assert errors.max() < max(0.03, correction.left_out.max_error)
    assert correction.left_out.mean_error < 0.015
    assert correction.left_out.networks == 40


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 30), st.integers(0, 10_000))
def test_coefficients_are_positive_whatever_is_measured(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [
        (
            Sums({kind: float(rng.exponential()) for kind in KINDS if rng.random() < 0.7} or {"add": 1.0}, 1000),
            float(value),
        )
        for value in rng.exponential(size=count) + 1e-3
    ]
    try:
        correction, left_out_ms = fit_correction(samples)
    except MeasurementRefused:
        return  # latencies that have nothing to do with the sums deserve no interval
    assert correction.scale > 0
    assert all(scale > 0 for scale in correction.scales.values())
    assert correction.offset_ms >= 0
    assert FLOOR <= correction.relative_half_width < 1
    assert len(left_out_ms) == count
    assert min(left_out_ms) > 0


def test_weights_beyond_the_caches_are_paid_for() -> None:
    rng = np.random.default_rng(2)
    samples = [
        (sums, (latency_ms + 0.2 * max(0, sums.parameters - 4_000_000) / 1e6) * float(np.exp(rng.normal(0, 0.005))))
        for sums, latency_ms in draw(40, dict.fromkeys(KINDS, 1.0), 0.0, 0.0, 1)
    ]
    correction, _ = fit_correction(samples)
    assert correction.spill_ms == pytest.approx(0.2, rel=0.3)
    assert 2e6 < correction.cached_parameters < 6e6
    for sums, latency_ms in samples:
        assert correction.apply(sums) == pytest.approx(latency_ms, rel=0.04)


def test_weights_that_others_take_from_the_caches_are_paid_for() -> None:
    rng = np.random.default_rng(2)
    samples = [
        (
            sums,
            (latency_ms + 0.03 * max(0.0, sums.total_ms - 4.0) * sums.parameters / 1e6)
            * float(np.exp(rng.normal(0, 0.005))),
        )
        for sums, latency_ms in draw(40, dict.fromkeys(KINDS, 1.0), 0.0, 0.0, 1)
    ]
    correction, _ = fit_correction(samples)
    assert correction.eviction == pytest.approx(0.03, rel=0.3)
    assert 3.0 < correction.kept_ms < 5.0
    assert (correction.growth, correction.spill_ms) == (0.0, 0.0)
    for sums, latency_ms in samples:
        assert correction.apply(sums) == pytest.approx(latency_ms, rel=0.04)


def test_caches_that_lose_nothing_are_the_rule() -> None:
    correction, _ = fit_correction(draw(40, dict.fromkeys(KINDS, 1.0), 0.0, 0.01, 4))
    assert (correction.cached_parameters, correction.spill_ms) == (0, 0.0)
    assert (correction.kept_ms, correction.eviction) == (0.0, 0.0)


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 0.4), st.integers(0, 1000))
def test_latencies_that_grow_beyond_their_sums(growth: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [
        (sums, latency_ms ** (1 + growth) * float(np.exp(rng.normal(0, 0.005))))
        for sums, latency_ms in draw(40, dict.fromkeys(KINDS, 1.1), 0.0, 0.0, seed)
    ]
    correction, _ = fit_correction(samples)
    # So little is, once in some hundreds of draws, said as well by what caches lose with time.
    if not (correction.eviction and growth < 0.05):
        assert correction.growth == pytest.approx(growth, abs=0.02)
    for sums, latency_ms in samples:
        assert correction.apply(sums) == pytest.approx(latency_ms, rel=0.04)


def test_what_takes_longer_for_its_sum_in_short_networks_has_no_growth() -> None:
    correction, _ = fit_correction(draw(40, dict.fromkeys(KINDS, 1.0), 0.5, 0.005, 6))
    assert correction.growth == 0
    assert correction.offset_ms == pytest.approx(0.5, rel=0.2)


def test_one_outlier_does_not_rule() -> None:
    samples = draw(40, dict.fromkeys(KINDS, 0.95), 0.0, 0.005, 3)
    clean, _ = fit_correction(samples)
    samples[7] = (samples[7][0], samples[7][1] * 4)
    spoilt, _ = fit_correction(samples)
    for number, (sums, _) in enumerate(samples):
        if number != 7:
            assert spoilt.apply(sums) == pytest.approx(clean.apply(sums), rel=0.01)
    assert spoilt.left_out.max_error > 0.5


def test_few_networks_get_one_scale_and_the_widest_interval() -> None:
    samples = draw(6, {"convolution": 1.2}, 0.0, 0.02, 1)
    correction, left_out_ms = fit_correction(samples)
    assert correction.scales == {}
    assert correction.offset_ms == 0
    worst = max(abs(latency_ms / told - 1) for (_, latency_ms), told in zip(samples, left_out_ms, strict=True))
    assert correction.relative_half_width == pytest.approx(max(worst, FLOOR))


def test_the_interval_holds_what_it_promises() -> None:
    rng = np.random.default_rng(5)
    inside = []
    for seed in range(10):
        correction, _ = fit_correction(
            draw(40, dict(zip(KINDS, rng.uniform(0.8, 1.3, 4), strict=True)), 0.1, 0.02, seed)
        )
        assert correction.relative_half_width < 0.15
    for seed in range(10):
        scales = dict(zip(KINDS, rng.uniform(0.8, 1.3, 4), strict=True))
        everything = draw(140, scales, 0.1, 0.02, 100 + seed)
        correction, _ = fit_correction(everything[:40])
        for sums, latency_ms in everything[40:]:
            inside.append(abs(latency_ms / correction.apply(sums) - 1) <= correction.relative_half_width)
    assert np.mean(inside) > 0.92


def test_what_cannot_be_fitted_is_refused() -> None:
    samples = draw(4, {"add": 1.0}, 0.0, 0.0, 0)
    with pytest.raises(InvalidInput, match="too few"):
        fit_correction(samples)
    with pytest.raises(InvalidInput, match="positive"):
        fit_correction([*samples, (Sums({"add": 0.0}, 0), 1.0)])
    with pytest.raises(InvalidInput, match="positive"):
        fit_correction([*samples, (Sums({"add": 1.0}, 0), float("nan"))])


def test_rank_correlation() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 90.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    assert rank_correlation(np.array([1.0, 1.0]), np.array([3.0, 2.0])) == 0
