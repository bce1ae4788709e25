"""Fits a correction: a small map from sums of operators, by family, to whole networks.

The model is `offset + (sum / typical) ** growth * sum over families of scale[family] * sum[family] + loss * (weights
that the caches lose)`, every scale positive, the others not negative. Caches lose what they have no room for, or what
others put in its place the longer a network takes. The model is fitted to relative errors under Huber's loss
(iteratively reweighted least squares), so that neither slow networks nor a spoilt measurement rule the fit. A family
has a scale of its own only where enough networks hold it, and that scale is drawn towards the common one (ridge). How
strongly, whether there is an offset, and what the caches lose, is chosen by cross-validation; the errors that are
published come from an outer cross-validation around the whole choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput, MeasurementRefused
from lut_db.estimates import Correction, Fit, Sums

Array = NDArray[np.float64]
Sample = tuple[Sums, float]
"""What a network's operators sum to, and its measured latency in ms."""

MIN_NETWORKS = 5
ENOUGH_TO_CHOOSE = 10
"""Networks in each part that a model is fitted to, below which it is one scale."""

FOLDS = 5
COVERAGE = 0.95
FLOOR = 0.005
"""Relative half-width below which no interval is claimed: repeated measurements differ by as much."""

HUBER = 1.345
"""Threshold in robust standard deviations: 95 % efficiency under normal errors."""

MIN_NOISE = 0.002
"""Relative scale of errors below which Huber's loss does not tighten."""

ROUNDS = 25
FAMILY_SHARE = 0.5
"""Share of the networks that must hold a family before it may have a scale of its own."""

FAMILY_NETWORKS = 10
"""Networks that must hold a family before it may have a scale of its own."""

SCALE_RANGE = 4.0
"""A family's scale is within this factor of the median ratio of measured to sum."""

OFFSET_SHARE = 0.5
"""Largest offset, as a share of the fastest network."""

RIDGES = (0.3, 0.03, 0.003)
"""Weights, for each network, of a family's relative distance from the common scale."""

LOOSE_GAIN = 0.6
"""What `GAIN` is for the looser ridges. Networks of a calibration share rows and the errors in them, also with those
left out of a fit: cross-validation flatters a model that can follow these. Where rows add up one scale is enough;
where they do not, as those of isolated operators, families of their own gain more than this."""

MOST_GROWTH = 0.5
"""The largest exponent of the sum beyond 1; up to 0.37 was seen."""

ROOMS = (0.1, 0.3, 0.5, 0.7)
"""Where the caches may be full: quantiles of the networks' weights."""

KEPT = (0.0, 0.1, 0.3, 0.5)
"""How long they may keep all that they hold: quantiles of the networks' sums."""

GAIN = 0.9
"""A richer model is taken where its cross-validated error is below this share of the simpler one's."""

LOSS_GAIN = 0.9
"""The same for what caches lose: of several places where that may begin, one is a little better by chance."""


@dataclass(frozen=True)
class Loss:
    """What caches lose from one run to the next: the weights beyond `cached`, or where that is None all of a network's,
    the more of them the longer it takes beyond `kept_ms`."""

    cached: int | None = None
    kept_ms: float = 0.0


@dataclass(frozen=True)
class Model:
    """A candidate: `ridge` is None for one scale common to every family, `loss` for caches that lose nothing."""

    growth: float = 0.0
    offset: bool = False
    ridge: float | None = None
    loss: Loss | None = None


@dataclass(frozen=True)
class Coefficients:
    """A fitted map: one scale for each column of sums, the last column being the families without one of their own."""

    scales: Array
    growth: float
    typical_ms: float
    offset_ms: float
    loss: Loss | None
    lost_ms: float
    """For each unit of what is lost."""

    def predict(self, networks: Networks) -> Array:
        """Latencies in ms, shape (n,)."""
        sums_ms = networks.grown_ms(self.growth, self.typical_ms)
        return sums_ms @ self.scales + self.offset_ms + self.lost_ms * networks.lost(self.loss)


