"""Every backend that is found measures every kind of operator, and fails as a value."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from gpus import gpu_backend
from phones import RunningPhone
from phones import phone as running_phone
from tables_kit import TARGET

from device_agents import backends
from device_agents.backends import LoadFailed, Options, Unprofiled, Unsupported
from device_agents.measuring import (
    HEAVY_STRAYS,
    MIN_KNOWN,
    MIN_KNOWN_NETWORKS,
    STRAY,
    UNLIKE,
    carrier_levels,
    known_drift,
    measure,
    without_waits,
)
from lut_db.canary import canary, heavy_canary
from lut_db.errors import InvalidInput
from lut_db.measurements import Samples
from lut_db.networks import Network
from lut_db.operators import (
    KINDS,
    Activate,
    Add,
    ChannelBypass,
    Convolution,
    GlobalPool,
    LayerNorm,
    Linear,
    MatMul,
    Operator,
    Pool,
    Rearrange,
    ResidualAdd,
    Softmax,
    SqueezeExcite,
    TransposedConvolution,
    Upsample,
    same_padding,
)
from lut_db.plans import Plan
from lut_db.wire import Lease

MAP = (1, 16, 14, 14)
TOKENS = (1, 49, 64)
HEADS = (2, 49, 32)
ONE_OF_EACH: tuple[Operator, ...] = (
    Convolution(input=MAP, filters=16, kernel=(3, 3), padding=same_padding(3), activation="hard_swish"),
    Convolution(input=MAP, filters=16, kernel=(1, 1), residual=True),
    ChannelBypass(input=MAP, filters=8, kernel=(3, 3), padding=same_padding(3), limit=12, activation="relu"),
    ChannelBypass(input=MAP, filters=0, kernel=(1, 1), stride=(2, 2)),
    SqueezeExcite(input=MAP, squeeze=8),
    ResidualAdd(input=MAP, shortcut_channels=24),
    Add(input=MAP),
    Pool(input=MAP, mode="average", kernel=(2, 2), stride=(2, 2)),
    Upsample(input=MAP, scale=2),
    Activate(input=MAP, activation="relu"),
    GlobalPool(input=MAP),
    Linear(input=(1, 16), features=32),
    Convolution(input=MAP, filters=16, kernel=(3, 3), dilation=(2, 2), padding=same_padding(3, 2), activation="gelu"),
    TransposedConvolution(input=MAP, filters=8, kernel=(4, 4), stride=(2, 2), padding=(1, 1, 1, 1)),
    Rearrange(input=MAP, mode="map_to_tokens"),
    Rearrange(input=TOKENS, mode="tokens_to_map", rows=7),
    LayerNorm(input=TOKENS),
    Linear(input=TOKENS, features=64),
    Linear(input=TOKENS, features=256, activation="gelu"),
    Rearrange(input=TOKENS, mode="split_heads", heads=2),
    MatMul(input=HEADS, columns=49, transposed=True, scaled=True),
    Softmax(input=(2, 49, 49)),
    MatMul(input=(2, 49, 49), columns=32),
    Rearrange(input=HEADS, mode="merge_heads", heads=2),
    Add(input=TOKENS),
    Activate(input=(1, 196, 256), activation="gelu"),  # in int8 the smaller one takes less than a tick of LiteRT's
    GlobalPool(input=TOKENS),
)
# Other tests may run beside these: what is tested is that figures come, not that they are quiet.
CALM = {"load_tolerance": 64.0, "drift_tolerance": 50.0}
ALL_RUNS = ("round_runs", "min_runs", "max_runs")
LIGHT = {"warmup_runs": 1, "round_runs": 2, "min_runs": 6, "max_runs": 6, **CALM}


VARIANTS: dict[str, tuple[dict[str, str], ...]] = {
    "cpu-onnxruntime": ({}, {"precision": "int8"}),
    "cpu-litert": ({}, {"precision": "int8"}, {"precision": "fp16"}),
    "cuda-torch": ({}, {"precision": "fp16"}),
    "cuda-onnxruntime": ({}, {"precision": "fp16"}),
    "android": (
        {"tool": "benchmark_model"}, {"tool": "benchmark_model", "precision": "int8"},
        {"tool": "benchmark_model", "precision": "fp16"}, {"tool": "onnxruntime_perf_test"},
        {"tool": "onnxruntime_perf_test", "precision": "int8"},
    ),
}  # fmt: skip
"""Settings to try a backend with; it is tried as it is where none are named."""
TRIED = [(name, settings) for name in backends.names() for settings in VARIANTS.get(name, ({},))]
IN_FP32 = pytest.mark.parametrize(
    "backend", [variant for variant in TRIED if "precision" not in variant[1]], indirect=True,
    ids=lambda variant: "-".join((variant[0], *variant[1].values())),
)  # fmt: skip
"""For what has nothing to do with the precision."""


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningPhone, Path]]:
    """A phone, and the folder of the key that it knows."""
    with running_phone() as running:
        yield running, tmp_path_factory.mktemp("keys")


@pytest.fixture(params=TRIED, ids=lambda variant: "-".join((variant[0], *variant[1].values())))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """Each backend; what needs a GPU or kernels of fp16 is skipped, with what is lacking, where there is none."""
    name, settings = request.param
    if name == "android":
        running, keys = request.getfixturevalue("phone")
        settings = {**settings, "devices": running.serial, "keys": str(keys)}
    try:
        return gpu_backend(name, settings, monkeypatch)
    except InvalidInput as refused:
        if settings.get("precision") != "fp16":
            raise
        pytest.skip(str(refused))


def light(backend: backends.Backend, **fields) -> Plan:
    """A plan of few runs; where every start of a tool is dear, and its timer coarse, of one round of more; in context
    where nodes have times."""
    rounds = dict.fromkeys(ALL_RUNS, 30) if backend.starts else {}
    context = {"context": "isolated"} if isinstance(backend, Unprofiled) else {}
    return Plan(**{**LIGHT, **rounds, **context, **fields})


def lease(backend: backends.Backend, plan: Plan, **fields) -> Lease:
    return Lease(token=1, device="here", target=backend.target(), plan=plan, expires_in_s=60, **fields)


@pytest.mark.parametrize("context", ["in_context", "isolated"])
def test_every_kind_is_measured(backend: backends.Backend, context: str) -> None:
    assert {operator.kind for operator in ONE_OF_EACH} == set(KINDS)
    assert backend.target().precision in ("fp32", "fp16", "int8")
    if context == "isolated" and backend.starts and backend.target().precision != "fp32":
        pytest.skip("every start of a tool is dear; a profile shows more")
    plan = light(backend, context=context, carriers=1 if backend.starts else 2)
    report = measure(backend, lease(backend, plan, operators=ONE_OF_EACH))
    assert [m.key for m in report.measurements] == [operator.key for operator in ONE_OF_EACH]
    if isinstance(backend, Unprofiled) and context == "in_context":
        whys = {(m.failure.cause, m.failure.message) for m in report.measurements if m.failure}
        assert whys == {("unsupported", backend.unprofiled)}
        assert all(m.failure for m in report.measurements)
        return
    for operator, measurement in zip(ONE_OF_EACH, report.measurements, strict=True):
        assert measurement.failure is None, (operator, measurement.failure)
        assert (measurement.latency_ms or 0) > 0
        assert len(measurement.samples) >= plan.carriers
        # A tool that tells only means tells one for each round.
        told = {plan.max_runs, plan.max_runs // plan.round_runs} if backend.starts else {plan.max_runs}
        assert all(len(found.samples_ms) in told for found in measurement.samples)
        if report.evidence.get("profiler_tick_us", 1.0) < 1.0:  # type: ignore[operator]
            for found in measurement.samples:
                fifth = -(-len(found.samples_ms) // 5)
                own = sorted(found.samples_ms)[fifth : 2 * fifth]
                assert sorted(found.samples_ms[number] for number in found.counted) == own, "of its own times"
    assert report.canary_ms is not None
    assert report.evidence["threads"] == 1
    assert report.evidence["cpu_model"]


def test_whole_networks_are_measured(backend: backends.Backend) -> None:
    plan = light(backend, context="whole", carriers=2)
    report = measure(backend, lease(backend, plan, networks=(canary(),), canary_ms=1.0))
    (measurement,) = report.measurements
    assert measurement.key == canary().key
    assert len(measurement.samples) == 2
    assert report.canary_ms == 1.0

    assert (measurement.latency_ms or 0) > 0


@IN_FP32
def test_known_operators_tie_a_lease_to_its_table(backend: backends.Backend) -> None:
    if isinstance(backend, Unprofiled):
        pytest.skip(f"there are no carriers to fill up: {backend.unprofiled}")
    wanted, *fillers = [
        Convolution(input=(1, 16, 28, 28), filters=16 + more, kernel=(3, 3), padding=(1, 1, 1, 1))
        for more in range(MIN_KNOWN + 2)
    ]
    plan = light(backend, carriers=1 if backend.starts else 2)
    before = measure(backend, lease(backend, plan, operators=(wanted, *fillers)))
    tenth_ms = {m.key: (m.latency_ms or 0) / 10 for m in before.measurements[1:]}
    asked = lease(backend, plan, operators=(wanted,), fillers=tuple(fillers), canary_ms=before.canary_ms)
    report = measure(backend, asked.model_copy(update={"known_ms": tenth_ms}))
    (measurement,) = report.measurements
    drift, slowness = report.evidence["known_drift"], report.evidence["slowness"]
    assert isinstance(drift, float)
    assert isinstance(slowness, float)
    assert 1 < drift < 100, "the table says a tenth of what they take"
    stated = [np.log(found.slowness) for found in measurement.samples]  # apart by what is each carrier's
    assert np.exp(np.mean(stated)) == pytest.approx(slowness * drift, rel=1e-3)
    assert np.ptp(stated) < 2 * UNLIKE
    few = dict(list(tenth_ms.items())[: MIN_KNOWN - 1])
    assert "known_drift" not in measure(backend, asked.model_copy(update={"known_ms": few})).evidence
    other = measure(backend, asked.model_copy(update={"known_ms": dict.fromkeys(tenth_ms, 1e-6)}))
    assert [m.failure.cause for m in other.measurements if m.failure] == ["drift"]


@IN_FP32
def test_what_a_busy_memory_adds_to_weights_is_left_out(
    backend: backends.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heavy canary is made to take a fifth longer than its reference: what is as heavy pays for as many weights as
    it has, what is light does not."""
    load = backend.load
    made_up_ms = {canary(): 1.0, heavy_canary(): 3.6}

    class Steady:
        profiler_runs = False

        def __init__(self, loaded: backends.Loaded, took_ms: float) -> None:
            self.loaded, self.took_ms = loaded, took_ms

        def time(self, runs: int) -> list[float]:
            return [self.took_ms] * len(self.loaded.time(runs))

    def loading(network: Network, *, profile: bool) -> backends.Loaded:
        loaded = load(network, profile=profile)
        return Steady(loaded, made_up_ms[network]) if network in made_up_ms else loaded  # type: ignore[return-value]

    monkeypatch.setattr(backend, "load", loading)
    plan = light(backend, context="whole", carriers=1)
    small = Network.of(ONE_OF_EACH[0])
    alone = measure(backend, lease(backend, plan, networks=(small,)))
    assert alone.heavy_canary_ms is None
    assert "heavy_slowness" not in alone.evidence
    first = measure(backend, lease(backend, plan, networks=(small, heavy_canary())))
    assert (first.canary_ms, first.heavy_canary_ms, first.evidence["heavy_slowness"]) == (1.0, 3.6, 1.0)
    asked = lease(backend, plan, networks=(small, heavy_canary()), canary_ms=1.0, heavy_canary_ms=3.0)
    report = measure(backend, asked)
    assert (report.heavy_canary_ms, report.evidence["heavy_slowness"]) == (3.0, 1.2)
    light_one, heavy_one = report.measurements
    assert [found.slowness for found in light_one.samples] == [1.0]
    busy = 0.2 * (1 - (HEAVY_STRAYS / 0.2) ** 2)
    assert heavy_one.latency_ms == pytest.approx(3.6 - busy * 3.0)
    strict = plan.model_copy(update={"drift_tolerance": 1.0})
    far = measure(backend, asked.model_copy(update={"plan": strict, "heavy_canary_ms": 1.2}))
    failure = far.measurements[0].failure
    assert failure is not None
    assert failure.cause == "drift"
    assert "the heavy canary" in failure.message
    assert far.heavy_canary_ms is None


