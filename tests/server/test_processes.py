"""Many at once, and processes that die: claims stay atomic and nothing is lost, on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from sqlalchemy import func, select
from tables_kit import PLAN, TARGET, convs, make_device, measured

from lut_db.storage import Database, queries
from lut_db.storage import models as m
from lut_db.wire import Lease, Report
from profiler_server import leasing
from profiler_server.settings import Settings

StartProcess = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start_process() -> Iterator[StartProcess]:
    """Starts `profiler-server` processes on free ports; whatever still runs is killed after the test."""
    running: list[subprocess.Popen[str]] = []

    def start(url: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "profiler_server.cli", "--port", "0", "--database", url]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        return process, line.removeprefix("listening on ").strip()

    yield start
    for process in running:
        process.kill()
        process.communicate()


def fill(database: Database, devices: int, operators: int) -> None:
    """Registers devices and puts operators into the queue."""
    with database.write() as session:
        now = queries.clock(session)
        for number in range(devices):
            queries.put_device(session, make_device(f"bench-{number}"), now)
        queries.put_plan(session, PLAN)
        queries.put_workloads(session, convs(operators))
        queries.enqueue(session, TARGET.key, PLAN.key, convs(operators), now)


# --- claims ---------------------------------------------------------------------------------------------------


def test_no_measurement_is_leased_twice(database: Database) -> None:
    """Eight devices claim at once, from connections of their own, until the queue is empty."""
    fill(database, 8, 200)
    chosen = Settings(database=str(database.url), lease_s=600, reference_operators=0)
    claimed: dict[str, list[int]] = {}
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        while True:
            with database.write() as session:
                lease = leasing.grant(session, f"bench-{number}", TARGET.key, 5, chosen, give_up=True)
                if lease is None:
                    return
                keys = [job.workload for job in queries.jobs_of(session, [lease])[lease.id]]
            for key in keys:
                claimed.setdefault(key, []).append(lease.id)
            with database.write() as session:
                report = Report(measurements=tuple(measured(key) for key in keys), canary_ms=0.2)
                assert leasing.settle(session, lease.id, report, chosen).rows == len(keys)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, number) for number in range(8)]:
            done.result()
    assert len(claimed) == 200
    assert all(len(tokens) == 1 for tokens in claimed.values())
    with database.read() as session:
        assert session.execute(select(func.count()).select_from(m.Row)).scalar_one() == 200
        assert session.execute(select(func.count()).select_from(m.Pending)).scalar_one() == 0


def test_one_device_that_claims_from_many_sides_holds_one_lease(database: Database) -> None:
    fill(database, 1, 100)
    chosen = Settings(database=str(database.url), lease_s=600)
    start = threading.Barrier(6)

    def work(_: int) -> list[int]:
        start.wait()
        tokens = []
        for _ in range(5):
            with database.write() as session:
                lease = leasing.grant(session, "bench-0", TARGET.key, 3, chosen, give_up=True)
                if lease is not None:
                    tokens.append(lease.id)
                active = select(func.count()).where(m.Lease.state == "active")
                assert session.execute(active).scalar_one() <= 1
        return tokens

    with ThreadPoolExecutor(6) as pool:
        tokens = [token for some in pool.map(work, range(6)) for token in some]
    assert len(tokens) == len(set(tokens)) == 30
    with database.read() as session:
        held = select(m.Pending.lease).where(m.Pending.lease.is_not(None)).distinct()
        assert list(session.scalars(held)) == [max(tokens)]


def test_two_server_processes_share_a_queue(database: Database, start_process: StartProcess) -> None:
    fill(database, 4, 60)
    address = database.url.render_as_string(hide_password=False)
    urls = [start_process(address, PROFILER_REFERENCE_OPERATORS="0")[1] for _ in range(2)]

    def agent(number: int) -> list[str]:
        seen: list[str] = []
        with httpx.Client(base_url=urls[number % 2], timeout=30) as client:
            while True:
                asked = {"target": TARGET.key, "max_operators": 4, "wait_s": 0}
                answer = client.post(f"/v1/devices/bench-{number}/leases", json=asked)
                if answer.status_code == 204:
                    return seen
                lease = Lease.model_validate(answer.json())
                keys = [operator.key for operator in lease.operators]
                report = Report(measurements=tuple(measured(key) for key in keys), canary_ms=0.2)
                told = client.post(f"/v1/leases/{lease.token}/results", json=report.model_dump(mode="json"))
                assert told.json()["rows"] == len(keys), told.text
                seen += keys

    with ThreadPoolExecutor(4) as pool:
        seen = [key for keys in pool.map(agent, range(4)) for key in keys]
    assert sorted(seen) == sorted(convs(60))


# --- death ----------------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys
from tables_kit import PLAN, TARGET, measured
from lut_db.storage import Database, queries
from lut_db.wire import Report
from profiler_server import leasing
from profiler_server.settings import Settings
address, what, token = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = Settings(database=address)
with Database(address).write() as session:
    if what == "claim":
        assert leasing.grant(session, "bench-0", TARGET.key, 5, settings, give_up=True) is not None
    else:
        lease = queries.lock_lease(session, token)
        keys = [job.workload for job in queries.jobs_of(session, [lease])[token]]
        report = Report(measurements=tuple(measured(key) for key in keys), canary_ms=0.2)
        assert leasing.settle(session, token, report, settings).rows == 5
    session.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what", ["claim", "report"])
def test_a_process_killed_within_a_transaction_leaves_the_tables_as_they_were(database: Database, what: str) -> None:
    fill(database, 1, 5)
    chosen = Settings(database=str(database.url))
    address = database.url.render_as_string(hide_password=False)
    token = 0
    if what == "report":
        with database.write() as session:
            lease = leasing.grant(session, "bench-0", TARGET.key, 5, chosen, give_up=True)
            assert lease is not None
            token = lease.id
    path = os.pathsep.join(sys.path)
    died = subprocess.run(
        [sys.executable, "-c", DIES, address, what, str(token)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    with database.read() as session:
        assert session.execute(select(func.count()).select_from(m.Row)).scalar_one() == 0
        assert session.execute(select(func.count()).select_from(m.Pending)).scalar_one() == 5
        assert queries.read_canaries(session, TARGET.key) == (None, None)
        assert session.execute(select(func.count()).select_from(m.Lease)).scalar_one() == (what == "report")
    with database.write() as session:  # and nobody else is locked out
        if what == "claim":
            lease = leasing.grant(session, "bench-0", TARGET.key, 5, chosen, give_up=True)
            assert lease is not None
            token = lease.id
        report = Report(measurements=tuple(measured(key) for key in convs(5)), canary_ms=0.2)
        assert leasing.settle(session, token, report, chosen).rows == 5


def test_a_killed_server_loses_nothing(database: Database, start_process: StartProcess) -> None:
    """Killed while an agent holds a lease and a search waits: after a restart the same lease is reported."""
    fill(database, 1, 3)
    address = database.url.render_as_string(hide_password=False)
    process, url = start_process(address)
    with httpx.Client(base_url=url, timeout=30) as client:
        plan = PLAN.model_dump(mode="json")
        pin = client.post("/v1/pins", json={"target": TARGET.key, "plan": plan}).json()["id"]
        lease = client.post("/v1/devices/bench-0/leases", json={"target": TARGET.key, "wait_s": 0}).json()
        with ThreadPoolExecutor(1) as pool:
            lookup = {"networks": [list(convs(3))], "wait_s": 30}
            waiting = pool.submit(client.post, f"/v1/pins/{pin}/lookup", json=lookup)
            time.sleep(0.2)
            process.kill()
            assert isinstance(waiting.exception(), httpx.TransportError)
    process, url = start_process(address)
    with httpx.Client(base_url=url, timeout=30) as client:
        report = Report(measurements=tuple(measured(key) for key in convs(3)), canary_ms=0.2).model_dump(mode="json")
        outcomes = [client.post(f"/v1/leases/{lease['token']}/results", json=report).json() for _ in range(2)]
        assert [told["outcome"] for told in outcomes] == ["accepted", "repeated"]
        answer = client.post(f"/v1/pins/{pin}/lookup", json=lookup).json()
        assert answer["networks"][0]["latency_ms"] == 3.0


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_long_polls_end_at_once_when_the_server_stops(tmp_path, start_process: StartProcess, number: int) -> None:
    process, url = start_process(f"sqlite:///{tmp_path / 'tables.sqlite'}")
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        device = make_device()
        assert client.put("/v1/devices/bench", json=device.model_dump(mode="json")).status_code == 200
        waiting = pool.submit(client.post, "/v1/devices/bench/leases", json={"target": TARGET.key, "wait_s": 60})
        time.sleep(0.3)
        process.send_signal(number)
        assert waiting.result(timeout=20).status_code == 204
    assert process.wait(timeout=20) == 0


def test_a_stale_schema_is_refused_with_the_command_that_helps(
    empty_database_url: str, start_process: StartProcess, tmp_path
) -> None:
    if empty_database_url.startswith("sqlite"):
        (tmp_path / "empty.sqlite").touch()  # a file that is there is not taken over unasked
    process, said = start_process(empty_database_url)
    assert said == ""
    _, error = process.communicate()
    assert process.returncode == 1
    assert "lut-db upgrade --database" in error
    assert "Traceback" not in error


def test_a_taken_port_and_a_bad_setting_are_explained(tmp_path, start_process: StartProcess) -> None:
    address = f"sqlite:///{tmp_path / 'tables.sqlite'}"
    _, url = start_process(address)
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "profiler_server.cli", "--database", address]
    taken = subprocess.run([*command, "--port", port], capture_output=True, text=True, check=False)
    assert (taken.returncode, taken.stdout) == (1, "")
    assert "cannot listen" in taken.stderr
    environment = {**os.environ, "PROFILER_LEASE_S": "never"}
    wrong = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "PROFILER_LEASE_S" in wrong.stderr


# --- the interface --------------------------------------------------------------------------------------------


def test_the_interface_answers_whatever_is_sent(start_server, database_url: str) -> None:
    """Requests made at random from the OpenAPI document, valid and not: never an error of the server."""
    server = start_server(database_url)
    server.client.put("/v1/devices/bench", json=make_device().model_dump(mode="json"))
    document = server.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == len({operation.definition.raw["operationId"] for operation in operations}) == 23
    calm = settings(
        max_examples=5, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize=True,
    )  # fmt: skip
    for operation in operations:

        def send(case) -> None:
            if isinstance(case.body, dict) and "wait_s" in case.body:
                case.body["wait_s"] = 0
            if isinstance(case.query, dict) and "wait_s" in case.query:
                case.query["wait_s"] = 0
            case.call_and_validate(session=None, checks=[not_a_server_error])

        calm(given(case=operation.as_strategy())(send))()
