"""Profiles in nanoseconds, from runtimes that count microseconds.

ONNX Runtime's and XNNPACK's profilers round what an operator took down to whole microseconds, which is what many
operators take: a network's sum is off by a percent, always the same way for the same operators, so that no repetition
evens it out. The processes that measure are therefore started with a small library (`fine_clock.c`, compiled when it is
first wanted) in front of all others, and in it a clock which, for the runtime's library alone, is a thousand times as
fast. Where it cannot be had, profiles are in microseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from device_agents.backends import Check, NodeTimes, Unsupported
from lut_db.errors import InvalidInput

SETTING = {"fine_clock": "on or off: profiles in nanoseconds; on by default where there is a C compiler"}
SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-shared", "-fPIC")
COMPILE_LIMIT_S = 60.0
PRELOAD = "LD_PRELOAD"
REMEDY = "apt install gcc, or name another C compiler in the variable CC"
MICROSECOND_MS = 1e-3
LEAST_SHARE = 1 / 200
"""Share of a run's time that a profile's entries make at least: those of a convolution of a microsecond make a
twentieth, microseconds taken for nanoseconds a thousandth."""

ROUNDING = 1.01
"""Beside a tick for each entry."""


class _Lack(Exception):
    """Why there is no fine clock."""


@cache
def _built() -> Path | _Lack:
    """The compiled library, kept in the user's cache."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return _Lack("it takes Linux and glibc")
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), *COMPILERS)))), None)
    source = SOURCE.read_bytes()
    name = hashlib.sha256(source + " ".join((platform.machine(), *FLAGS)).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latency-lab"
        library = folder / f"fine-clock-{name}.so"
        if library.exists():
            return library
        if compiler is None:
            return _Lack("there is no C compiler")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            partial = Path(made) / library.name
            subprocess.run(
                [compiler, *FLAGS, "-o", str(partial), str(SOURCE), "-ldl"],
                check=True, capture_output=True, text=True, timeout=COMPILE_LIMIT_S,
            )  # fmt: skip
            partial.replace(library)
    except subprocess.CalledProcessError as error:
        return _Lack(f"{compiler} does not compile it: {error.stderr.strip()[-500:]}")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: a user without a home
        return _Lack(str(error))
    return library


def wanted(settings: Mapping[str, str]) -> bool:
    """Whether profiles are to be in nanoseconds: as the setting `fine_clock` says, or else where they can.

    Raises InvalidInput for another setting than on and off, and where there is no fine clock.
    """
    said = settings.get("fine_clock")
    if said not in (None, "on", "off"):
        raise InvalidInput(f"{said!r} is neither on nor off", field="settings.fine_clock", remedy="on or off")
    if said == "off":
        return False
    built = _built()
    if isinstance(built, _Lack) and said == "on":
        raise InvalidInput(f"no fine clock here: {built}", field="settings.fine_clock", remedy=f"{REMEDY}; or off")
    return isinstance(built, Path)


def environment(wanted: bool) -> dict[str, str]:
    """The environment in which a process can have a fine clock, from its start."""
    built = _built()
    if not wanted or isinstance(built, _Lack):
        return {}
    others = [item for item in os.environ.get(PRELOAD, "").replace(" ", ":").split(":") if item not in ("", str(built))]
    return {PRELOAD: ":".join([str(built), *others])}


def check(settings: Mapping[str, str]) -> Check:
    if settings.get("fine_clock") == "off":
        return Check("fine clock", True, "off: profiles are in microseconds")
    built = _built()
    if isinstance(built, Path):
        return Check("fine clock", True, f"{built}: profiles are in nanoseconds")
    return Check("fine clock", True, f"none, profiles are in microseconds: {built}. {REMEDY}")


def tick_ms(library: str) -> float:
    """What the profiler in a library counts in, which gets the fine clock if this process was started with one.

    `library` is part of the name of its file, which must have been loaded.
    """
    serve = getattr(ctypes.CDLL(None), "latency_lab_fine_clock", None)
    factor = 0 if serve is None else int(serve(library.encode()))
    return MICROSECOND_MS / factor if factor else MICROSECOND_MS


def believed(times: NodeTimes, passed_ms: float) -> NodeTimes:
    """A profile of runs that took so long in all. Raises Unsupported where it tells more time than passed, or so little
    that it was not in the unit it was taken to be in."""
    told_ms = float(times.total_ms.sum())
    least_ms = LEAST_SHARE * passed_ms if times.tick_ms < MICROSECOND_MS else 0.0
    rounded_ms = times.tick_ms * len(times.total_ms) * float(times.events.sum())
    if not least_ms <= told_ms <= ROUNDING * passed_ms + rounded_ms:
        raise Unsupported(f"the profile tells {told_ms:.3g} ms of runs that took {passed_ms:.3g} ms")
    return times
