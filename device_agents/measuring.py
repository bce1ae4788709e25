"""From a lease to a report: what to time, in which graphs, and what the times say. Knows no runtime."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf, prod, sqrt
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from device_agents import energy
from device_agents.backends import Backend, Loaded, LoadFailed, Movable, NodeTimes, Unprofiled, Unreachable, Unsupported
from device_agents.packing import pack
from device_agents.sampling import Z95, Part, Timed, Times, chosen, half_width, sample, statistic
from lut_db.canary import canary, heaviness, heavy_canary
from lut_db.measurements import Cause, Evidence, Failure, Measurement, Samples, Stop
from lut_db.networks import Network
from lut_db.plans import Plan
from lut_db.wire import Lease, Report

CANARY_SESSIONS = 4
"""Sessions of the canary: a single one is up to 2 % off, from where its memory happens to lie."""

HEAVY_CANARY_SESSIONS = 3
CANARY_WARMUP_RUNS = 5
MESSAGE_LENGTH = 4000
TWINS = 6
ENERGY_SESSIONS = 3
"""Sessions of one graph whose energy is counted: it hardly depends on where a runtime placed its memory."""

ENERGY_S = 600.0
"""How long all bursts of a lease may last: a lease has an end, and its latencies are there already."""

ENERGY_TRIES = 3
ENERGY_AGAIN_S = 60.0
"""How often the bursts are run where the device was not quiet, unless they take longer than this: an operator without
energy would stay without it, but a lease has an end."""

KNOWN_SESSIONS = 2
"""Sessions of each known network; there are many of them."""

MIN_KNOWN = 8
MIN_KNOWN_NETWORKS = 3
"""Known operators and networks in a lease below which they do not say how far it is from its table."""

ALIKE = 0.35
"""Difference in the logarithm of the parameters up to which two networks suffer about alike from a busy memory."""

STRAY = 0.05
"""How far the drift of one that is known may be from that of the others and still count in full."""

CERTAIN = 0.02
"""Relative spread between carriers below which one known operator says no more than another."""

LEASES_DIFFER = 0.02
"""Relative standard deviation of leases from each other, scaled to the canary, as far as is known before."""

UNLIKE = 0.1
"""Relative difference of an operator's time in one carrier that can be the carrier's; the rest is the operator's."""

ITS_OWN = 4
"""How many times as much an operator's time varies from carrier to carrier, in variance, as that of all that a carrier
times."""

TICK_MS = 1e-3
"""What profilers count in, those of a table's oldest rows at least."""

MIN_VOICES = 3
"""How many equally certain operators must speak for a drift."""

USUAL_SPREAD = 0.05
"""That of an operator which was seen in too few carriers to tell."""

HEAVY_STRAYS = 0.02
"""Relative standard deviation of the heavy canary from networks of its size while nothing keeps the memory busy."""

FEELS = 4
"""How many times as much as the heavy canary, relatively, an operator feels a busy memory at most: those that read
weights fastest were seen to feel it three times as much."""

MOST_WAITS = 1 / 2
"""The largest share of a latency that is said to be what a busy memory adds."""

PATIENCE_S = 600.0
"""How long a lease may be disturbed. Waiting keeps what was timed, a refusal throws it away."""

UNSTEADY = 1 / 3
"""Share of the drift tolerance by which a device may change its speed while it is measured."""

SIGNIFICANT_DIGITS = 5
STOPS: tuple[Stop, ...] = ("confident", "settled", "max_runs", "max_seconds")
"""From the best reason to stop to the worst: a row carries the worst of its graphs."""


@dataclass
class _Graph:
    """A loaded graph and the node that times each key; no places: the whole graph is what is timed."""

    network: Network
    loaded: Loaded
    places: dict[int, str]
    key: str


def measure(
    backend: Backend, lease: Lease, progress: Callable[[str], None] = lambda text: None, *, count_energy: bool = True
) -> Report:  # fmt: skip
    """Measures what a lease asks for. Whatever goes wrong with an operator is a failure in the report.

    Results are refused (causes `load`, `hot`, `drift`) where other processes were too busy or the device too hot,
    or where a canary, or what the table knows, says that it was at another speed than the table's; there are none
    from a device that is gone (cause `unreachable`).
    """
    if lease.plan.context == "in_context" and isinstance(backend, Unprofiled):
        return failed(lease, "unsupported", backend.unprofiled)
    try:
        now = backend.target()
        if now != lease.target:  # since it was registered another tool was put there, or the clocks were set free
            raise Unreachable(f"it is now target {now.key}, the lease is for {lease.target.key}")
        return _measure(backend, lease, progress, count_energy)
    except Unreachable as error:
        return failed(lease, "unreachable", str(error))


