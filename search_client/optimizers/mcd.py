"""Multi-layer coordinate descent, MCD (NetAdaptV2, Sec. 2.4), and its special case SCD of NetAdaptV1.

From the initial network, each iteration t lowers the target and takes the best of J samples that meets it:

    R_t = max(budget, R_{t-1} - r0 * R0 * decay^(t-1))                      R0 the cost of the initial network

A sample shrinks L distinct layers of the best architecture so far, by random single steps (the next width or the
next kernel), until its cost R <= R_t; a step may *raise* the cost, so nothing is assumed of one. Then every step
that the target does not need is taken back. The sample of the highest quality becomes the next architecture.

Everything here is a pure function of its arguments. Random numbers are a function of (seed, iteration, sample,
redraw) alone, so the state after any iteration is all that is needed to go on bit for bit. A path of random steps
does not depend on costs: the J samples of an iteration advance in lock-step, several steps ahead, and each round
is one call of `cost` for all of them, because an answer may cost a request over a network, and a measurement.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from lut_db.errors import InvalidInput, LatencyLabError
from search_client.architecture import Architecture, SearchSpace

Cost = Callable[[Sequence[Architecture]], Sequence[float | None]]
"""What architectures cost, in one unit; None or infinity for one that cannot be costed: it is then no candidate."""

Quality = Callable[[Sequence[Architecture]], Sequence[float]]
"""How good architectures are, larger is better (accuracy on held-out images, say)."""

Canonical = Callable[[Architecture], Architecture]
"""The one architecture that stands for all that are the same network."""

MAX_ITERATIONS = 10_000


class NoValidSample(LatencyLabError):
    """No sample of the iteration meets its target."""


@dataclass(frozen=True)
class Config:
    """How to search.

    `samples` is J, `layers` is L, `reduction` is r0 and `decay` its factor per iteration. The budget is either
    `budget_ratio` of the initial cost or `budget` in the unit of the cost. With `relative` the reduction is taken
    of the previous target instead of the initial cost: R_t = R_{t-1} * (1 - r0 * decay^(t-1)). A sample whose
    layers are exhausted before they meet the target is drawn again, `redraws` times at most. One call of the cost
    asks for about `look_ahead` architectures a sample; this changes the number of calls and no result. With
    `each_layer` the k-th sample shrinks layer k (SCD) instead of a random choice.
    """

    samples: int
    layers: int
    reduction: float
    decay: float = 0.98
    budget_ratio: float | None = None
    budget: float | None = None
    relative: bool = False
    seed: int = 0
    redraws: int = 10
    look_ahead: int = 4
    each_layer: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("samples", self.samples, 1), ("layers", self.layers, 1), ("look_ahead", self.look_ahead, 1),
            ("redraws", self.redraws, 0), ("seed", self.seed, 0),
        ):  # fmt: skip
            if value < least:
                raise InvalidInput(f"{value} is below {least}", field=name)
        if not 0 < self.reduction < 1:
            raise InvalidInput(
                f"{self.reduction} is not between 0 and 1", field="reduction", remedy="give a share, 0.03 for 3 %"
            )
        if not 0 < self.decay <= 1:
            raise InvalidInput(f"{self.decay} is not above 0 and at most 1", field="decay")
        if (self.budget is None) == (self.budget_ratio is None):
            raise InvalidInput("give exactly one of budget and budget_ratio", field="budget")
        if self.budget_ratio is not None and not 0 < self.budget_ratio <= 1:
            raise InvalidInput(
                f"{self.budget_ratio} is not above 0 and at most 1", field="budget_ratio",
                remedy="it is a share of the initial network's cost",
            )  # fmt: skip
        if self.budget is not None and not (self.budget > 0 and math.isfinite(self.budget)):
            raise InvalidInput(f"{self.budget} is no positive cost", field="budget")


def scd(config: Config, space: SearchSpace) -> Config:
    """SCD of NetAdaptV1 as a case of MCD: one layer a sample, one sample a layer."""
    return replace(config, samples=len(space.layers), layers=1, each_layer=True)


@dataclass(frozen=True)
class Candidate:
    """A sample that met its target."""

    key: str
    cost: float
    quality: float


@dataclass(frozen=True)
class Entry:
    """One point of the trajectory: the architecture chosen in an iteration. Iteration 0 is the initial network.

    `drawn` counts the samples that met the target, `candidates` holds the distinct ones, best first. Both are
    empty where the previous architecture meets the new target already: it is then kept.
    """

    iteration: int
    target: float
    cost: float
    quality: float
    architecture: Architecture
    drawn: int = 0
    candidates: tuple[Candidate, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        architecture = data["architecture"]
        return cls(
            **{
                **data,
                "architecture": Architecture(tuple(architecture["widths"]), tuple(architecture["kernels"])),
                "candidates": tuple(Candidate(**candidate) for candidate in data["candidates"]),
            }
        )


@dataclass(frozen=True)
class State:
    """A search after some iteration: its trajectory so far is all there is to know."""

    budget: float
    trajectory: tuple[Entry, ...] = field(default=())

    @property
    def iteration(self) -> int:
        return self.trajectory[-1].iteration

    @property
    def architecture(self) -> Architecture:
        """The best architecture so far; the discovered one once `finished`."""
        return self.trajectory[-1].architecture

    @property
    def initial_cost(self) -> float:
        return self.trajectory[0].cost

    @property
    def finished(self) -> bool:
        return self.trajectory[-1].cost <= self.budget

    def to_json(self) -> str:
        return json.dumps({"budget": self.budget, "trajectory": [entry.to_json() for entry in self.trajectory]})

    @classmethod
    def from_json(cls, text: str) -> State:
        data = json.loads(text)
        return cls(data["budget"], tuple(Entry.from_json(entry) for entry in data["trajectory"]))


def schedule(config: Config, initial_cost: float) -> list[float]:
    """The targets R_1, R_2, … down to the budget, the last of them; empty where the initial cost meets the budget.

    Raises InvalidInput where the reductions never add up to what the budget asks: they sum to r0 / (1 - decay) of
    the initial cost at most.
    """
    budget = config.budget if config.budget is not None else (config.budget_ratio or 1.0) * initial_cost
    targets: list[float] = []
    target = initial_cost
    while target > budget:
        share = config.reduction * config.decay ** len(targets)
        lower = target * (1 - share) if config.relative else target - share * initial_cost
        if lower >= target or target - lower < 1e-9 * initial_cost or len(targets) >= MAX_ITERATIONS:
            reach = sum(config.reduction * config.decay**t for t in range(len(targets)))
            reached = 1 - target / initial_cost
            raise InvalidInput(
                f"reductions of {config.reduction:.4g} decaying by {config.decay:.4g} take off {reached:.1%} of the "
                f"initial cost at most, but the budget asks for {1 - budget / initial_cost:.1%}",
                field="reduction",
                remedy=_reach_further(config, budget / initial_cost, reach),
            )
        target = max(budget, lower)
        targets.append(target)
    return targets


def _reach_further(config: Config, ratio: float, reach: float) -> str:
    """How to reach `ratio` of the initial cost, where reductions now sum to `reach` of it."""
    needed = -math.log(ratio) if config.relative else 1 - ratio
    least = math.ceil(1020 * config.reduction * needed / reach) / 1000
    return (
        f"raise it to {least:.3g} or more, or raise decay or the budget" if least < 1 else "raise decay or the budget"
    )


def check(config: Config, space: SearchSpace) -> None:
    """Raises InvalidInput where the configuration asks of the space what it does not have."""
    if config.layers > len(space.layers):
        raise InvalidInput(
            f"{config.layers} layers a sample, but the network has {len(space.layers)} searchable layers",
            field="layers",
        )


def start(
    config: Config, space: SearchSpace, cost: Cost, quality: Quality, canonical: Canonical | None = None
) -> State:
    """The state before the first iteration: the initial network, costed and judged, and a budget that can be met.

    Raises InvalidInput where the budget is out of reach, before any sample is drawn.
    """
    check(config, space)
    initial = (canonical or _same)(space.full)
    (initial_cost,) = cost([initial])
    if initial_cost is None or not math.isfinite(initial_cost) or initial_cost <= 0:
        raise NoValidSample(
            "the initial network cannot be costed", remedy="see why its operators failed on this target"
        )
    targets = schedule(config, initial_cost)
    (initial_quality,) = _judged(quality, [initial])
    entry = Entry(0, initial_cost, initial_cost, initial_quality, initial)
    return State(budget=targets[-1] if targets else initial_cost, trajectory=(entry,))


def step(
    state: State, config: Config, space: SearchSpace, cost: Cost, quality: Quality, canonical: Canonical | None = None
) -> State:
    """The state after one more iteration. Raises NoValidSample where no sample meets the target."""
    if state.finished:
        return state
    iteration = state.iteration + 1
    target = schedule(config, state.initial_cost)[iteration - 1]
    last = state.trajectory[-1]
    if last.cost <= target:
        entry = replace(last, iteration=iteration, target=target, drawn=0, candidates=())
        return replace(state, trajectory=(*state.trajectory, entry))

    costs = _Costs(cost, canonical or _same)
    samples = _draw(state.architecture, iteration, target, config, space, costs)
    distinct = {costs.canonical(sample).key: costs.canonical(sample) for sample in samples}
    if not distinct:
        raise NoValidSample(
            f"iteration {iteration}: none of {config.samples} samples of {config.layers} layers, each drawn "
            f"{config.redraws + 1} times, costs {target:.6g} or less; the best so far costs {last.cost:.6g}",
            field="layers",
            remedy="let a sample shrink more layers, lower the reduction per iteration, or raise the budget",
        )
    known = costs.known
    judged = _judged(quality, list(distinct.values()))
    candidates = sorted(
        (Candidate(key, known[key], value) for key, value in zip(distinct, judged, strict=True)),
        key=lambda candidate: (-candidate.quality, candidate.cost, candidate.key),
    )
    best = candidates[0]
    entry = Entry(
        iteration, target, best.cost, best.quality, distinct[best.key], drawn=len(samples), candidates=tuple(candidates)
    )
    return replace(state, trajectory=(*state.trajectory, entry))


def search(
    state: State, config: Config, space: SearchSpace, cost: Cost, quality: Quality, canonical: Canonical | None = None
) -> Iterator[State]:
    """The states after every further iteration, up to the one that meets the budget."""
    while not state.finished:
        state = step(state, config, space, cost, quality, canonical)
        yield state


# --- samples --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One single step of one layer."""

    layer: int
    kernel: bool


