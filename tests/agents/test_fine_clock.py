"""Kernels in nanoseconds: who gets the fine clock, who keeps the usual one, and what is done without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_measuring import ONE_OF_EACH

from device_agents import backends, fine_clock
from device_agents.agent import Agent
from device_agents.backends import NodeTimes, Options, Unsupported
from device_agents.child import Job
from lut_db.errors import InvalidInput
from lut_db.operators import Convolution, GlobalPool, Linear, Operator
from lut_db.plans import Plan
from lut_db.wire import Lease, Report

ANY_LOAD, ANY_SPEED = 64, 50
OPERATORS: tuple[Operator, ...] = (
    Convolution(input=(1, 16, 28, 28), filters=16, kernel=(3, 3), padding=(1, 1, 1, 1), groups=16, activation="relu"),
    Convolution(input=(1, 16, 28, 28), filters=32, kernel=(1, 1), activation="relu"),
    GlobalPool(input=(1, 32, 7, 7)),
)  # fmt: skip
TINY: tuple[Operator, ...] = (GlobalPool(input=(1, 1, 1, 1)), Linear(input=(1, 4), features=2))
"""A runtime takes a hundred times as long around these as in them."""
VARIANTS = [
    ("cpu-onnxruntime", {}), ("cpu-onnxruntime", {"precision": "int8"}), ("cpu-litert", {}),
    ("cpu-litert", {"xnnpack": "off"}), ("cpu-litert", {"precision": "int8"}),
]  # fmt: skip
PROFILE = """
import json, sys, time
from device_agents import backends
from device_agents.backends import Options
from lut_db.canary import canary

name, settings = sys.argv[1], json.loads(sys.argv[2])
session = backends.create(name, Options(settings=settings)).load(canary(), profile=True)
began = time.time(), time.monotonic()
latencies_ms = session.time(40)
passed = time.time() - began[0], time.monotonic() - began[1]
times = session.node_times()
print(json.dumps([times.tick_ms, times.total_ms[10:].tolist(), latencies_ms[10:], passed]))
"""


@pytest.fixture(scope="module")
def library() -> Path:
    built = fine_clock._built()
    if isinstance(built, fine_clock._Lack):
        pytest.skip(f"no fine clock here: {built.why}")
    return built


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fine_clock._built.cache_clear()
    yield tmp_path / "latency-lab"
    fine_clock._built.cache_clear()


def profile(name: str, settings: dict[str, str], environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROFILE, name, json.dumps(settings)], env=os.environ | environment, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_profile_is_in_nanoseconds(name: str, settings: dict[str, str]) -> None:
    backend = backends.create(name, Options(settings=settings))
    tick_ms, nodes_ms, latencies_ms, passed = profile(name, settings, backend.environment())
    assert tick_ms == pytest.approx(1e-6)
    whole = np.round(np.array(nodes_ms) * 1e3, 3) % 0.5 == 0
    assert whole.mean() < 0.1, "microseconds, or halves of them"
    shares = np.array(nodes_ms).sum(axis=1) / latencies_ms
    assert 0.1 < np.median(shares) <= 1, "the nodes are most of a run, and no more than it"
    assert passed[0] < 100 * passed[1], "the process keeps its clocks"
    assert passed[1] < 100 * passed[0]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["cpu-onnxruntime", "cpu-litert"])
def test_the_fine_clock_tells_what_the_usual_one_does(name: str) -> None:
    on, off = (
        profile(name, settings, backends.create(name, Options(settings=settings)).environment())
        for settings in ({"fine_clock": "on"}, {"fine_clock": "off"})
    )
    assert off[0] == pytest.approx(1e-3)
    halves = np.array(off[1]) * 2e3
    assert halves == pytest.approx(np.round(halves), abs=1e-6), "whole microseconds, to their middle"
    largest = np.argmax(np.median(on[1], axis=0))
    fine, usual = (np.median(found[1], axis=0)[largest] for found in (on, off))
    assert usual / 10 < fine < usual * 10, "of one size, whatever else the machine does"


MANY_SMALL = """
import json, sys
from dataclasses import replace
from device_agents import backends, fine_clock, ort_marks
from device_agents.backends import LoadFailed, Options
from lut_db.networks import NetworkBuilder
from lut_db.operators import Activate

