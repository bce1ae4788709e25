"""Fits a correction: a small map from sums of operators, by kind, to whole networks.

The model is `offset + sum over kinds of scale[kind] * sum[kind]`, every scale positive and the offset not negative.
It is fitted to relative errors under Huber's loss (iteratively reweighted least squares), so that neither slow
networks nor a spoilt measurement rule the fit. A kind has a scale of its own only where enough networks hold it, and
that scale is drawn towards the common one (ridge). How strongly, and whether there is an offset, is chosen by
cross-validation; the errors that are published come from an outer cross-validation around the whole choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput, MeasurementRefused
from lut_db.estimates import Correction, Fit

Array = NDArray[np.float64]
Sample = tuple[Mapping[str, float], float]
"""Sums in ms by operator kind, and the measured latency in ms of the network."""

MIN_NETWORKS = 5
FOLDS = 5
COVERAGE = 0.95
FLOOR = 0.005
"""Relative half-width below which no interval is claimed: repeated measurements differ by as much."""

HUBER = 1.345
"""Threshold in robust standard deviations: 95 % efficiency under normal errors."""

MIN_NOISE = 0.002
"""Relative scale of errors below which Huber's loss does not tighten."""

ROUNDS = 25
KIND_SHARE = 0.5
"""Share of the networks that must hold a kind before it may have a scale of its own."""

KIND_NETWORKS = 10
"""Networks that must hold a kind before it may have a scale of its own."""

SCALE_RANGE = 4.0
"""A kind's scale is within this factor of the median ratio of measured to sum."""

OFFSET_SHARE = 0.5
"""Largest offset, as a share of the fastest network."""

RIDGES = (0.3, 0.03, 0.003)
"""Weights, for each network, of a kind's relative distance from the common scale."""

GAIN = 0.97
"""A richer model is taken where its cross-validated error is below this share of the simpler one's."""


@dataclass(frozen=True)
class Model:
    """A candidate: `ridge` is None for one scale common to every kind."""

    offset: bool
    ridge: float | None


CANDIDATES = (
    Model(offset=False, ridge=None),
    Model(offset=True, ridge=None),
    *(Model(offset=False, ridge=ridge) for ridge in RIDGES),
    *(Model(offset=True, ridge=ridge) for ridge in RIDGES),
)
"""From the simplest to the richest."""


@dataclass(frozen=True)
class Coefficients:
    """A fitted map: one scale for each column of sums, the last column being the kinds without one of their own."""

    scales: Array
    offset_ms: float

    def predict(self, sums_ms: Array) -> Array:
        """Latencies in ms of networks, shape (n,), from sums of shape (n, kinds + 1)."""
        return sums_ms @ self.scales + self.offset_ms


def fit_correction(samples: Sequence[Sample]) -> tuple[Correction, tuple[float, ...]]:
    """The correction, and for every sample the latency in ms predicted by a fit that left it out.

    Raises InvalidInput for fewer than 5 samples or for values that are no latencies, and MeasurementRefused where
    networks left out of the fit are so far off that an interval would say nothing.
    """
    if len(samples) < MIN_NETWORKS:
        raise InvalidInput(
            f"{len(samples)} networks are too few for a correction", field="networks",
            remedy=f"measure at least {MIN_NETWORKS}",
        )  # fmt: skip
    measured = np.array([latency_ms for _, latency_ms in samples], dtype=np.float64)
    totals = np.array([sum(sums.values()) for sums, _ in samples], dtype=np.float64)
    if not (np.isfinite(measured).all() and np.isfinite(totals).all() and min(measured.min(), totals.min()) > 0):
        raise InvalidInput("sums and latencies must be positive and finite", field="networks")
    kinds = _own_kinds([sums for sums, _ in samples])
    sums_ms = np.array(
        [
            [*(sums.get(kind, 0.0) for kind in kinds), sum(v for kind, v in sums.items() if kind not in kinds)]
            for sums, _ in samples
        ],
        dtype=np.float64,
    )
    left_out = np.empty_like(measured)
    for test in _folds(len(samples)):
        train = np.setdiff1d(np.arange(len(samples)), test)
        left_out[test] = _choose_and_fit(sums_ms[train], measured[train], bool(kinds)).predict(sums_ms[test])
    fitted = _choose_and_fit(sums_ms, measured, bool(kinds))
    half_width = _half_width(left_out, measured)
    if half_width >= 1:
        raise MeasurementRefused(
            "networks left out of the fit are off by more than their estimate: no interval can be claimed",
            field="networks", remedy="measure more networks, like those that will be estimated",
        )  # fmt: skip
    correction = Correction(
        scale=float(fitted.scales[-1]),
        scales={kind: float(value) for kind, value in zip(kinds, fitted.scales, strict=False)},
        offset_ms=fitted.offset_ms,
        relative_half_width=half_width,
        left_out=_statistics(left_out, measured),
    )
    return correction, tuple(float(value) for value in left_out)


def _own_kinds(sums: Sequence[Mapping[str, float]]) -> list[str]:
    """Kinds that enough networks hold; none where there are too few networks to tell kinds apart."""
    holders: dict[str, int] = {}
    for of_network in sums:
        for kind, value in of_network.items():
            holders[kind] = holders.get(kind, 0) + (value > 0)
    enough = max(KIND_NETWORKS, KIND_SHARE * len(sums))
    kinds = sorted(kind for kind, count in holders.items() if count >= enough)
    return kinds if len(sums) >= 2 * (len(kinds) + 2) and len(holders) > 1 else []


