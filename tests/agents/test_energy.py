"""Energy: counters of a processor in the layout of Linux, of a phone over ADB, and joules through the whole system."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import RunningServer
from phones import phone as running_phone

from device_agents import backends, energy
from device_agents.adb import Address, Phone
from device_agents.backends import Backend, Options
from device_agents.child import Job
from device_agents.energy import Absent, Burst, Metered, Nvml, Rails, Rapl, Reading, joules_per_run
from device_agents.measuring import measure
from lut_db.canary import canary
from lut_db.errors import InvalidInput
from lut_db.measurements import Status
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import Convolution, GlobalPool, Linear, SqueezeExcite, same_padding
from lut_db.plans import Plan
from lut_db.storage import snapshots
from lut_db.targets import Device
from lut_db.wire import API, Lease, LeaseRequest, LookupRequest, NetworksRequest, Report
from search_client import metrics
from search_client.client import ProfilerClient

IDLE_W, WORK_W = 2.0, 25.0
RANGE_UJ = 262_143_328_850
STEP_S = 1e-3
CALM = {"load_tolerance": 64.0, "drift_tolerance": 50.0}
LIGHT = {"warmup_runs": 1, "round_runs": 2, "min_runs": 6, "max_runs": 6, "carriers": 3, **CALM}
"""Other tests may run beside these: what is tested is that figures come, not that they are quiet."""
NOBODY = 65534


@dataclass
class Tree:
    """A powercap tree as Linux shows it: a folder of links to the zones' own folders."""

    root: Path
    zones: dict[str, Path] = field(default_factory=dict)

    def add(self, zone: str, name: str, energy_uj: int = 0) -> Path:
        parts = zone.split(":")
        folder = self.root / "devices/virtual/powercap" / parts[0]
        for depth in range(2, len(parts) + 1):
            folder /= ":".join(parts[:depth])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (folder / "energy_uj").write_text(f"{energy_uj:015}\n")
        self.classes.mkdir(parents=True, exist_ok=True)
        for linked in (folder, self.root / "devices/virtual/powercap" / parts[0]):
            link = self.classes / linked.name
            if not link.is_symlink():
                link.symlink_to(linked)
        self.zones[zone] = folder
        return folder

    @property
    def classes(self) -> Path:
        return self.root / "class/powercap"

    def set(self, zone: str, energy_uj: int) -> None:
        """In one write: who reads meanwhile sees the old or the new figure."""
        file = os.open(self.zones[zone] / "energy_uj", os.O_WRONLY)
        try:
            os.pwrite(file, f"{energy_uj:015}\n".encode(), 0)
        finally:
            os.close(file)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    found = Tree(tmp_path)
    found.add("intel-rapl:0", "package-0")
    found.add("intel-rapl:0:0", "core")
    found.add("intel-rapl:0:1", "dram")
    return found


@contextmanager
def powered(tree: Tree, work_w: float = WORK_W, start_uj: int = 0) -> Iterator[None]:
    """Advances the package's counter every millisecond: idle power, and more for the time that this process works."""
    stop = threading.Event()

    def tick() -> None:
        begin, worked = time.perf_counter(), time.process_time()
        while not stop.is_set():
            # The work of this thread is none of the device's.
            work_s = time.process_time() - worked - time.thread_time()
            joules = IDLE_W * (time.perf_counter() - begin) + work_w * work_s
            tree.set("intel-rapl:0", (start_uj + round(joules * 1e6)) % RANGE_UJ)
            time.sleep(STEP_S)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def backend_on(tree: Tree, name: str = "cpu-onnxruntime") -> Backend:
    return backends.create(name, Options(settings={"powercap": str(tree.classes)}))


# --- processors ------------------------------------------------------------------------------------------------


def read_while(counter: Rapl, tree: Tree, zone: str, energy_uj: int) -> float:
    """The joules that are read while a zone makes its next step."""
    timer = threading.Timer(0.02, tree.set, (zone, energy_uj))
    timer.start()
    try:
        return counter.read().joules
    finally:
        timer.join()


