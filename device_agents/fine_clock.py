"""Times of kernels in nanoseconds, from runtimes whose profilers count microseconds.

Profilers round what an operator took down to whole microseconds, which is what many operators take: a network's sum is
off by a percent, always the same way for the same operators, so that no repetition evens it out. The processes that
measure are therefore started with a small library (`fine_clock.c`, compiled when it is first wanted) in front of all
others. For XNNPACK's profiler, which does little else than read the clock, there is a clock in it that is a thousand
times as fast (`Clock`). ONNX Runtime's takes longer around a kernel than many kernels do, and fills the caches; so its
kernels are told apart without it, by the objects that it makes for their results (`Tracer`, read by `ort_marks.py`).
Where the library cannot be had, profiles are in microseconds.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from device_agents.backends import Check, NodeTimes, Unreachable, Unsupported
from device_agents.settings import wish
from lut_db.errors import InvalidInput

SETTING = {"fine_clock": "on or off: kernels in nanoseconds; on by default where there is a C compiler"}
SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-shared", "-fPIC")
LIMIT_S = 60.0
PRELOAD = "LD_PRELOAD"
SEPARATORS = " :"
PROBE = "import ctypes; ctypes.CDLL(None).latency_lab_fine_clock"
MICROSECOND_MS = 1e-3
ENTRY = np.dtype([("ns", np.int64), ("place", np.int64)])
"""An entry of a trace: when, by the monotonic clock, and where in a library's code; below zero, it read the clock."""

T = TypeVar("T")
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
    libraries.latency_lab_traced.restype = ctypes.c_int64
    libraries.latency_lab_trace.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    libraries.latency_lab_trace.restype = None
    return libraries


def _refused(library: str) -> Unreachable:
    return Unreachable(
        f"fine_clock=on, but this process was started without its library, or {library} is not in it: start the agent "
        "again, or set fine_clock=off"
    )


class Clock:
    """What the profiler of one session counts in.

    `library` is part of the name of the file that has the profiler in it, which must have been loaded. It gets the fine
    clock if this process was started with one. Raises Unreachable where the setting says so and the process was not
    started so.
    """

    def __init__(self, library: str, settings: Mapping[str, str]):
        wished = wish(settings, "fine_clock")
        self.libraries = None if wished is False else _preloaded()
        factor = 1
        if self.libraries is not None:
            factor = int(self.libraries.latency_lab_fine_clock(library.encode()))
        if factor == 1 and wished:
            raise _refused(library)
        self.tick_ms = MICROSECOND_MS / factor
        self.readings = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around every run of the session: how often it read the fine clock. There are others in the process."""
        readings = self._count()
        yield
        self.readings += self._count() - readings

    def _count(self) -> int:
        return 0 if self.libraries is None else int(self.libraries.latency_lab_fine_clock_readings())

    def believed(self, times: NodeTimes, passed_ms: float) -> NodeTimes:
        """A profile of runs that took so long in all. Raises Unsupported where it was not taken by the clock that it
        was given, or tells more time than passed."""
        entries = len(times.total_ms) * int(times.events.sum())
        if self.tick_ms < MICROSECOND_MS and self.readings < entries:
            raise Unsupported(
                f"the profiler read the fine clock {self.readings} times for {entries} entries: it has another; set "
                "fine_clock=off"
            )
        told_ms = float(times.total_ms.sum())
        if told_ms > ROUNDING * passed_ms + entries * self.tick_ms:
            raise Unsupported(f"the profile tells {told_ms:.4g} ms of runs that took {passed_ms:.4g} ms")
        return times


class Tracer:
    """Writes down when a library makes objects, and from which places in its code, and when it reads the clock.

    `library` as for `Clock`. There is one in a process; what it wrote down is overwritten by the next trace.
    """

    _room: ClassVar[NDArray[np.void]] = np.zeros(0, dtype=ENTRY)

    def __init__(self, libraries: ctypes.CDLL):
        self.libraries = libraries

    @classmethod
    def of(cls, library: str, settings: Mapping[str, str]) -> Tracer | None:
        """None where the setting is off, or is not given and this process was started without the fine clock. Raises
        Unreachable where it is on and cannot be had."""
        wished = wish(settings, "fine_clock")
        libraries = None if wished is False else _preloaded()
        if libraries is not None and libraries.latency_lab_can_trace(library.encode()):
            return cls(libraries)
        if wished:
            raise _refused(library)
        return None

    def trace(self, work: Callable[[], T], room: int, places: NDArray[np.int64] | None = None) -> tuple[T, NDArray]:
        """What `work` returns, and what the library did meanwhile on this thread, shape (entries,) of `ENTRY`: at these
        places of its code, or at all. Raises Unsupported where that is more than there is room for."""
        if len(self._room) < room:
            type(self)._room = np.ones(room, dtype=ENTRY)  # written to, so that the trace waits for no memory
        kept = np.zeros(0, dtype=np.int64) if places is None else np.ascontiguousarray(places, dtype=np.int64)
        entries = type(self)._room
        self.libraries.latency_lab_trace(entries.ctypes.data, len(entries), kept.ctypes.data, len(kept))
        try:
            result = work()
        finally:
            count = int(self.libraries.latency_lab_traced())
        if count > len(entries):
            raise Unsupported(f"this graph makes {count} objects, more than the {len(entries)} that are traced")
        return result, entries[:count].copy()