def test_a_row_says_the_worst_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sessions of one network the first never repeats itself, the last always does."""
    backend = backends.create("cpu-onnxruntime", Options())
    load, sessions = backend.load, 0

    class Told:
        profiler_runs = False

        def __init__(self, times_ms: Iterator[float]) -> None:
            self.times_ms = times_ms

        def time(self, runs: int) -> list[float]:
            return [next(self.times_ms) for _ in range(runs)]

    def loading(network: Network, *, profile: bool) -> backends.Loaded:
        nonlocal sessions
        if network == canary():
            return load(network, profile=profile)
        sessions += 1
        return Told(cycle((1.0, 3.0, 2.0) if sessions == 1 else (1.0,)))  # type: ignore[return-value]

    monkeypatch.setattr(backend, "load", loading)
    plan = light(backend, context="whole", carriers=2, max_runs=12, statistic="median")
    (measurement,) = measure(backend, lease(backend, plan, networks=(Network.of(ONE_OF_EACH[0]),))).measurements
    assert sessions == 2
    assert measurement.stop == "max_runs"


def test_what_waits_are_taken_off() -> None:
    wide, none = Linear(input=(1, 1024), features=1024), Activate(input=MAP, activation="relu")
    asked = Lease(token=1, device="here", target=TARGET, plan=Plan(), operators=(wide, none), expires_in_s=60)
    one = Samples(carrier="c", samples_ms=(0.4, 0.5), counted=(0,), slowness=2.0, profiling_ms=0.1)
    samples = {wide.key: [(one, "heavy"), (one, "half"), (one, "light")], none.key: [(one, "heavy")]}

    def latencies(busy: float) -> list[float]:
        """Of the wide operator in graphs of three weights, and of the one without weights; 0.15 ms as they are."""
        rested = without_waits(samples, asked, {"heavy": 1.0, "half": 0.5}, busy, heavy_ms=1.0)
        return [0.3 / found.slowness for found, _ in (*rested[wide.key], *rested[none.key])]

    waits_ms = 0.1 * wide.parameters / heavy_canary().parameters
    assert latencies(0.1) == pytest.approx([0.15 - waits_ms, 0.15 - waits_ms / 2, 0.15, 0.15])
    assert latencies(-0.1) == pytest.approx([0.15 + waits_ms, 0.15 + waits_ms / 2, 0.15, 0.15]), "it was quieter"
    assert latencies(0.0) == pytest.approx([0.15] * 4)
    samples = {wide.key: [(one.model_copy(update={"samples_ms": (0.11, 0.5)}), "heavy")], none.key: [(one, "heavy")]}
    for busy, most in ((0.05, 0.2), (-0.05, -0.2), (0.3, 0.5)):
        (rested, _), *_ = without_waits(samples, asked, {"heavy": 1.0}, busy, heavy_ms=1.0)[wide.key]
        assert 0.011 / rested.slowness == pytest.approx(0.011 / 2 * (1 - most)), "a tenth of what was read, at least"


def test_a_drift_is_believed_as_far_as_it_is_certain() -> None:
    def found(*known: tuple[float, float, float]) -> tuple[float, float]:
        """Of ratio, spread, and microseconds of each."""
        ratios, spreads, known_us = np.array(known).T
        return known_drift(ratios, spreads, known_us / 1e3)

    def drift(*known: tuple[float, float, float]) -> float:
        return found(*known)[0]

    slower = [(1.08, 0.01, 20.0), (1.09, 0.02, 30.0), (1.07, 0.01, 50.0), (1.08, 0.02, 15.0)]
    assert drift(*slower) == pytest.approx(1.08, abs=0.01)
    assert drift(*slower) < drift(*slower * 6) == pytest.approx(1.08, abs=0.005), "more say it with more certainty"
    ticks = [(0.9, 0.0, 0.6)] * 20
    assert drift(*slower, *ticks) == pytest.approx(1.08, abs=0.01), "one tick reads the same at any speed"
    assert drift(*slower * 2, (3.0, 0.01, 20.0)) == pytest.approx(1.08, abs=0.02), "one that strays does not lead"
    scattered = [(0.96, 0.05, 20.0), (1.06, 0.05, 20.0), (0.98, 0.05, 30.0), (1.03, 0.05, 10.0)]
    assert drift(*scattered) == pytest.approx(1, abs=0.005), "the canary is the better guess"
    assert drift(*[(1.0, 0.0, 20.0)] * 8) == 1
    assert drift(*[(2.0, 0.0, 20.0)] * 8) == pytest.approx(2)
    assert drift((1.08, 0.0, 50.0), *[(1.0, 0.0, 0.6)] * 23) == 1, "none speaks for all"
    apart = np.random.default_rng(0).normal(0, 0.2, (200, 24))
    believed = [abs(np.log(drift(*((float(np.exp(log)), 0.01, 20.0) for log in logs)))) for logs in apart]
    means = [abs(float(np.median(logs))) for logs in apart]
    assert np.mean(believed) < np.mean(means) / 2, "what is far apart is uncertain, drawn in or not"
    surely = np.log([found(*((float(np.exp(log)), 0.01, 20.0) for log in logs))[1] for logs in apart])
    assert np.mean(surely == 0) > 0.8, "there is none"
    assert found(*scattered)[1] == 1
    far = [(1e4 * ratio, spread, took_us) for ratio, spread, took_us in scattered * 3]
    assert drift(*far) < 1e3 < found(*far)[1], "little is believed, and it is far from its table all the same"
    near = [(1 / ratio / 1e4, spread, took_us) for ratio, spread, took_us in scattered * 3]
    assert found(*near)[1] < 1e-3


def test_what_is_common_to_a_carrier_is_told_from_its_operators() -> None:
    rng = np.random.default_rng(0)
    graphs = [f"carrier {number}" for number in range(12)]
    slow = dict(zip(graphs, np.exp(rng.normal(0, 0.03, len(graphs))), strict=True))
    operators_ms = np.exp(rng.normal(-4, 1, 32))

    def latencies(noise: float) -> list[dict[str, float]]:
        return [
            {graph: float(ms * slow[graph] * np.exp(rng.normal(0, noise))) for graph in rng.choice(graphs, 6, False)}
            for ms in operators_ms
        ]

    def off(found: list[dict[str, float]], levels: dict[str, float]) -> float:
        rows = [np.mean([ms / levels.get(graph, 1.0) for graph, ms in each.items()]) for each in found]
        return float(np.std(np.log(rows / operators_ms)))

    for noise, share in ((0.0, 0.6), (0.01, 0.9)):
        found = latencies(noise)
        levels = carrier_levels({str(number): each for number, each in enumerate(found)})
        assert np.mean(np.log(list(levels.values()))) == pytest.approx(0, abs=1e-12)
        assert off(found, levels) < share * off(found, {})
    strays = {str(number): each for number, each in enumerate(latencies(0.0))}
    strays["0"] = {graph: ms * (9 if number == 0 else 1) for number, (graph, ms) in enumerate(strays["0"].items())}
    assert max(carrier_levels(strays).values()) < 1.1, "one that strays is not its carrier's"
    assert carrier_levels({}) == {}
    alone = {"a": 1.0, "b": 1.04, "c": 0.98}
    assert all(abs(level - 1) < 0.01 for level in carrier_levels({"operator": alone}).values()), "its own"


@IN_FP32
def test_known_networks_tie_whole_networks_to_their_table(backend: backends.Backend) -> None:
    plan = light(backend, context="whole", carriers=1)
    wanted, *known = (Network.of(operator) for operator in ONE_OF_EACH[: MIN_KNOWN_NETWORKS + 1])
    before = measure(backend, lease(backend, plan, networks=(wanted, *known)))
    half_ms = {m.key: (m.latency_ms or 0) / 2 for m in before.measurements[1:]}
    asked = lease(
        backend, plan, networks=(wanted,), known_networks=tuple(known), known_ms=half_ms, canary_ms=before.canary_ms
    )
    report = measure(backend, asked)
    (measurement,) = report.measurements
    drift, slowness = report.evidence["known_drift"], report.evidence["slowness"]
    assert isinstance(drift, float)
    assert isinstance(slowness, float)
    assert 1 < drift < 10, "the table says half of what they take"
    assert all(found.slowness == pytest.approx(slowness * drift, rel=0.01 + 2 * STRAY) for found in measurement.samples)
    few = dict(list(half_ms.items())[: MIN_KNOWN_NETWORKS - 1])
    assert "known_drift" not in measure(backend, asked.model_copy(update={"known_ms": few})).evidence


@IN_FP32
def test_a_busy_machine_is_refused(backend: backends.Backend) -> None:
    if backend.starts:
        pytest.skip("what else runs on a phone is not known; its heat and its canary are")
    if backend.target().runtime == "torch":
        pytest.skip("the host has no part in a graph that is replayed on a GPU")
    plan = light(backend, load_tolerance=1e-9, max_runs=40, min_runs=40)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            busy = measure(backend, lease(backend, plan, operators=ONE_OF_EACH))
        finally:
            other.kill()
    assert {m.failure.cause for m in busy.measurements if m.failure} == {"load"}
    assert busy.canary_ms is None


@IN_FP32
def test_another_speed_is_refused(backend: backends.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agents.measuring.PATIENCE_S", 1.0)
    plan = light(backend, drift_tolerance=0.5, carriers=1)
    report = measure(backend, lease(backend, plan, operators=ONE_OF_EACH[:1], canary_ms=1e-3))
    assert [m.failure.cause for m in report.measurements if m.failure] == ["drift"]
    assert "reference" in (report.measurements[0].failure.message if report.measurements[0].failure else "")
    disturbed_s = report.evidence["disturbed_s"]
    assert isinstance(disturbed_s, float)
    assert disturbed_s >= 1.0, "it was waited for"


@IN_FP32
def test_a_speed_that_changes_in_a_lease_is_refused(backend: backends.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that were run before the change would have their fastest runs from then, others would not."""
    looks, runs = (5, 60) if backend.starts else (20, 120)
    calls = 0
    load = backend.load

    class Slowed:
        def __init__(self, loaded: backends.Loaded) -> None:
            self.loaded = loaded

        def time(self, runs: int) -> list[float]:
            nonlocal calls
            calls += 1
            return [ms * (1.0 if calls < looks else 1.2) for ms in np.full(len(self.loaded.time(runs)), 2.0)]

    def loading(network: Network, *, profile: bool) -> backends.Loaded:
        loaded = load(network, profile=profile)
        return Slowed(loaded) if network == canary() else loaded  # type: ignore[return-value]

    monkeypatch.setattr(backend, "load", loading)
    monkeypatch.setattr("device_agents.measuring.PATIENCE_S", 0.0)
    monkeypatch.setattr("device_agents.sampling.LOOK_S", 0.0)
    monkeypatch.setattr("device_agents.sampling.LATENCIES_OF_A_PART", 5)  # benchmark_model tells one at each start
    plan = light(backend, context="isolated", carriers=1, max_runs=runs, min_runs=runs, round_runs=6)
    asked = lease(backend, plan.model_copy(update={"drift_tolerance": 0.3}), operators=ONE_OF_EACH[:1])
    report = measure(backend, asked)
    assert [m.failure.cause for m in report.measurements if m.failure] == ["drift"]
    assert "within the lease" in str(report.measurements[0].failure)
    looks = 10**6
    calls = 0
    assert measure(backend, asked).measurements[0].failure is None