build = NetworkBuilder()
tensor = build.input((1, 8, 1, 1))
for _ in range(64):
    for function in ("hard_swish", "relu"):
        tensor = build.add(Activate(input=(1, 8, 1, 1), activation=function), tensor)
network = build.network(tensor)
backend = backends.create("cpu-onnxruntime", Options(threads=int(sys.argv[1])))
session, other = (backend.load(network, profile=True) for _ in range(2))
latencies_ms = []
for _ in range(10):
    latencies_ms += session.time(10)
    other.time(1)
times = session.node_times()
refusals = []
found = session.marks
changed = (
    ("find_marks", lambda *_: replace(found, first=found.first[:9], kernels=found.kernels[:9])),
    ("ANY_OBJECTS", 9),
)
for name, value in changed:
    module = ort_marks if hasattr(ort_marks, name) else sys.modules["device_agents.backends.cpu_onnxruntime"]
    kept = getattr(module, name)
    setattr(module, name, value)
    fine_clock.Tracer._room = fine_clock.Tracer._room[:0]
    try:
        backend.load(network, profile=True)
    except LoadFailed as refused:
        assert refused.cause == "error"
        refusals.append(str(refused))
    setattr(module, name, kept)
print(json.dumps([times.total_ms.tolist(), latencies_ms, session.profiler_runs, refusals]))
"""


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_are_told_apart_without_a_profiler(threads: int) -> None:
    """Those that take a tenth of a microsecond too, where the profiler takes two or more."""
    environment = os.environ | backends.create("cpu-onnxruntime", Options()).environment()
    done = subprocess.run(
        [sys.executable, "-c", MANY_SMALL, str(threads)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    nodes_ms, latencies_ms, profiler_runs, refusals = json.loads(done.stdout)
    assert np.shape(nodes_ms) == (100, 128)
    assert np.min(nodes_ms) > 0
    assert np.all(np.sum(nodes_ms, axis=1) < latencies_ms)
    assert not profiler_runs
    assert "makes nothing at which n" in refusals[0]
    assert "more than the 9 that are traced" in refusals[1]


def ask(backend: backends.Backend, operators: tuple[Operator, ...]) -> Lease:
    plan = Plan(
        carriers=2, carrier_length=6, warmup_runs=2, min_runs=10, max_runs=10, load_tolerance=ANY_LOAD,
        drift_tolerance=ANY_SPEED,
    )  # fmt: skip
    return Lease(token=1, device="here", target=backend.target(), plan=plan, operators=operators, expires_in_s=60)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operators", [OPERATORS, TINY, ONE_OF_EACH], ids=["usual", "tiny", "one of each kind"])
@pytest.mark.parametrize(
    ("name", "precision"), [("cpu-onnxruntime", "fp32"), ("cpu-onnxruntime", "int8"), ("cpu-litert", "fp32")]
)
def test_a_lease_is_measured_with_it(name: str, precision: str, operators: tuple[Operator, ...], threads: int) -> None:
    options = Options(threads=threads, settings={"precision": precision})
    backend = backends.create(name, options)
    agent = Agent("http://127.0.0.1:1", "here", name, backend, options)
    report = agent._measure(ask(backend, operators), threading.Event())
    assert report is not None
    assert [row.failure for row in report.measurements] == [None] * len(operators)
    assert report.evidence["profiler_tick_us"] == pytest.approx(1e-3)
    read_ms = [value for row in report.measurements for samples in row.samples for value in samples.samples_ms]
    assert any(round(value * 1e3, 3) % 0.5 for value in read_ms)
    largest_ms = max(row.latency_ms for row in report.measurements if row.latency_ms is not None)
    assert 1e-5 < largest_ms < 100, "the smallest take less than the profiler does"


@pytest.mark.parametrize("name", ["cpu-onnxruntime", "cpu-litert"])
def test_on_is_on_or_nothing_is_measured(name: str, library: Path, tmp_path: Path) -> None:
    """A process that was started without the library, as where it was deleted since."""
    settings = {"fine_clock": "on", "precision": "fp32"}
    options = Options(settings=settings)
    job = Job(backend=name, options=options, lease=ask(backends.create(name, options), OPERATORS))
    (tmp_path / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "device_agents.child", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:  # it ends when its standard input does
        assert child.wait() == 0
    for row in Report.model_validate_json((tmp_path / "report.json").read_bytes()).measurements:
        assert row.failure is not None
        assert row.failure.cause == "unreachable"
        assert "set fine_clock=off" in row.failure.message


@pytest.mark.parametrize("name", ["cpu-onnxruntime", "cpu-litert"])
def test_off_is_off_wherever_it_was_started(name: str, library: Path) -> None:
    tick_ms, *_ = profile(name, {"fine_clock": "off"}, {"LD_PRELOAD": str(library)})
    assert tick_ms == pytest.approx(1e-3)


def test_what_is_preloaded_already_stays(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/some/other.so /and/another.so")
    once = fine_clock.environment({})
    assert once == {"LD_PRELOAD": f"{library}:/some/other.so:/and/another.so"}
    monkeypatch.setenv("LD_PRELOAD", once["LD_PRELOAD"])
    assert fine_clock.environment({}) == once, "a command that starts itself again does so once"
    assert fine_clock.environment({"fine_clock": "off"}) == {}


@pytest.mark.parametrize("content", [b"", b"\x7fELF", None], ids=["empty", "cut off", "half"])
def test_a_library_that_does_not_run_is_made_again(library: Path, cache: Path, content: bytes | None) -> None:
    cache.mkdir()
    broken = cache / library.name
    whole = library.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert fine_clock._built() == broken
    assert len(broken.read_bytes()) == len(whole)


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_profiles_are_in_microseconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    backend = backends.create("cpu-onnxruntime", Options())
    assert "LD_PRELOAD" not in backend.environment()
    assert "no C compiler" in fine_clock.check({}).found
    with pytest.raises(InvalidInput, match="no C compiler") as refused:
        backends.create("cpu-onnxruntime", Options(settings={"fine_clock": "on"}))
    assert refused.value.field == "settings.fine_clock"
    assert "apt install gcc" in str(refused.value.remedy)


@pytest.mark.parametrize(
    ("script", "told"),
    [("echo 'time.h: no such file' >&2; exit 1", "time.h: no such file"),
     ("while test $1 != -o; do shift; done; echo nonsense > $2", "does not run")],
)  # fmt: skip
def test_a_compiler_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, script: str, told: str
) -> None:
    compiler = tmp_path / "cc-that-fails"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", f"{compiler} -pipe")
    assert fine_clock.environment({}) == {}
    assert told in fine_clock.check({}).found
    assert list(cache.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("folder", ["two words", "a:b"])
def test_a_folder_that_cannot_be_preloaded_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, folder: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
    assert fine_clock.environment({}) == {}
    assert "XDG_CACHE_HOME" in fine_clock.check({}).found


@pytest.mark.parametrize("said", ["yes", "ON", ""])
def test_a_setting_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(InvalidInput, match="neither on nor off"):
        fine_clock.check_setting({"fine_clock": said})


@pytest.mark.parametrize(
    ("told_ms", "tick_ms", "read", "told"),
    [(90.0, 1e-6, 40, None), (0.01, 1e-6, 20, None), (120.0, 1e-6, 40, "120 ms of runs that took 100 ms"),
     (90.0, 1e-6, 19, "19 times for 20 entries"), (120.0, 1e-3, 0, "120 ms"), (0.0, 1e-3, 0, None)],
)  # fmt: skip
def test_a_profile_that_cannot_be_is_refused(told_ms: float, tick_ms: float, read: int, told: str | None) -> None:
    """Of ten runs of two entries, which took 100 ms with all that is around them."""
    clock = fine_clock.Clock("nothing", {"fine_clock": "off"})
    clock.tick_ms, clock.readings = tick_ms, read
    total_ms = np.full((10, 2), told_ms / 20)
    times = NodeTimes(total_ms, np.zeros_like(total_ms), np.ones(2, dtype=np.int64), tick_ms)
    if told is None:
        assert clock.believed(times, 100.0) is times
    else:
        with pytest.raises(Unsupported, match=told):
            clock.believed(times, 100.0)