def failed(lease: Lease, cause: Cause, message: str) -> Report:
    """The report of a lease from which nothing came."""
    failure = Failure(cause=cause, message=message[:MESSAGE_LENGTH])
    keys = [record.key for record in (*lease.operators, *lease.networks)]
    return Report(measurements=tuple(Measurement(key=key, failure=failure) for key in keys))


def _measure(backend: Backend, lease: Lease, progress: Callable[[str], None], count_energy: bool) -> Report:
    keys = [record.key for record in (*lease.operators, *lease.networks)]
    failures: dict[str, Failure] = {}
    began = time.perf_counter()
    canaries = load_canaries(backend)
    loaded = _load(backend, lease, failures, progress)
    heavy = {
        graph.key: share
        for graph in loaded if lease.plan.context != "isolated" and (share := heaviness(graph.network)) > 0
    }  # fmt: skip
    heavy_canaries = load_canaries(backend, heavy=True) if heavy else []
    twins = _load_twins(backend, loaded)
    progress(f"timing {len(loaded)} graphs")
    watch = backend.watch()
    sampled = sample(
        [*(graph.loaded.time for graph in loaded), *(twin.time for _, twin in twins)], canaries, lease.plan,
        lease.token, heavy_canaries=heavy_canaries, starts=backend.starts, patience_s=PATIENCE_S,
        slowest_ms=lease.canary_ms * (1 + lease.plan.drift_tolerance) if lease.canary_ms else inf,
        move=backend.move if isinstance(backend, Movable) else lambda: False,
    )  # fmt: skip
    seen, refusal = watch.read(lease.plan)

    graphs, timed = [], []
    for graph, record in zip(loaded, sampled.graphs[: len(loaded)], strict=True):
        if record.failure is None:
            graphs.append(graph)
            timed.append(record)
        else:
            failures |= _graph_failures(graph.network, graph.places, graph.key, lease, record.failure)
    now_ms = sampled.canary_ms(lease.plan.statistic)
    canary_ms = lease.canary_ms or now_ms
    slowness = now_ms / canary_ms
    heavy_now_ms = sampled.heavy_canary_ms(lease.plan.statistic) / slowness if heavy else None
    heavy_ms = lease.heavy_canary_ms or heavy_now_ms
    heavy_slowness = heavy_now_ms / heavy_ms if heavy_now_ms and heavy_ms else 1.0
    profiles = _profiles(graphs, failures)
    plain = [
        (graph, twin, record)
        for (graph, twin), record in zip(twins, sampled.graphs[len(loaded) :], strict=True) if record.failure is None
    ]  # fmt: skip
    profiler_ms = _profiler_cost(
        [(profiles[id(graph)], timed[graphs.index(graph)], record)
         for graph, _, record in plain if id(graph) in profiles],
        lease.plan,
    )  # fmt: skip
    part = _part(profiles.values(), lease.plan)
    samples = _samples(graphs, timed, profiles, slowness, profiler_ms, failures, part, lease.plan)
    if heavy and heavy_ms:
        samples = without_waits(samples, lease, heavy, _beyond(heavy_slowness - 1, HEAVY_STRAYS), heavy_ms)
    samples = _levelled(samples) if profiles else samples
    over_time = sampled.canary_over_time(lease.plan.statistic)
    refusal = refusal or _drift("the canary", slowness, lease.plan) or unsteady(over_time, lease.plan)
    refusal = refusal or _drift("the heavy canary", heavy_slowness, lease.plan)
    drifts, surely = _network_drifts(samples, lease) if lease.networks else _filler_drifts(samples, lease)
    if drifts:
        refusal = refusal or _drift("what the table knows", surely, lease.plan)
        samples = {key: [(_slower(one, drifts[key]), graph) for one, graph in each] for key, each in samples.items()}
    energies: dict[str, float] = {}
    counted: Evidence = {"absent": "the latencies are refused" if count_energy else "it was not asked for"}
    if refusal is None and count_energy:
        progress("counting energy")
        spare = {id(graph): twin for graph, twin, _ in plain}
        asked = [pair for pair in zip(graphs, timed, strict=True) if pair[0].places or pair[0].key in keys]
        energies, counted = _energies(backend, asked, profiles, spare, profiler_ms, lease.plan)
    stops: dict[str, Stop] = {}
    for graph, record in zip(graphs, timed, strict=True):
        stops[graph.key] = max(stops.get(graph.key, STOPS[0]), record.stop or "max_runs", key=STOPS.index)
    measured = {key: _measurement(key, found, stops, energies.get(key), part) for key, found in samples.items()}
    all_canaries = np.concatenate([times_ms for _, times_ms in sampled.looks])

    measurements = []
    for key in keys:
        if key in failures:
            measurements.append(Measurement(key=key, failure=failures[key]))
        elif refusal is not None:
            measurements.append(Measurement(key=key, failure=refusal))
        else:
            measurements.append(measured[key])
    facts: Evidence = {
        **seen,
        "runtime": f"{lease.target.runtime} {lease.target.runtime_version}",
        "threads": lease.target.threads,
        "cores": list(lease.target.cores),
        "canary_reference_ms": round(canary_ms, 6),
        "slowness": round(slowness, 4),
        "slowness_5_95": [round(float(q) / canary_ms, 4) for q in np.percentile(all_canaries, (5, 95))],
        "slowness_over_time": [round(part_ms / canary_ms, 4) for part_ms in over_time],
        "disturbed_s": round(sampled.disturbed_s, 3),
        "moves": sampled.moves,
        "profiler_cost_us": round(profiler_ms * 1e3, 4),
        "energy": counted,
        "graphs": len(loaded),
        "seconds": round(time.perf_counter() - began, 3),
        "seconds_in_kernels": round(sum(sum(record.times_ms) for record in timed) / 1e3, 3),
    }
    if ticks_ms := [profile.tick_ms for profile in profiles.values() if profile.tick_ms is not None]:
        facts["profiler_tick_us"] = round(max(ticks_ms) * 1e3, 4)
    if drifts:
        facts["known_drift"] = round(float(np.median(list(drifts.values()))), 4)
    if heavy and heavy_ms:
        facts["heavy_canary_reference_ms"] = round(heavy_ms, 6)
        facts["heavy_slowness"] = round(heavy_slowness, 4)
    believed = bool(timed) and refusal is None
    return Report(
        measurements=tuple(measurements), canary_ms=canary_ms if believed else None,
        heavy_canary_ms=heavy_ms if believed and heavy else None, evidence=facts,
    )  # fmt: skip