@dataclass(frozen=True)
class Networks:
    """What is known of n networks: sums of shape (n, families + 1), weights and latencies of shape (n,)."""

    sums_ms: Array
    parameters: Array
    measured: Array

    def __len__(self) -> int:
        return len(self.measured)

    def part(self, numbers: NDArray[np.intp]) -> Networks:
        return Networks(self.sums_ms[numbers], self.parameters[numbers], self.measured[numbers])

    def split(self) -> Iterator[tuple[NDArray[np.intp], Networks, Networks]]:
        """Numbers of a fold's networks, all others, and these."""
        everything = np.arange(len(self))
        for test in _folds(len(self)):
            yield test, self.part(np.setdiff1d(everything, test)), self.part(test)

    def grown_ms(self, growth: float, typical_ms: float) -> Array:
        """Sums as they are in networks that take longer than others, shape (n, families + 1)."""
        totals_ms: Array = self.sums_ms.sum(axis=1, keepdims=True)
        return self.sums_ms * (totals_ms / typical_ms) ** growth

    def lost(self, loss: Loss | None) -> Array:
        """What the caches lose, shape (n,): millions of weights, or these times the ms in which they are lost."""
        if loss is None:
            return np.zeros(len(self))
        if loss.cached is not None:
            return np.maximum(0.0, self.parameters - loss.cached) / 1e6
        return self.parameters / 1e6 * np.maximum(0.0, self.sums_ms.sum(axis=1) - loss.kept_ms)


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
    totals = np.array([sums.total_ms for sums, _ in samples], dtype=np.float64)
    if not (np.isfinite(measured).all() and np.isfinite(totals).all() and min(measured.min(), totals.min()) > 0):
        raise InvalidInput("sums and latencies must be positive and finite", field="networks")
    families = _own_families([sums.by_family for sums, _ in samples])
    sums_ms = np.array(
        [
            [
                *(sums.by_family.get(family, 0.0) for family in families),
                sum(value for family, value in sums.by_family.items() if family not in families),
            ]
            for sums, _ in samples
        ],
        dtype=np.float64,
    )
    networks = Networks(sums_ms, np.array([sums.parameters for sums, _ in samples], dtype=np.float64), measured)
    left_out = np.empty_like(measured)
    folds = list(networks.split())
    # Chosen in every fold or in none: the error must be that of what is published.
    enough = min(len(others) for _, others, _ in folds) >= ENOUGH_TO_CHOOSE
    fit = _choose_and_fit if enough else partial(_fit, model=Model())
    for test, others, tested in folds:
        left_out[test] = fit(others).predict(tested)
    fitted = fit(networks)
    half_width = _half_width(left_out, measured)
    loss = fitted.loss or Loss()
    if half_width >= 1:
        raise MeasurementRefused(
            "networks left out of the fit are off by more than their estimate: no interval can be claimed",
            field="networks", remedy="measure more networks, like those that will be estimated",
        )  # fmt: skip
    correction = Correction(
        scale=float(fitted.scales[-1]),
        scales={family: float(value) for family, value in zip(families, fitted.scales, strict=False)},
        growth=fitted.growth,
        typical_ms=fitted.typical_ms,
        offset_ms=fitted.offset_ms,
        cached_parameters=loss.cached or 0,
        spill_ms=fitted.lost_ms if loss.cached is not None else 0.0,
        kept_ms=loss.kept_ms,
        eviction=fitted.lost_ms if loss.cached is None else 0.0,
        relative_half_width=half_width,
        left_out=_statistics(left_out, measured),
    )
    return correction, tuple(float(value) for value in left_out)


def _own_families(sums: Sequence[Mapping[str, float]]) -> list[str]:
    """Families that enough networks hold; none where there are too few networks to tell families apart."""
    holders: dict[str, int] = {}
    for of_network in sums:
        for family, value in of_network.items():
            holders[family] = holders.get(family, 0) + (value > 0)
    enough = max(FAMILY_NETWORKS, FAMILY_SHARE * len(sums))
    families = sorted(family for family, count in holders.items() if count >= enough)
    return families if len(sums) >= 2 * (len(families) + 2) and len(holders) > 1 else []