def test_packages_are_summed_and_nothing_is_counted_twice(tree: Tree) -> None:
    tree.add("intel-rapl:1", "package-1", 5_000_000)
    tree.add("intel-rapl:2", "psys", 1_000_000)
    tree.add("intel-rapl-mmio:0", "package-0")
    counter = Rapl(tree.classes)
    assert counter.source == "RAPL package-0, package-1"
    tree.set("intel-rapl:0", 2_000_000)
    tree.set("intel-rapl:0:0", 70_000_000)
    tree.set("intel-rapl-mmio:0", 2_000_000)
    tree.set("intel-rapl:2", 90_000_000)
    assert read_while(counter, tree, "intel-rapl:1", 8_000_000) == pytest.approx(5.0)


def test_a_counter_that_begins_again_at_zero_goes_on(tree: Tree) -> None:
    tree.set("intel-rapl:0", RANGE_UJ - 1_500_000)
    counter = Rapl(tree.classes)
    assert read_while(counter, tree, "intel-rapl:0", 500_000) == pytest.approx(2.0)
    assert read_while(counter, tree, "intel-rapl:0", 1_500_000) == pytest.approx(3.0)


def test_what_may_not_be_read_is_absent_with_the_remedy() -> None:
    with tempfile.TemporaryDirectory() as name:  # everybody may enter it, unlike the folders of tests
        os.chmod(name, 0o755)
        tree = Tree(Path(name))
        (tree.add("intel-rapl:0", "package-0") / "energy_uj").chmod(0o400)
        with without_rights(), pytest.raises(Absent, match=r"energy_uj may not be read.*chmod a\+r"):
            Rapl(tree.classes)


@contextmanager
def without_rights() -> Iterator[None]:
    """Root reads everything: it is somebody else for a while. Who is not root must be refused as it is."""
    if os.geteuid() != 0:
        pytest.skip("a file of somebody else is needed, which only root can make")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_where_nothing_counts_it_is_absent(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="there is no"):
        Rapl(tmp_path / "powercap")
    with pytest.raises(Absent, match="no zone of a processor package"):
        Rapl(tmp_path)
    found = energy.check(lambda: Rapl(tmp_path))
    assert found.ok
    assert "stays empty" in found.found


def test_a_counter_that_stands_still_is_absent(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "STANDSTILL_S", 0.05)
    with pytest.raises(Absent, match="stands still"):
        Rapl(tree.classes).read()


def test_a_gpu_needs_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Absent, match="pip install nvidia-ml-py"):
        Nvml()


# --- phones ----------------------------------------------------------------------------------------------------

RAILS = "t={at}\nCH0(T={at})[S10M_VDD_TPU], {tpu}\nCH1(T={at})[S2M_VDD_CPUCL2], {cpu}\n"


def test_rails_of_a_phone(tmp_path: Path) -> None:
    with running_phone() as running:
        chip = running.root / "data/local/tmp/iio:device0"
        chip.mkdir(parents=True)
        told = chip / "energy_value"
        told.write_text(RAILS.format(at=1_000, tpu=5_000_000, cpu=7_000_000))
        phone = Phone(Address.parse(running.serial), tmp_path / "keys")
        try:
            rails = Rails(lambda command: phone.run(command).output, "/data/local/tmp/iio:device*/energy_value")
            told.write_text(RAILS.format(at=3_500, tpu=5_000_000, cpu=9_500_000))
            assert rails.source == "rails S10M_VDD_TPU, S2M_VDD_CPUCL2"
            assert rails.read() == Reading(joules=2.5, at_s=3.5)
            told.write_text("CH0(T=9)[ANOTHER], 1\n")
            with pytest.raises(Absent, match="now tells of rails ANOTHER"):
                rails.read()
            with pytest.raises(Absent, match="No such file"):
                Rails(lambda command: phone.run(command).output)
        finally:
            phone.close()


