"""What is true around a measurement: who the machine is, how loaded it is, how fast its clocks run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from device_agents.backends import Check, Unreachable
from device_agents.settings import wish
from lut_db.errors import InvalidInput
from lut_db.measurements import Evidence, Failure
from lut_db.plans import Plan

CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
LOAD_CHECK_S = 2.0


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


def next_core(cores: Sequence[int], threads: int) -> bool:
    """Moves this thread, and what it starts, to the next of several cores, where one thread does all the work.

    False where there is no other. Raises Unreachable where it was taken away.
    """
    if threads > 1 or len(cores) < 2:
        return False
    now = os.sched_getaffinity(0)
    core = cores[(cores.index(*now) + 1) % len(cores)] if len(now) == 1 and now <= set(cores) else cores[0]
    try:
        os.sched_setaffinity(0, {core})
    except OSError as error:
        raise Unreachable(f"it cannot be moved to core {core}: {error}") from error
    return True


def check_cores(cores: Collection[int], threads: int) -> None:
    """Raises InvalidInput where this process may not use all of these cores, or where there are fewer than threads."""
    if not hasattr(os, "sched_getaffinity"):
        raise InvalidInput("this system pins no process to cores", field="cores", remedy="cores=any")
    allowed = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - allowed):
        had = ",".join(map(str, sorted(allowed)))
        raise InvalidInput(
            f"this process may not use core {missing[0]}", field="cores", remedy=f"some of {had}, or any"
        )
    if len(cores) < threads:
        raise InvalidInput(f"{threads} threads on {len(cores)} cores", field="cores", remedy="one for each thread")


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MALLOC_HUGE_PAGES = ("glibc.malloc.hugetlb=1", "glibc.malloc.mmap_max=0", f"glibc.malloc.top_pad={1 << 28}")
"""Huge pages, and everything in one heap that grows by a quarter of a GiB: what the allocator maps by itself, as it
does tensors, begins anywhere in a huge page and has none of its own where it ends before the next."""

GLIBC_WITH_HUGE_PAGES = (2, 35)
TUNABLES = "GLIBC_TUNABLES"


def huge_pages(settings: dict[str, str]) -> bool:
    """Whether memory is to lie in huge pages: as the setting `huge_pages` says, or else where the system can.

    In small pages a runtime's latency depends on which ones it happens to get, by one or two percent from session to
    session; in huge pages by half of that. Raises InvalidInput for another setting than on and off, and where the
    system cannot.
    """
    wished = wish(settings, "huge_pages")
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    allowed = HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()
    possible = allowed and name == "glibc" and numbers >= GLIBC_WITH_HUGE_PAGES
    if wished and not possible:
        raise InvalidInput(
            f"this system's allocator cannot use huge pages ({name} {version}, {HUGE_PAGES}: "
            f"{HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else 'missing'})",
            field="settings.huge_pages", remedy=f"echo madvise > {HUGE_PAGES}, with glibc 2.35 or newer; or off",
        )  # fmt: skip
    return possible and wished is not False


def huge_page_environment(wanted: bool) -> dict[str, str]:
    """The environment in which the allocator asks for huge pages; it reads it once, when a process starts."""
    if not wanted:
        return {}
    others = [item for item in os.environ.get(TUNABLES, "").split(":") if item and item not in MALLOC_HUGE_PAGES]
    return {TUNABLES: ":".join([*others, *MALLOC_HUGE_PAGES])}


def huge_page_mib() -> float | None:
    """How much of this process's memory lies in huge pages, None where the system does not say."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) / 1024
    except OSError:
        return None
    return None


class CpuWatch:
    """Watches the machine that this process runs on."""

    def __init__(self) -> None:
        self.meter = LoadMeter()

    def read(self, plan: Plan) -> tuple[Evidence, Failure | None]:
        load = self.meter.read()
        facts: Evidence = {
            "cpu_model": cpu_model(),
            "os_build": os_build(),
            "clock_policy": clock_policy(),
            "clock_mhz": clock_mhz(),
            "load_of_others": round(load.others, 4),
            "stolen": round(load.stolen, 4),
            "huge_page_mib": huge_page_mib(),
        }
        if load.others <= plan.load_tolerance:
            return facts, None
        message = (
            f"other processes used {load.others:.2f} cores while it was measured, more than the plan's "
            f"load_tolerance of {plan.load_tolerance}: let the machine be quiet"
        )
        return facts, Failure(cause="load", message=message)


def cpu_checks(threads: int, cores: tuple[int, ...]) -> Iterator[Check]:
    """What a backend on this machine's processor needs of it."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    missing = [core for core in cores if core not in allowed]
    yield Check(
        "cores", not missing and (not cores or len(cores) >= threads),
        f"{','.join(map(str, cores)) or 'any'} of {','.join(map(str, allowed)) or 'unknown'} for {threads} threads",
        "--cores takes cores that this process may use, at least one for each thread",
    )  # fmt: skip
    policy = clock_policy()
    yield Check(
        "clock policy", policy in ("performance", "unknown"), policy,
        "fix the clocks while measuring: cpupower frequency-set -g performance",
    )  # fmt: skip
    meter = LoadMeter()
    time.sleep(LOAD_CHECK_S)
    load = meter.read()
    yield Check(
        "load", load.others <= Plan().load_tolerance, f"{load.others:.2f} cores busy with other processes",
        "end other work on this machine while it measures",
    )  # fmt: skip
