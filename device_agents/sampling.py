"""How many runs are enough, and what they say: statistics, the stopping rule and interleaved sampling."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, sqrt
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lut_db.measurements import Stop
from lut_db.plans import Plan

Z95 = 1.959964
SETTLED_VISITS = 3
SETTLED_CHANGE = 0.05


def statistic(samples: ArrayLike, name: str) -> float:
    """The median, or the interquartile mean: the mean of the middle half, robust and finer than a timer's ticks."""
    values = np.sort(np.asarray(samples, dtype=float))
    if name == "median" or len(values) < 4:
        return float(np.median(values))
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def half_width(samples: ArrayLike, name: str) -> float:
    """Half the 95 % confidence interval of `statistic`.

    Median: from order statistics, without assuming a distribution. Interquartile mean: Tukey-McLaughlin, from the
    winsorised variance.
    """
    values = np.sort(np.asarray(samples, dtype=float))
    count = len(values)
    if count < 4:
        return float(np.ptp(values)) if count > 1 else float(values[0])
    if name == "median":
        reach = Z95 * sqrt(count) / 2
        low = max(0, floor(count / 2 - reach) - 1)
        high = min(count - 1, ceil(count / 2 + reach))
        return float(values[high] - values[low]) / 2
    cut = count // 4
    winsorised = np.clip(values, values[cut], values[count - cut - 1])
    return float(Z95 * winsorised.std(ddof=1) / ((1 - 2 * cut / count) * sqrt(count)))


@dataclass
class Timed:
    """The latencies of one graph, and for each the canary's: the mean of both sides. `done` counts the timed runs."""

    times_ms: list[float] = field(default_factory=list)
    canaries_ms: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    """Which latencies of the graph, counted from its loading, these are: its profile has the others too."""
    count: int = 0
    done: int = 0
    seconds: float = 0.0
    stop: Stop | None = None
    noise: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> NDArray[np.float64]:
        """Latency in units of the canary: what is left when the speed of the device is taken out."""
        return np.array(self.times_ms) / np.array(self.canaries_ms)


def decide(timed: Timed, plan: Plan) -> Stop | None:
    """Whether a graph has been run often enough, and why."""
    runs = timed.done
    if runs >= plan.max_runs:
        return "max_runs"
    if timed.seconds >= plan.max_seconds and runs:
        return "max_seconds"
    if runs < plan.min_runs:
        return None
    ratios = timed.ratios
    if half_width(ratios, plan.statistic) <= plan.relative_half_width * statistic(ratios, plan.statistic):
        return "confident"
    recent = timed.noise[-SETTLED_VISITS:]
    if runs >= 2 * plan.min_runs and len(recent) == SETTLED_VISITS:
        spread = max(recent) - min(recent)
        if spread <= SETTLED_CHANGE * max(recent):
            return "settled"
    return None


Times = Callable[[int], Sequence[float]]
"""Runs something so many times and returns latencies in ms: one for each run, or fewer where only means are told."""


def sample(graphs: Sequence[Times], canary: Times, plan: Plan, seed: int, burst: int | None = 1) -> list[Timed]:
    """Times every graph under the plan, in rounds of random order, every `burst` runs between runs of the canary.

    A fixed order would let a drift of the device hit some graphs more than others. Without `burst` a whole round of
    a graph lies between two of the canary.
    """
    rng = random.Random(seed)
    timed = [Timed() for _ in graphs]
    for graph, record in zip(graphs, timed, strict=True):
        if plan.warmup_runs:
            record.count = len(graph(plan.warmup_runs))
    open_graphs = list(range(len(graphs)))
    while open_graphs:
        rng.shuffle(open_graphs)
        for number in open_graphs:
            _visit(graphs[number], canary, plan, timed[number], burst or plan.round_runs)
        open_graphs = [number for number in open_graphs if timed[number].stop is None]
    return timed


def _visit(graph: Times, canary: Times, plan: Plan, timed: Timed, burst: int) -> None:
    begin = time.perf_counter()
    if burst == 1:
        timed.count += len(graph(1))  # brings the graph's weights back into the caches that other graphs used
        canary(1)
    before = fmean(canary(burst))
    done = 0
    while done < plan.round_runs:
        runs = min(burst, plan.round_runs - done)
        times_ms = graph(runs)
        after = fmean(canary(runs))
        timed.times_ms.extend(times_ms)
        timed.canaries_ms.extend([(before + after) / 2] * len(times_ms))
        timed.runs.extend(range(timed.count, timed.count + len(times_ms)))
        timed.count += len(times_ms)
        timed.done += runs
        before = after
        done += runs
    timed.seconds += time.perf_counter() - begin
    low, middle, high = np.percentile(timed.ratios, (25, 50, 75))
    timed.noise.append(float((high - low) / middle))
    timed.stop = decide(timed, plan)
