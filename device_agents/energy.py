"""Energy of runs, where the device counts it: the joules that one run adds to a device which stands still.

Devices count energy as a whole, in steps of a millisecond or more: one run of one operator cannot be read. So a graph
is run in a burst that is long beside the counter's steps, with the counter read before and after, and what the device
draws when it stands still, measured before and after all bursts, is taken off:

    joules of a run = (joules of the burst - idle watts * seconds of the burst) / runs

These are the *marginal* joules. The idle power is drawn whether a network runs or not, and differs between devices of
one target by what else is in them; without it the joules of operators add up to those of their network. The total is
had by adding idle watts * latency; the evidence holds the idle watts.

Counters: `Rapl` for processors (Linux' powercap), `Nvml` for NVIDIA's GPUs, `Rails` for phones whose power management
counts its rails. A backend that has one is `Metered`. Where there is none the energy is absent, with the reason.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Protocol, runtime_checkable

from device_agents import nvml
from device_agents.backends import Check, Unreachable
from lut_db.errors import InvalidInput
from lut_db.measurements import Evidence

POWERCAP = Path("/sys/class/powercap")
IIO = "/sys/bus/iio/devices/iio:device*/energy_value"

IDLE_TOLERANCE = 0.1
"""Share of what bursts add to the idle power, beyond which a change of the idle power makes them worthless."""
SETTLE_S = 0.05
"""Between the last work and the idle power: cores fall asleep in the meantime."""
SHORT_BURST = 4
"""Where starting a tool costs energy of its own, a burst of so many times fewer runs is taken off."""
STANDSTILL_S = 2.0
TRIAL_RUNS = 16
"""Show how long a run takes with what comes between two: a GPU's of three microseconds is started by a host that needs
twenty."""
SHORT_SHARE = 0.8
"""Of what a burst should last, below which it is run once more."""
MOST_RUNS = 200_000


class Absent(Exception):
    """There is no energy to be had; the message says why."""


@dataclass(frozen=True)
class Reading:
    """Joules counted since a counter was opened, and when that was so, in seconds of the counter's own clock."""

    joules: float
    at_s: float


class Counter(Protocol):
    """Counts the energy of a device from the moment it is opened."""

    source: str
    """What is counted, for the evidence."""
    burst_s: float
    """The shortest burst beside which the counter's steps do not matter."""

    def read(self) -> Reading:
        """What is counted now. Raises Absent where it cannot be read, or stands still."""


@runtime_checkable
class Metered(Protocol):
    """A backend whose device may count its energy."""

    def counter(self) -> Counter:
        """Opens the counter. Raises Absent."""


@dataclass(frozen=True)
class Burst:
    """What is to be run: `time` runs it so many times, each of which takes about `latency_ms`."""

    time: Callable[[int], object]
    latency_ms: float


@dataclass(frozen=True)
class Energies:
    """The joules that one run of each burst adds, in order, negative where that drowned in noise; and the evidence."""

    joules: tuple[float, ...]
    evidence: Evidence


def joules_per_run(counter: Counter, bursts: Sequence[Burst], *, starts: bool = False) -> Energies:
    """Runs each burst and reads the counter around it. The device must have nothing else to do.

    `starts`: every call of `time` starts a tool, whose own energy is taken off by a second, shorter burst.
    Raises Absent where the figures cannot be trusted.
    """
    before_w = _idle_power(counter)
    spans = [_span(counter, burst, starts=starts) for burst in bursts]
    after_w = _idle_power(counter)
    idle_w = (before_w + after_w) / 2
    seconds = sum(span.seconds for span in spans)
    added_w = sum(span.joules for span in spans) / seconds - idle_w
    if added_w <= 0:
        raise Absent(f"{counter.source} counts {added_w + idle_w:.4g} W at work, {idle_w:.4g} W at rest: no difference")
    if abs(after_w - before_w) > IDLE_TOLERANCE * added_w:
        raise Absent(
            f"{counter.source} counted {before_w:.4g} W at rest before the bursts and {after_w:.4g} W after them, too "
            f"far apart beside the {added_w:.4g} W that they added: let the device be quiet"
        )
    return Energies(
        joules=tuple((span.joules - idle_w * span.seconds) / span.runs for span in spans),
        evidence={
            "source": counter.source, "idle_w": [round(before_w, 4), round(after_w, 4)],
            "added_w": round(added_w, 4), "bursts": len(spans), "seconds": round(seconds, 3),
        },
    )  # fmt: skip