class _Costs:
    """The costs of one iteration by canonical key; an architecture is asked for once."""

    def __init__(self, cost: Cost, canonical: Canonical) -> None:
        self._cost = cost
        self._canonical = canonical
        self._seen: dict[Architecture, Architecture] = {}
        self.known: dict[str, float] = {}

    def canonical(self, architecture: Architecture) -> Architecture:
        if architecture not in self._seen:
            self._seen[architecture] = self._canonical(architecture)
        return self._seen[architecture]

    def ask(self, architectures: Sequence[Architecture]) -> None:
        """Costs all of them in at most one call."""
        missing = {
            one.key: one for one in map(self.canonical, architectures) if one.key not in self.known
        }  # fmt: skip
        if not missing:
            return
        answers = self._cost(list(missing.values()))
        for key, answer in zip(missing, answers, strict=True):
            self.known[key] = math.inf if answer is None or math.isnan(answer) else answer

    def __contains__(self, architecture: Architecture) -> bool:
        return self.canonical(architecture).key in self.known

    def __getitem__(self, architecture: Architecture) -> float:
        return self.known[self.canonical(architecture).key]


def _draw(
    base: Architecture, iteration: int, target: float, config: Config, space: SearchSpace, costs: _Costs
) -> list[Architecture]:
    """The samples of an iteration that meet its target, in the order of their numbers."""
    window = config.look_ahead * config.samples
    running = {number: _path(base, iteration, number, config, space) for number in range(config.samples)}
    found: dict[int, list[_Step]] = {}
    while running:
        # As many architectures a round as at first: the fewer samples are left, the further each looks ahead.
        ahead = {number: list(islice(path, window // len(running))) for number, path in running.items()}
        costs.ask([one for points in ahead.values() for one, _ in points])
        for number, points in ahead.items():
            met = next((steps for one, steps in points if costs[one] <= target), None)
            if met is not None:
                found[number] = met
            if met is not None or not points:
                del running[number]
    return _take_back(base, target, [found[number] for number in sorted(found)], window, space, costs)


def _take_back(
    base: Architecture, target: float, samples: list[list[_Step]], window: int, space: SearchSpace, costs: _Costs
) -> list[Architecture]:
    """Takes back, first step first, every step without which a sample still meets the target."""
    samples = [list(steps) for steps in samples]
    tried = [0] * len(samples)

    def without(number: int, *undone: int) -> Architecture:
        return _replay(base, [one for index, one in enumerate(samples[number]) if index not in undone], space)

    while running := [number for number, steps in enumerate(samples) if tried[number] < len(steps)]:
        wanted = [
            without(number, undone) for number in running for undone in range(tried[number], len(samples[number]))
        ]
        for number in running:  # and what is asked next where one step can be taken back, as far as the round goes
            if len(wanted) >= window:
                break
            rest = range(tried[number], len(samples[number]))
            wanted += [without(number, undone, other) for undone in rest for other in rest if other > undone]
        costs.ask(wanted)
        for number in running:
            while tried[number] < len(samples[number]):
                trial = without(number, tried[number])
                if trial not in costs:
                    break
                if costs[trial] <= target:
                    del samples[number][tried[number]]
                else:
                    tried[number] += 1
    return [_replay(base, steps, space) for steps in samples]


def _path(
    base: Architecture, iteration: int, number: int, config: Config, space: SearchSpace
) -> Iterator[tuple[Architecture, list[_Step]]]:
    """Every architecture that one sample may come to, with the steps to it: its first draw, then its redraws."""
    shrinkable = [layer for layer in range(len(space.layers)) if space.shrink(base, layer)]
    for redraw in range(config.redraws + 1):
        digest = hashlib.sha256(f"{config.seed}/{iteration}/{number}/{redraw}".encode()).digest()
        draw = random.Random(int.from_bytes(digest, "big")).random
        if config.each_layer:
            chosen = [number] if number in shrinkable else []
        else:
            left = list(shrinkable)
            chosen = [left.pop(int(draw() * len(left))) for _ in range(min(config.layers, len(left)))]
        steps: list[_Step] = []
        current = base
        while options := [(layer, one) for layer in chosen for one in space.shrink(current, layer)]:
            layer, following = options[int(draw() * len(options))]
            steps = [*steps, _Step(layer, kernel=following.kernels != current.kernels)]
            yield following, steps
            current = following


def _replay(base: Architecture, steps: Sequence[_Step], space: SearchSpace) -> Architecture:
    """The architecture after these steps; one that is not there any more is left out."""
    current = base
    for wanted in steps:
        for following in space.shrink(current, wanted.layer):
            if (following.kernels != current.kernels) == wanted.kernel:
                current = following
                break
    return current


def _judged(quality: Quality, architectures: Sequence[Architecture]) -> list[float]:
    values = [float(value) for value in quality(architectures)]
    if len(values) != len(architectures) or not all(map(math.isfinite, values)):
        raise InvalidInput(
            "the quality of a sample is not a number", field="quality", remedy="see whether its training diverged"
        )
    return values


def _same(architecture: Architecture) -> Architecture:
    return architecture
