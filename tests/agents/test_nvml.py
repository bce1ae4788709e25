"""What an NVIDIA GPU's driver says, and what is refused for it: pynvml itself, over a library that plays the driver."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from gpus import Board, Library, play_driver

from device_agents import nvml
from device_agents.backends import Options, Unreachable
from device_agents.backends.cuda_onnxruntime import CudaOnnxruntime
from device_agents.backends.cuda_torch import CudaTorch, Setup
from device_agents.energy import Absent, Nvml
from device_agents.measuring import measure
from lut_db.canary import canary
from lut_db.errors import InvalidInput
from lut_db.measurements import Evidence, Failure
from lut_db.networks import Network
from lut_db.plans import Plan
from lut_db.targets import Target
from lut_db.wire import Lease

CALM = Plan(load_tolerance=64.0)
UUID = "GPU-00000001-0000-0000-0000-000000000000"
ELSEWHERE = 7_654_321
"""A process that is none of this machine's."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """A machine with one GPU that only this process uses, as far as pynvml can tell."""
    return play_driver(monkeypatch)


def watched(library: Library, locked_mhz: int | None = None, **changed: object) -> tuple[Evidence, Failure | None]:
    """What a watch says over a time in which something changed."""
    watch = nvml.GpuWatch(nvml.Gpu(), locked_mhz, host_matters=False)
    library.change(**changed)
    return watch.read(CALM)


def test_a_gpu_says_who_it_is(library: Library) -> None:
    gpu = nvml.Gpu()
    assert (gpu.name, gpu.uuid, gpu.driver) == ("NVIDIA H100 80GB HBM3", UUID, "580.65.06")
    assert gpu.environment() == {"CUDA_VISIBLE_DEVICES": UUID}
    assert gpu.power_limit_w() == 700.0
    assert gpu.state() == nvml.State(1410, 2619, 41, 123.456, (), 0, (os.getpid(),))


