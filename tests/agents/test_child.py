"""The process that measures has limits, and whatever ends it is told as a failure."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningServer

from device_agents import backends
from device_agents.agent import Agent, Stopped, _tail, _why
from device_agents.backends import Options
from device_agents.child import Job
from lut_db.operators import Convolution, Linear, Operator
from lut_db.plans import Plan
from lut_db.wire import API, Lease, LookupRequest, PinRequest, Report

LIGHT: dict[str, Any] = {
    "carriers": 1, "warmup_runs": 1, "round_runs": 2, "min_runs": 4, "max_runs": 4, "load_tolerance": 64,
    "drift_tolerance": 50,
}  # fmt: skip
BACKEND = "cpu-onnxruntime"
ENOUGH_BYTES = 1 << 30
SMALL = Convolution(input=(1, 4, 8, 8), filters=4, kernel=(1, 1))
SLOW = Convolution(input=(1, 32, 64, 64), filters=32, kernel=(3, 3))
HUGE = Linear(input=(1, 1 << 16), features=1 << 12)


def ask(*operators: Operator, **plan: Any) -> Lease:
    target = backends.create(BACKEND, Options()).target()
    return Lease(
        token=1, device="here", target=target, plan=Plan(**{**LIGHT, **plan}), operators=operators, expires_in_s=60
    )


@pytest.mark.parametrize("context", ["in_context", "isolated"])
def test_an_operator_that_does_not_fit_is_out_of_memory(tmp_path: Path, context: str) -> None:
    job = Job(backend=BACKEND, options=Options(), lease=ask(SMALL, HUGE, context=context))
    (tmp_path / "job.json").write_text(job.model_dump_json())
    with (tmp_path / "log").open("w") as log, subprocess.Popen(
        [sys.executable, "-m", "device_agents.child", str(tmp_path)], stdin=subprocess.PIPE, stdout=log, stderr=log,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (ENOUGH_BYTES, ENOUGH_BYTES)),
    ) as child:  # fmt: skip
        child.wait()
    cause, message = _why(child.returncode, _tail(tmp_path))
    assert cause == "out_of_memory", message
    assert not (tmp_path / "report.json").exists()


def test_the_limits_of_a_child() -> None:
    code = (
        "import os, resource, tempfile; from device_agents import child; child.MEMORY_SHARE = 1e-9\n"
        "child.MAX_FILE_BYTES = 1000; child._limit()\n"
        "print([resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)], flush=True)\n"
        "try:\n    tempfile.TemporaryFile(buffering=0).write(bytes(2000)) == 2000 or print('cut', flush=True)\n"
        "except OSError as error: print(error)\n"
        "try:\n    bytearray(1 << 28)\nexcept MemoryError: print('no memory')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[1000, 0]", "cut", "no memory"]


def test_cores_that_are_taken_away_are_nothing_of_the_operators(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    job = Job(backend=BACKEND, options=Options(cores=(core, 4096)), lease=ask(SMALL))
    (tmp_path / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "device_agents.child", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:  # it ends when its standard input does
        assert child.wait() == 0
    (measurement,) = Report.model_validate_json((tmp_path / "report.json").read_bytes()).measurements
    assert measurement.failure is not None
    assert measurement.failure.cause == "unreachable"
    assert f"only use [{core}]" in measurement.failure.message


def test_a_backend_that_cannot_be_made_any_more_is_nothing_of_the_operators(tmp_path: Path) -> None:
    job = Job(backend="cuda-torch", options=Options(settings={"gpu": "4096"}), lease=ask(SMALL))
    (tmp_path / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "device_agents.child", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.wait() == 0
    (measurement,) = Report.model_validate_json((tmp_path / "report.json").read_bytes()).measurements
    assert measurement.failure is not None
    assert measurement.failure.cause == "unreachable"


def test_what_was_measured_is_told_even_by_an_agent_that_ends(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to stop while the service does not answer, which it does a moment later."""
    options = Options()
    agent = Agent(server.url, "here", BACKEND, backends.create(BACKEND, options), options)
    with httpx.Client(base_url=server.url + API) as http:
        agent._register(http, agent.backend.target())
        pin = PinRequest(target=agent.backend.target().key, plan=Plan(**LIGHT))
        number = http.post("/pins", json=pin.model_dump(mode="json")).json()["id"]
        lookup = LookupRequest(operators={SMALL.key: SMALL}, networks=((SMALL.key,),))
        assert http.post(f"/pins/{number}/lookup", json=lookup.model_dump(mode="json")).is_success
        lease = agent._ask(http, agent.backend.target())
        assert lease is not None

        def silent(*_: object, **__: object) -> None:
            agent.stop()
            raise Stopped

        monkeypatch.setattr(agent, "_request", silent)
        with pytest.raises(Stopped):
            agent._serve(http, lease)
        rows = http.get(f"/targets/{agent.backend.target().key}/rows").json()["rows"]
    assert [(row["key"], row["status"]) for row in rows] == [(SMALL.key, "measured")]


def test_what_takes_too_long_is_ended() -> None:
    options = Options()
    agent = Agent("http://127.0.0.1:1", "here", BACKEND, backends.create(BACKEND, options), options, lease_limit_s=1.0)
    long = {"min_runs": 100_000, "settle_runs": 100_000, "max_runs": 100_000, "max_seconds": 3600}
    report = agent._measure(ask(SLOW, **long), threading.Event())
    assert report is not None
    (measurement,) = report.measurements
    assert measurement.failure is not None
    assert measurement.failure.cause == "timed_out"