class Failing:
    """What was loaded, and does not run."""

    profiler_runs = False

    def time(self, runs: int) -> list[float]:
        raise LoadFailed("crashed", "signal 11")

    def node_times(self) -> backends.NodeTimes:
        raise AssertionError("nothing was profiled")


def refused() -> Failing:
    raise Unsupported("no such thing here")


def crashed() -> Failing:
    raise LoadFailed("crashed", "signal 11")


@pytest.mark.parametrize(
    ("load_bad", "cause"), [(refused, "unsupported"), (crashed, "crashed"), (Failing, "crashed")],
    ids=["does not load", "crashes its runtime", "fails while it is timed"],
)  # fmt: skip
def test_what_fails_is_a_failure_and_the_rest_is_measured(
    backend: backends.Backend, monkeypatch: pytest.MonkeyPatch, load_bad: Callable[[], backends.Loaded], cause: str
) -> None:
    bad, good = ONE_OF_EACH[0], ONE_OF_EACH[4]
    load = backend.load

    def loading(network: Network, *, profile: bool) -> backends.Loaded:
        return load_bad() if bad in network.operators else load(network, profile=profile)

    monkeypatch.setattr(backend, "load", loading)
    plan = light(backend, context="isolated", carriers=1)
    report = measure(backend, lease(backend, plan, operators=(bad, good)))
    assert report.measurements[0].failure is not None
    assert report.measurements[0].failure.cause == cause
    assert report.measurements[1].latency_ms is not None


