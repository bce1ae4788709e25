"""How many runs are enough, and what they say: statistics, the stopping rule and interleaved sampling."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, floor, inf, pi, sqrt, tan
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from device_agents.backends import LoadFailed, Unsupported
from lut_db.measurements import Stop
from lut_db.plans import Plan, Statistic

Z95 = 1.959964
WAKE_RUNS = 4
"""Runs of a graph, at each visit, that are not counted: what ran before has filled the caches, and it takes three or
four runs until they hold the graph's weights and maps again. The first run takes up to half as long again."""

CANARY_WAKE_RUNS = 4
CANARY_RUNS = 4
LOOK_S = 0.05
"""Where graphs are small, the canary is not looked at more often than this."""
HEAVY_EVERY = 2
"""The heavy canary, which takes about as long as what it is run beside, is looked at with every second look."""
MOST_LOOKS = 8
"""After a visit of seconds the canary is run longer, for each second as long as else, up to this."""
PARTS = 4
LATENCIES_OF_A_PART = 20
"""Into how many parts the time of a lease is cut, each with so many latencies of the canary at least, to see whether
the device kept its speed."""
DISTURBED = 1 / 3
"""Share of the drift tolerance by which a look at the canary may be slower than the fastest ones: graphs feel what
disturbs a device more than the canary does, or less."""

WAIT_S = 30.0
QUIET_SHARE = 1 / 10
"""How long it is waited for a disturbed device, and then as long as it is quiet for this share of the time. Where
processors are shared it is quiet for hundredths of a second in a row, in bad hours a fifth of the time."""

REST_S = 1.0
"""From one look at a disturbed phone to the next, since what works without a pause stays hot. A processor is looked at
without one: it may be quiet for less."""

MOVE_LOOKS = 2
"""After how many slow looks in a row it is looked on another core. One may be chance, and a core that was just moved to
has cold caches; after one, or four, it took longer until a core was quiet."""

SETTLED_VISITS = 3
SETTLED_GAIN = 0.02
"""Relative narrowing of the interval over that many visits below which more runs are no use."""


Part = Statistic | Literal["second_fifth"]
"""Which part of the samples, in the order of their size, a figure is the mean of."""


def chosen(samples: ArrayLike, name: Part) -> NDArray[np.intp]:
    """Which samples a statistic is the mean of.

    `fastest_fifth`: what disturbs a run only ever slows it down, so the fastest runs show the undisturbed device;
    a fifth of them, unlike the minimum, does not depend on how many there are. `second_fifth`: the next ones, for what
    is a part of a run; the fastest times of parts, each from another run, add up to less than any run.
    `interquartile_mean`: the middle half. `median`: the middle one, or two.
    """
    values = np.asarray(samples, dtype=float)
    order = np.argsort(values, kind="stable")
    count = len(values)
    fifth = ceil(count / 5)
    if name == "fastest_fifth":
        return order[:fifth]
    if name == "second_fifth" and count > 1:
        return order[fifth : 2 * fifth]
    cut = count // 4 if name == "interquartile_mean" and count >= 4 else (count - 1) // 2
    return order[cut : count - cut]


def statistic(samples: ArrayLike, name: Part) -> float:
    """The value of a statistic."""
    return float(np.asarray(samples, dtype=float)[chosen(samples, name)].mean())


def half_width(visits: Sequence[ArrayLike], name: Part | None) -> float:
    """Half the 95 % confidence interval of `statistic` of all samples, or of their mean where `name` is None. They were
    taken visit by visit.

    Samples of one visit are alike, since what disturbs a device lasts longer than a run: what varies freely is the sum
    over each visit of what its samples do to the statistic (a cluster-robust variance, as Liang and Zeger's, 1986, with
    Student's t for the number of visits). What a sample does is how far it is from the mean, with those beyond the part
    drawn in to its edge, over the part's share (Tukey and McLaughlin, 1963); to the median, on which side of it it is.
    """
    taken = [np.asarray(visit, dtype=float) for visit in visits]
    values = np.concatenate(taken)
    count = len(values)
    if count < 4 or len(taken) < 2:
        return float(np.ptp(values)) if count > 1 else float(values[0])
    if name == "median":
        # Order statistics, without assuming a distribution.
        reach = _reach(np.sign(values - np.median(values)), taken) * count / 2
        ordered = np.sort(values)
        low = max(0, floor(count / 2 - reach) - 1)
        high = min(count - 1, ceil(count / 2 + reach))
        return float(ordered[high] - ordered[low]) / 2
    part = values if name is None else values[chosen(values, name)]
    drawn_in = np.clip(values, part.min(), part.max())
    return _reach(drawn_in - drawn_in.mean(), taken) * count / len(part)


def _reach(deviations: NDArray[np.float64], visits: Sequence[NDArray[np.float64]]) -> float:
    """Half the 95 % confidence interval of the mean of deviations."""
    sums = np.add.reduceat(deviations, np.cumsum([0, *map(len, visits[:-1])]))
    free = len(visits) - 1
    return float(_student(free) * sqrt((sums @ sums) * len(visits) / free) / len(deviations))