@pytest.mark.parametrize(("settings", "message"), [
    ({"gpu": "1"}, "no GPU 1, but 1 .*nvidia-smi -L"), ({"gpu": "first"}, "settings.gpu: 'first' is no whole number"),
    ({"gpu": "-1"}, "no whole number"),
])  # fmt: skip
def test_a_gpu_that_is_not_there(library: Library, settings: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        nvml.Gpu.of(Options(settings=settings))


def test_a_gpu_in_instances_is_refused(library: Library) -> None:
    library.change(mig=1)
    with pytest.raises(InvalidInput, match=r"cut into instances.*-mig 0"):
        nvml.Gpu()


def test_cuda_s_first_device_must_be_this_gpu(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.Gpu().check_visible()  # there is only one
    library.boards.append(Board())
    with pytest.raises(InvalidInput, match=f"CUDA_VISIBLE_DEVICES={UUID}"):
        nvml.Gpu().check_visible()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUID)
    nvml.Gpu(0).check_visible()
    with pytest.raises(InvalidInput, match="00000002"):
        nvml.Gpu(1).check_visible()


def test_a_quiet_gpu_is_believed_and_described(library: Library) -> None:
    facts, refusal = watched(library, sm_mhz=1395, temperature_c=44)
    assert refusal is None
    assert facts["gpu"] == "NVIDIA H100 80GB HBM3"
    assert facts["sm_mhz"] == [1410, 1395]
    assert facts["temperature_c"] == [41, 44]
    assert facts["gpu_processes"] == [1, 1]
    assert facts["clock_policy"] == "default"
    assert facts["cpu_model"]


@pytest.mark.parametrize("bit", [0x08, 0x20, 0x40, 0x80])
def test_a_gpu_that_is_slowed_down_is_refused(library: Library, bit: int) -> None:
    facts, refusal = watched(library, reasons=bit | 0x04)
    assert refusal is not None
    assert refusal.cause == "hot"
    assert nvml.SLOWED[bit] in refusal.message
    assert facts["slowed"] == [[], [nvml.POWER_CAP, nvml.SLOWED[bit]]]
    # What slowed it down at first is no better for having passed.
    assert (watched(library, reasons=0)[1] or refusal).cause == "hot"


def test_heat_in_between_is_seen_and_the_power_cap_is_none(library: Library) -> None:
    _, refusal = watched(library, heat_counter=17)
    assert refusal is not None
    assert (refusal.cause, "in between" in refusal.message) == ("hot", True)
    assert watched(library, reasons=0x04 | 0x01)[1] is None


@pytest.mark.parametrize(("others", "refused"), [
    ((os.getpid(),), False), ((os.getpid(), ELSEWHERE), True),
    # In a container the driver tells the host's numbers: one of them is this process.
    ((ELSEWHERE,), False), ((ELSEWHERE, ELSEWHERE + 1), True), ((), False), (None, False),
])  # fmt: skip
def test_company_is_refused(library: Library, others: tuple[int, ...] | None, refused: bool) -> None:
    _, refusal = watched(library, users=others)
    assert (refusal is not None) is refused
    if refusal is not None:
        assert refusal.cause == "load"
        assert str(ELSEWHERE) in refusal.message


def test_company_that_has_left_meanwhile_is_refused_too(library: Library) -> None:
    library.change(users=(os.getpid(), ELSEWHERE))
    _, refusal = watched(library, users=(os.getpid(),))
    assert refusal is not None
    assert refusal.cause == "load"


def test_clocks_must_be_as_they_are_said_to_be_locked(library: Library) -> None:
    assert watched(library, 1410, sm_mhz=1425)[1] is None
    facts, refusal = watched(library, 1410, sm_mhz=1980)
    assert refusal is not None
    assert (refusal.cause, "-lgc 1410,1410" in refusal.message) == ("drift", True)
    assert facts["clock_policy"] == "locked at 1410 MHz"
    assert watched(library, 1410, sm_mhz=None)[1] is None


def test_the_host_s_load_counts_where_it_feeds_the_gpu(library: Library) -> None:
    plan = Plan(load_tolerance=1e-9)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            watches = [nvml.GpuWatch(nvml.Gpu(), None, host_matters=matters) for matters in (True, False)]
            time.sleep(1)
            refusals = [watch.read(plan)[1] for watch in watches]
        finally:
            other.kill()
    assert refusals[0] is not None
    assert refusals[0].cause == "load"
    assert refusals[1] is None


def test_an_agent_waits_for_a_gpu_that_is_not_ready(library: Library) -> None:
    gpu = nvml.Gpu()
    library.change(users=())
    gpu.ready()
    library.change(users=(ELSEWHERE,))
    with pytest.raises(Unreachable, match=f"other processes.*{ELSEWHERE}"):
        gpu.ready()
    library.change(users=(), reasons=0x40)
    with pytest.raises(Unreachable, match="hardware thermal slowdown"):
        gpu.ready()
    library.change(reasons=0)
    gpu.ready()


def test_a_driver_that_tells_little_refuses_nothing(library: Library) -> None:
    untold = dict.fromkeys(("sm_mhz", "memory_mhz", "temperature_c", "power_mw", "reasons", "heat_counter", "users"))
    facts, refusal = watched(library, **untold)
    assert refusal is None
    assert facts["sm_mhz"] == [1410, None]
    assert facts["slowed"] == [[], None]


def test_older_drivers_are_understood(library: Library) -> None:
    library.absent = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetCurrentClocksEventReasons")
    _, refusal = watched(library, users=(os.getpid(), ELSEWHERE))
    assert (refusal.cause if refusal else "") == "load"
    _, refusal = watched(library, reasons=0x08)
    assert (refusal.cause if refusal else "") == "hot"


def test_a_gpu_that_is_lost_is_unreachable(library: Library) -> None:
    class Watched:
        """A backend of nothing but a watch."""

        starts = False

        def __init__(self) -> None:
            self.gpu = nvml.Gpu()

        def target(self) -> Target:
            return target

        def load(self, model: Network, *, profile: bool) -> Watched:
            return self

        def time(self, runs: int) -> list[float]:
            return [1.0] * runs

        def watch(self) -> nvml.GpuWatch:
            return nvml.GpuWatch(self.gpu, None, host_matters=False)

    backend = Watched()
    target = Target(device_model="GPU", os_build="Linux", runtime="torch", runtime_version="2")
    library.change(lost=True)
    plan = Plan(context="whole", carriers=1, warmup_runs=0, min_runs=1, settle_runs=1, max_runs=1)
    lease = Lease(token=1, device="here", target=target, plan=plan, expires_in_s=60, networks=(canary(),))
    (measurement,) = measure(backend, lease).measurements  # type: ignore[arg-type]
    assert measurement.failure is not None
    assert measurement.failure.cause == "unreachable"
    assert "GPU is lost" in measurement.failure.message


def test_clock_policies(library: Library) -> None:
    gpu = nvml.Gpu()
    assert gpu.clock_policy(None) == "default"
    assert gpu.clock_policy(1410) == "locked at 1410 MHz"
    library.change(application_mhz=1200)
    assert gpu.clock_policy(None) == "application clocks 1200 MHz"
    library.change(application_mhz=None, default_mhz=None)
    assert gpu.clock_policy(None) == "default"


def test_the_doctor_looks_at_everything(library: Library) -> None:
    library.change(users=())
    checks = {check.name: check for check in nvml.checks(Options(settings={"clocks_mhz": "1410"}))}
    assert list(checks) == ["GPU", "clocks", "persistence", "heat", "other processes"]
    assert all(check.ok for check in checks.values())
    assert "580.65.06" in checks["GPU"].found
    library.change(users=(ELSEWHERE,), persistence=0, reasons=0x20)
    checks = {check.name: check for check in nvml.checks(Options())}
    assert [name for name, check in checks.items() if not check.ok] == [
        "clocks", "persistence", "heat", "other processes",
    ]  # fmt: skip
    assert all(check.remedy for check in checks.values() if not check.ok)
    assert "nvidia-smi -i 0 -lgc" in checks["clocks"].remedy


def test_joules_of_the_board(library: Library) -> None:
    counter = Nvml()
    timer = threading.Timer(0.02, library.change, kwargs={"energy_mj": 9_500})
    timer.start()
    assert counter.read().joules == pytest.approx(4.5)
    timer.join()
    library.change(energy_mj=None)
    with pytest.raises(Absent, match="does not count"):
        counter.read()
    library.change(lost=True)
    with pytest.raises(Absent, match="lost"):
        counter.read()


def test_targets_say_what_latencies_depend_on(library: Library) -> None:
    gpu = nvml.Gpu()
    torch_targets = [
        CudaTorch(gpu, setup, locked).target()
        for setup in (
            Setup(),
            Setup(precision="fp16"),
            Setup(tf32=True),
            Setup(channels_last=True),
            Setup(l2_flush=True),
        )
        for locked in (None, 1410)
    ]
    ort = {"level": "all", "precision": "fp32", "tf32": False, "l2_flush": False}
    runtimes = [
        CudaOnnxruntime(Options(), gpu, None, **{**ort, **changed}).target()  # type: ignore[arg-type]
        for changed in ({}, {"level": "basic"}, {"precision": "fp16"}, {"tf32": True}, {"l2_flush": True})
    ]
    targets = [*torch_targets, *runtimes]
    assert len({target.key for target in targets}) == len(targets)
    assert {(target.accelerator, target.device_model) for target in targets} == {("cuda", "NVIDIA H100 80GB HBM3")}
    assert torch_targets[2].precision == "fp16"
    assert "driver 580.65.06" in torch_targets[0].os_build
    library.change(limit_mw=500_000)
    assert CudaTorch(gpu, Setup(), None).target().key != torch_targets[0].key


def test_energy_is_not_counted_with_what_empties_the_cache(library: Library) -> None:
    gpu = nvml.Gpu()
    assert CudaTorch(gpu, Setup(), None).counter().source == "NVML GPU 0"
    with pytest.raises(Absent, match="empties the cache"):
        CudaTorch(gpu, Setup(l2_flush=True), None).counter()
