"""How many runs are enough, and what they say: statistics, the stopping rule and interleaved sampling."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, sqrt

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
    """The runs of one graph: `times_ms` by the wall clock, `canaries_ms` the mean of the canary on both sides."""

    times_ms: list[float] = field(default_factory=list)
    canaries_ms: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    """Which runs of the graph, counted from its loading, were timed: its profile has the others too."""
    count: int = 0
    seconds: float = 0.0
    stop: Stop | None = None
    noise: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> NDArray[np.float64]:
        """Latency in units of the canary: what is left when the speed of the device is taken out."""
        return np.array(self.times_ms) / np.array(self.canaries_ms)


def decide(timed: Timed, plan: Plan) -> Stop | None:
    """Whether a graph has been run often enough, and why."""
    runs = len(timed.times_ms)
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


def sample(graphs: Sequence[Callable[[], None]], canary: Callable[[], None], plan: Plan, seed: int) -> list[Timed]:
    """Times every graph under the plan, in rounds of random order, each run between two runs of the canary.

    A fixed order would let a drift of the device hit some graphs more than others.
    """
    rng = random.Random(seed)
    timed = [Timed() for _ in graphs]
    for graph, record in zip(graphs, timed, strict=True):
        for _ in range(plan.warmup_runs):
            graph()
        record.count = plan.warmup_runs
    open_graphs = list(range(len(graphs)))
    while open_graphs:
        rng.shuffle(open_graphs)
        for number in open_graphs:
            _visit(graphs[number], canary, plan, timed[number])
        open_graphs = [number for number in open_graphs if timed[number].stop is None]
    return timed


def _visit(graph: Callable[[], None], canary: Callable[[], None], plan: Plan, timed: Timed) -> None:
    begin = time.perf_counter()
    graph()  # brings the graph's weights back into the caches that other graphs used
    timed.count += 1
    canary()
    before = _run_ms(canary)
    for _ in range(plan.round_runs):
        time_ms = _run_ms(graph)
        after = _run_ms(canary)
        timed.times_ms.append(time_ms)
        timed.canaries_ms.append((before + after) / 2)
        timed.runs.append(timed.count)
        timed.count += 1
        before = after
    timed.seconds += time.perf_counter() - begin
    ratios = timed.ratios
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    timed.noise.append(float((high - low) / middle))
    timed.stop = decide(timed, plan)


def _run_ms(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3