def _student(free: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom, to 3 % (Abramowitz and Stegun, 26.7.5); with
    one it is Cauchy's."""
    if free == 1:
        return tan(0.475 * pi)
    z = Z95
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / free**power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Visit:
    """Runs of one graph in a row. A tool that tells only means makes more `runs` than it tells latencies."""

    times_ms: Sequence[float]
    first: int
    """Which latency of the graph the first one is, counted from its loading: its profile has the others too."""
    runs: int
    seconds: float
    look: int = 0
    """The last look at the canary before."""


@dataclass
class Timed:
    """The visits of one graph that count."""

    visits: list[Visit] = field(default_factory=list)
    count: int = 0
    """All latencies from its loading on."""
    run_ms: float = 0.0
    """What a run took of late; 0 where it has not been run."""
    stop: Stop | None = None
    widths: list[float] = field(default_factory=list)
    """The relative half-width after each visit."""
    failure: Unsupported | LoadFailed | None = None
    """Why it could not be timed to the end."""

    @property
    def times_ms(self) -> list[float]:
        return [latency_ms for visit in self.visits for latency_ms in visit.times_ms]

    @property
    def positions(self) -> list[int]:
        """Which latencies of the graph these are, counted from its loading."""
        return [visit.first + number for visit in self.visits for number in range(len(visit.times_ms))]

    @property
    def done(self) -> int:
        return sum(visit.runs for visit in self.visits)

    @property
    def seconds(self) -> float:
        return sum(visit.seconds for visit in self.visits)

    def half_width_ms(self, plan: Plan) -> float:
        """Half the 95 % confidence interval of the plan's statistic."""
        return half_width([visit.times_ms for visit in self.visits], plan.statistic)

    def add(self, visit: Visit, plan: Plan) -> None:
        self.visits.append(visit)
        self.widths.append(self.half_width_ms(plan) / statistic(self.times_ms, plan.statistic))
        self.stop = decide(self, plan)

    def keep(self, visits: Iterable[Visit], plan: Plan) -> None:
        """Counts only these."""
        self.visits, self.widths, self.stop = [], [], None
        for visit in visits:
            self.add(visit, plan)


Look = tuple[int, list[float]]
"""The number of a canary's session, and its latencies."""


@dataclass
class Sampled:
    """What `sample` saw: every graph's latencies, and those of the canaries, taken all the while, in the order of
    time. While `disturbed_s` passed the device was disturbed, and nothing from then is here; `moves` is how often that
    made it go on on another core."""

    graphs: list[Timed]
    looks: list[Look]
    heavy_looks: list[Look] = field(default_factory=list)
    disturbed_s: float = 0.0
    moves: int = 0

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
    starts: bool = False, slowest_ms: float = inf, patience_s: float = 0.0, move: Callable[[], bool] = lambda: False,
) -> Sampled:  # fmt: skip
    """Times every graph under the plan, in rounds of random order, with a canary at the start, between and at the end.

    A fixed order would let a drift of the device hit some graphs more than others. The canaries are sessions of one
    network and take turns: where a runtime happened to place one in memory matters less; `heavy_canaries` are those of
    another one. Graphs and canaries are timed with warm caches, so that neither depends on what else is in the lease.
    `starts` says that each visit starts a tool afresh, which warms up by itself and is dear: there is no other warm-up,
    and the canary is run as often as a graph.

    A device is disturbed where looks at the canary take longer than the fastest of them, by a share of the plan's
    `drift_tolerance`, or than `slowest_ms`, twice or more in a row. What was timed beside such looks is not counted,
    and it is looked again until the device is quiet, on other cores of it where `move` goes on on another one and says
    True. It must be quiet for a tenth of the time, after the first half minute, and be disturbed for less than
    `patience_s` in all: else everything counts from then on.

    A graph that fails is timed no more, and the others go on.
    """
    course = _Course(graphs, canaries, heavy_canaries, plan, seed, starts, slowest_ms, patience_s, move)
    course.run()
    return course.sampled()


