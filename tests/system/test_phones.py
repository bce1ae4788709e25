"""A lab of phones through everything that can go wrong with them: it heals without a hand, and no number is wrong."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from phones import RunningPhone
from phones import phone as running_phone
from processes import LIGHT, Processes, kill, measuring_child, wait_until

from device_agents import adb, backends
from device_agents.backends import Options
from device_agents.measuring import measure
from device_agents.simulated_phone.phone import FAULTS
from lut_db.lowering.onnx import to_onnx
from lut_db.lowering.tflite import to_tflite
from lut_db.networks import Network
from lut_db.operators import Convolution, Operator
from lut_db.plans import Plan
from lut_db.storage import models as m
from lut_db.wire import DeviceState, Lease, TargetState

TOOLS = ("benchmark_model", "onnxruntime_perf_test")
PHONES = 2
"""For each tool: what crashes one can be tried on another."""
OPERATORS_AT_A_TIME = 2
# Slow phones wait more than they compute, so that what else runs here disturbs their figures little. They cool fast.
PHONE = ("--speed", "4", "--heat-seconds", "1.5", "--heat", "1")
PLAN = Plan(**{**LIGHT, "context": "isolated", "round_runs": 4})
AGREES = 30.0
"""A figure may differ from an undisturbed phone's by this factor, since a machine that does much else slows runs, and
those of the undisturbed phone too, up to tenfold. Nonsense differs by more: the tools print microseconds, so seconds
for milliseconds is a thousand, and this lies halfway."""
SERVICE = {"PROFILER_LEASE_S": "6", "PROFILER_REFUSAL_PAUSE_S": "0.5", "PROFILER_REFERENCE_OPERATORS": "0"}
OPERATORS = 140
"""For each tool, in the long test: with what has to be repeated, more than 200 leases."""
CRASHES, FAILS = 5, 6
"""Which operators crash the tool wherever they run, and which it cannot run."""


def wanted(count: int) -> list[Operator]:
    """Convolutions that take about equally long, all different."""
    return [
        Convolution(input=(1, 16, 28, 28), filters=16 + number % 16, kernel=(3, 3), padding=(1, 1, 1, number // 16))
        for number in range(count)
    ]


def model_of(operator: Operator, tool: str) -> str:
    """What the file with an operator is called on a phone."""
    network = Network.of(operator)
    content = to_tflite(network) if tool == "benchmark_model" else to_onnx(network).SerializeToString()
    return hashlib.sha256(content).hexdigest()


class Storm:
    """A service, an agent for each tool and their phones, and everything that can go wrong."""

    def __init__(self, lab: Processes, stack: ExitStack, folder: Path, tools: tuple[str, ...], operators: int) -> None:
        self.lab = lab
        self.tools = tools
        self.keys = folder / "keys"
        self.operators = wanted(operators)
        self.phones: dict[str, list[RunningPhone]] = {}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.struck: Counter[str] = Counter()
        self.blamed: set[int] = set()
        """The leases during which the last blow fell that counts against operators."""
        self.hopeless = {self.operators[number].key for number in (CRASHES, FAILS)}
        lab.start_server()
        for tool in tools:
            self.phones[tool] = [
                stack.enter_context(running_phone(*PHONE, "--root", str(folder / f"{tool}-{number}")))
                for number in range(PHONES)
            ]
            for phone in self.phones[tool]:
                self.doom(tool, phone)
            self.start_agent(tool)
        self.targets = {tool: lab.target(tool.partition("_")[2]) for tool in tools}

    def doom(self, tool: str, phone: RunningPhone) -> None:
        """What is wrong with two of the operators is wrong for as long as the phone runs."""
        for number, fault in ((CRASHES, "crash-run"), (FAILS, "fail-run")):
            phone.control.fault(fault, times=10**6, match=model_of(self.operators[number], tool))

    def start_agent(self, tool: str) -> None:
        settings = {
            "tool": tool, "keys": str(self.keys), "timeout_s": "4",
            "devices": ",".join(phone.serial for phone in self.phones[tool]),
        }  # fmt: skip
        options = [part for name, value in settings.items() for part in ("--setting", f"{name}={value}")]
        at_a_time = str(OPERATORS_AT_A_TIME)
        self.agents[tool] = self.lab.start_agent(tool, "android", "--max-operators", at_a_time, *options)

    def ask(self) -> None:
        keyed = {operator.key: operator for operator in self.operators}
        for tool in self.tools:
            self.lab.ask(self.lab.open_pin(PLAN, tool.partition("_")[2]), keyed)

    # --- what goes wrong ----------------------------------------------------------------------------------------

    def inject(self, kind: str, tool: str, number: int) -> bool:
        """Makes something go wrong with a phone, and returns when it has; False where all was measured before."""
        if kind in AGAINST_OPERATORS:
            # Three such blows to one operator would be its failure: here it is only bad luck. Where it is not, the last
            # try must show what is wrong with it.
            self._wait(tool, lambda: not self.open() & self.blamed and not any(job.attempts for job in self.queue()))
        if not self.queue(tool):
            return False
        phone = self.phones[tool][number]
        leases = len(self.lab.leases())
        match kind:
            case "kill-phone":
                phone.kill()
                time.sleep(0.5)
                phone.start_again()
                self.doom(tool, phone)
            case "kill-agent":
                kill(self.agents[tool])
                self.start_agent(tool)
            case "kill-child":
                child = wait_until(lambda: measuring_child(self.agents[tool]), "the agent measures")
                child.kill()
            case "kill-server":
                kill(self.lab.server)
                self.lab.start_server()
            case "unplug":
                phone.control.die(1.0)
            case "drop":
                phone.control.drop()
            case "heat":
                phone.control.heat(75)
            case "freeze" | "die":
                phone.control.fault(kind, seconds=1.0, after=0.2 if kind == "die" else 0.0)
            case _:
                phone.control.fault(kind, **ARMED[kind])
                return self._wait(tool, lambda: kind not in armed(phone))
        # The lab goes on before the next thing happens.
        self._wait(tool, lambda: len(self.lab.leases()) > leases)
        return True

    def open(self) -> set[int]:
        """Leases that have not come to their end."""
        return {lease.id for lease in self.lab.leases() if lease.state == "active"}

    def queue(self, *tools: str) -> list[m.Pending]:
        """What is left to measure with these tools, or with any."""
        targets = [self.targets[tool] for tool in tools or self.tools]
        return [job for job in self.lab.queue() if job.target in targets]

    def _wait(self, tool: str, condition: Callable[[], bool]) -> bool:
        """Until it is so, or nothing is left to measure with a tool: whether it is so."""
        wait_until(lambda: condition() or not self.queue(tool), "a fault strikes")
        return condition()

    def rage(self, kinds: list[str]) -> None:
        """One thing after another goes wrong, with each phone in turn, until all is measured."""
        places = cycle([(tool, number) for number in range(PHONES) for tool in self.tools])
        for kind in cycle(kinds):
            tool, number = next(places)
            if not self.queue():
                return
            if not self.queue(tool):
                tool, number = next(places)  # the other one's phone: tools take turns
            if self.inject(kind, tool, number):
                self.struck[kind] += 1
                if kind in AGAINST_OPERATORS:
                    self.blamed = self.open()

    # --- what must be so afterwards -----------------------------------------------------------------------------

    def check_service(self) -> None:
        lab = self.lab
        assert {lease.state for lease in lab.leases()} <= {"reported", "expired", "released"}
        for agent in self.agents.values():
            assert agent.poll() is None
        states = [DeviceState.model_validate(one) for one in lab.http.get("/devices").json()]
        assert {state.state for state in states} == {"ready"}, states
        assert len(states) == PHONES * len(self.tools)
        pending = [TargetState.model_validate(one).pending for one in lab.http.get("/targets").json()]
        assert pending == [0] * len(self.tools)

    def check_rows(self) -> None:
        """Every operator has one row for each tool; those that cannot be measured say why."""
        rows = self.lab.rows()
        counted = Counter((row.target, row.workload) for row in rows)
        assert set(counted) == {(target, o.key) for target in self.targets.values() for o in self.operators}
        assert set(counted.values()) == {1}
        failures = {(row.target, row.workload): row.failure for row in rows if row.failure}
        crashes, fails = self.operators[CRASHES].key, self.operators[FAILS].key
        causes = {place: failure["cause"] for place, failure in failures.items()}
        for target in self.targets.values():
            assert causes.pop((target, crashes)) == "crashed", failures
            assert causes.pop((target, fails)) == "unsupported"
        assert causes == {}, failures

    def check_figures(self) -> dict[str, tuple[float, float]]:
        """Latencies agree with those of a phone that nothing happened to. Returns how well, as factors, by tool."""
        healthy = [operator for operator in self.operators if operator.key not in self.hopeless]
        sampled = healthy[:: max(1, len(healthy) // 3)]
        factors = {}
        with running_phone(*PHONE) as calm:
            for tool, target in self.targets.items():
                options = Options(settings={"devices": calm.serial, "keys": str(self.keys), "tool": tool})
                backend = backends.create("android", options)
                assert backend.target().key == target
                with self.lab.database.read() as session:
                    canary_ms = session.connection().exec_driver_sql(
                        "SELECT canary_ms FROM targets WHERE key = ?", (target,)
                    ).scalar_one()  # fmt: skip
                lease = Lease(
                    token=1, device="calm", target=backend.target(), plan=PLAN, operators=tuple(sampled),
                    canary_ms=canary_ms, expires_in_s=600,
                )  # fmt: skip
                report = measure(backend, lease)
                calm_ms = [measurement.latency_ms for measurement in report.measurements]
                typical_ms = median(calm_ms)
                told_ms = [row.latency_ms for row in self.lab.rows() if row.target == target and not row.failure]
                factors[tool] = (min(told_ms) / typical_ms, max(told_ms) / typical_ms)
                assert 1 / AGREES < factors[tool][0] <= factors[tool][1] < AGREES, (sorted(told_ms), calm_ms)
        return factors

    def check_phones(self) -> None:
        """Nothing of ours runs on a phone, and nothing lies there but tools, and models under their own hashes."""
        for tool, agent in self.agents.items():
            assert agent.wait() == 0
            for phone in self.phones[tool]:
                left = processes_on(phone)
                assert left == [], left
                folder = phone.root / adb.FOLDER[1:]
                assert {path.name for path in folder.iterdir()} <= {"models", "tools", "run", "scratch"}
                files = list((folder / "models").iterdir())
                assert files
                for path in files:
                    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
                    assert path.suffix == (".tflite" if tool == "benchmark_model" else ".onnx")
                assert {path.name for path in folder.parent.iterdir()} <= {folder.name, *TOOLS}
                # The agent's latest command and that of its last child, both at their end.
                ended = [path.read_text().strip() for path in (folder / "run").iterdir()]
                assert ended in ([], [""], ["", ""])


def armed(phone: RunningPhone) -> set[str]:
    """Faults that have not struck yet, but for those of single models."""
    return {fault["name"] for fault in phone.control.state()["faults"] if fault["times"] < 100}


def processes_on(phone: RunningPhone) -> list[str]:
    """What runs on a phone, but for its first process: seen from outside."""
    found = []
    marker = f"PHONE_DEV={'/dev' if phone.isolated else f'{phone.root}/dev'}".encode()
    own = psutil.Process(phone.process.pid).children(recursive=True)
    for process in own if phone.isolated else psutil.process_iter():
        try:
            if marker in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, OSError):
            continue  # ended meanwhile, or another user's
    return found


def test_what_is_left_on_a_phone_is_seen(tmp_path: Path) -> None:
    with running_phone() as phone:
        client = adb.Phone(adb.Address.parse(phone.serial), tmp_path)
        client.run("nohup sleep 991 >/dev/null 2>&1 &")
        client.close()
        assert processes_on(phone) == ["sleep 991"]


ARMED: dict[str, dict[str, Any]] = {
    "corrupt-push": {}, "crash-run": {"times": 2}, "drop-push": {"after": 300.0}, "drop-run": {"after": 0.05},
    "fail-run": {}, "garbage": {"times": 2}, "hang": {"match": "mark said"}, "hang-run": {},
    "no-space": {"after": 100.0},
}  # fmt: skip
AGAINST_OPERATORS = {"crash-run", "garbage", "hang-run", "kill-agent", "kill-child", "kill-server", "no-space"}
KINDS = [
    "drop-push", "garbage", "drop-run", "kill-agent", "heat", "hang", "crash-run", "die", "no-space", "kill-phone",
    "fail-run", "kill-child", "corrupt-push", "hang-run", "freeze", "unplug", "drop", "kill-server",
]  # fmt: skip
"""In an order in which what is held against an operator never comes twice in a row."""


def test_every_fault_there_is_strikes() -> None:
    assert set(FAULTS) <= set(KINDS)
    assert set(ARMED) == set(FAULTS) - {"die", "freeze"}


@pytest.fixture
def storm(tmp_path: Path) -> Iterator[Callable[..., Storm]]:
    with Processes(tmp_path, **SERVICE) as lab, ExitStack() as stack:
        yield lambda tools, operators: Storm(lab, stack, tmp_path, tools, operators)


def weather(storm: Storm, kinds: list[str]) -> dict[str, Any]:
    """Lets a storm rage to its end, sees that nothing was lost, and tells the figures."""
    began = time.monotonic()
    storm.ask()
    storm.rage(kinds)
    seconds = time.monotonic() - began
    storm.check_service()
    storm.check_rows()
    leases = storm.lab.leases()
    for agent in storm.agents.values():
        agent.send_signal(signal.SIGTERM)  # it ends when the service has answered what it asks
    factors = storm.check_figures()
    storm.check_phones()
    return {
        "leases": len(leases), "states": Counter(lease.state for lease in leases), "seconds": round(seconds),
        "rows": Counter(row.status for row in storm.lab.rows()), "requeued": sum(lease.requeued for lease in leases),
        "struck": storm.struck, "factors": factors,
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_a_shower(storm: Callable[..., Storm]) -> None:
    figures = weather(storm(TOOLS, 8), [kind for kind in KINDS if kind != "kill-server"])
    assert figures["leases"] >= 10
    assert len(figures["struck"]) >= 5, figures


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_two_hundred_leases_with_every_fault_in_turn(storm: Callable[..., Storm]) -> None:
    figures = weather(storm(TOOLS, OPERATORS), KINDS)
    print(json.dumps(figures), file=sys.stderr)
    assert figures["leases"] >= 200
    assert set(figures["struck"]) == set(KINDS)
