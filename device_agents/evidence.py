"""What is true around a measurement: who the machine is, how loaded it is, how fast its clocks run."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware", "Model")):
                name = line.partition(":")[2].strip()
                if name:
                    return name
    except OSError:
        return platform.processor() or platform.machine()  # no such file outside Linux
    return platform.processor() or platform.machine()


def os_build() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def clock_policy() -> str:
    """The governor of the first core, or `unknown` where the system does not say (as in virtual machines)."""
    try:
        return (CPUFREQ / "scaling_governor").read_text().strip()
    except OSError:
        return "unknown"


def clock_mhz() -> float | None:
    """The present clock in MHz, or None where the system does not say."""
    frequency = psutil.cpu_freq()
    return round(frequency.current, 1) if frequency is not None and frequency.current else None


@dataclass(frozen=True)
class Load:
    """How busy the machine was between two moments, in cores, this process and its children left out."""

    others: float
    stolen: float
    seconds: float


class LoadMeter:
    """Reads how busy other processes are from now until `read` is called."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.start = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        system = psutil.cpu_times()
        own = self.process.cpu_times()
        # User time includes guests and low-priority work; waiting for input and output is not load.
        busy = system.user + system.system + getattr(system, "nice", 0.0) + getattr(system, "irq", 0.0)
        busy += getattr(system, "softirq", 0.0)
        mine = own.user + own.system + own.children_user + own.children_system
        return time.monotonic(), busy, mine, getattr(system, "steal", 0.0)

    def read(self) -> Load:
        then, busy_then, mine_then, stolen_then = self.start
        now, busy, mine, stolen = self._now()
        seconds = max(now - then, 1e-9)
        others = max(0.0, (busy - busy_then) - (mine - mine_then))
        return Load(others / seconds, max(0.0, stolen - stolen_then) / seconds, seconds)


def default_cores(threads: int) -> tuple[int, ...]:
    """The last cores that this process may use: the first ones serve interrupts and everybody else."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(allowed[-threads:]) if len(allowed) > threads else ()
