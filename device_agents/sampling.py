"""How many runs are enough, and what they say: statistics, the stopping rule and interleaved sampling."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import ceil, floor, sqrt
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from device_agents.backends import LoadFailed, Unsupported
from lut_db.measurements import Stop
from lut_db.plans import Plan, Statistic

Z95 = 1.959964
WAKE_RUNS = 4
"""Runs of a graph, at each visit, that are not counted: what ran before has filled the caches, and it takes three or
four runs until they hold the graph's weights and maps again. The first run takes up to half as long again."""

CANARY_WAKE_RUNS = 6
CANARY_RUNS = 4
LOOK_S = 0.02
"""Where graphs are small, the canary is not looked at more often than this."""
HEAVY_EVERY = 2
"""The heavy canary, which takes about as long as what it is run beside, is looked at with every second look."""
MOST_LOOKS = 8
"""After a visit of seconds the canary is run longer, for each second as long as else, up to this."""
PARTS = 4
LATENCIES_OF_A_PART = 20
"""Into how many parts the time of a lease is cut, each with so many latencies of the canary at least, to see whether
the device kept its speed."""
SETTLED_VISITS = 3
SETTLED_GAIN = 0.02
"""Relative narrowing of the interval over that many visits below which more runs are no use."""


def chosen(samples: ArrayLike, name: Statistic) -> NDArray[np.intp]:
    """Which samples a statistic is the mean of.

    `fastest_fifth`: what disturbs a run only ever slows it down, so the fastest runs show the undisturbed device;
    a fifth of them, unlike the minimum, does not depend on how many there are. `interquartile_mean`: the middle half.
    `median`: the middle one, or two.
    """
    values = np.asarray(samples, dtype=float)
    order = np.argsort(values, kind="stable")
    count = len(values)
    if name == "fastest_fifth":
        return order[: ceil(count / 5)]
    cut = count // 4 if name == "interquartile_mean" and count >= 4 else (count - 1) // 2
    return order[cut : count - cut]


def statistic(samples: ArrayLike, name: Statistic) -> float:
    """The value of a statistic."""
    return float(np.asarray(samples, dtype=float)[chosen(samples, name)].mean())


def half_width(samples: ArrayLike, name: Statistic) -> float:
    """Half the 95 % confidence interval of `statistic`.

    Median: from order statistics, without assuming a distribution. Means of a part: from the variance of the samples
    with those beyond the part drawn in to its edge (Tukey-McLaughlin), divided by the part's share.
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
    part = values[np.sort(chosen(values, name))]
    winsorised = np.clip(values, part[0], part[-1])
    return float(Z95 * winsorised.std(ddof=1) / (len(part) / count * sqrt(count)))


@dataclass
class Timed:
    """The latencies of one graph. `done` counts the timed runs, which can be more where a tool tells only means."""

    times_ms: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Which latencies of the graph, counted from its loading, these are: its profile has the others too."""
    count: int = 0
    done: int = 0
    seconds: float = 0.0
    run_ms: float = 0.0
    """What a run took of late; 0 where it has not been run."""
    stop: Stop | None = None
    widths: list[float] = field(default_factory=list)
    failure: Unsupported | LoadFailed | None = None
    """Why it could not be timed to the end."""


Look = tuple[int, list[float]]
"""The number of a canary's session, and its latencies."""


