"""Real processes on loopback that tests may kill: servers over one SQLite file on one port, agents, searches."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
from sqlalchemy import select

from lut_db.operators import Convolution, Operator
from lut_db.plans import WHOLE, Plan
from lut_db.storage import Database
from lut_db.storage import models as m
from lut_db.wire import API, LookupRequest, Pin, PinRequest, TargetState

HERE = Path(__file__).parent
PORTS = range(20_000, 30_000)
"""Below the ports of outgoing connections: none of them takes the port of a server that is away."""
PATIENCE_S = 240.0
"""Long, since a host's neighbours can slow a lease fourfold: only a test that fails waits for it."""
PAUSE_S = 0.02
CHILD = "device_agents.child"

LIGHT: dict[str, Any] = {
    "carriers": 1, "warmup_runs": 0, "round_runs": 2, "min_runs": 4, "max_runs": 4, "load_tolerance": 64,
    "drift_tolerance": 50,
}  # fmt: skip
"""Quick and without refusals: latencies are of no interest here."""
PLAN = Plan(**LIGHT)
WHOLE_PLAN = Plan(**WHOLE.model_dump() | LIGHT)
SETTINGS = {"PROFILER_POLL_S": "0.05", "PROFILER_TEND_S": "0.1"}


def operators(count: int) -> dict[str, Operator]:
    """Small convolutions, all different, by key."""
    made = [Convolution(input=(1, 4, 8, 8), filters=1 + number, kernel=(1, 1)) for number in range(count)]
    return {operator.key: operator for operator in made}


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` returns once it is true; fails the test where it does not come true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain waited for {PATIENCE_S:.0f} s: {what}")
        time.sleep(PAUSE_S)
    return found


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


class Processes:
    """A server, agents and searches of one test, over one SQLite file. Whatever still runs at the end is killed."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.address = f"sqlite:///{folder / 'tables.sqlite'}"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = {**SETTINGS, **settings}
        self.database = Database(self.address)
        self.database.upgrade()
        self.http = httpx.Client(base_url=self.url + API, timeout=30, trust_env=False)
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        for process in reversed(self._started):
            if process.poll() is None:
                process.kill()
            process.wait()
        self.database.close()
        if error is not None:
            for path in sorted(self.folder.glob("*.log")):
                error.add_note(f"{path.name}: ...{path.read_text(errors='replace')[-1500:]}")

    # --- processes --------------------------------------------------------------------------------------------

    def start(self, log: str, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """Starts a Python program; what it says is appended to the file `log`."""
        with (self.folder / f"{log}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment},
            )  # fmt: skip
        self._started.append(process)
        return process

    def start_server(self, *program: str) -> subprocess.Popen[bytes]:
        """Starts the server, or a program that takes its options; returns once it is ready, or has ended."""
        command = program or ("-m", "profiler_server.cli")
        process = self.start(
            "server", [*command, "--port", str(self.port), "--database", self.address], **self.settings
        )
        self.server = process
        wait_until(lambda: process.poll() is not None or self.ready(), "the server is ready")
        return process

    def ready(self) -> bool:
        try:
            return self.http.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def start_agent(
        self, name: str = "bench", backend: str = "cpu-onnxruntime", *options: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("device-agent")), backend, "--server", self.url, "--name", name]
        return self.start(name, [*command, "--cores", "any", *options], **environment)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    # --- the service ------------------------------------------------------------------------------------------

    def target(self, runtime: str = "") -> str:
        """The key of the agents' target, or of that with this runtime, once an agent has registered."""

        def registered() -> str | None:
            states = [TargetState.model_validate(one) for one in self.http.get("/targets").json()]
            return next((state.key for state in states if runtime in state.target.runtime), None)

        return str(wait_until(registered, "an agent registers"))

    def open_pin(self, plan: Plan = PLAN, runtime: str = "") -> Pin:
        request = PinRequest(target=self.target(runtime), plan=plan)
        return Pin.model_validate(self.http.post("/pins", json=request.model_dump(mode="json")).json())

    def ask(self, pin: Pin, wanted: dict[str, Operator]) -> None:
        """Puts operators into the queue."""
        request = LookupRequest(operators=wanted, networks=(tuple(wanted),))
        answer = self.http.post(f"/pins/{pin.id}/lookup", json=request.model_dump(mode="json"))
        assert answer.json()["enqueued"] == len(wanted), answer.text

    def targets(self) -> list[str]:
        """The keys of the recorded targets, read from the tables: the server may be away."""
        with self.database.read() as session:
            return list(session.scalars(select(m.Target.key)))

    # --- the tables -------------------------------------------------------------------------------------------

    def rows(self) -> list[m.Row]:
        with self.database.read() as session:
            return list(session.scalars(select(m.Row).order_by(m.Row.id)))

    def leases(self) -> list[m.Lease]:
        with self.database.read() as session:
            return list(session.scalars(select(m.Lease).order_by(m.Lease.id)))

    def queue(self) -> list[m.Pending]:
        with self.database.read() as session:
            return list(session.scalars(select(m.Pending).order_by(m.Pending.id)))

    def wait_for_rows(self, wanted: dict[str, Operator]) -> None:
        """Until the queue is empty; then every operator has exactly one row, and it is measured."""
        wait_until(lambda: not self.queue(), "the queue is empty")
        self.check_rows()
        assert {row.workload for row in self.rows()} >= set(wanted)

    def check_rows(self) -> None:
        """No table says anything twice, and nothing failed."""
        rows = self.rows()
        counted = Counter((row.target, row.plan, row.workload) for row in rows)
        assert max(counted.values()) == 1, counted.most_common(3)
        assert {row.revision for row in rows} == {1}
        assert {row.status for row in rows} == {"measured"}, [row.failure for row in rows if row.failure]


def measuring_child(agent: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The process in which an agent measures, if there is one now."""
    for child in psutil.Process(agent.pid).children():
        try:
            if CHILD in child.cmdline():
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def child_of(agent: subprocess.Popen[bytes]) -> psutil.Process:
    """The process in which an agent measures, once there is one."""
    found = wait_until(lambda: measuring_child(agent), "the agent measures")
    assert isinstance(found, psutil.Process)
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL
