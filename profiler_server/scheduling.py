"""What a lease holds and what becomes of its measurements. Pure: no database, no clock, no server."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import fmean

from lut_db.measurements import REFUSALS, Failure
from lut_db.operators import Add, Convolution, Operator, ResidualAdd, Shape
from lut_db.plans import Plan

MAX_NETWORKS = 16
"""Whole networks in one lease."""

MIN_FILLERS = 24

KNOWN_NETWORKS = (6, 12)
"""The fewest and the most known networks that tie a lease of whole networks to its table."""

OLDEST_NETWORKS = 32
"""Networks that leases are tied to: of those alike the first in a table, so that errors hardly pass between leases."""

MAX_BESIDE = 8
"""How many operators that came before an operator, and how many that came behind it, are told to who measures it."""

ALIKE = 2.0
"""Factor in parameters up to which networks may speak for each other."""

MAX_ATTEMPTS = 3
"""Tries of a measurement before its failure becomes a row."""


def lease_size(plan: Plan, requested: int, attempts: int) -> int:
    """How many measurements of `plan` that were tried `attempts` times before go into one lease.

    What came back once goes out again in small company and at last alone, so that one operator that kills agents
    does not take the others down with it.
    """
    most = min(requested, MAX_NETWORKS) if plan.context == "whole" else requested
    if attempts == 0:
        return most
    return max(1, most // 8) if attempts < MAX_ATTEMPTS - 1 else 1


@dataclass(frozen=True)
class Fate:
    """What becomes of a measurement that gave no latency.

    `record`: its failure is written as a row. Otherwise it goes back to the queue, `attempts` more counted, after
    a pause where `pause` is set.
    """

    record: bool
    attempts: int = 1
    pause: bool = False


def fate(failure: Failure, attempts: int) -> Fate:
    """What becomes of a measurement that failed, having been tried `attempts` times before.

    A refused figure says nothing of the operator: it is taken again, as often as it needs. What is unsupported
    stays unsupported. Everything else is tried `MAX_ATTEMPTS` times.
    """
    if failure.cause in REFUSALS:
        return Fate(record=False, attempts=0, pause=True)
    if failure.cause == "unsupported":
        return Fate(record=True)
    return Fate(record=attempts + 1 >= MAX_ATTEMPTS)


def filler_count(plan: Plan, wanted: int) -> int:
    """How many known operators fill up the carriers of a lease of `wanted` operators: two carriers' worth in all, and
    enough to tie the lease to the table."""
    return max(MIN_FILLERS, plan.carrier_length - wanted) if plan.context == "in_context" else 0


def choose_known_networks(wanted: Sequence[int], known: Sequence[int]) -> list[int]:
    """Indices into `known`, oldest first, of networks with about as many parameters as the wanted ones, from the
    smallest to the largest: how far a busy memory slows a network down depends on its weights."""

    def apart(one: int, other: int) -> float:
        return abs(log((one + 1) / (other + 1)))

    ordered = sorted(wanted)
    near = [i for i, size in enumerate(known) if min(apart(size, other) for other in ordered) <= log(ALIKE)]
    near = near[:OLDEST_NETWORKS]
    fewest, most = KNOWN_NETWORKS
    count = min(max(fewest, len(wanted)), most, len(near))
    chosen: list[int] = []
    for number in range(count):
        like = ordered[round(number * (len(ordered) - 1) / max(1, count - 1))]
        left = (index for index in near if index not in chosen)
        chosen.append(min(left, key=lambda index: (apart(known[index], like), index)))
    return chosen


_Pairs = list[tuple[str, str]]


def beside(networks: Sequence[Sequence[Operator]], keys: Collection[str]) -> tuple[_Pairs, _Pairs, dict[str, float]]:
    """What these networks tell of these operators, by keys: which operator came right behind which, which made what is
    added by which, as far as `successions` and `shortcuts` tell, and how many weights an operator has on average in the
    networks that each of them is in. What is asked for alone tells of no network."""
    means: defaultdict[str, list[float]] = defaultdict(list)
    for network in networks:
        if len(network) < 2:
            continue
        mean = fmean(operator.parameters for operator in network)
        for key in {operator.key for operator in network}.intersection(keys):
            means[key].append(mean)
    return (
        successions([[operator.key for operator in network] for network in networks], keys),
        shortcuts(networks, keys),
        {key: fmean(values) for key, values in means.items()},
    )


def successions(
    networks: Iterable[Sequence[str]], keys: Collection[str], most: int = MAX_BESIDE
) -> _Pairs:  # fmt: skip
    """Which operator comes right behind which in these networks, told by keys, where one of the two is among `keys`:
    for each of them `most` before it and as many behind it, where there are so many, and few more in all."""
    found: dict[tuple[str, str], None] = {}
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for network in networks:
        for pair in pairwise(network):
            first, second = pair
            wanted = (second in keys and before[second] < most) or (first in keys and after[first] < most)
            if wanted and first != second and pair not in found:
                found[pair] = None
                before[second] += 1
                after[first] += 1
    return list(found)


def shortcuts(networks: Iterable[Sequence[Operator]], keys: Collection[str]) -> _Pairs:
    """Which operator made what is added by which in these networks, told by keys, where the second is among `keys`.

    A network tells its operators in order: a block adds what it began with, the first that fits from the last sum on,
    or else the latest before. Sums of equal shapes are passed by, to what made their own shortcut: a runtime has them
    in its layout.
    """
    found: _Pairs = []
    for network in networks:
        roots: list[Operator] = []
        """Of every operator so far what made the layout of its output."""
        last = 0
        for number, operator in enumerate(network):
            root = operator
            if isinstance(operator, Add | Convolution | ResidualAdd) and len(operator.inputs) == 2:
                earlier = [*range(last, number - 1), *range(last - 1, -1, -1)]
                made = next((roots[n] for n in earlier if network[n].output == operator.inputs[1]), None)
                last = number
                if made is not None and operator.key in keys:
                    found.append((made.key, operator.key))
                if made is not None and not isinstance(operator, ResidualAdd):
                    root = made
            roots.append(root)
    return few(found)


def few(pairs: _Pairs, most: int = MAX_BESIDE) -> _Pairs:
    """Different ones of these pairs, the first `most` of each second."""
    count: Counter[str] = Counter()
    found = []
    for pair in dict.fromkeys(pairs):
        count[pair[1]] += 1
        if count[pair[1]] <= most:
            found.append(pair)
    return found


def choose_fillers(wanted: Sequence[Operator], known: Sequence[Operator], count: int, seed: int) -> list[int]:
    """Up to `count` indices into `known`, those whose shapes adjoin the wanted operators first.

    Breadth first from `wanted`: an operator adjoins another when the output of one has the shape of an input of
    the other. Within one distance the order is random, from `seed`; operators that nothing connects come last.
    """
    rng = random.Random(seed)
    reads: dict[Shape, list[int]] = defaultdict(list)
    makes: dict[Shape, list[int]] = defaultdict(list)
    for number, operator in enumerate(known):
        makes[operator.output].append(number)
        for shape in dict.fromkeys(operator.inputs):
            reads[shape].append(number)
    chosen: list[int] = []
    left = set(range(len(known)))
    front: Sequence[Operator] = wanted
    while front and len(chosen) < count:
        outputs = dict.fromkeys(operator.output for operator in front)
        inputs = dict.fromkeys(shape for operator in front for shape in operator.inputs)
        near = {number for shape in outputs for number in reads[shape]}
        near |= {number for shape in inputs for number in makes[shape]}
        ring = sorted(near & left)
        rng.shuffle(ring)
        chosen += ring
        left -= near
        front = [known[number] for number in ring]
    rest = sorted(left)
    rng.shuffle(rest)
    return (chosen + rest)[:count]