@dataclass
class Sampled:
    """What `sample` saw: every graph's latencies, and those of the canaries, taken all the while, in the order of
    time."""

    graphs: list[Timed]
    looks: list[Look]
    heavy_looks: list[Look] = field(default_factory=list)

    def canary_over_time(self, name: Statistic) -> list[float]:
        """The canary's latency in successive parts of the time, each of so many latencies that noise does not show."""
        looks = [times_ms for _, times_ms in self.looks]
        parts = max(1, min(PARTS, len(looks), sum(map(len, looks)) // LATENCIES_OF_A_PART))
        ends = [len(looks) * number // parts for number in range(parts + 1)]
        return [statistic(np.concatenate(looks[begin:end]), name) for begin, end in pairwise(ends)]

    def canary_ms(self, name: Statistic) -> float:
        """The canary's latency: the mean over its sessions of their statistic."""
        return _over_sessions(self.looks, name)

    def heavy_canary_ms(self, name: Statistic) -> float:
        """That of the heavy canary."""
        return _over_sessions(self.heavy_looks, name)


def _over_sessions(looks: Iterable[Look], name: Statistic) -> float:
    sessions: dict[int, list[float]] = {}
    for number, times_ms in looks:
        sessions.setdefault(number, []).extend(times_ms)
    return fmean(statistic(times_ms, name) for times_ms in sessions.values())


def decide(timed: Timed, plan: Plan) -> Stop | None:
    """Whether a graph has been run often enough, and why."""
    if timed.done >= plan.max_runs:
        return "max_runs"
    if timed.seconds >= plan.max_seconds and timed.done:
        return "max_seconds"
    if timed.done < plan.min_runs:
        return None
    if timed.widths[-1] <= plan.relative_half_width:
        return "confident"
    # An interval that more runs no longer narrow shows a device whose state changes, not one sampled too little.
    if timed.done >= plan.settle_runs and len(timed.widths) > SETTLED_VISITS:
        recent = timed.widths[-SETTLED_VISITS - 1 :]
        if min(recent[1:]) >= recent[0] * (1 - SETTLED_GAIN):
            return "settled"
    return None


Times = Callable[[int], Sequence[float]]
"""Runs something so many times and returns latencies in ms, as `Loaded.time` does."""


def sample(
    graphs: Sequence[Times], canaries: Sequence[Times], plan: Plan, seed: int, *, heavy_canaries: Sequence[Times] = (),
    starts: bool = False,
) -> Sampled:  # fmt: skip
    """Times every graph under the plan, in rounds of random order, with a canary at the start, between and at the end.

    A fixed order would let a drift of the device hit some graphs more than others. The canaries are sessions of one
    network and take turns: where a runtime happened to place one in memory matters less; `heavy_canaries` are those of
    another one. Graphs and canaries are timed with warm caches, so that neither depends on what else is in the lease.
    `starts` says that each visit starts a tool afresh, which warms up by itself and is dear: the canary then is run as
    often as a graph.

    A graph that fails is timed no more, and the others go on.
    """
    rng = random.Random(seed)
    timed = [Timed() for _ in graphs]
    looks: list[Look] = []
    heavy_looks: list[Look] = []
    looked: float | None = None

    def look(*, often: bool = True) -> None:
        nonlocal looked
        passed_s = 0.0 if looked is None else time.perf_counter() - looked
        if not often and looked is not None and passed_s < LOOK_S:
            return
        runs = plan.round_runs if starts else CANARY_RUNS * max(1, min(MOST_LOOKS, int(passed_s)))
        if heavy_canaries and len(looks) % HEAVY_EVERY == 0:
            heavy_looks.append(look_at(heavy_canaries, WAKE_RUNS, runs))
        looks.append(look_at(canaries, CANARY_WAKE_RUNS, runs))
        looked = time.perf_counter()

    def look_at(sessions: Sequence[Times], wake_runs: int, runs: int) -> Look:
        number = rng.randrange(len(sessions))
        if not starts:
            sessions[number](wake_runs)
        return number, list(sessions[number](runs))

    def run(number: int, visit: Callable[[Times, Timed], None]) -> None:
        try:
            visit(graphs[number], timed[number])
        except (Unsupported, LoadFailed) as error:
            timed[number].failure = error

    def still_open() -> list[int]:
        return [number for number, record in enumerate(timed) if record.stop is None and record.failure is None]

    if plan.warmup_runs:
        for number in range(len(graphs)):
            run(number, partial(_warm_up, plan))
    while open_graphs := still_open():
        rng.shuffle(open_graphs)
        for number in open_graphs:
            look(often=starts)
            run(number, partial(_visit, plan, 0 if starts else WAKE_RUNS))
    look()
    return Sampled(timed, looks, heavy_looks)


def _warm_up(plan: Plan, graph: Times, timed: Timed) -> None:
    times_ms = graph(plan.warmup_runs)
    timed.count = len(times_ms)
    timed.run_ms = fmean(times_ms)


def _visit(plan: Plan, wake_runs: int, graph: Times, timed: Timed) -> None:
    begin = time.perf_counter()
    # What takes seconds a run does not take more than its time in one visit.
    left_ms = 1e3 * (plan.max_seconds - timed.seconds)
    share = min(1.0, left_ms / (timed.run_ms * (wake_runs + plan.round_runs))) if timed.run_ms else 1.0
    runs, wake_runs = max(1, int(plan.round_runs * share)), int(wake_runs * share)
    if wake_runs:
        timed.count += len(graph(wake_runs))
    times_ms = graph(runs)
    timed.times_ms.extend(times_ms)
    timed.positions.extend(range(timed.count, timed.count + len(times_ms)))
    timed.count += len(times_ms)
    timed.done += runs
    timed.run_ms = fmean(times_ms)
    timed.seconds += time.perf_counter() - begin
    timed.widths.append(half_width(timed.times_ms, plan.statistic) / statistic(timed.times_ms, plan.statistic))
    timed.stop = decide(timed, plan)