# --- joules of a run -------------------------------------------------------------------------------------------


def test_joules_of_a_run_of_a_real_session(tree: Tree) -> None:
    """The counter advances with the processor time that this process uses: what a run adds is known from it."""
    loaded = backend_on(tree).load(canary(), profile=False)
    latency_ms = float(np.median(loaded.time(20)))
    used: dict[float, tuple[float, int]] = {}

    def burst(expected_ms: float) -> Burst:
        def run(runs: int) -> None:
            before = time.process_time()
            loaded.time(runs)
            used[expected_ms] = time.process_time() - before, runs  # the last is what counts, behind trials

        return Burst(run, expected_ms)

    start_uj = RANGE_UJ - 1_000_000  # it begins again at zero on the way
    tree.set("intel-rapl:0", start_uj)
    with powered(tree, start_uj=start_uj):
        found = joules_per_run(Rapl(tree.classes), [burst(latency_ms), burst(latency_ms / 2)])
    for joules, (seconds, runs) in zip(found.joules, used.values(), strict=True):
        assert joules == pytest.approx(WORK_W * seconds / runs, rel=0.15)
    assert found.evidence["source"] == "RAPL package-0"
    assert found.evidence["bursts"] == 2
    assert found.evidence["idle_w"] == pytest.approx([IDLE_W, IDLE_W], rel=0.25)


class Scripted:
    """A counter that draws so many watts at the first and at the last rest, and what the test says at work."""

    source = "script"
    burst_s = 0.01

    def __init__(self, first_w: float, last_w: float) -> None:
        self.idle_w, self.last_w = first_w, last_w
        self.at_s = self.joules = 0.0
        self.looked = time.perf_counter()

    def work(self, seconds: float, watts: float) -> None:
        self.at_s += seconds
        self.joules += seconds * watts
        self.idle_w = self.last_w

    def read(self) -> Reading:
        now = time.perf_counter()
        self.at_s += now - self.looked
        self.joules += (now - self.looked) * self.idle_w
        self.looked = now
        return Reading(self.joules, self.at_s)


def test_what_starting_a_tool_costs_is_taken_off() -> None:
    counter = Scripted(2.0, 2.0)

    def start(runs: int) -> None:
        counter.work(0.5, 30.0)
        counter.work(0.001 * runs, 12.0)

    assert joules_per_run(counter, [Burst(start, 1.0)], starts=True).joules == pytest.approx((0.001 * 10.0,))
    assert joules_per_run(counter, [Burst(start, 1.0)]).joules[0] > 1.0


def test_a_burst_is_as_long_as_its_runs_take_with_what_comes_between() -> None:
    """On a GPU a run of microseconds is started by a host that needs many more."""
    asked: list[int] = []

    def run(runs: int) -> None:
        asked.append(runs)
        time.sleep(1e-3 * runs)

    counter = Scripted(2.0, 2.0)
    joules_per_run(counter, [Burst(lambda runs: (run(runs), counter.work(1.0, 12.0)), 1e-3)])
    *_, burst = asked
    assert 1 <= burst <= counter.burst_s / 1e-3


def test_figures_that_say_nothing_are_refused() -> None:
    restless = Scripted(2.0, 4.0)
    with pytest.raises(Absent, match=r"2 W at rest before the bursts and 4 W after"):
        joules_per_run(restless, [Burst(lambda runs: restless.work(1.0, 12.0), 1.0)])
    lazy = Scripted(2.0, 2.0)
    with pytest.raises(Absent, match="no difference"):
        joules_per_run(lazy, [Burst(lambda runs: lazy.work(1.0, 1.5), 1.0)])
    frozen = Scripted(2.0, 2.0)
    frozen.read = lambda: Reading(1.0, 1.0)  # type: ignore[method-assign]
    with pytest.raises(Absent, match="stands still"):
        joules_per_run(frozen, [Burst(lambda runs: None, 1.0)])