@dataclass(frozen=True)
class _Span:
    joules: float
    seconds: float
    runs: int


def _span(counter: Counter, burst: Burst, *, starts: bool) -> _Span:
    most = min(ceil(counter.burst_s * 1e3 / burst.latency_ms), MOST_RUNS)
    return _started(counter, burst, max(most, SHORT_BURST)) if starts else _at_work(counter, burst, most)


def _at_work(counter: Counter, burst: Burst, most: int) -> _Span:
    """A burst of as many runs as fit, with what comes between two, up to `most`."""
    runs = most
    if most > TRIAL_RUNS:
        for _ in range(2):  # the first wakes the device up
            began = time.perf_counter()
            burst.time(TRIAL_RUNS)
            run_s = (time.perf_counter() - began) / TRIAL_RUNS
        runs = min(most, ceil(counter.burst_s / run_s))
    whole = _counted(counter, lambda: burst.time(runs))
    if runs < most and whole.at_s < SHORT_SHARE * counter.burst_s:  # the trial was disturbed
        runs = min(most, ceil(runs * counter.burst_s / whole.at_s))
        whole = _counted(counter, lambda: burst.time(runs))
    return _Span(whole.joules, whole.at_s, runs)


def _started(counter: Counter, burst: Burst, runs: int) -> _Span:
    """What a burst has beyond a shorter one: not what starting the tool costs."""
    few = runs // SHORT_BURST
    whole = _counted(counter, lambda: burst.time(runs))
    short = _counted(counter, lambda: burst.time(few))
    if whole.at_s <= short.at_s:
        raise Absent(f"a burst of {runs} runs was over before one of {few}")
    return _Span(whole.joules - short.joules, whole.at_s - short.at_s, runs - few)


def _counted(counter: Counter, work: Callable[[], object]) -> Reading:
    """What is counted during some work, and for how many seconds."""
    begin = counter.read()
    work()
    end = counter.read()
    if end.at_s <= begin.at_s:
        raise Absent(f"{counter.source} stands still")
    return Reading(end.joules - begin.joules, end.at_s - begin.at_s)


def _idle_power(counter: Counter) -> float:
    """Watts that the device draws when nothing runs."""
    time.sleep(SETTLE_S)
    idle = _counted(counter, lambda: time.sleep(counter.burst_s))
    return idle.joules / idle.at_s


def check(open_counter: Callable[[], Counter]) -> Check:
    """For a backend's doctor: what counts energy, or why nothing does. Latencies do not need it."""
    try:
        return Check("energy", True, open_counter().source)
    except Absent as absent:
        return Check("energy", True, f"not counted, the column stays empty: {absent}")


# --- counters --------------------------------------------------------------------------------------------------


def _at_step(read: Callable[[], float], source: str, pause_s: float) -> Reading:
    """Waits until a counter makes a step: only then is it known what time it is up to."""
    last = read()
    deadline = time.perf_counter() + STANDSTILL_S
    while (now := read()) == last:
        if time.perf_counter() > deadline:
            raise Absent(f"{source} stands still")
        time.sleep(pause_s)
    return Reading(now, time.perf_counter())


