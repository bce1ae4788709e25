"""The loop of an agent: register, ask for a lease, measure it in a child process, report; over and over.

The service may go away and come back at any time. An agent keeps trying, measures on while it can, and never
reports under a lease that it has lost.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from device_agents.backends import Backend, Options, Unreachable
from device_agents.child import Job
from device_agents.measuring import failed
from lut_db.errors import LatencyLabError
from lut_db.measurements import REFUSALS, Cause
from lut_db.targets import Device, Target
from lut_db.wire import API, Lease, LeaseRequest, Problem, Report, ReportOutcome

log = logging.getLogger("device-agent")

POLL_S = 25.0
REQUEST_TIMEOUT_S = 20.0
FIRST_RETRY_S = 0.2
LONGEST_RETRY_S = 10.0
SIGN_OF_LIFE_S = 10.0
"""Shorter than the silence after which the service takes a device for lost."""
CHECK_S = 0.05
COOL_DOWN_S = 2.0
LONGEST_COOL_DOWN_S = 25.0
"""Shorter than the silence after which the service takes a device for lost."""
LOG_TAIL = 2000


class Refused(LatencyLabError):
    """The service refused a request that will not get better by asking again."""


class Stopped(Exception):
    """The agent was told to stop."""


@dataclass
class Agent:
    """Serves one device with one backend. `run` returns when `stop` is called."""

    server: str
    name: str
    backend_name: str
    backend: Backend
    options: Options
    max_operators: int = 128
    lease_limit_s: float = 1800.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _kept_out: bool = False
    _refusals: int = 0

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        # A proxy from the environment has no business between two processes of one machine.
        local = httpx.URL(self.server).host in ("127.0.0.1", "localhost", "::1")
        base_url = self.server.rstrip("/") + API
        with httpx.Client(base_url=base_url, timeout=REQUEST_TIMEOUT_S, trust_env=not local) as http:
            try:
                self._await_device()
                target = self.backend.target()
                self._register(http, target)
                print(f"registered {self.name} as {target.key}", flush=True)
                while not self._stop.is_set():
                    self._cool_down()
                    self._await_device()
                    if self.backend.target() != target:  # another build or tool than before: other tables
                        target = self.backend.target()
                        self._register(http, target)
                        print(f"registered {self.name} as {target.key}", flush=True)
                    lease = self._ask(http, target)
                    if lease is not None:
                        self._serve(http, lease)
            except Stopped:
                log.info("stopped")

    def _cool_down(self) -> None:
        """Waits longer after each lease that was refused: what disturbs a device is seldom over at once."""
        if self._refusals:
            self._stop.wait(min(COOL_DOWN_S * 2 ** min(self._refusals - 1, 10), LONGEST_COOL_DOWN_S))

    def _await_device(self) -> None:
        """Returns when the device can measure. One that is gone or hot takes no lease, and needs no hand."""
        wait_s = FIRST_RETRY_S
        reported = False
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                self.backend.ready()
            except Unreachable as error:
                if not reported:
                    log.warning("%s cannot measure: %s; waiting", self.name, error)
                    reported = True
            else:
                if reported:
                    log.info("%s can measure again", self.name)
                return
            self._stop.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    def _register(self, http: httpx.Client, target: Target) -> None:
        device = Device(name=self.name, targets=(target,))
        self._request(http, "PUT", f"/devices/{self.name}", content=device.model_dump_json())

    def _ask(self, http: httpx.Client, target: Target) -> Lease | None:
        request = LeaseRequest(target=target.key, max_operators=self.max_operators, wait_s=POLL_S)
        response = self._request(
            http, "POST", f"/devices/{self.name}/leases", content=request.model_dump_json(),
            timeout=POLL_S + REQUEST_TIMEOUT_S, allow=(404, 409),
        )  # fmt: skip
        if response.status_code == 409:
            # Kept out until somebody has looked at it: released, it goes on without a hand on this side.
            if not self._kept_out:
                log.warning("%s", _explain(response))
            self._kept_out = True
            self._stop.wait(LONGEST_RETRY_S)
            return None
        self._kept_out = False
        if response.status_code == 404:  # the service has another database than the one we registered with
            self._register(http, target)
            return None
        return None if response.status_code == 204 else Lease.model_validate_json(response.content)

    def _serve(self, http: httpx.Client, lease: Lease) -> None:
        log.info(
            "lease %d: %d operators, %d networks, %s", lease.token, len(lease.operators), len(lease.networks),
            lease.plan.context,
        )  # fmt: skip
        began = time.monotonic()
        try:
            with heartbeat(http, lease) as lost:
                report = self._measure(lease, lost)
        except Stopped:
            self._give_back(http, lease)
            raise
        if report is None:
            log.warning("lease %d was lost: its results are thrown away", lease.token)
            return
        results = partial(self._request, http, "POST", f"/leases/{lease.token}/results")
        try:
            response = results(allow=(404, 413), content=report.model_dump_json())
            if response.status_code == 413:  # in smaller company they may be told
                report = failed(lease, "error", f"the service does not take the report: {_explain(response)}")
                response = results(allow=(404,), content=report.model_dump_json())
        except Stopped:
            self._tell_once(http, lease, report)
            raise
        if response.status_code == 404:
            log.warning("lease %d is not known to the service any more", lease.token)
            return
        outcome = ReportOutcome.model_validate_json(response.content)
        failure = next((m.failure for m in report.measurements if m.failure is not None), None)
        self._refusals = self._refusals + 1 if failure is not None and failure.cause in REFUSALS else 0
        log.info(
            "lease %d: %s, %d rows, %d requeued, %.1f s%s", lease.token, outcome.outcome, outcome.rows,
            outcome.requeued, time.monotonic() - began, f"; {failure.cause}: {failure.message}" if failure else "",
        )  # fmt: skip

    def _measure(self, lease: Lease, lost: threading.Event) -> Report | None:
        """Measures in a child process. None when the lease was lost meanwhile."""
        with tempfile.TemporaryDirectory(prefix="lease-") as name:
            folder = Path(name)
            job = Job(backend=self.backend_name, options=self.options, lease=lease)
            (folder / "job.json").write_text(job.model_dump_json())
            deadline = time.monotonic() + self.lease_limit_s
            with (folder / "log").open("w") as output, subprocess.Popen(
                [sys.executable, "-m", "device_agents.child", str(folder)],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | self.backend.environment(),
            ) as child:  # fmt: skip
                try:
                    while child.poll() is None:
                        if lost.is_set():
                            return None
                        if self._stop.is_set():
                            raise Stopped
                        if time.monotonic() > deadline:
                            return failed(
                                lease, "timed_out", f"not measured within {self.lease_limit_s:.0f} s; {_tail(folder)}"
                            )
                        time.sleep(CHECK_S)
                finally:
                    if child.poll() is None:
                        child.kill()
            if child.returncode == 0:
                return Report.model_validate_json((folder / "report.json").read_bytes())
            return failed(lease, *_why(child.returncode, _tail(folder)))

    def _tell_once(self, http: httpx.Client, lease: Lease, report: Report) -> None:
        """What was measured is told even where there is no time to tell it again and again."""
        headers = {"content-type": "application/json"}
        try:
            response = http.post(f"/leases/{lease.token}/results", content=report.model_dump_json(), headers=headers)
        except httpx.TransportError as error:
            log.warning("the results of lease %d could not be told (%s): it will expire", lease.token, error)
        else:
            log.info("lease %d: told before the end, HTTP %d", lease.token, response.status_code)

    def _give_back(self, http: httpx.Client, lease: Lease) -> None:
        try:
            http.delete(f"/leases/{lease.token}")
        except httpx.TransportError as error:
            log.warning("lease %d could not be given back (%s): it will expire", lease.token, error)

    def _request(
        self, http: httpx.Client, method: str, path: str, *, allow: tuple[int, ...] = (), content: str | None = None,
        timeout: float = REQUEST_TIMEOUT_S,
    ) -> httpx.Response:  # fmt: skip
        """Asks until the service answers: every request of an agent may be repeated without harm."""
        wait_s = FIRST_RETRY_S
        reported = False
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                response = http.request(
                    method, path, content=content, timeout=timeout, headers={"content-type": "application/json"}
                )
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success or response.status_code in allow:
                    if reported:
                        log.info("the service answers again")
                    return response
                problem = _explain(response)
                if response.status_code < 500 and response.status_code != 429:
                    raise Refused(f"{method} {path}: {problem}")
            if not reported:
                log.warning("%s at %s; trying again", problem, self.server)
                reported = True
            self._stop.wait(random.uniform(wait_s / 2, wait_s))
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)


def serve_all(agents: Sequence[Agent]) -> None:
    """Runs one agent for each device of this process until all are stopped; one that fails ends them all."""
    errors: list[BaseException] = []

    def run(agent: Agent) -> None:
        try:
            agent.run()
        except BaseException as error:
            errors.append(error)
            for other in agents:
                other.stop()

    threads = [threading.Thread(target=run, args=(agent,), name=agent.name) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def heartbeat(http: httpx.Client, lease: Lease) -> Iterator[threading.Event]:
    """Keeps a lease alive while the body runs; the event is set when it was lost."""
    done = threading.Event()
    lost = threading.Event()

    def beat() -> None:
        # The first one at once: it tells the service that the lease arrived.
        wait_s = 0.0
        while not done.wait(wait_s):
            wait_s = min(lease.expires_in_s / 4, SIGN_OF_LIFE_S)
            try:
                response = http.post(f"/leases/{lease.token}/heartbeat")
            except httpx.TransportError as error:
                # A service that is away cannot give the lease to anybody else either.
                log.debug("heartbeat of lease %d: %s", lease.token, error)
                continue
            if response.status_code in (404, 409):
                lost.set()
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join()


def _why(code: int, tail: str) -> tuple[Cause, str]:
    if "MemoryError" in tail or "bad_alloc" in tail:
        return "out_of_memory", f"the measuring process ran out of memory; {tail}"
    if code < 0:
        return "crashed", f"the measuring process was ended by {signal.Signals(-code).name}; {tail}"
    return "error", f"the measuring process ended with exit code {code}; {tail}"


def _tail(folder: Path) -> str:
    text = (folder / "log").read_text(errors="replace").strip()
    return f"its last words: {text[-LOG_TAIL:]}" if text else "it said nothing"


def _explain(response: httpx.Response) -> str:
    try:
        problem = Problem.model_validate_json(response.content)
    except ValueError:
        return f"HTTP {response.status_code}"
    remedy = f" ({problem.remedy})" if problem.remedy else ""
    return f"HTTP {response.status_code}: {problem.detail}{remedy}"