@pytest.mark.parametrize(
    "error",
    [Unsupported("no such thing"), LoadFailed("crashed", "signal 11"), RuntimeError("no CUDA"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_a_device_that_cannot_run_the_canary_says_nothing_of_operators(
    backend: backends.Backend, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(network: Network, *, profile: bool) -> backends.Loaded:
        raise error

    monkeypatch.setattr(backend, "load", broken)
    report = measure(backend, lease(backend, light(backend), operators=ONE_OF_EACH[:2]))
    assert [m.failure.cause for m in report.measurements if m.failure] == ["unreachable"] * 2
    assert report.canary_ms is None


def test_a_profile_adds_up_over_the_nodes(backend: backends.Backend) -> None:
    if isinstance(backend, Unprofiled):
        with pytest.raises(Unsupported, match="profile"):
            backend.load(canary(), profile=True)
        return
    loaded = backend.load(canary(), profile=True)
    told = len(loaded.time(4))
    assert told == 4 or (told == 1 and backend.starts)
    times = loaded.node_times()
    assert times.total_ms.shape == times.layout_ms.shape == (told, len(canary().nodes))
    assert np.all(times.layout_ms <= times.total_ms)
    assert np.all(times.total_ms.sum(axis=0) > 0)
    assert times.events.shape == (len(canary().nodes),)


def test_what_takes_less_than_a_tick_is_read_from_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.create("cpu-onnxruntime", Options())
    short = ONE_OF_EACH[0]

    class Ticking:
        """Each run is slower than the one before, and only the last one sees a tick go by in one operator."""

        profiler_runs = True

        def __init__(self, network: Network) -> None:
            self.nodes = [node.operator.key for node in network.nodes]
            self.runs = 0

        def time(self, runs: int) -> list[float]:
            self.runs += runs
            return [1.0 + number / 100 for number in range(self.runs - runs, self.runs)]

        def node_times(self) -> backends.NodeTimes:
            total_ms = np.full((self.runs, len(self.nodes)), 0.01)
            total_ms[:-1, [key == short.key for key in self.nodes]] = 0.0
            events = np.zeros(len(self.nodes), dtype=np.int64)
            return backends.NodeTimes(total_ms, np.zeros_like(total_ms), events)

    monkeypatch.setattr(backend, "load", lambda network, *, profile: Ticking(network))
    plan = light(backend, max_runs=10, min_runs=10)
    read, other = measure(backend, lease(backend, plan, operators=(short, ONE_OF_EACH[7]))).measurements
    assert read.latency_ms == pytest.approx(0.01 / 10, rel=0.01)
    assert other.latency_ms == pytest.approx(0.01, rel=0.01)


def test_what_has_become_another_target_is_not_measured(backend: backends.Backend) -> None:
    asked = lease(backend, light(backend), operators=ONE_OF_EACH[:1])
    other = asked.target.model_copy(update={"runtime_version": "another"})
    report = measure(backend, asked.model_copy(update={"target": other}))
    (measurement,) = report.measurements
    assert measurement.failure is not None
    assert measurement.failure.cause == "unreachable"
    assert other.key in measurement.failure.message


@pytest.mark.parametrize("name", ["cpu-onnxruntime", "cpu-litert"])
def test_a_precision_is_part_of_the_target(name: str) -> None:
    plain, fp32, int8 = (
        backends.create(name, Options(settings=settings)).target()
        for settings in ({}, {"precision": "fp32"}, {"precision": "int8"})
    )
    assert plain.key == fp32.key != int8.key
    others = {"bypass": "concat"} if name == "cpu-onnxruntime" else {}
    assert int8 == plain.model_copy(update={"precision": "int8", "options": plain.options | others})


def test_a_backend_that_does_not_exist() -> None:
    with pytest.raises(InvalidInput, match="cpu-onnxruntime"):
        backends.create("abacus", Options())
    with pytest.raises(InvalidInput, match="no precision"):
        backends.create("cpu-onnxruntime", Options(settings={"precision": "fp8"}))
    with pytest.raises(InvalidInput, match="fp16 with cpu-litert"):
        backends.create("cpu-onnxruntime", Options(settings={"precision": "fp16"}))
    with pytest.raises(InvalidInput, match="fp32 kernels"):
        backends.create("cpu-onnxruntime", Options(settings={"precision": "int8", "graph_optimization": "basic"}))
    with pytest.raises(InvalidInput, match="lose bits"):
        backends.create("cpu-onnxruntime", Options(settings={"precision": "int8", "bypass": "sum"}))
    with pytest.raises(InvalidInput, match="graph_optimization"):
        backends.create("cpu-onnxruntime", Options(settings={"colour": "red"}))