class _Course:
    """The course of sampling. Looks at the canary divide it into stretches, numbered by the look before each."""

    def __init__(
        self, graphs: Sequence[Times], canaries: Sequence[Times], heavy_canaries: Sequence[Times], plan: Plan,
        seed: int, starts: bool, slowest_ms: float, patience_s: float, move: Callable[[], bool],
    ):  # fmt: skip
        self.graphs, self.canaries, self.heavy_canaries = graphs, canaries, heavy_canaries
        self.plan, self.starts, self.slowest_ms, self.patience_s = plan, starts, slowest_ms, patience_s
        self.move, self.moves = move, 0
        self.rng = random.Random(seed)
        self.timed = [Timed() for _ in graphs]
        self.looks: list[Look] = []
        self.looked: list[float] = []
        self.heavy_looks: list[tuple[int, Look]] = []
        self.quiet: dict[int, float] = {}
        """The latencies that looks show, but for those of a disturbed device."""
        self.lost: set[int] = set()
        """Stretches beside such a look."""

    def run(self) -> None:
        self.move()  # to the first core, where the system would choose among several
        if self.plan.warmup_runs and not self.starts:
            for number in range(len(self.graphs)):
                self._run(number, self._warm_up)
        while True:
            open_graphs = self._open()
            self.rng.shuffle(open_graphs)
            for number in open_graphs:
                self._look(often=self.starts)
                self._run(number, self._visit)
            if not self._open():
                self._look()
                if not self._open():
                    break

    def sampled(self) -> Sampled:
        looks = [self.looks[number] for number in self.quiet]
        return Sampled(self.timed, looks, self._heavy(), self._disturbed_s(), self.moves)

    def _open(self) -> list[int]:
        return [number for number, record in enumerate(self.timed) if record.stop is None and record.failure is None]

    def _look(self, *, often: bool = True) -> None:
        """Looks at the canaries, until the device is quiet or patience at its end."""
        passed_s = time.perf_counter() - self.looked[-1] if self.looked else 0.0
        if not often and self.looked and passed_s < LOOK_S:
            return
        runs = self.plan.round_runs if self.starts else CANARY_RUNS * max(1, min(MOST_LOOKS, int(passed_s)))
        number = self._awake(self.canaries, CANARY_WAKE_RUNS)
        slow = 0
        while True:
            self.looks.append((number, list(self.canaries[number](runs))))
            self.looked.append(time.perf_counter())
            if not self._disturbed():
                break
            slow += 1
            if self.starts:
                time.sleep(REST_S)
            if slow % MOVE_LOOKS == 0 and self.move():
                self.moves += 1
                self.canaries[number](CANARY_WAKE_RUNS)
        if self.heavy_canaries and HEAVY_EVERY * len(self._heavy()) < len(self.quiet):
            number = self._awake(self.heavy_canaries, WAKE_RUNS)
            self.heavy_looks.append((len(self.looks) - 1, (number, list(self.heavy_canaries[number](runs)))))

    def _awake(self, sessions: Sequence[Times], wake_runs: int) -> int:
        number = self.rng.randrange(len(sessions))
        if not self.starts:
            sessions[number](wake_runs)
        return number

    def _disturbed(self) -> bool:
        """Whether the last look was slow. Takes back what stands beside two or more slow looks in a row, these or older
        ones that were not yet known to be slow; one alone is no more than the statistic leaves out anyway."""
        last = len(self.looks) - 1
        self.quiet[last] = statistic(self.looks[-1][1], self.plan.statistic)
        disturbed_s = self._disturbed_s()
        quiet_s = self.looked[-1] - self.looked[0] - disturbed_s
        if disturbed_s >= min(self.patience_s, WAIT_S + quiet_s * (1 / QUIET_SHARE - 1)):
            self.patience_s = 0.0
            return False
        fastest_ms = statistic(list(self.quiet.values()), "fastest_fifth")
        limit_ms = min((1 + DISTURBED * self.plan.drift_tolerance) * fastest_ms, self.slowest_ms)
        slow = {number for number in range(len(self.looks)) if self.quiet.get(number, inf) > limit_ms}
        found = [number for number in slow if number in self.quiet and slow & {number - 1, number + 1}]
        for number in found:
            del self.quiet[number]
            self.lost |= {number - 1, number}
        for record in self.timed if found else ():
            if any(visit.look in self.lost for visit in record.visits):
                record.keep([visit for visit in record.visits if visit.look not in self.lost], self.plan)
        return last in slow

    def _heavy(self) -> list[Look]:
        return [look for stretch, look in self.heavy_looks if stretch not in self.lost]

    def _disturbed_s(self) -> float:
        return sum(
            self.looked[number + 1] - self.looked[number] for number in self.lost if 0 <= number < len(self.looked) - 1
        )

    def _run(self, number: int, how: Callable[[Times, Timed], None]) -> None:
        try:
            how(self.graphs[number], self.timed[number])
        except (Unsupported, LoadFailed) as error:
            self.timed[number].failure = error

    def _warm_up(self, graph: Times, timed: Timed) -> None:
        times_ms = graph(self.plan.warmup_runs)
        timed.count = len(times_ms)
        timed.run_ms = fmean(times_ms)

    def _visit(self, graph: Times, timed: Timed) -> None:
        plan, wake_runs = self.plan, 0 if self.starts else WAKE_RUNS
        begin = time.perf_counter()
        # What takes seconds a run does not take more than its time in one visit.
        left_ms = 1e3 * (plan.max_seconds - timed.seconds)
        share = min(1.0, left_ms / (timed.run_ms * (wake_runs + plan.round_runs))) if timed.run_ms else 1.0
        runs = max(1, min(int(plan.round_runs * share), plan.max_runs - timed.done))
        wake_runs = int(wake_runs * share)
        if wake_runs:
            timed.count += len(graph(wake_runs))
        times_ms = graph(runs)
        first, timed.count = timed.count, timed.count + len(times_ms)
        timed.run_ms = fmean(times_ms)
        timed.add(Visit(times_ms, first, runs, time.perf_counter() - begin, len(self.looks) - 1), plan)