def _folds(count: int) -> list[NDArray[np.intp]]:
    """Indices of the test sets: up to `FOLDS` of them, shuffled the same way every time."""
    order = np.random.default_rng(0).permutation(count)
    return [np.sort(part) for part in np.array_split(order, min(FOLDS, count))]


def _choose_and_fit(networks: Networks) -> Coefficients:
    """The simplest candidate whose cross-validated error no richer one clearly beats, fitted to everything.

    With one scale for all families it is chosen first what the caches lose, with growth, beside it or in its place;
    then offset and scales.
    """
    growth = _growth(networks)
    best, error = _best(networks, [Model(growth=growth, offset=offset) for offset in (False, True)])
    losing = [replace(best, loss=Loss(cached=int(room))) for room in np.quantile(networks.parameters, ROOMS)] + [
        replace(best, growth=growing, loss=Loss(kept_ms=float(kept_ms)))
        for growing in dict.fromkeys((0.0, growth))
        for kept_ms in np.quantile(networks.sums_ms.sum(axis=1), KEPT)
    ]
    errors = [_cross_validated(networks, model) for model in losing]
    if min(errors) < error * LOSS_GAIN:
        best = losing[int(np.argmin(errors))]
    ridges = (None, *RIDGES) if networks.sums_ms.shape[1] > 1 else (None,)
    best, _ = _best(
        networks, [replace(best, ridge=ridge, offset=offset) for ridge in ridges for offset in (False, True)]
    )
    return _fit(networks, best)


def _growth(networks: Networks) -> float:
    """By how much the slope of the latencies' logarithms on those of the sums is above 1, under Huber's loss."""
    totals = np.log(networks.sums_ms.sum(axis=1))
    measured = np.log(networks.measured)
    weights = np.ones(len(networks))
    slope = 1.0
    for _ in range(ROUNDS):
        apart = totals - np.average(totals, weights=weights)
        spread = float(weights @ apart**2)
        before, slope = slope, float(weights @ (apart * measured)) / spread if spread > 0 else 1.0
        errors = measured - slope * totals
        errors -= np.average(errors, weights=weights)
        weights = _huber(errors)
        if abs(slope - before) < 1e-9:
            break
    return min(max(0.0, slope - 1), MOST_GROWTH)


def _huber(errors: Array) -> Array:
    """The weights of relative errors in the next round of reweighted least squares."""
    noise = max(1.4826 * float(np.median(np.abs(errors))), MIN_NOISE)
    weights: Array = np.minimum(1.0, HUBER * noise / np.maximum(np.abs(errors), 1e-12))
    return weights


def _best(networks: Networks, candidates: Sequence[Model]) -> tuple[Model, float]:
    """The first candidate that no later one clearly beats, and its cross-validated error."""
    best = candidates[0]
    error = _cross_validated(networks, best)
    for model in candidates[1:]:
        found = _cross_validated(networks, model)
        if found < error * (LOOSE_GAIN if _is_loose(model) and not _is_loose(best) else GAIN):
            best, error = model, found
    return best, error


def _is_loose(model: Model) -> bool:
    return model.ridge is not None and model.ridge < RIDGES[0]