def load_canaries(backend: Backend, *, heavy: bool = False) -> list[Times]:
    """Sessions of the canary, or of the heavy one, warmed up: as many as a backend can keep, one where every start is
    dear.

    A device on which not even the canary runs, now or later, says nothing of any operator: Unreachable.
    """
    network = heavy_canary() if heavy else canary()
    name = "heavy canary" if heavy else "canary"
    sessions = HEAVY_CANARY_SESSIONS if heavy else CANARY_SESSIONS
    # As long as no operator was loaded none is at fault, whatever it is.
    nobodys = () if heavy else (RuntimeError, MemoryError, OSError)

    def load() -> Times:
        def run(runs: int) -> Sequence[float]:
            with _no_canary(name):
                return session.time(runs)

        with _no_canary(name, *nobodys):
            session = backend.load(network, profile=False)
            if not backend.starts:
                run(CANARY_WARMUP_RUNS)
        return run

    return [load() for _ in range(1 if backend.starts else sessions)]


@contextmanager
def _no_canary(name: str, *more: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (Unsupported, LoadFailed, *more) as error:  # type: ignore[misc]  # mypy does not unpack it
        raise Unreachable(f"the {name} does not run on it: {error}") from error


def _load(
    backend: Backend, lease: Lease, failures: dict[str, Failure], progress: Callable[[str], None]
) -> list[_Graph]:
    """Loads every graph of a lease. A graph that does not load fails the operators in it, not the lease."""
    plan = lease.plan
    wanted: Iterable[tuple[Network, dict[int, str]]]
    if plan.context == "in_context":
        seed = plan.seed + lease.token
        carriers = pack(
            lease.operators, lease.fillers, plan.carriers, plan.carrier_length, seed, lease.successions,
            lease.neighbours, lease.shortcuts, lease.mean_parameters,
        )  # fmt: skip
        wanted = [(carrier.network, carrier.places) for carrier in carriers]
    else:
        networks = lease.networks or tuple(Network.of(operator) for operator in lease.operators)
        sessions = min(1 if backend.starts else KNOWN_SESSIONS, plan.carriers)
        wanted = [(network, {}) for network in networks for _ in range(plan.carriers)]
        wanted += [(network, {}) for network in lease.known_networks for _ in range(sessions)]
    owners = {Network.of(operator).key: operator.key for operator in lease.operators}
    graphs = []
    for number, (network, places) in enumerate(wanted):
        progress(f"loading graph {number + 1}")
        key = owners.get(network.key, network.key)
        try:
            graphs.append(_Graph(network, backend.load(network, profile=bool(places)), places, key))
        except (Unsupported, LoadFailed) as error:
            failures |= _graph_failures(network, places, key, lease, error)
    gc.collect()
    return graphs


def _graph_failures(
    network: Network, places: dict[int, str], key: str, lease: Lease, error: Unsupported | LoadFailed
) -> dict[str, Failure]:
    """What a graph that does not run means for those that it was to time, by key."""
    # In a carrier any wanted operator may be at fault, or what stands beside it: each is tried again, at last alone,
    # before it is given up. Fillers have run before.
    asked = {operator.key for operator in (*lease.operators, *lease.neighbours)}
    alone = len(asked & {operator.key for operator in network.operators}) <= 1
    cause: Cause = error.cause if isinstance(error, LoadFailed) else "unsupported" if alone else "error"
    failure = Failure(cause=cause, message=str(error)[:MESSAGE_LENGTH])
    return dict.fromkeys(places.values() if places else [key], failure)


def _load_twins(backend: Backend, graphs: Sequence[_Graph]) -> list[tuple[_Graph, Loaded]]:
    """Some profiled carriers, those that have the least to do at each node, loaded once more without a profiler, which
    shows what profiling itself costs."""
    profiled = [graph for graph in graphs if graph.places and graph.loaded.profiler_runs]
    long = max((len(graph.network.nodes) for graph in profiled), default=0) / 2
    profiled = [graph for graph in profiled if len(graph.network.nodes) >= long]
    twins = []
    for graph in sorted(profiled, key=lambda graph: _elements_per_node(graph.network))[:TWINS]:
        with suppress(Unsupported, LoadFailed):  # the carrier itself tells what is wrong with it
            twins.append((graph, backend.load(graph.network, profile=False)))
    return twins


def _profiles(graphs: Sequence[_Graph], failures: dict[str, Failure]) -> dict[int, NodeTimes]:
    """The profile of every carrier, by the identity of the graph. One that cannot be read fails its operators."""
    profiles = {}
    for graph in graphs:
        if not graph.places:
            continue
        try:
            profiles[id(graph)] = graph.loaded.node_times()
        except Unsupported as error:
            failures.update(
                dict.fromkeys(graph.places.values(), Failure(cause="error", message=str(error)[:MESSAGE_LENGTH]))
            )
    return profiles


def _profiler_cost(twins: Sequence[tuple[NodeTimes, Timed, Timed]], plan: Plan) -> float:
    """What one entry of a profile costs, in ms, less what a runtime spends between two nodes.

    A profiler's entries include some of its own work, a whole run has work that no entry shows. Both go with the
    number of entries, so the difference between a profile's sum and the same graph's latency without a profiler,
    divided by the entries, makes profiles add up to latencies. It is seen best in fast graphs.
    """
    agreement = weight = 0.0
    for profile, timed, twin in twins:
        latency_ms, entries = statistic(twin.times_ms, plan.statistic), float(profile.events.sum())
        excess_ms = float(profile.total_ms[_counted(timed, plan)].sum(axis=1).mean()) - latency_ms
        # Sessions differ by a share of their latency: least squares over relative differences.
        agreement += entries * excess_ms / latency_ms**2
        weight += (entries / latency_ms) ** 2
    return agreement / weight if weight else 0.0


def _elements_per_node(network: Network) -> float:
    """Weights and elements of maps for each node: how slow a graph is beside what its profiler costs."""
    return (network.parameters + sum(prod(shape) for shape in network.shapes)) / len(network.nodes)


def _counted(timed: Timed, plan: Plan) -> NDArray[np.intp]:
    """The latencies of a graph that the statistic rests on, counted from its loading, as its profile has them."""
    return np.array(timed.positions)[chosen(timed.times_ms, plan.statistic)]


def _samples(
    graphs: Sequence[_Graph], timed: Sequence[Timed], profiles: dict[int, NodeTimes], slowness: float,
    profiler_ms: float, failures: dict[str, Failure], part: Part | None, plan: Plan,
) -> dict[str, list[tuple[Samples, str]]]:  # fmt: skip
    """The raw samples by key, one entry for each graph in which it was timed, with the graph's key."""
    found: dict[str, list[tuple[Samples, str]]] = defaultdict(list)
    for graph, record in zip(graphs, timed, strict=True):
        counted = chosen(record.times_ms, plan.statistic)
        if not graph.places:
            times_ms = np.array(record.times_ms)
            found[graph.key].append((_pack_samples(graph, record, times_ms, counted, slowness), graph.key))
            continue
        if id(graph) not in profiles:
            continue
        times = profiles[id(graph)]
        for node, key in graph.places.items():
            total = times.total_ms[record.positions, node]
            read = counted if part is None else chosen(total, part)
            # What takes less than a tick reads nothing in most runs, and a tick in some: their mean is right.
            read = read if total[read].any() else np.arange(len(total))
            if not total[read].any():
                message = f"the runtime's profile gives no time to this operator in carrier {graph.network.key}"
                failures[key] = Failure(cause="error", message=message)
                continue
            profiling_ms = float(times.events[node]) * profiler_ms
            layout_ms = float(times.layout_ms[np.array(record.positions)[read], node].mean())
            packed = _pack_samples(graph, record, total, read, slowness, layout_ms, profiling_ms)
            found[key].append((packed, graph.key))
    return found


def _part(profiles: Iterable[NodeTimes], plan: Plan) -> Part | None:
    """Which part of its own samples a figure is the mean of; None where a node's are those of the runs in which its
    carrier was fast.

    What disturbs a part of a run slows some nodes down and hardly shows in the whole: of nodes whose single runs can be
    put in order, since their profiler counts finely, each has its own fast runs.
    """
    if plan.context != "in_context":
        return plan.statistic
    fine = all(profile.tick_ms is not None and profile.tick_ms < TICK_MS for profile in profiles)
    return "second_fifth" if fine and plan.statistic == "fastest_fifth" else None


def _pack_samples(
    graph: _Graph, record: Timed, times_ms: NDArray[np.float64], counted: NDArray[np.intp], slowness: float,
    layout_ms: float = 0.0, profiling_ms: float = 0.0,
) -> Samples:  # fmt: skip
    return Samples(
        carrier=graph.network.key,
        samples_ms=tuple(float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in times_ms),
        visits=tuple(len(visit.times_ms) for visit in record.visits),
        counted=tuple(sorted(counted.tolist())),
        slowness=slowness,
        layout_ms=layout_ms,
        profiling_ms=profiling_ms,
    )


def _counted_ms(samples: Samples) -> NDArray[np.float64]:
    return np.array(samples.samples_ms)[list(samples.counted)]


def _value(samples: Samples) -> float:
    """The statistic at the reference speed, less what profiling cost; an operator is never faster than a tenth of
    what was read, as where the timer's ticks are coarser than the operator."""
    read_ms = float(_counted_ms(samples).mean())
    return max(read_ms - samples.profiling_ms, read_ms / 10) / samples.slowness


def _half_width(samples: Samples, part: Part | None) -> float:
    """Half the 95 % confidence interval, at the reference speed."""
    times_ms, ends = np.array(samples.samples_ms), np.cumsum(samples.visits[:-1])
    visits = np.split(times_ms, ends)
    if part is None:
        # The runs that count were chosen by the carrier's times: of this node's they are a sample of their own.
        counted = np.split(np.array(samples.counted), np.searchsorted(samples.counted, ends))
        visits = [times_ms[read] for read in counted if len(read)]
    return half_width(visits, part) / samples.slowness


def _energies(
    backend: Backend, graphs: Sequence[tuple[_Graph, Timed]], profiles: dict[int, NodeTimes],
    spare: dict[int, Loaded], profiler_ms: float, plan: Plan,
) -> tuple[dict[str, float], Evidence]:  # fmt: skip
    """Joules that one run adds, by key, and what they rest on; none, with the reason, where they cannot be had.

    A carrier's joules are shared among its nodes in proportion to their times; an operator's are the median over its
    carriers. Latencies stand whatever comes of it.
    """
    if not isinstance(backend, energy.Metered):
        return {}, {"absent": "this backend knows of nothing that counts energy"}

    def first(most: int) -> list[tuple[_Graph, Timed]]:
        """The graphs whose nodes have times, and so many sessions of each other one."""
        sessions: dict[str, int] = defaultdict(int)
        found = []
        for graph, record in graphs:
            sessions[graph.network.key] += 1
            if id(graph) in profiles or (not graph.places and sessions[graph.network.key] <= most):
                found.append((graph, record))
        return found

    try:
        counter = backend.counter()
        each = (first(most) for most in range(1 if backend.starts else ENERGY_SESSIONS, 0, -1))
        wanted = next((some for some in each if len(some) * counter.burst_s <= ENERGY_S), None)
        if wanted is None:
            raise energy.Absent(f"it would take over {ENERGY_S:.0f} s: fewer operators at a time (--max-operators)")
        if not wanted:
            raise energy.Absent("no graph could be measured")
        bursts = []
        for graph, record in wanted:
            loaded = graph.loaded
            if loaded.profiler_runs:  # what it does costs energy too
                loaded = spare.get(id(graph)) or backend.load(graph.network, profile=False)
                loaded.time(CANARY_WARMUP_RUNS)
            bursts.append(energy.Burst(loaded.time, float(np.median(record.times_ms))))
        counted = _count(backend, counter, bursts, plan)
    except (energy.Absent, Unsupported, LoadFailed, Unreachable, RuntimeError, MemoryError, OSError) as absent:
        return {}, {"absent": str(absent) or type(absent).__name__}
    found: dict[str, list[float]] = defaultdict(list)
    for (graph, record), joules in zip(wanted, counted.joules, strict=True):
        if not graph.places:
            found[graph.key].append(joules)
            continue
        profile = profiles[id(graph)]
        read_ms = profile.total_ms[_counted(record, plan)].mean(axis=0)
        times_ms = np.maximum(read_ms - profile.events * profiler_ms, read_ms / 10)
        for node, key in graph.places.items():
            found[key].append(joules * float(times_ms[node] / times_ms.sum()))
    # The middle of all, those below zero too: leaving them out first would make the rest too large.
    middles = {key: float(np.median(values)) for key, values in found.items()}
    return {key: joules for key, joules in middles.items() if joules > 0}, counted.evidence


def _count(backend: Backend, counter: energy.Counter, bursts: Sequence[energy.Burst], plan: Plan) -> energy.Energies:
    """The joules of bursts, run again where the device was not quiet. Raises Absent where it never is."""
    lack = energy.Absent()
    began = time.perf_counter()
    for number in range(ENERGY_TRIES):
        if number and time.perf_counter() - began > number * ENERGY_AGAIN_S:
            break
        watch = backend.watch()
        try:
            counted = energy.joules_per_run(counter, bursts, starts=backend.starts)
        except energy.Absent as absent:
            lack = absent
            continue
        _, disturbed = watch.read(plan)
        # After the bursts it stood still: that its clocks fell then says nothing.
        if disturbed is None or disturbed.cause == "drift":
            return counted
        lack = energy.Absent(disturbed.message)
    raise lack


def _measurement(
    key: str, found: list[tuple[Samples, str]], stops: dict[str, Stop], energy_j: float | None, part: Part | None
) -> Measurement:
    """The row of an operator or network: the middle of its graphs' statistics at the reference speed."""
    values = np.array([_value(samples) for samples, _ in found])
    latency_ms = statistic(values, "interquartile_mean")
    return Measurement(
        key=key,
        latency_ms=latency_ms,
        half_width_ms=float(np.median([_half_width(samples, part) for samples, _ in found])),
        spread=float(np.abs(values / latency_ms - 1).max()),
        energy_j=energy_j,
        stop=max((stops[graph] for _, graph in found), key=STOPS.index),
        samples=tuple(samples for samples, _ in found),
    )


def _drift(what: str, slowness: float, plan: Plan) -> Failure | None:
    if 1 / (1 + plan.drift_tolerance) <= slowness <= 1 + plan.drift_tolerance:
        return None
    message = (
        f"{what} took {slowness:.2f} times the reference, beyond the plan's drift_tolerance of "
        f"{plan.drift_tolerance}: the device is not at the speed of its table"
    )
    return Failure(cause="drift", message=message)


def unsteady(canary_ms: Sequence[float], plan: Plan) -> Failure | None:
    """Why a lease during which the device changed its speed is refused: graphs that were run before and after have
    their fastest runs from different times."""
    change = max(canary_ms) / min(canary_ms)
    if change <= 1 + UNSTEADY * plan.drift_tolerance:
        return None
    message = (
        f"the canary's time changed by a factor of {change:.2f} within the lease, beyond a third of the plan's "
        f"drift_tolerance of {plan.drift_tolerance}: the device did not keep its speed"
    )
    return Failure(cause="drift", message=message)


def _ratios(samples: dict[str, list[tuple[Samples, str]]], lease: Lease) -> dict[str, tuple[float, float]]:
    """Measured now over what the table says, and the relative spread between graphs, of what is known."""
    found = {}
    for key, known_ms in lease.known_ms.items():
        if key in samples:
            values = np.array([_value(one) for one, _ in samples[key]])
            spread = float(values.std(ddof=1) / values.mean()) if len(values) > 2 else USUAL_SPREAD
            found[key] = (statistic(values, "interquartile_mean") / known_ms, spread)
    return found


def _filler_drifts(samples: dict[str, list[tuple[Samples, str]]], lease: Lease) -> tuple[dict[str, float], float]:
    """How far this lease is from its table, the same for every operator, empty where too few are known; and how far it
    is at least.

    A canary shows how fast a device computes. How busy its memory is with other things it shows less well than
    operators like those that are measured.
    """
    known = _ratios(samples, lease)
    if len(known) < MIN_KNOWN:
        return {}, 1.0
    known_ms = np.array([lease.known_ms[key] for key in known])
    ratios, spreads = np.array(list(known.values())).T
    believed, surely = known_drift(ratios, spreads, known_ms)
    return dict.fromkeys(samples, believed), surely


def known_drift(
    ratios: NDArray[np.float64], spreads: NDArray[np.float64], known_ms: NDArray[np.float64]
) -> tuple[float, float]:  # fmt: skip
    """The drift that known operators show, from what each takes now over what the table says: as far as it is believed,
    and the end nearest to none of its confidence interval of about 95 %.

    The mean of the logarithms, those far from the middle drawn in: each by how well its carriers agree and by how many
    of a profiler's ticks it takes (what takes few reads the same at any speed). It is drawn towards none by its
    variance beside that of leases (the posterior mean of a normal prior): where it is uncertain the canary is the
    better guess. That prior is of leases at their table's speed and says nothing of others: whether a lease is one is
    asked of the interval. None where one operator would speak for all.
    """
    logs = np.log(ratios)
    weights = _weights(known_ms, spreads)
    weights /= weights.sum()
    share = float(weights @ weights)
    if share > 1 / MIN_VOICES:
        return 1.0, 1.0
    order = np.argsort(logs)
    middle = logs[order][np.searchsorted(np.cumsum(weights[order]), 0.5)]
    # The variance of a mean of what was drawn in: Tukey and McLaughlin (1963).
    near = float(weights[np.abs(logs - middle) <= STRAY].sum())
    logs = np.clip(logs, middle - STRAY, middle + STRAY)
    drift = float(weights @ logs)
    variance = float(weights @ (logs - drift) ** 2) * share / (1 - share) / near**2
    believed = drift * LEASES_DIFFER**2 / (LEASES_DIFFER**2 + variance)
    surely = np.copysign(max(0.0, abs(drift) - Z95 * sqrt(variance)), drift)
    return float(np.exp(believed)), float(np.exp(surely))


def _weights(latency_ms: ArrayLike, spread: ArrayLike = 0.0) -> NDArray[np.float64]:
    """How much latencies say of a speed, by how well their carriers agree and by how many ticks they take."""
    return 1 / ((CERTAIN + np.asarray(spread)) ** 2 + (TICK_MS / np.asarray(latency_ms)) ** 2)


def _network_drifts(samples: dict[str, list[tuple[Samples, str]]], lease: Lease) -> tuple[dict[str, float], float]:
    """How far this lease is from its table, for each whole network: by the known networks with about as many weights,
    since those that fit a device's caches hardly feel who else uses its memory; believed in full. And their median."""
    known = _ratios(samples, lease)
    if len(known) < MIN_KNOWN_NETWORKS:
        return {}, 1.0
    size = {network.key: np.log1p(network.parameters) for network in (*lease.networks, *lease.known_networks)}
    logs = np.log([ratio for ratio, _ in known.values()])
    logs = np.clip(logs, np.median(logs) - STRAY, np.median(logs) + STRAY)
    sizes = np.array([size[key] for key in known])
    drifts = {}
    for key in samples:
        weights = 1 / (1 + ((sizes - size[key]) / ALIKE) ** 2)
        drifts[key] = float(np.exp(weights @ logs / weights.sum()))
    return drifts, float(np.median(list(drifts.values())))


def without_waits(
    samples: dict[str, list[tuple[Samples, str]]], lease: Lease, heavy: Mapping[str, float], busy: float,
    heavy_ms: float,
) -> dict[str, list[tuple[Samples, str]]]:  # fmt: skip
    """The same samples, without what weights took longer because the memory was busy.

    `busy` is how much longer the heavy canary took, relatively, than its reference of `heavy_ms`; below zero, it was
    quieter, and samples are stated as at the reference too. `heavy` says how heavy graphs are, by key. In one as heavy
    as the canary each of an operator's or network's weights takes as much longer as each of the canary's.
    """
    records = (*lease.operators, *lease.fillers, *lease.networks, *lease.known_networks)
    weight_ms = {record.key: record.parameters * heavy_ms / heavy_canary().parameters for record in records}
    most = min(MOST_WAITS, FEELS * abs(busy))

    def rested(one: Samples, key: str, share: float) -> Samples:
        waits = share * busy * weight_ms[key] / _value(one)
        return _slower(one, 1 / (1 - float(np.clip(waits, -most, most))))

    return {
        key: [(rested(one, key, heavy.get(graph, 0.0)), graph) for one, graph in found]
        for key, found in samples.items()
    }


def _beyond(difference: float, strays: float) -> float:
    """What is left of a difference that may be chance, in the manner of James and Stein (1961)."""
    return difference * max(0.0, 1 - (strays / difference) ** 2) if difference else 0.0


def _levelled(samples: dict[str, list[tuple[Samples, str]]]) -> dict[str, list[tuple[Samples, str]]]:
    """The same samples, without what all that a carrier times has in common: as if it was as fast as the others."""
    levels = carrier_levels({key: {graph: _value(one) for one, graph in found} for key, found in samples.items()})
    return {key: [(_slower(one, levels[graph]), graph) for one, graph in found] for key, found in samples.items()}


def carrier_levels(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How slow each carrier is beside the others, 1 on average, from the latencies in ms of every operator in each.

    The mean of what its operators take there over what they take in the middle of their carriers, in logarithms, those
    far off drawn in, each by how many of a profiler's ticks it takes; drawn towards none where these say little. Which
    memory a runtime gave a carrier, and what else was in the caches then, slows down all of it; a mean over few
    carriers has that in it.
    """
    ratios: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for found in values.values():
        middle_ms = statistic(list(found.values()), "interquartile_mean")
        weight = float(_weights(middle_ms))
        for graph, value_ms in found.items():
            ratios[graph].append((np.log(value_ms / middle_ms), weight))
    levels = {}
    for graph, found_there in ratios.items():
        logs, weights = np.array(found_there).T
        level = float(np.average(np.clip(logs, -UNLIKE, UNLIKE), weights=weights))
        voices = float(weights.sum() ** 2 / (weights @ weights))
        levels[graph] = level * voices / (voices + ITS_OWN)
    if not levels:
        return {}
    common = fmean(levels.values())
    return {graph: float(np.exp(level - common)) for graph, level in levels.items()}


def _slower(samples: Samples, factor: float) -> Samples:
    """The same samples, said to be taken when what they are of was slower by a factor than they say."""
    return samples.model_copy(update={"slowness": samples.slowness * factor})
