"""Profiles in nanoseconds, from runtimes that count microseconds.

ONNX Runtime's and XNNPACK's profilers round what an operator took down to whole microseconds, which is what many
operators take: a network's sum is off by a percent, always the same way for the same operators, so that no repetition
evens it out. The processes that measure are therefore started with a small library (`fine_clock.c`, compiled when it is
first wanted) in front of all others, and in it a clock which, for the runtime's library alone, is a thousand times as
fast. Where it cannot be had, profiles are in microseconds.

ONNX Runtime's profiler also does most of its own work, two to three microseconds for every kernel, between the readings
around that kernel. The clock stands still then.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from device_agents.backends import Check, NodeTimes, Unreachable, Unsupported
from device_agents.settings import wish
from lut_db.errors import InvalidInput

SETTING = {"fine_clock": "on or off: profiles in nanoseconds; on by default where there is a C compiler"}
SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-shared", "-fPIC")
LIMIT_S = 60.0
PRELOAD = "LD_PRELOAD"
SEPARATORS = " :"
PROBE = "import ctypes; ctypes.CDLL(None).latency_lab_fine_clock"
MICROSECOND_MS = 1e-3
ROUNDING = 1.01
"""How far a profile's sum may be beyond the time that passed, beside a tick for each entry."""


@dataclass(frozen=True)
class _Lack:
    """Why there is no fine clock, and what to do about it."""

    why: str
    remedy: str


@cache
def _built() -> Path | _Lack:
    """The compiled library, kept in the user's cache and tried out."""
    system, version = platform.libc_ver()
    if sys.platform != "linux" or system != "glibc":
        return _Lack("it takes Linux and glibc", "measure in microseconds, fine_clock=off")
    kept = "make the user's cache folder writable, or name another in XDG_CACHE_HOME"
    try:
        said = "\0".join((SOURCE.read_text(), platform.machine(), version, *FLAGS))
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latency-lab"
        library = folder / f"fine-clock-{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
        if set(SEPARATORS) & set(str(library)):
            return _Lack(
                f"{PRELOAD} cannot name {library}", "name a folder without spaces and colons in XDG_CACHE_HOME"
            )
        if library.exists() and _trouble(library) is None:
            return library
        compiler = _compiler()
        if compiler is None:
            return _Lack("there is no C compiler", "apt install gcc, or name one in the variable CC")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            partial = Path(made) / library.name
            command = [*compiler, *FLAGS, "-o", str(partial), str(SOURCE), "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            if done.returncode:
                return _Lack(
                    f"{shlex.join(compiler)} does not compile {SOURCE}: {done.stderr.strip()[-500:]}",
                    "a working C compiler, named in the variable CC",
                )
            if trouble := _trouble(partial):
                return _Lack(f"what {shlex.join(compiler)} made does not run: {trouble}", kept)
            partial.replace(library)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: a user without a home
        return _Lack(str(error), kept)
    return library


def _compiler() -> list[str] | None:
    if said := os.environ.get("CC"):
        return shlex.split(said)
    return next(([compiler] for compiler in COMPILERS if shutil.which(compiler)), None)


def _trouble(library: Path) -> str | None:
    """What goes wrong in a process that is started with a library, if anything does: one made for another system or cut
    off ends it, one in a folder from which nothing may run is left out."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROBE], env=os.environ | {PRELOAD: str(library)}, capture_output=True,
        text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    return (done.stderr.strip()[-500:] or f"it ends with {done.returncode}") if done.returncode else None


def check_setting(settings: Mapping[str, str]) -> None:
    """Raises InvalidInput for another setting `fine_clock` than on and off, and where it is on and cannot be had."""
    if not wish(settings, "fine_clock") or _preloaded() is not None:
        return
    built = _built()
    if isinstance(built, _Lack):
        raise InvalidInput(
            f"no fine clock here: {built.why}", field="settings.fine_clock", remedy=f"{built.remedy}; or off"
        )


def check(settings: Mapping[str, str]) -> Check:
    """What the doctor says: without the fine clock it can be measured, if less well."""
    if wish(settings, "fine_clock") is False:
        return Check("fine clock", True, "off: profiles are in microseconds")
    built = _built()
    if isinstance(built, Path):
        return Check("fine clock", True, f"{built}: profiles are in nanoseconds")
    return Check("fine clock", True, f"none, profiles are in microseconds: {built.why}. To have it: {built.remedy}")


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a process can have a fine clock, from its start."""
    if wish(settings, "fine_clock") is False:
        return {}
    built = _built()
    if isinstance(built, _Lack):
        return {}
    given = os.environ.get(PRELOAD, "").replace(" ", ":").split(":")
    return {PRELOAD: ":".join([str(built), *(item for item in given if item not in ("", str(built)))])}


def _preloaded() -> ctypes.CDLL | None:
    """This process's libraries, where the fine clock is one of them."""
    libraries = ctypes.CDLL(None)
    if not hasattr(libraries, "latency_lab_fine_clock"):
        return None
    libraries.latency_lab_fine_clock_readings.restype = ctypes.c_int64
    libraries.latency_lab_fine_clock_stops.restype = ctypes.c_int64
    return libraries


class Clock:
    """What the profiler of one session counts in.

    `library` is part of the name of the file that has the profiler in it, which must have been loaded. It gets the fine
    clock if this process was started with one. `still`: it leaves out what ONNX Runtime's profiler does around kernels,
    where a session has one thread; the threads of others read the clock in kernels too. Raises Unreachable where the
    setting says so and the process was not started so.
    """

    def __init__(self, library: str, settings: Mapping[str, str], *, still: bool = False):
        wished = wish(settings, "fine_clock")
        self.libraries = None if wished is False else _preloaded()
        factor = 1
        if self.libraries is not None:
            factor = int(self.libraries.latency_lab_fine_clock(library.encode(), int(still)))
        if factor == 1 and wished:
            raise Unreachable(
                f"fine_clock=on, but this process was started without its library, or {library} is not in it: start "
                "the agent again, or set fine_clock=off"
            )
        self.tick_ms = MICROSECOND_MS / max(factor, 1)
        self.readings = self.stops = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around every run of the session: how often it read the fine clock, and how often that had stood still
        before. There are others in the process."""
        readings, stops = self._count()
        yield
        now_readings, now_stops = self._count()
        self.readings += now_readings - readings
        self.stops += now_stops - stops

    def _count(self) -> tuple[int, int]:
        if self.libraries is None:
            return 0, 0
        return (
            int(self.libraries.latency_lab_fine_clock_readings()),
            int(self.libraries.latency_lab_fine_clock_stops()),
        )

    def believed(self, times: NodeTimes, passed_ms: float) -> NodeTimes:
        """A profile of runs that took so long in all. Raises Unsupported where it was not taken by the clock that it
        was given, tells more time than passed, or has the profiler's own work in some of its entries alone."""
        entries = len(times.total_ms) * int(times.events.sum())
        if self.tick_ms < MICROSECOND_MS and self.readings < entries:
            raise Unsupported(
                f"the profiler read the fine clock {self.readings} times for {entries} entries: it has another; set "
                "fine_clock=off"
            )
        if 0 < self.stops < entries:
            raise Unsupported(
                f"the fine clock left out the profiler's own work in {self.stops} of {entries} entries; set "
                "fine_clock=off"
            )
        told_ms = float(times.total_ms.sum())
        if told_ms > ROUNDING * passed_ms + entries * self.tick_ms:
            raise Unsupported(f"the profile tells {told_ms:.4g} ms of runs that took {passed_ms:.4g} ms")
        return times