# --- through the whole system ----------------------------------------------------------------------------------


def network() -> Network:
    build = NetworkBuilder()
    tensor = build.input((1, 16, 28, 28))
    for operator in (
        Convolution(input=(1, 16, 28, 28), filters=32, kernel=(3, 3), padding=same_padding(3), activation="relu"),
        SqueezeExcite(input=(1, 32, 28, 28), squeeze=8),
        Convolution(input=(1, 32, 28, 28), filters=64, kernel=(1, 1), activation="relu"),
        GlobalPool(input=(1, 64, 28, 28)),
        Linear(input=(1, 64), features=32),
    ):
        tensor = build.add(operator, tensor)
    return build.network()


def lease(backend: Backend, plan: Plan, **fields) -> Lease:  # type: ignore[no-untyped-def]
    return Lease(token=1, device="here", target=backend.target(), plan=plan, expires_in_s=60, **fields)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rapl, "burst_s", 0.1)


@pytest.mark.parametrize("name", ["cpu-litert", "cpu-onnxruntime"])
@pytest.mark.parametrize("context", ["in_context", "isolated"])
def test_operators_have_energy_where_the_processor_counts_it(tree: Tree, name: str, context: str, quick: None) -> None:
    backend = backend_on(tree, name)
    assert isinstance(backend, Metered)
    operators = network().operators
    plan = Plan(**{**LIGHT, "context": context})
    with powered(tree):
        report = measure(backend, lease(backend, plan, operators=operators))
    for operator, measurement in zip(operators, report.measurements, strict=True):
        assert measurement.energy_j is not None, (operator, report.evidence["energy"])
        # One thread works while it runs: joules are to milliseconds as its watts are, however fast the machine is.
        assert 0.2 < measurement.energy_j / (WORK_W * (measurement.latency_ms or 0) / 1e3) < 5
    facts = report.evidence["energy"]
    assert facts["source"] == "RAPL package-0"  # type: ignore[index,call-overload]
    if context == "isolated":
        assert facts["bursts"] == 3 * len(operators)  # type: ignore[index,call-overload]


def test_a_trouble_with_energy_is_none_with_latency(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "STANDSTILL_S", 0.05)
    nowhere = backends.create("cpu-onnxruntime", Options(settings={"powercap": str(tmp_path / "none")}))
    for backend, why in ((nowhere, "there is no"), (backend_on(tree), "stands still")):
        report = measure(backend, lease(backend, Plan(context="whole", **LIGHT), networks=(canary(),)))
        (measurement,) = report.measurements
        assert measurement.latency_ms is not None
        assert measurement.energy_j is None
        assert why in report.evidence["energy"]["absent"]  # type: ignore[index,call-overload,operator]


def test_an_agent_that_is_told_so_counts_none(tree: Tree, tmp_path: Path) -> None:
    backend = backend_on(tree)
    options = Options(energy=False, settings={"powercap": str(tree.classes)})
    asked = lease(backend, Plan(context="whole", **LIGHT), networks=(canary(),))
    job = Job(backend="cpu-onnxruntime", options=options, lease=asked)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "device_agents.child", str(tmp_path)]
    with powered(tree), subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        assert child.wait() == 0
    report = Report.model_validate_json((tmp_path / "report.json").read_bytes())
    assert report.evidence["energy"] == {"absent": "it was not asked for"}
    assert [m.energy_j for m in report.measurements] == [None]


def serve(server: RunningServer, backend: Backend) -> None:
    """What an agent does with one lease, in this process."""
    asked = LeaseRequest(target=backend.target().key, wait_s=5)
    answer = server.client.post(f"{API}/devices/here/leases", json=asked.model_dump(mode="json"))
    assert answer.status_code == 200, answer.text
    leased = Lease.model_validate_json(answer.content)
    assert server.client.post(f"{API}/leases/{leased.token}/heartbeat").status_code == 200
    report = measure(backend, leased)
    sent = server.client.post(f"{API}/leases/{leased.token}/results", json=report.model_dump(mode="json"))
    assert sent.json()["outcome"] == "accepted", sent.text