def _folds(count: int) -> list[NDArray[np.intp]]:
    """Indices of the test sets: up to `FOLDS` of them, shuffled the same way every time."""
    order = np.random.default_rng(0).permutation(count)
    return [np.sort(part) for part in np.array_split(order, min(FOLDS, count))]


def _choose_and_fit(sums_ms: Array, measured: Array, per_kind: bool) -> Coefficients:
    """The simplest candidate whose cross-validated error no richer one clearly beats, fitted to everything."""
    candidates = [model for model in CANDIDATES if per_kind or model.ridge is None]
    if len(measured) < 2 * MIN_NETWORKS:
        candidates = candidates[:1]  # too few to choose by
    best, best_error = candidates[0], np.inf
    for model in candidates:
        error = _cross_validated(sums_ms, measured, model) if len(candidates) > 1 else 0.0
        if error < best_error * (GAIN if np.isfinite(best_error) else 1.0):
            best, best_error = model, error
    return _fit(sums_ms, measured, best)


def _cross_validated(sums_ms: Array, measured: Array, model: Model) -> float:
    """Mean relative error in networks left out, the worst tenth trimmed: an outlier must not choose the model."""
    errors = np.empty_like(measured)
    for test in _folds(len(measured)):
        train = np.setdiff1d(np.arange(len(measured)), test)
        errors[test] = np.abs(_fit(sums_ms[train], measured[train], model).predict(sums_ms[test]) / measured[test] - 1)
    kept = np.sort(errors)[: len(errors) - len(errors) // 10]
    return float(kept.mean())


def _fit(sums_ms: Array, measured: Array, model: Model) -> Coefficients:
    """Huber's loss over relative errors by iteratively reweighted, bounded least squares."""
    count, columns = sums_ms.shape
    totals = sums_ms.sum(axis=1)
    typical = float(np.median(measured / totals))
    largest_offset = OFFSET_SHARE * float(measured.min()) if model.offset else 0.0
    # Unknowns: the scales over `typical` (one for each column, or one for all), then the offset over its bound.
    shared = model.ridge is None
    design = (totals[:, None] if shared else sums_ms) * typical / measured[:, None]
    if model.offset:
        design = np.column_stack([design, largest_offset / measured])
    scales = 1 if shared else columns
    lower = np.concatenate([np.full(scales, 1 / SCALE_RANGE), np.zeros(int(model.offset))])
    upper = np.concatenate([np.full(scales, SCALE_RANGE), np.ones(int(model.offset))])
    penalty = np.zeros((design.shape[1], design.shape[1]))
    if model.ridge is not None:
        own = np.eye(columns)[:-1]
        own[:, -1] = -1.0  # a kind's scale minus the common one
        penalty[:columns, :columns] = model.ridge * count * own.T @ own * float(np.mean((design[:, :columns]) ** 2))
    if not shared and not sums_ms[:, -1].any():
        # Nothing else speaks for the common scale but the ridge: hold it lightly to the typical ratio.
        penalty[columns - 1, columns - 1] += 1e-9
    weights = np.ones(count)
    solution = np.ones(design.shape[1])
    for _ in range(ROUNDS):
        gram = design.T @ (weights[:, None] * design) + penalty
        before, solution = solution, _bounded(gram, design.T @ weights, lower, upper)
        errors = design @ solution - 1
        noise = max(1.4826 * float(np.median(np.abs(errors))), MIN_NOISE)
        weights = np.minimum(1.0, HUBER * noise / np.maximum(np.abs(errors), 1e-12))
        if np.abs(solution - before).max() < 1e-9:
            break
    fitted = np.full(columns, solution[0]) if shared else solution[:columns]
    return Coefficients(
        scales=fitted * typical, offset_ms=float(solution[-1]) * largest_offset if model.offset else 0.0
    )


def _bounded(gram: Array, right: Array, lower: Array, upper: Array) -> Array:
    """The minimum of `x G x / 2 - r x` within bounds, by coordinate descent from the clipped free solution."""
    gram = gram + np.eye(len(right)) * 1e-10 * max(float(np.trace(gram)), 1e-12)
    x: Array = np.asarray(np.linalg.solve(gram, right), dtype=np.float64)
    if (x >= lower).all() and (x <= upper).all():
        return x
    x = np.clip(x, lower, upper)
    for _ in range(500):
        moved = 0.0
        for i in range(len(x)):
            value = x[i] + (right[i] - gram[i] @ x) / gram[i, i]
            value = min(max(value, lower[i]), upper[i])
            moved = max(moved, abs(value - x[i]))
            x[i] = value
        if moved < 1e-10:
            break
    return x


def _half_width(left_out: Array, measured: Array) -> float:
    """The conformal quantile of the relative errors on networks left out, relative to the estimate, floored."""
    errors = np.sort(np.abs(measured / left_out - 1))
    rank = min(ceil((len(errors) + 1) * COVERAGE), len(errors))
    return max(float(errors[rank - 1]), FLOOR)


def _statistics(left_out: Array, measured: Array) -> Fit:
    errors = np.abs(left_out / measured - 1)
    return Fit(
        networks=len(measured),
        mean_error=float(errors.mean()),
        max_error=float(errors.max()),
        within_5_percent=float((errors <= 0.05).mean()),
        within_10_percent=float((errors <= 0.10).mean()),
        rank_correlation=rank_correlation(left_out, measured),
    )


def rank_correlation(first: Array, second: Array) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean rank; 0 where one side is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    a, b = (values - values.mean() for values in ranks)
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / norm, -1.0, 1.0)) if norm > 0 else 0.0


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Array = ends - (counts - 1) / 2
    return means[inverse]
