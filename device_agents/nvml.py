"""An NVIDIA GPU as its driver tells of it through NVML: which one it is, how fast and how hot, and who else uses it.

None of this makes a CUDA context, so the loop of an agent can ask while nothing is measured: a process that holds one
counts as a user of the GPU. NVML numbers GPUs as `nvidia-smi` does and CUDA in an order of its own; the process that
measures is therefore shown its one GPU by `CUDA_VISIBLE_DEVICES`, as CUDA's device 0.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from device_agents import evidence
from device_agents.backends import Check, Options, Unreachable
from device_agents.settings import whole
from lut_db.errors import InvalidInput
from lut_db.measurements import Evidence, Failure
from lut_db.plans import Plan

VISIBLE = "CUDA_VISIBLE_DEVICES"
FLUSH_BYTES = 256 << 20
"""What is written to empty a GPU's second-level cache: the largest hold half of it."""
CLOCK_STEP_MHZ = 15
"""NVIDIA's clocks go in steps of this: locked at a figure between two, a GPU takes the nearest."""

SETTINGS = {
    "gpu": "which GPU, as nvidia-smi counts them; 0 by default",
    "clocks_mhz": "the SM clock that nvidia-smi -lgc has locked, held to when it is measured; not locked by default",
}

POWER_CAP = "power cap"
SLOWED = {
    0x04: POWER_CAP,
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Why clocks are lower than was asked for, by NVML's bits. The cap on power is part of a GPU's ordinary life, the rest
is not."""


@dataclass(frozen=True)
class State:
    """A GPU at one moment; None stands for what its driver does not tell."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    slowed: tuple[str, ...] | None
    heat_counter: int | None
    """Grows while heat holds the clocks down."""
    users: tuple[int, ...] | None
    """Processes that hold a CUDA context on it."""


class Gpu:
    """One GPU. Raises InvalidInput with the remedy where there is no NVML or no such GPU."""

    def __init__(self, index: int = 0) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise InvalidInput("the package pynvml is not there", field="settings.gpu",
                               remedy="pip install nvidia-ml-py") from error  # fmt: skip
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            self.count: int = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise InvalidInput(
                f"there is no NVIDIA GPU to be found: NVML says {error}", field="settings.gpu",
                remedy="nvidia-smi must list one: install NVIDIA's driver, or give the container its GPUs",
            ) from error  # fmt: skip
        if index >= self.count:
            raise InvalidInput(f"there is no GPU {index}, but {self.count}", field="settings.gpu",
                               remedy="nvidia-smi -L lists them")  # fmt: skip
        self.index = index
        try:
            self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
            self.name: str = nvml.nvmlDeviceGetName(self._handle)
            self.uuid: str = nvml.nvmlDeviceGetUUID(self._handle)
            self.driver: str = nvml.nvmlSystemGetDriverVersion()
        except nvml.NVMLError as error:
            raise InvalidInput(f"GPU {index} does not answer: {error}", field="settings.gpu",
                               remedy="see dmesg; the machine may have to be started again") from error  # fmt: skip
        if (mig := self._told("nvmlDeviceGetMigMode")) and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE:
            raise InvalidInput(f"GPU {index} is cut into instances, whose neighbours cannot be seen",
                               field="settings.gpu", remedy=f"nvidia-smi -i {index} -mig 0")  # fmt: skip

    @classmethod
    def of(cls, options: Options) -> Gpu:
        """The GPU that the settings name."""
        return cls(whole(options.settings, "gpu", 0) or 0)

    def _told(self, *names: str, asking: tuple[Any, ...] = ()) -> Any:
        """What a function of NVML says of this GPU, by the first of its names, old and new, that is understood. None
        where pynvml, the driver or the GPU has no such thing."""
        nvml = self._nvml
        untold = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_NO_PERMISSION)
        for name in names:
            if (ask := getattr(nvml, name, None)) is None:
                continue
            try:
                return ask(self._handle, *asking)
            except nvml.NVMLError as error:
                if error.value not in untold:
                    raise Unreachable(f"GPU {self.index} ({self.name}): NVML says {error}") from error
        return None

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to see this GPU, and no other, as CUDA's device 0."""
        return {VISIBLE: self.uuid}

    def check_visible(self) -> None:
        """Raises InvalidInput where CUDA's device 0 of this process may be another GPU."""
        seen = os.environ.get(VISIBLE)
        if seen != self.uuid and not (seen is None and self.count == 1):
            raise InvalidInput(
                f"this process may see other GPUs than number {self.index}", field="settings.gpu",
                remedy=f"start it with {VISIBLE}={self.uuid}",
            )  # fmt: skip

    def clock_policy(self, locked_mhz: int | None) -> str:
        """For a target. No driver tells whether clocks are locked: that is known from the setting alone."""
        if locked_mhz is not None:
            return f"locked at {locked_mhz} MHz"
        nvml = self._nvml
        chosen = self._told("nvmlDeviceGetApplicationsClock", asking=(nvml.NVML_CLOCK_GRAPHICS,))
        usual = self._told("nvmlDeviceGetDefaultApplicationsClock", asking=(nvml.NVML_CLOCK_GRAPHICS,))
        return "default" if chosen is None or chosen == usual else f"application clocks {chosen} MHz"

    def power_limit_w(self) -> float | None:
        """The cap on power that was set."""
        limit_mw = self._told("nvmlDeviceGetPowerManagementLimit")
        return None if limit_mw is None else limit_mw / 1e3

    def persistent(self) -> bool | None:
        """Whether the driver keeps its state, locked clocks too, while no process uses the GPU."""
        mode = self._told("nvmlDeviceGetPersistenceMode")
        return None if mode is None else mode == self._nvml.NVML_FEATURE_ENABLED

    def millijoules(self) -> int | None:
        """Energy since the driver was loaded, of the whole board; since Volta."""
        counted = self._told("nvmlDeviceGetTotalEnergyConsumption")
        return None if counted is None else int(counted)

    def state(self) -> State:
        """How it is now. Raises Unreachable where it has gone."""
        nvml = self._nvml
        power_mw = self._told("nvmlDeviceGetPowerUsage")
        # Drivers before 535 have the older name of the first, those before 510 of the second.
        bits = self._told("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        users = self._told("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")
        counters = self._told("nvmlDeviceGetFieldValues", asking=([nvml.NVML_FI_DEV_PERF_POLICY_THERMAL],))
        heat = counters[0] if counters is not None and counters[0].nvmlReturn == nvml.NVML_SUCCESS else None
        return State(
            sm_mhz=self._told("nvmlDeviceGetClockInfo", asking=(nvml.NVML_CLOCK_SM,)),
            memory_mhz=self._told("nvmlDeviceGetClockInfo", asking=(nvml.NVML_CLOCK_MEM,)),
            temperature_c=self._told("nvmlDeviceGetTemperature", asking=(nvml.NVML_TEMPERATURE_GPU,)),
            power_w=None if power_mw is None else power_mw / 1e3,
            slowed=None if bits is None else tuple(why for bit, why in SLOWED.items() if bits & bit),
            heat_counter=None if heat is None else int(heat.value.ullVal),
            users=None if users is None else tuple(user.pid for user in users),
        )

    def ready(self) -> None:
        """Raises Unreachable where it is throttled or used by others. For a process that does not use it itself."""
        now = self.state()
        refusal = _heat(now, now) or _company(now.users, measuring=False)
        if refusal is not None:
            raise Unreachable(f"GPU {self.index} ({self.name}): {refusal.message}")


def _heat(before: State, after: State) -> Failure | None:
    """Why figures taken between two moments are too slow, if something held the clocks down."""
    why = [name for state in (before, after) for name in state.slowed or () if name != POWER_CAP]
    counters = (before.heat_counter, after.heat_counter)
    if not why and None not in counters and counters[0] != counters[1]:
        why = ["heat, in between"]
    if not why:
        return None
    message = (
        f"the GPU held its clocks down ({', '.join(dict.fromkeys(why))}; {after.temperature_c} °C): cool it, or lock "
        "its clocks lower"
    )
    return Failure(cause="hot", message=message)


def _company(users: Collection[int] | None, *, measuring: bool) -> Failure | None:
    """Why figures are not this process's alone, if others hold the GPU too; `measuring`: this one holds it.

    In a container NVML tells the host's numbers: where our own is not among them, one of them is it.
    """
    others = set(users or ()) - {os.getpid()}
    unnamed = measuring and os.getpid() not in (users or ()) and bool(others)
    if len(others) == int(unnamed):
        return None
    numbers = ", ".join(map(str, sorted(others)))
    among = ", this one among them by another number" if unnamed else ""
    message = f"other processes use the GPU too ({numbers}{among}): end them, or move them to another GPU"
    return Failure(cause="load", message=message)


def _drift(after: State, locked_mhz: int | None) -> Failure | None:
    """Why the clocks were not locked, if they were to be. Read behind the last run, before the GPU comes to rest."""
    if locked_mhz is None or after.sm_mhz is None or abs(after.sm_mhz - locked_mhz) <= CLOCK_STEP_MHZ:
        return None
    message = (
        f"the SM clock is {after.sm_mhz} MHz where clocks_mhz says that it is locked at {locked_mhz} MHz: "
        f"nvidia-smi -lgc {locked_mhz},{locked_mhz}"
    )
    return Failure(cause="drift", message=message)


class GpuWatch:
    """Watches a GPU and the machine that feeds it. `host_matters`: figures suffer where that machine is busy."""

    def __init__(self, gpu: Gpu, locked_mhz: int | None, *, host_matters: bool) -> None:
        self.gpu = gpu
        self.locked_mhz = locked_mhz
        self.host_matters = host_matters
        self.cpu = evidence.CpuWatch()
        self.begin = gpu.state()

    def read(self, plan: Plan) -> tuple[Evidence, Failure | None]:
        end = self.gpu.state()
        facts, busy = self.cpu.read(plan)
        both = (self.begin, end)
        facts |= {
            "gpu": self.gpu.name,
            "driver": self.gpu.driver,
            "clock_policy": self.gpu.clock_policy(self.locked_mhz),
            "sm_mhz": [state.sm_mhz for state in both],
            "memory_mhz": [state.memory_mhz for state in both],
            "temperature_c": [state.temperature_c for state in both],
            "power_w": [state.power_w for state in both],
            "power_limit_w": self.gpu.power_limit_w(),
            "slowed": [None if state.slowed is None else list(state.slowed) for state in both],
            "gpu_processes": [None if state.users is None else len(state.users) for state in both],
        }
        company = _company(self.begin.users, measuring=True) or _company(end.users, measuring=True)
        refusal = _heat(self.begin, end) or company or _drift(end, self.locked_mhz)
        return facts, refusal or (busy if self.host_matters else None)


def locked_mhz(options: Options) -> int | None:
    """The clock that the setting `clocks_mhz` says is locked."""
    return whole(options.settings, "clocks_mhz")


def checks(options: Options) -> Iterator[Check]:
    """What a backend on a GPU needs of it and of its driver. Without a GPU, the first, no other is looked at."""
    try:
        gpu = Gpu.of(options)
        now = gpu.state()
    except (InvalidInput, Unreachable) as lack:
        yield Check("GPU", False, lack.message, lack.remedy or "see nvidia-smi")
        return
    yield Check("GPU", True, f"{gpu.index}: {gpu.name}, driver {gpu.driver}")
    locked = locked_mhz(options)
    yield Check(
        "clocks", locked is not None, f"{gpu.clock_policy(locked)}, {now.sm_mhz} MHz at present",
        f"nvidia-smi -i {gpu.index} -lgc MHZ,MHZ as root, with a clock that it holds at work, and "
        "--setting clocks_mhz=MHZ",
    )  # fmt: skip
    yield Check(
        "persistence", gpu.persistent() is not False, {True: "on", False: "off", None: "untold"}[gpu.persistent()],
        f"nvidia-smi -i {gpu.index} -pm 1, or locked clocks are forgotten when the GPU is idle",
    )  # fmt: skip
    hot = _heat(now, now)
    yield Check("heat", hot is None, hot.message if hot else f"{now.temperature_c} °C", "cool it")
    shared = _company(now.users, measuring=False)
    yield Check(
        "other processes", shared is None, shared.message if shared else "none" if now.users is not None else "untold",
        "end them, or move them to another GPU",
    )  # fmt: skip