def _cross_validated(networks: Networks, model: Model) -> float:
    """Mean relative error in networks left out, the worst tenth trimmed: an outlier must not choose the model."""
    errors = np.empty_like(networks.measured)
    for test, others, tested in networks.split():
        errors[test] = np.abs(_fit(others, model).predict(tested) / tested.measured - 1)
    kept = np.sort(errors)[: len(errors) - len(errors) // 10]
    return float(kept.mean())


def _fit(networks: Networks, model: Model) -> Coefficients:
    """Huber's loss over relative errors by iteratively reweighted, bounded least squares."""
    typical_ms = float(np.exp(np.log(networks.sums_ms.sum(axis=1)).mean())) if model.growth else 1.0
    sums_ms, measured = networks.grown_ms(model.growth, typical_ms), networks.measured
    count, columns = sums_ms.shape
    totals = sums_ms.sum(axis=1)
    typical = float(np.median(measured / totals))
    lost = networks.lost(model.loss)
    # Unknowns: the scales over `typical` (one for each column, or one for all), then what else there is over its bound.
    shared = model.ridge is None
    design = (totals[:, None] if shared else sums_ms) * typical / measured[:, None]
    scales = 1 if shared else columns
    bounds: list[float] = []
    if model.offset:
        bounds.append(OFFSET_SHARE * float(measured.min()))
        design = np.column_stack([design, bounds[-1] / measured])
    if lost.any():
        bounds.append(float(np.median(measured)) / float(lost.max()))
        design = np.column_stack([design, bounds[-1] * lost / measured])
    lower = np.concatenate([np.full(scales, 1 / SCALE_RANGE), np.zeros(len(bounds))])
    upper = np.concatenate([np.full(scales, SCALE_RANGE), np.ones(len(bounds))])
    penalty = np.zeros((design.shape[1], design.shape[1]))
    if model.ridge is not None:
        own = np.eye(columns)[:-1]
        own[:, -1] = -1.0  # a family's scale minus the common one
        penalty[:columns, :columns] = model.ridge * count * own.T @ own * float(np.mean((design[:, :columns]) ** 2))
    if not shared and not sums_ms[:, -1].any():
        # Nothing else speaks for the common scale but the ridge: hold it lightly to the typical ratio.
        penalty[columns - 1, columns - 1] += 1e-9
    weights = np.ones(count)
    solution = np.ones(design.shape[1])
    for _ in range(ROUNDS):
        gram = design.T @ (weights[:, None] * design) + penalty
        before, solution = solution, _bounded(gram, design.T @ weights, lower, upper)
        weights = _huber(design @ solution - 1)
        if np.abs(solution - before).max() < 1e-9:
            break
    fitted = np.full(columns, solution[0]) if shared else solution[:columns]
    more = [float(value) * bound for value, bound in zip(solution[scales:], bounds, strict=True)]
    return Coefficients(
        scales=fitted * typical,
        growth=model.growth,
        typical_ms=typical_ms,
        offset_ms=more[0] if model.offset else 0.0,
        loss=model.loss if lost.any() else None,
        lost_ms=more[-1] if lost.any() else 0.0,
    )


def _bounded(gram: Array, right: Array, lower: Array, upper: Array) -> Array:
    """The minimum of `x G x / 2 - r x` within bounds, G positive definite: by an active set, one bound at a time; by
    coordinate descent should that not settle."""
    gram = gram + np.eye(len(right)) * 1e-10 * max(float(np.trace(gram)), 1e-12)
    held: dict[int, float] = {}
    x: Array = np.zeros_like(right)
    for _ in range(4 * len(right)):
        free = [i for i in range(len(right)) if i not in held]
        for i, value in held.items():
            x[i] = value
        if free:
            rest = right[free] - sum(gram[free, i] * value for i, value in held.items())
            x[free] = np.linalg.solve(gram[np.ix_(free, free)], rest)
        beyond = np.maximum(lower - x, x - upper)
        worst = int(np.argmax(beyond))
        if beyond[worst] > 0:
            held[worst] = float(lower[worst] if x[worst] < lower[worst] else upper[worst])
            continue
        slope = gram @ x - right
        gains = {i: -slope[i] if value == lower[i] else slope[i] for i, value in held.items()}
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] <= 1e-12:
            return x
        del held[best]
    x = np.clip(x, lower, upper)
    for _ in range(500):
        moved = 0.0
        for i in range(len(x)):
            value = min(max(x[i] + (right[i] - gram[i] @ x) / gram[i, i], lower[i]), upper[i])
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
