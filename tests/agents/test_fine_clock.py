"""Profiles in nanoseconds: who gets the fine clock, who keeps the usual one, and what is done without it."""

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

from device_agents import backends, fine_clock
from device_agents.agent import Agent
from device_agents.backends import NodeTimes, Options, Unsupported
from lut_db.errors import InvalidInput
from lut_db.operators import Convolution, GlobalPool, Operator
from lut_db.plans import Plan
from lut_db.wire import Lease

ANY_LOAD, ANY_SPEED = 64, 50
OPERATORS: tuple[Operator, ...] = (
    Convolution(input=(1, 16, 28, 28), filters=16, kernel=(3, 3), padding=(1, 1, 1, 1), groups=16, activation="relu"),
    Convolution(input=(1, 16, 28, 28), filters=32, kernel=(1, 1), activation="relu"),
    GlobalPool(input=(1, 32, 7, 7)),
)  # fmt: skip
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


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    built = fine_clock._built()
    if isinstance(built, fine_clock._Lack):
        pytest.skip(f"no fine clock here: {built}")


@pytest.fixture
def _nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fine_clock._built.cache_clear()
    yield
    fine_clock._built.cache_clear()


def profile(name: str, settings: dict[str, str], environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROFILE, name, json.dumps(settings)], env=os.environ | environment, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_profile_is_in_nanoseconds(name: str, settings: dict[str, str]) -> None:
    backend = backends.create(name, Options(settings=settings))
    tick_ms, nodes_ms, latencies_ms, passed = profile(name, settings, backend.environment())
    assert tick_ms == pytest.approx(1e-6)
    whole = np.round(np.array(nodes_ms) * 1e3, 3) % 0.5 == 0
    assert whole.mean() < 0.1, "microseconds, or halves of them"
    shares = np.array(nodes_ms).sum(axis=1) / latencies_ms
    assert 0.1 < np.median(shares) <= 1, "the nodes are most of a run, and no more than it"
    assert passed[0] == pytest.approx(passed[1], abs=0.1), "the process keeps its clocks"
    assert sum(latencies_ms) / 1e3 < passed[1]


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
    assert fine == pytest.approx(usual, rel=0.5), "of one size, whatever else the machine does"


@pytest.mark.parametrize("name", ["cpu-onnxruntime", "cpu-litert"])
def test_a_lease_is_measured_with_it(name: str) -> None:
    options = Options()
    backend = backends.create(name, options)
    plan = Plan(
        carriers=2, carrier_length=6, warmup_runs=2, min_runs=10, max_runs=10, load_tolerance=ANY_LOAD,
        drift_tolerance=ANY_SPEED,
    )  # fmt: skip
    lease = Lease(token=1, device="here", target=backend.target(), plan=plan, operators=OPERATORS, expires_in_s=60)
    agent = Agent("http://127.0.0.1:1", "here", name, backend, options)
    report = agent._measure(lease, threading.Event())
    assert report is not None
    assert [row.failure for row in report.measurements] == [None] * len(OPERATORS)
    assert report.evidence["profiler_tick_us"] == pytest.approx(1e-3)
    read_ms = [value for row in report.measurements for samples in row.samples for value in samples.samples_ms]
    assert any(round(value * 1e3, 3) % 0.5 for value in read_ms)
    assert all(1e-5 < row.latency_ms < 10 for row in report.measurements if row.latency_ms is not None)


def test_what_is_preloaded_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(fine_clock._built())
    monkeypatch.setenv("LD_PRELOAD", "/some/other.so /and/another.so")
    once = fine_clock.environment(True)
    assert once == {"LD_PRELOAD": f"{path}:/some/other.so:/and/another.so"}
    monkeypatch.setenv("LD_PRELOAD", once["LD_PRELOAD"])
    assert fine_clock.environment(True) == once, "a command that starts itself again does so once"
    assert fine_clock.environment(False) == {}


@pytest.mark.usefixtures("_nothing_built")
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


@pytest.mark.usefixtures("_nothing_built")
def test_a_compiler_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc-that-fails"
    compiler.write_text("#!/bin/sh\necho 'time.h: no such file' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert not fine_clock.wanted({})
    assert "time.h: no such file" in fine_clock.check({}).found
    assert list((tmp_path / "latency-lab").iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("said", ["yes", "ON", ""])
def test_a_setting_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(InvalidInput, match="neither on nor off"):
        fine_clock.wanted({"fine_clock": said})


@pytest.mark.parametrize(
    ("told_ms", "tick_ms", "fits"),
    [(90.0, 1e-6, True), (120.0, 1e-6, False), (0.09, 1e-6, False), (120.0, 1e-3, False), (0.0, 1e-3, True)],
)
def test_a_profile_in_another_unit_is_refused(told_ms: float, tick_ms: float, fits: bool) -> None:
    """120 ms were never there; 0.09 ms are 90 in microseconds that were taken for nanoseconds. What takes less than a
    microsecond may tell nothing in microseconds."""
    total_ms = np.full((10, 2), told_ms / 20)
    times = NodeTimes(total_ms, np.zeros_like(total_ms), np.ones(2, dtype=np.int64), tick_ms)
    if fits:
        assert fine_clock.believed(times, 100.0) is times
    else:
        with pytest.raises(Unsupported, match="the profile tells"):
            fine_clock.believed(times, 100.0)
