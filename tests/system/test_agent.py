"""Agents and servers that die while a lease is measured: every operator still ends with exactly one row."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from processes import PLAN, Processes, child_of, kill, operators, wait_until

from lut_db.wire import DeviceState

OPERATORS = operators(6)
KILLER = next(iter(OPERATORS))
ABORTS = """
import os, sys
if "device_agents.child" in sys.orig_argv:
    from device_agents.backends import cpu_onnxruntime as backend
    load = backend.CpuOnnxruntime.load
    def aborting(self, model, *, profile):
        if any(operator.key == os.environ["KILLER"] for operator in model.operators):
            os.abort()
        return load(self, model, profile=profile)
    backend.CpuOnnxruntime.load = aborting
"""
"""A runtime that takes its process down with it when it is given one of the operators."""


def test_the_lease_of_a_killed_agent_expires_and_another_one_measures(tmp_path: Path) -> None:
    with Processes(tmp_path, PROFILER_LEASE_S="2") as lab:
        lab.start_server()
        agent = lab.start_agent("first")
        lab.ask(lab.open_pin(), OPERATORS)
        child = child_of(agent)
        kill(agent)
        wait_until(lambda: not child.is_running(), "the measuring process ends with its agent")
        assert not lab.rows()
        lab.start_agent("second")
        lab.wait_for_rows(OPERATORS)
        lost, *later = lab.leases()
        assert (lost.device, lost.state) == ("first", "expired")
        assert {(lease.device, lease.state) for lease in later} == {("second", "reported")}


def test_a_killed_measuring_process_costs_its_lease_and_not_the_agent(tmp_path: Path) -> None:
    with Processes(tmp_path) as lab:
        lab.start_server()
        agent = lab.start_agent()
        lab.ask(lab.open_pin(), OPERATORS)
        child_of(agent).kill()
        lab.wait_for_rows(OPERATORS)
        assert agent.poll() is None
        first, *later = lab.leases()
        assert (first.state, first.rows, first.requeued) == ("reported", 0, len(OPERATORS))
        assert sum(lease.rows for lease in later) == len(OPERATORS)
        assert "crashed: the measuring process was ended by SIGKILL" in lab.log("bench")


def test_a_report_that_the_service_does_not_take_is_a_failure_and_the_agent_goes_on(tmp_path: Path) -> None:
    with Processes(tmp_path, PROFILER_MAX_BODY_BYTES="16384") as lab:
        lab.start_server()
        agent = lab.start_agent()
        (key, operator), (other, small), *_ = OPERATORS.items()
        long = PLAN.model_copy(update={"context": "isolated", "min_runs": 3000, "settle_runs": 3000, "max_runs": 3000})
        lab.ask(lab.open_pin(long), {key: operator})
        wait_until(lambda: not lab.queue(), "the queue is empty")
        (row,) = lab.rows()
        assert row.failure is not None
        assert row.failure["cause"] == "error"
        assert "does not take the report" in row.failure["message"]
        assert len(lab.leases()) == 3, "tried again before it is given up"
        lab.ask(lab.open_pin(), {other: small})
        wait_until(lambda: not lab.queue(), "the queue is empty")
        assert agent.poll() is None
        assert [row.workload for row in lab.rows() if row.failure is None] == [other]


def test_an_agent_that_is_told_to_stop_gives_its_lease_back(tmp_path: Path) -> None:
    with Processes(tmp_path) as lab:
        lab.start_server()
        agent = lab.start_agent()
        lab.ask(lab.open_pin(), OPERATORS)
        child = child_of(agent)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait() == 0
        assert not child.is_running()
        assert [lease.state for lease in lab.leases()] == ["released"]
        assert [(job.lease, job.attempts) for job in lab.queue()] == [(None, 0)] * len(OPERATORS)
        lab.start_agent()
        lab.wait_for_rows(OPERATORS)


def test_an_agent_goes_on_with_its_lease_when_the_server_was_killed(tmp_path: Path) -> None:
    with Processes(tmp_path) as lab:
        server = lab.start_server()
        agent = lab.start_agent()
        lab.ask(lab.open_pin(), OPERATORS)
        child_of(agent)
        kill(server)
        lab.start_server()
        lab.wait_for_rows(OPERATORS)
        assert agent.poll() is None
        (lease,) = lab.leases()
        assert (lease.state, lease.rows) == ("reported", len(OPERATORS))


def aborting(folder: Path) -> dict[str, str]:
    """The environment of an agent whose runtime aborts on one operator."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ABORTS)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "KILLER": KILLER}


def test_an_operator_that_kills_its_process_everywhere_fails_alone(tmp_path: Path) -> None:
    with Processes(tmp_path, PROFILER_REFERENCE_OPERATORS="0") as lab:
        lab.start_server()
        for name in ("first", "second"):
            lab.start_agent(name, **aborting(tmp_path / f"{name}-runtime"))
        lab.ask(lab.open_pin(), OPERATORS)
        wait_until(lambda: not lab.queue(), "the queue is empty")
        rows = {row.workload: row for row in lab.rows()}
        assert len(lab.rows()) == len(rows) == len(OPERATORS)
        failure = rows.pop(KILLER).failure
        assert failure is not None
        assert failure["cause"] == "crashed"
        assert "SIGABRT" in failure["message"]
        assert {row.status for row in rows.values()} == {"measured"}
        states = [DeviceState.model_validate(one).state for one in lab.http.get("/devices").json()]
        assert set(states) == {"ready"}


def test_an_operator_that_kills_its_process_on_one_device_is_measured_on_another(tmp_path: Path) -> None:
    with Processes(tmp_path, PROFILER_REFERENCE_OPERATORS="0") as lab:
        lab.start_server()
        lab.start_agent("first", **aborting(tmp_path / "runtime"))
        pin = lab.open_pin()
        lab.start_agent("second")
        wait_until(lambda: len(lab.http.get("/devices").json()) == 2, "both have registered")
        lab.ask(pin, OPERATORS)
        lab.wait_for_rows(OPERATORS)
        assert next(row.device for row in lab.rows() if row.workload == KILLER) == "second"
        assert lab.log("first").count("SIGABRT") <= 1