def ask(server: RunningServer, client: ProfilerClient, backend: Backend, wanted: Network) -> None:
    """Registers the device, and has it measure a network's operators and the network."""
    device = Device(name="here", targets=(backend.target(),))
    assert server.client.put(f"{API}/devices/here", json=device.model_dump(mode="json")).is_success
    pin = client.open_pin(backend.target().key, Plan(**LIGHT))
    operators = {operator.key: operator for operator in wanted.operators}
    lookup = LookupRequest(operators=operators, networks=(tuple(operators),))
    assert server.client.post(f"{API}/pins/{pin.id}/lookup", json=lookup.model_dump(mode="json")).is_success
    serve(server, backend)
    whole = NetworksRequest(networks=(wanted,), plan=Plan(context="whole", **LIGHT))
    path = f"{API}/targets/{backend.target().key}/networks"
    assert server.client.post(path, json=whole.model_dump(mode="json")).is_success
    serve(server, backend)


def test_energy_comes_to_a_search(tree: Tree, server: RunningServer, quick: None) -> None:
    wanted, backend = network(), backend_on(tree)
    with ProfilerClient(server.url) as client:
        with powered(tree):
            ask(server, client, backend, wanted)
        (estimate,) = client.estimates([wanted])
        rows = [client.row(operator) for operator in wanted.operators]
        energies = [row.energy_j for row in rows if row is not None and row.energy_j is not None]
        assert len(energies) == len(wanted.operators)
        assert estimate.energy_j == pytest.approx(sum(energies))
        assert metrics.load("energy").costs([wanted], client) == [estimate.energy_j]
        (whole,) = client.measure_networks([wanted], Plan(context="whole", **LIGHT))
        assert whole.energy_j is not None
        listed = server.client.get(f"{API}/targets/{backend.target().key}/rows").json()["rows"]
        assert {row["key"]: row["energy_j"] for row in listed} == {
            **{operator.key: row.energy_j for operator, row in zip(wanted.operators, rows, strict=True) if row},
            wanted.key: whole.energy_j,
        }
        assert server.client.get(f"{API}/rows/{whole.row}").json()["energy_j"] == whole.energy_j
        number = client.seal().snapshot
    assert number is not None
    with server.lab.database.read() as session:
        kept = snapshots.export_snapshot(session, number)
    assert sum(row.measurement.energy_j or 0.0 for row in kept.rows) == pytest.approx(estimate.energy_j)
    with server.lab.database.write() as session:
        again = snapshots.import_snapshot(session, snapshots.parse_snapshot(kept.model_dump_json()))
    with server.lab.database.read() as session:
        assert snapshots.export_snapshot(session, again).rows == kept.rows


def test_energy_that_is_absent_stays_absent(tmp_path: Path, server: RunningServer) -> None:
    wanted = network()
    backend = backends.create("cpu-onnxruntime", Options(settings={"powercap": str(tmp_path / "none")}))
    with ProfilerClient(server.url) as client:
        ask(server, client, backend, wanted)
        (estimate,) = client.estimates([wanted])
        assert estimate.status is Status.MEASURED
        assert estimate.energy_j is None
        assert [row.energy_j for operator in wanted.operators if (row := client.row(operator))] == [None] * 5
        with pytest.raises(InvalidInput, match=f"{backend.target().key} has no energy of convolution") as refused:
            metrics.load("energy").costs([wanted], client)
        assert refused.value.field == "search.metric"
        listed = server.client.get(f"{API}/targets/{backend.target().key}/rows").json()["rows"]
        assert [row["energy_j"] for row in listed] == [None] * 6
        evidence = server.client.get(f"{API}/rows/{listed[0]['id']}").json()["evidence"]
        assert "there is no" in evidence["energy"]["absent"]