class Rapl:
    """The processor packages of this machine, as Linux' powercap counts them, in steps of about a millisecond.

    Cores, caches and memory controllers are in it, memory itself and everything else are not. Zones inside a package
    are left out, and so is a package that a second interface tells once more.
    """

    burst_s = 0.3
    PAUSE_S = 2e-4

    def __init__(self, root: Path = POWERCAP) -> None:
        if not root.is_dir():
            raise Absent(f"there is no {root}: a virtual machine, or a processor that does not count")
        zones: dict[str, Path] = {}
        # What is told through MSRs and once more through memory-mapped registers is taken from the former.
        for zone in sorted(root.glob("*:*"), key=lambda path: ("mmio" in path.name, path.name)):
            name = _told(zone / "name") if zone.name.count(":") == 1 else ""
            if re.fullmatch(r"package-\d+(-die-\d+)?", name):
                zones.setdefault(name, zone)
        if not zones:
            raise Absent(f"{root} has no zone of a processor package")
        self.source = f"RAPL {', '.join(sorted(zones))}"
        self._zones = [(zone / "energy_uj", int(_told(zone / "max_energy_range_uj"))) for zone in zones.values()]
        self._last = [int(_told(path)) for path, _ in self._zones]
        self._total_uj = 0

    def read(self) -> Reading:
        return _at_step(self._joules, self.source, self.PAUSE_S)

    def _joules(self) -> float:
        for number, (path, range_uj) in enumerate(self._zones):
            now = int(_told(path))
            counted = now - self._last[number]
            self._total_uj += counted if counted >= 0 else counted + range_uj  # it began again at zero
            self._last[number] = now
        return self._total_uj / 1e6


def of_processor(settings: dict[str, str]) -> Counter:
    """What counts this machine's processors, in the folder that the setting `powercap` names. Raises Absent."""
    return Rapl(Path(settings.get("powercap", POWERCAP)))


def _told(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise Absent(f"{path} may not be read; allow it as root: chmod a+r {path}") from error
    except OSError as error:
        raise Absent(f"{path} cannot be read: {error.strerror}") from error


class Nvml:
    """An NVIDIA GPU as NVML counts it since its driver was loaded: the whole board, since Volta."""

    burst_s = 1.0
    PAUSE_S = 2e-3

    def __init__(self, index: int = 0) -> None:
        try:
            self._gpu = nvml.Gpu(index)
        except InvalidInput as lack:
            raise Absent(str(lack)) from lack
        self.source = f"NVML GPU {index}"
        self._first_mj = self._millijoules()

    def read(self) -> Reading:
        return _at_step(lambda: (self._millijoules() - self._first_mj) / 1e3, self.source, self.PAUSE_S)

    def _millijoules(self) -> int:
        try:
            counted = self._gpu.millijoules()
        except Unreachable as gone:
            raise Absent(str(gone)) from gone
        if counted is None:
            raise Absent("NVML does not count this GPU's energy")
        return counted


class Rails:
    """The power rails of a phone whose power management chips count them, such as Pixel phones since the sixth.

    `shell` runs a command on the phone and gives its output. The file of each chip names its rails, microwatt-seconds
    since the start, and the milliseconds up to which they are counted:

        CH0(T=349894)[S10M_VDD_TPU], 5578756

    Only the rails that a phone counts are in the sum; the evidence names them.
    """

    burst_s = 2.0
    _LINE = re.compile(r"^CH\d+\(T=(\d+)\)\[([^\]]+)\], *(\d+)\s*$", re.MULTILINE)

    def __init__(self, shell: Callable[[str], str], files: str = IIO) -> None:
        self._shell = shell
        self._files = files
        self.source = ""
        self._first = self._sum()

    def read(self) -> Reading:
        joules, at_s = self._sum()
        return Reading(joules - self._first[0], at_s)

    def _sum(self) -> tuple[float, float]:
        said = self._shell(f"cat {self._files} 2>&1")
        found = self._LINE.findall(said)
        if not found:
            raise Absent(f"the phone does not tell what its power rails use: {said.strip()[-200:]}")
        source = f"rails {', '.join(name for _, name, _ in found)}"
        if self.source not in ("", source):
            raise Absent(f"the phone told of {self.source} and now tells of {source}")
        self.source = source
        return sum(int(energy) for *_, energy in found) / 1e6, fmean(int(at) for at, *_ in found) / 1e3
