"""Phones with Android, over ADB: a model is pushed once, a benchmark tool runs it there, its output is read back.

    device-agent android --setting devices=192.168.0.7:5555,usb:1A2B3C --setting tool=benchmark_model

One process serves many phones, each as a device of its own. The tools are TensorFlow Lite's `benchmark_model` (CPU with
and without XNNPACK, GPU delegate, NNAPI) and ONNX Runtime's `onnxruntime_perf_test` (CPU, XNNPACK, NNAPI). Every start
of a tool is a fresh session; `onnxruntime_perf_test` tells the latency of each run, `benchmark_model` the median of a
start's runs (older builds the mean).

A phone that is gone, has not authorised this computer, is hot or saves its battery is not ready, and is again without a
hand when that is over. Hot is what Android's thermal service calls throttled, and whatever is warmer than
`max_temperature_c` at the battery or skin.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import re
import secrets
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from device_agents import adb, benchmark_tools, energy, ort_profile, xnnpack
from device_agents.backends import Backend, Check, Loaded, LoadFailed, NodeTimes, Options, Unreachable, Unsupported
from device_agents.benchmark_tools import NotDelegated, Row, ToolFailed
from device_agents.settings import choice, core_list
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import to_onnx
from lut_db.lowering.tflite import ModelOperator, model_operators, to_tflite
from lut_db.lowering.weights import Weights
from lut_db.measurements import Evidence, Failure
from lut_db.networks import Network, NetworkBuilder
from lut_db.plans import Plan
from lut_db.targets import PRECISIONS, Precision, Target

log = logging.getLogger("device-agent")

TOOLS = ("benchmark_model", "onnxruntime_perf_test")
ACCELERATORS = ("cpu", "gpu", "nnapi")
TOOL_FOLDER = "/data/local/tmp"
KEYS = "~/.config/latency-lab/adb"
MAX_TEMPERATURE_C = 40.0
COOLED_C = 2.0
"""A phone that was too hot is ready again when it is cooler than the limit by this."""
WARMED_C = 5.0
"""A phone may get warmer than the limit by this while it measures."""
THROTTLED = 1
"""The lowest thermal status of Android at which it throttles (1 light … 6 shutdown)."""
FORCE_FP16 = "xnnpack_force_fp16"
"""benchmark_model's flag, in its newer builds."""
TICK_MS = 1e-3
"""Of the tools' timers."""

TIMEOUT_S = 120.0
"""A tool may take this long beside its runs, and SLOWER times as long for a run as it took at first."""
SLOWER = 20.0
NOT_FOUND = (126, 127)
SIGNALLED = range(129, 193)
"""Exit codes of the shell for what could not be run, and for what a signal ended (128 and its number)."""
HOTTEST_C = 150.0
"""What reads higher is no temperature."""
BATTERY, SKIN, CPU = 2, 3, 0
"""Types of temperature in Android's thermal service."""

SETTINGS = {
    "devices": f"phones, commas between: {adb.ADDRESSES}",
    "tool": f"one of {', '.join(TOOLS)}; the first by default",
    "tool_path": f"the tool on the phone; {TOOL_FOLDER}/ and its name by default",
    "tool_file": "the tool on this computer, to be pushed; instead of tool_path",
    "folder": f"where models are put on the phone; {adb.FOLDER} by default",
    "keys": f"folder of the key that phones authorise, made on first use; {KEYS} by default",
    "cores": "cores of the phone to pin the tool to, like 6,7 or 4-7; any by default (--cores are this computer's)",
    "accelerator": f"one of {', '.join(ACCELERATORS)}; cpu by default",
    "precision": "fp32, int8 or, with benchmark_model on accelerators and with XNNPACK, fp16; fp32 by default",
    "xnnpack": "true or false: whether XNNPACK runs the graph on the CPU; true by default for benchmark_model",
    "max_temperature_c": f"hottest battery or skin at which it is measured; {MAX_TEMPERATURE_C:.0f} by default",
    "fixed_performance": "true or false: have Android 11 or later hold its clocks; false by default",
    "timeout_s": f"how long a tool may take beside its runs; {TIMEOUT_S:.0f} by default",
    "authorise_s": f"how long to wait for the key to be accepted on the screen; {adb.AUTHORISE_S:.0f} by default",
}


@dataclass(frozen=True)
class _Setup:
    """The settings, read."""

    devices: tuple[str, ...]
    tool: str
    tool_path: str
    tool_file: Path | None
    folder: str
    keys: Path
    threads: int
    cores: tuple[int, ...]
    accelerator: str
    precision: Precision
    xnnpack: bool
    max_temperature_c: float
    fixed_performance: bool
    timeout_s: float
    authorise_s: float

    @classmethod
    def of(cls, options: Options) -> _Setup:
        given = options.settings
        tool = choice(given, "tool", TOOLS)
        accelerator = choice(given, "accelerator", ACCELERATORS)
        precision = choice(given, "precision", PRECISIONS)
        xnnpack = _flag(given, "xnnpack", tool == "benchmark_model")
        if tool == "onnxruntime_perf_test" and accelerator == "gpu":
            raise InvalidInput(f"{tool} has no GPU on phones", field="settings.accelerator", remedy="cpu or nnapi")
        if precision == "fp16" and (tool != "benchmark_model" or (accelerator == "cpu" and not xnnpack)):
            raise InvalidInput(
                "only benchmark_model calculates in fp16, on accelerators and with XNNPACK",
                field="settings.precision", remedy="tool=benchmark_model and xnnpack=true; or int8",
            )  # fmt: skip
        if "tool_file" in given and "tool_path" in given:
            raise InvalidInput("either tool_path or tool_file", field="settings.tool_file")
        tool_path = given.get("tool_path", f"{TOOL_FOLDER}/{tool}")
        folder = given.get("folder", adb.FOLDER)
        for name, path in (("tool_path", tool_path), ("folder", folder)):
            if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", path):
                raise InvalidInput(f"{path!r} is no plain absolute path", field=f"settings.{name}")
        return cls(
            devices=tuple(adb.split(given.get("devices", ""))), tool=tool, tool_path=tool_path,
            tool_file=Path(given["tool_file"]) if "tool_file" in given else None, folder=folder,
            keys=Path(given.get("keys", KEYS)).expanduser(), threads=options.threads,
            cores=core_list(given.get("cores", "any"), "settings.cores"), accelerator=accelerator,
            precision=precision, xnnpack=xnnpack,
            max_temperature_c=_number(given, "max_temperature_c", MAX_TEMPERATURE_C),
            fixed_performance=_flag(given, "fixed_performance", False),
            timeout_s=_number(given, "timeout_s", TIMEOUT_S),
            authorise_s=_number(given, "authorise_s", adb.AUTHORISE_S),
        )  # fmt: skip

    @property
    def scratch(self) -> str:
        """The folder on the phone in which a tool runs, empty at each start."""
        return f"{self.folder}/scratch"

    def phone(self, device: str) -> adb.Phone:
        return adb.Phone(adb.Address.parse(device), self.keys, self.folder, self.authorise_s)


def _flag(given: dict[str, str], name: str, default: bool) -> bool:
    return choice({name: given.get(name, str(default).lower())}, name, ("true", "false")) == "true"


def _number(given: dict[str, str], name: str, default: float) -> float:
    try:
        value = float(given.get(name, default))
    except ValueError as error:
        raise InvalidInput(f"{given[name]!r} is no number", field=f"settings.{name}") from error
    if not 0 < value < 1e6:
        raise InvalidInput(f"{value} is out of range", field=f"settings.{name}")
    return value


def devices(options: Options) -> list[Options]:
    """The options of each phone."""
    return [
        replace(options, settings={**options.settings, "devices": device})
        for device in adb.split(options.settings.get("devices", ""))
    ]


def create(options: Options) -> Backend:
    setup = _Setup.of(options)
    if len(setup.devices) != 1:
        raise InvalidInput("a backend measures on one phone", field="settings.devices", remedy="name one")
    return Android(setup, setup.phone(setup.devices[0]))


# ------------------------------------------------------------------------------------------------ what a phone is like


@dataclass(frozen=True)
class _Core:
    """Clocks in kHz; None where the phone does not say."""

    now: int | None
    limit: int | None
    governor: str


@dataclass(frozen=True)
class _State:
    """What a phone says of itself at one moment. Missing facts are None or absent."""

    properties: dict[str, str]
    tool: str
    """Size and time of the tool, and of a library beside it; empty where there is no tool that may be run."""
    cores: dict[int, _Core]
    temperatures_c: dict[str, float]
    """At the battery and the skin, or, where neither is known, at the hottest zone."""
    cpu_temperature_c: float | None
    thermal_status: int | None
    battery_percent: int | None
    charging: bool | None
    battery_saver: bool
    fixed_performance: bool
    free_bytes: int | None

    @property
    def temperature_c(self) -> float | None:
        return max(self.temperatures_c.values(), default=None)


CORES = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq"
CORE_FILES = ("scaling_cur_freq", "scaling_max_freq", "scaling_governor")
ZONES = "/sys/class/thermal/thermal_zone*"


def _look(phone: adb.Phone, tool_path: str, *, fix_clocks: bool) -> _State:
    """Asks a phone for its state, in one command."""
    mark = secrets.token_hex(8)
    fixed = "cmd power set-fixed-performance-mode-enabled true >/dev/null 2>&1; echo $?" if fix_clocks else "echo 1"
    said = phone.run(
        f"echo {mark} properties; getprop; "
        f"echo {mark} tool; [ -x {tool_path} ] && stat -c '%s %Y' {tool_path} {_library(tool_path)}; "
        f"echo {mark} fixed; {fixed}; "
        # One process for all files: there can be a hundred zones.
        f"echo {mark} cores; grep -H . {' '.join(f'{CORES}/{name}' for name in CORE_FILES)} 2>/dev/null; "
        f"echo {mark} zones; grep -H . {ZONES}/type {ZONES}/temp 2>/dev/null; "
        f"echo {mark} thermal; dumpsys thermalservice 2>/dev/null; "
        f"echo {mark} battery; dumpsys battery 2>/dev/null; "
        f"echo {mark} saver; settings get global low_power 2>/dev/null; echo {mark} end"
    )
    parts = _sections(said.output, mark)
    if "end" not in parts:
        raise Unreachable(f"{phone.address}: the phone did not describe itself: {said.output[-500:]}")
    return replace(_read_state(parts), free_bytes=phone.free_bytes())


def _library(tool_path: str) -> str:
    """For the phone's shell: ONNX Runtime's library, nothing where it is built into the tool."""
    return f"$(ls {tool_path.rpartition('/')[0]}/libonnxruntime.so 2>/dev/null)"


def _sections(text: str, mark: str) -> dict[str, str]:
    """What follows each line `MARK name`, by name."""
    found = re.split(rf"^{mark} (\w+)\n?", text + "\n", flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def _read_state(parts: dict[str, str]) -> _State:
    properties = dict(re.findall(r"^\[(.+?)\]: \[(.*)\]$", parts["properties"], re.MULTILINE))
    files: dict[int, dict[str, str]] = defaultdict(dict)
    for core, name, text in re.findall(r"/cpu(\d+)/cpufreq/(\w+):(.*)$", parts["cores"], re.MULTILINE):
        files[int(core)][name] = text.strip()
    cores = {}
    for core_number, said in files.items():
        now, limit = (int(said[name]) if said.get(name, "").isdigit() else None for name in CORE_FILES[:2])
        cores[core_number] = _Core(now, limit, said.get(CORE_FILES[2], "unknown"))
    zones: dict[str, float] = {}
    found = dict(re.findall(r"/thermal_zone(\d+/\w+):(.*)$", parts["zones"], re.MULTILINE))
    for place, text in found.items():
        number, _, file = place.partition("/")
        if file == "temp" and text.strip().isdigit() and (celsius := _celsius(int(text))) is not None:
            name = found.get(f"{number}/type", number).strip()
            zones[name] = max(celsius, zones.get(name, celsius))
    thermal = parts["thermal"]
    # Cached temperatures can be old.
    current = thermal.partition("Current temperatures from HAL:")[2].partition("Current cooling devices")[0] or thermal
    readings = [
        (int(kind), name, float(value))
        for value, kind, name in re.findall(r"mValue=([\d.]+), mType=(\d+), mName=([^,}]+)", current)
        if 0 < float(value) < HOTTEST_C
    ]
    battery = dict(re.findall(r"^\s*(AC powered|USB powered|level|temperature): (\w+)", parts["battery"], re.MULTILINE))
    touched = {name: value for kind, name, value in readings if kind in (BATTERY, SKIN)}
    touched |= {name: value for name, value in zones.items() if re.search("skin|battery", name, re.IGNORECASE)}
    if battery.get("temperature", "").isdigit():
        touched["battery"] = int(battery["temperature"]) / 10
    inside = [value for kind, _, value in readings if kind == CPU]
    inside += [value for name, value in zones.items() if re.search("cpu|soc|tsens|core", name, re.IGNORECASE)]
    if not touched and zones:
        touched = dict([max(zones.items(), key=lambda zone: zone[1])])
    status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    return _State(
        properties=properties, tool=parts["tool"].strip(), cores=cores, temperatures_c=touched,
        cpu_temperature_c=max(inside, default=None), thermal_status=int(status[1]) if status else None,
        battery_percent=int(battery["level"]) if battery.get("level", "").isdigit() else None,
        charging="true" in (battery.get("AC powered"), battery.get("USB powered")) if battery else None,
        battery_saver=parts["saver"].strip() == "1", fixed_performance=parts["fixed"].strip() == "0", free_bytes=None,
    )  # fmt: skip


def _celsius(reading: int) -> float | None:
    """Zones tell thousandths, tenths or whole degrees; what is no temperature of a running phone is none."""
    celsius = reading / 1000 if reading > 2000 else reading / 10 if reading > 200 else float(reading)
    return celsius if 0 < celsius < HOTTEST_C else None


def _heat(state: _State, limit_c: float) -> str | None:
    """Why a phone is too hot, if it is."""
    if state.thermal_status is not None and state.thermal_status >= THROTTLED:
        return f"Android throttles it for its heat (thermal status {state.thermal_status})"
    if state.temperature_c is not None and state.temperature_c > limit_c:
        hottest = max(state.temperatures_c, key=lambda name: state.temperatures_c[name])
        return f"it is too hot ({state.temperature_c:.1f} °C at {hottest}, limit {limit_c:.1f} °C)"
    return None


# ------------------------------------------------------------------------------------------------------------- backend


@dataclass(frozen=True)
class _Start:
    """What one start of a tool told: latencies, and, where it was profiled, a row of times for each of them."""

    latencies_ms: list[float]
    times: NodeTimes | None


class _Tool(Protocol):
    """How one of the tools is given a model, started and understood."""

    suffix: str
    runtime: str

    def lower(self, network: Network) -> bytes:
        """The network in the tool's format."""

    def start(self, path: str, runs: int, profiled: _Profiled | None, limit_s: float) -> _Start:
        """Runs the model that often. Raises ToolFailed, TimedOut and Unreachable; Unsupported for what never works."""


@dataclass(eq=False)
class _Profiled:
    """A network whose nodes are timed, and what was found out about how the tool runs it."""

    network: Network
    model: bytes
    owners: ort_profile.Owners | None = None
    """For ONNX Runtime: whose time each node of the optimised graph is."""
    parts: tuple[_Part, ...] = ()
    """For TensorFlow Lite: what is profiled in place of the whole, one after the other."""


@dataclass(frozen=True)
class _Part:
    """A part of a network as a model of its own on the phone, and its nodes' numbers in the whole."""

    path: str
    profiled: _Profiled
    numbers: tuple[int, ...]


class Android:
    starts = True

    def __init__(self, setup: _Setup, phone: adb.Phone):
        self.setup = setup
        self.phone = phone
        self.tool: _Tool = (_BenchmarkModel if setup.tool == "benchmark_model" else _PerfTest)(setup, self)
        self._target: Target | None = None
        self._tool_seen = ("", "")
        """What `_State.tool` says, and the hash of those files."""
        self._pushed: str | None = None
        self._was_hot = False
        self.restarts = 0
        """How often the tool had to be started again."""

    def environment(self) -> dict[str, str]:
        """None: what measures runs on the phone."""
        return {}

    def target(self) -> Target:
        if self._target is None:
            self.ready()
        assert self._target is not None
        return self._target

    def ready(self) -> None:
        with self.phone.hold():
            state = self.look()
            where = self.phone.address
            if not state.tool and self._pushed is not None:  # somebody has cleared the folder
                self._pushed = None
                state = self.look()
            if not state.tool:
                raise Unreachable(f"{where}: there is no program {self.tool_path()}", remedy=_whence(self.setup.tool))
            if self.setup.fixed_performance and not state.fixed_performance:
                raise Unreachable(f"{where}: it does not fix its clocks", remedy="set fixed_performance=false")
            if state.battery_saver:
                raise Unreachable(f"{where}: it saves its battery", remedy="charge it")
            lacking = 0 if state.free_bytes is None else adb.RESERVE - state.free_bytes
            if lacking > 0 and self.phone.make_room(lacking):  # what leases before this one brought
                state = self.look()
            if state.free_bytes is not None and state.free_bytes < adb.RESERVE:
                raise adb.NoSpace(f"{where}: {state.free_bytes} bytes of storage are free", remedy="free some")
            limit_c = self.setup.max_temperature_c - (COOLED_C if self._was_hot else 0)
            heat = _heat(state, limit_c)
            self._was_hot = heat is not None
            if heat is not None:
                raise Unreachable(f"{where}: {heat}")
            self._target = self._describe(state)

    def look(self) -> _State:
        """How the phone is now; has it hold its clocks where the settings say so."""
        return _look(self.phone, self.tool_path(), fix_clocks=self.setup.fixed_performance)

    def tool_path(self) -> str:
        """Where the tool is on the phone; brings it there if it is to be."""
        if self.setup.tool_file is None:
            return self.setup.tool_path
        if self._pushed is None:
            self._pushed = self.phone.put(self.setup.tool_file, program=True)
        return self._pushed

    def _describe(self, state: _State) -> Target:
        setup = self.setup
        return Target(
            device_model=state.properties.get("ro.product.model") or "unknown",
            os_build=state.properties.get("ro.build.fingerprint") or "unknown",
            runtime=self.tool.runtime, runtime_version=self._version(state.tool), accelerator=setup.accelerator,
            threads=setup.threads, cores=setup.cores, precision=setup.precision,
            clock_policy=self.clock_policy(state),
            options={"xnnpack": str(setup.xnnpack).lower()} if setup.accelerator == "cpu" else {},
        )  # fmt: skip

    def clock_policy(self, state: _State) -> str:
        if state.fixed_performance:
            return "fixed-performance"
        pinned = [core for number, core in sorted(state.cores.items()) if number in (self.setup.cores or state.cores)]
        return "+".join(dict.fromkeys(core.governor for core in pinned)) or "unknown"

    def _version(self, seen: str) -> str:
        """The tool's hash, with that of ONNX Runtime's library where that lies beside it."""
        if self._tool_seen[0] != seen:
            path = self.tool_path()
            files = f"{path} {_library(path)}" if self.setup.tool != "benchmark_model" else path
            hashes = re.findall(r"^([0-9a-f]{64}) ", self.phone.check(f"sha256sum {files}"), re.MULTILINE)
            if not hashes:
                raise Unreachable(f"{self.phone.address}: sha256sum does not tell the hash of {path}")
            together = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
            self._tool_seen = (seen, together[:12])
        return self._tool_seen[1]

    def watch(self) -> _Watch:
        return _Watch(self)

    def counter(self) -> energy.Counter:
        return energy.Rails(lambda command: self.phone.run(command).output)

    def load(self, model: Network | Path, *, profile: bool) -> Loaded:
        """Brings the model to the phone and runs it once: what that shows, it shows before anything is timed."""
        if isinstance(model, Path) and model.suffix != self.tool.suffix:
            raise Unsupported(f"{self.setup.tool} reads {self.tool.suffix} files, not {model.name}")
        if profile and self.setup.accelerator == "gpu":
            raise Unsupported("the GPU delegate runs a graph as one: its operators can only be measured isolated")
        content: bytes | Path = self.tool.lower(model) if isinstance(model, Network) else model
        profiled = None
        if profile:
            assert isinstance(model, Network), "only networks can be profiled"
            profiled = _Profiled(model, self.tool.lower(model) if isinstance(content, Path) else content)
        try:
            path = self.phone.put(content, self.tool.suffix)
            first = self.start(path, 1, profiled, self.setup.timeout_s)
        except adb.NoSpace as error:  # the phone had space when the lease began: this is too large, or came last
            raise LoadFailed("out_of_memory", str(error)) from error
        return _Model(self, path, profiled, first.latencies_ms[0])

    def start(self, path: str, runs: int, profiled: _Profiled | None, limit_s: float) -> _Start:
        """Starts the tool, and once more where it failed, crashed or said what makes no sense.

        Raises Unsupported where the tool refuses the model, LoadFailed and Unreachable.
        """
        try:
            try:
                return self.tool.start(path, runs, profiled, limit_s)
            except NotDelegated:
                raise
            except ToolFailed as error:
                log.warning("%s: %s; once more", self.phone.address, error.message.partition(";")[0])
                self.restarts += 1
                return self.tool.start(path, runs, profiled, limit_s)
        except (NotDelegated, _Refused) as error:
            if self.phone.run(f"[ -f {path} ]").code != 0:
                raise Unreachable(f"{self.phone.address}: {path} is no longer there") from error
            raise Unsupported(str(error)) from error
        except ToolFailed as error:
            raise LoadFailed("crashed", str(error)) from error
        except adb.TimedOut as error:
            raise LoadFailed("timed_out", str(error)) from error

    def compute(self, network: Network, weights: Weights, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray]:
        raise NotImplementedError(f"{self.setup.tool} prints times, not what a network computes")

    def run_tool(self, arguments: Sequence[str], limit_s: float, then: str = ":") -> dict[str, str]:
        """Starts the tool in an empty folder; its output under `said`, that of `then` by the names it marks.

        `then` marks with `$mark NAME`. Raises ToolFailed or _Refused by the exit code.
        """
        path, mark = self.tool_path(), secrets.token_hex(8)
        mask = sum(1 << core for core in self.setup.cores)
        pinned = f"taskset {mask:x} " if mask else ""
        folder = path.rpartition("/")[0]
        result = self.phone.run(
            f"scratch={self.setup.scratch}; mark={mark}; rm -rf $scratch; mkdir -p $scratch && cd $scratch || exit 1; "
            f"echo $mark said; LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH {pinned}{path} {shlex.join(arguments)}; "
            f"code=$?; {then}; cd /; exit $code",
            limit_s,
        )
        parts = _sections(result.output, mark)
        if "said" not in parts:
            raise Unreachable(f"{self.phone.address}: the phone has no place to work: {result.output.strip()[-500:]}")
        said = parts["said"]
        if result.code in NOT_FOUND:
            raise Unreachable(f"{self.phone.address}: {path} cannot be run: {said.strip()}")
        if result.code in SIGNALLED:
            raise ToolFailed(f"{self.setup.tool} was ended by signal {result.code - 128}", said)
        if result.code != 0:
            raise _Refused(f"{self.setup.tool} ended with exit code {result.code}", said)
        return parts


class _Refused(ToolFailed):
    """A tool came to its end and said that it cannot do what it was asked."""


class _Watch:
    """Looks at a phone before and after."""

    def __init__(self, backend: Android):
        self.backend = backend
        self.before = backend.look()
        self.restarts = backend.restarts

    def read(self, plan: Plan) -> tuple[Evidence, Failure | None]:
        """Heat that throttled, or a limit of the clocks that fell meanwhile, refuses what was measured."""
        backend, before = self.backend, self.before
        after = backend.look()
        watched = sorted(set(backend.setup.cores or before.cores) & set(before.cores) & set(after.cores))
        properties = after.properties
        facts: Evidence = {
            "device": str(backend.phone.address),
            "cpu_model": next(
                (properties[name] for name in ("ro.soc.model", "ro.board.platform", "ro.hardware")
                 if properties.get(name)), "unknown",
            ),
            "abi": properties.get("ro.product.cpu.abi", "unknown"),
            "os_build": properties.get("ro.build.fingerprint", "unknown"),
            "tool": backend.setup.tool,
            "tool_restarts": backend.restarts - self.restarts,
            "clock_policy": backend.clock_policy(after),
            "clock_mhz": {str(core): [_mhz(before.cores[core].now), _mhz(after.cores[core].now)] for core in watched},
            "clock_limit_mhz": {
                str(core): [_mhz(before.cores[core].limit), _mhz(after.cores[core].limit)] for core in watched
            },
            "thermal_status": [before.thermal_status, after.thermal_status],
            "temperature_c": [before.temperature_c, after.temperature_c],
            "cpu_temperature_c": [before.cpu_temperature_c, after.cpu_temperature_c],
            "battery_percent": [before.battery_percent, after.battery_percent],
            "charging": after.charging,
        }  # fmt: skip
        why = _heat(before, backend.setup.max_temperature_c + WARMED_C) or _heat(
            after, backend.setup.max_temperature_c + WARMED_C
        )
        for core in watched:
            then, now = before.cores[core].limit, after.cores[core].limit
            if why is None and then is not None and now is not None and now < then:
                why = f"the clock of core {core} was limited from {_mhz(then)} to {_mhz(now)} MHz meanwhile"
        if why is not None:
            return facts, Failure(cause="hot", message=f"{backend.phone.address}: {why}")
        policies = backend.clock_policy(before), backend.clock_policy(after)
        message = f"{backend.phone.address}: its clock policy was {policies[0]} and is {policies[1]} now"
        return facts, None if policies[0] == policies[1] else Failure(cause="drift", message=message)


def _mhz(khz: int | None) -> float | None:
    return None if khz is None else khz / 1e3


@dataclass(eq=False)
class _Model:
    """A model on a phone."""

    backend: Android
    path: str
    profiled: _Profiled | None
    expected_ms: float
    times: list[NodeTimes] = field(default_factory=list)

    @property
    def profiler_runs(self) -> bool:
        return self.profiled is not None

    def time(self, runs: int) -> list[float]:
        limit_s = self.backend.setup.timeout_s + SLOWER * (runs + 1) * self.expected_ms / 1e3
        start = self.backend.start(self.path, runs, self.profiled, limit_s)
        if start.times is not None:
            self.times.append(start.times)
        return start.latencies_ms

    def node_times(self) -> NodeTimes:
        assert self.profiled is not None, "loaded without profile=True"
        return NodeTimes(
            total_ms=np.concatenate([times.total_ms for times in self.times]),
            layout_ms=np.concatenate([times.layout_ms for times in self.times]),
            events=np.max([times.events for times in self.times], axis=0),
        )


class _BenchmarkModel:
    suffix = ".tflite"
    runtime = "tflite-benchmark_model"

    def __init__(self, setup: _Setup, backend: Android):
        self.setup = setup
        self.backend = backend
        self._flags: frozenset[str] | None = None

    def lower(self, network: Network) -> bytes:
        return to_tflite(network, precision=self.setup.precision)

    def start(self, path: str, runs: int, profiled: _Profiled | None, limit_s: float) -> _Start:
        if profiled is not None and profiled.parts:
            return self._start_parts(runs, profiled, limit_s)
        setup = self.setup
        arguments = [
            f"--graph={path}", f"--num_threads={setup.threads}", f"--num_runs={runs}", "--min_secs=0",
            f"--max_secs={limit_s:.0f}", "--warmup_runs=1", "--warmup_min_secs=0",
            f"--use_xnnpack={str(setup.accelerator == 'cpu' and setup.xnnpack).lower()}",
        ]  # fmt: skip
        if self.forced:
            if FORCE_FP16 not in self.flags():
                raise Unsupported(f"this build of {setup.tool} has no flag --{FORCE_FP16}")
            arguments.append(f"--{FORCE_FP16}=true")
        half = str(setup.precision == "fp16").lower()
        if setup.accelerator == "gpu":
            arguments += ["--use_gpu=true", f"--gpu_precision_loss_allowed={half}", "--require_full_delegation=true"]
        elif setup.accelerator == "nnapi":
            arguments += ["--use_nnapi=true", f"--nnapi_allow_fp16={half}", "--require_full_delegation=true"]
        if profiled is not None:
            arguments.append("--enable_op_profiling=true")
            if "op_profiling_output_mode" in self.flags():
                arguments.append("--op_profiling_output_mode=csv")  # finer than the microseconds of the table
        said = self.backend.run_tool(arguments, limit_s)["said"]
        delegate = None if setup.accelerator == "cpu" else setup.accelerator.upper()
        read = benchmark_tools.parse_benchmark(said, runs, delegate=delegate, profiled=profiled is not None)
        if profiled is None:
            return _Start([read.latency_ms], None)
        operators = model_operators(profiled.model, profiled.network)
        try:
            times = _tflite_times(read.profile, operators, profiled.network, fp16=self.forced)
            return _Start([read.latency_ms], times)
        except _AddedUp as error:
            alone = {operators[number].owner for number in error.own}
            parts = _cut(profiled.network, alone)
            if len(parts) == 1:
                raise
            profiled.parts = tuple(self._part(*part) for part in parts)
        return self._start_parts(runs, profiled, limit_s)

    def _part(self, network: Network, numbers: tuple[int, ...]) -> _Part:
        model = to_tflite(network, precision=self.setup.precision, inner=True)
        return _Part(self.backend.phone.put(model, self.suffix), _Profiled(network, model), numbers)

    def _start_parts(self, runs: int, profiled: _Profiled, limit_s: float) -> _Start:
        latency_ms = 0.0
        nodes = len(profiled.network.nodes)
        whole = NodeTimes(np.zeros((1, nodes)), np.zeros((1, nodes)), np.zeros(nodes, dtype=np.int64))
        for part in profiled.parts:
            start = self.start(part.path, runs, part.profiled, limit_s)
            assert start.times is not None
            latency_ms += start.latencies_ms[0]
            numbers = list(part.numbers)
            whole.total_ms[:, numbers] = start.times.total_ms
            whole.events[numbers] = start.times.events
        return _Start([latency_ms], whole)

    @property
    def forced(self) -> bool:
        """Whether XNNPACK is to calculate in fp16."""
        return self.setup.precision == "fp16" and self.setup.accelerator == "cpu"

    def flags(self) -> frozenset[str]:
        """The flags that the tool on this phone knows."""
        if self._flags is None:
            # It prints them and calls that an error.
            said = self.backend.phone.run(f"{self.backend.tool_path()} --help", self.setup.timeout_s).output
            self._flags = benchmark_tools.parse_flags(said)
        return self._flags


class _AddedUp(Unsupported):
    """XNNPACK ran a graph in several parts, and the tool added up the times of what has one name in different parts.

    `own` are the model's operators that are not XNNPACK's.
    """

    def __init__(self, own: frozenset[int]) -> None:
        super().__init__("XNNPACK runs the graph in several parts, whose times the tool adds up")
        self.own = own


def _cut(network: Network, alone: set[int]) -> list[tuple[Network, tuple[int, ...]]]:
    """Cuts a network into parts, before and behind each node that must be alone; with the numbers of their nodes."""
    groups: list[list[int]] = []
    for number in range(len(network.nodes)):
        if not groups or number in alone or number - 1 in alone:
            groups.append([])
        groups[-1].append(number)
    first = len(network.inputs)
    wanted = [set(numbers) for numbers in network.consumers()]
    parts = []
    for group in groups:
        build = NetworkBuilder()
        made = {first + number for number in group}
        read = dict.fromkeys(tensor for number in group for tensor in network.nodes[number].inputs)
        here = {tensor: build.input(network.shapes[tensor]) for tensor in read if tensor not in made}
        for number in group:
            node = network.nodes[number]
            here[first + number] = build.add(node.operator, *(here[tensor] for tensor in node.inputs))
        outputs = [
            here[tensor] for tensor in sorted(made)
            if wanted[tensor] - set(group) or not wanted[tensor] or tensor in network.output_tensors
        ]  # fmt: skip
        parts.append((build.network(*outputs), tuple(group)))
    return parts


def _tflite_times(
    rows: Sequence[Row], operators: Sequence[ModelOperator], network: Network, *, fp16: bool = False
) -> NodeTimes:
    """The rows of a profile by the network's nodes; rows are means, so there is one row of times.

    Raises Unsupported where a row cannot be charged to a node, and _AddedUp where the graph must be cut.
    """
    own: dict[int, Row] = {}
    inside: list[Row] = []
    added_up = left_out = False
    for row in rows:
        if row.index is None:
            continue  # the runtime's other work
        if row.inside:
            # Each part that XNNPACK runs is counted from zero.
            added_up |= row.calls != 1
            left_out |= row.index not in (0, inside[-1].index + 1 if inside and inside[-1].index is not None else 0)
            inside.append(row)
        elif row.index < len(operators):
            # Some builds describe an operator behind its name.
            if row.type.partition("/")[0] != operators[row.index].code or row.index in own or row.calls != 1:
                raise Unsupported(f"the profile names an operator {row.type}, {row.index}, that the model has not")
            own[row.index] = row
        # A delegate is counted behind the model's operators; what it ran is told by the rows inside it.
    if added_up or (left_out and own):
        raise _AddedUp(frozenset(own))
    if left_out:
        raise Unsupported("the profile leaves out operators of XNNPACK")
    if not inside and len(own) != len(operators):
        raise Unsupported("the profile does not tell the times of what a delegate ran")
    charged = [(row, operators[index], 0.0) for index, row in own.items()]
    attributed = xnnpack.attribute([row.type for row in inside], operators, own, fp16=fp16)
    for row, (operator, lost) in zip(inside, attributed, strict=True):
        charged.append((row, operator, lost))
    times_ms = np.zeros((1, len(network.nodes)))
    events = np.zeros(len(network.nodes), dtype=np.int64)
    for row, operator, lost in charged:
        times_ms[0, operator.owner] += row.mean_ms + lost * TICK_MS
        events[operator.owner] += 1
    return NodeTimes(total_ms=times_ms, layout_ms=np.zeros_like(times_ms), events=events)


class _PerfTest:
    suffix = ".onnx"
    runtime = "onnxruntime-perf_test"

    def __init__(self, setup: _Setup, backend: Android):
        self.setup = setup
        self.backend = backend

    def lower(self, network: Network) -> bytes:
        return to_onnx(network, precision=self.setup.precision).SerializeToString()

    def start(self, path: str, runs: int, profiled: _Profiled | None, limit_s: float) -> _Start:
        arguments = self._arguments(runs)
        then = "echo; echo $mark results; cat results.csv 2>/dev/null"
        if profiled is not None:
            arguments += ["-p", "profile"]
            then += "; echo; echo $mark profile; cat profile*.json 2>/dev/null"
        parts = self.backend.run_tool([*arguments, path, "results.csv"], limit_s, then)
        latencies_ms = benchmark_tools.parse_results(parts["results"], runs, parts["said"])
        if profiled is None:
            return _Start(latencies_ms, None)
        events = benchmark_tools.parse_events(parts["profile"])
        if profiled.owners is None:
            profiled.owners = ort_profile.owners_by_name(events, profiled.network)
        if profiled.owners is None:
            profiled.owners = self._owners(path, profiled.network, limit_s)
        times = ort_profile.node_times(events, profiled.owners, len(profiled.network.nodes))
        if len(times.total_ms) != runs + 1:  # the tool warms up with one run, which the profiler sees too
            raise ToolFailed(f"the profile holds {len(times.total_ms)} runs instead of {runs + 1}", parts["said"])
        return _Start(latencies_ms, NodeTimes(times.total_ms[1:], times.layout_ms[1:], times.events))

    def _arguments(self, runs: int) -> list[str]:
        setup = self.setup
        provider = "nnapi" if setup.accelerator == "nnapi" else "xnnpack" if setup.xnnpack else "cpu"
        arguments = [
            "-I", "-S", "0", "-m", "times", "-r", str(runs), "-x", str(setup.threads), "-y", "1", "-o", "99",
            "-e", provider,
        ]  # fmt: skip
        if provider == "nnapi":  # what it cannot run must not run elsewhere in silence
            arguments += ["-i", "NNAPI_FLAG_CPU_DISABLED", "-C", "session.disable_cpu_ep_fallback|1"]
        return arguments

    def _owners(self, path: str, network: Network, limit_s: float) -> ort_profile.Owners:
        """From the graph as the runtime on the phone optimised it, which it writes into a file."""
        optimized = f"{self.setup.scratch}/optimized.onnx"
        self.backend.run_tool([*self._arguments(1), "-u", "optimized.onnx", path, "results.csv"], limit_s)
        try:
            model = onnx.load_from_string(self.backend.phone.get(optimized))
        except DecodeError as error:
            raise ToolFailed("the optimised model that it wrote cannot be read", str(error)) from error
        return ort_profile.owners_in_graph(model.graph, network)


# -------------------------------------------------------------------------------------------------------------- doctor


def _whence(tool: str) -> str:
    if tool == "benchmark_model":
        return (
            "get android_aarch64_benchmark_model from the nightly builds named on the LiteRT page on performance "
            "measurement, then: adb push benchmark_model /data/local/tmp && adb shell chmod +x "
            "/data/local/tmp/benchmark_model; or name it with the setting tool_file"
        )
    return (
        "build onnxruntime_perf_test with ONNX Runtime's build.sh --android, then adb push it to /data/local/tmp and "
        "chmod +x it; or name it with the setting tool_file"
    )


UNREACHED = (
    "on the phone: turn on developer options and USB debugging; over USB run `adb tcpip 5555` once after each start of "
    "the phone, then use its address with port 5555 (wireless debugging of Android 11 and later pairs over TLS, which "
    "needs that step too); end a host's own adb server with `adb kill-server` where the phone is on USB"
)


def doctor(options: Options) -> Iterator[Check]:
    setup = _Setup.of(options)
    yield Check("adb-shell", True, importlib.metadata.version("adb-shell"))
    adb.signer(setup.keys)
    yield Check("key", True, f"{setup.keys / adb.KEY}, authorised by accepting it on each phone's screen")
    for device in setup.devices:
        backend = Android(setup, setup.phone(device))
        try:
            yield from _examine(backend)
        except Unreachable as error:
            yield Check(f"{device}: answers", False, str(error), error.remedy or UNREACHED)
        finally:
            backend.phone.close()


def _examine(backend: Android) -> Iterator[Check]:
    setup, name = backend.setup, backend.phone.address
    state = backend.look()
    model = state.properties.get("ro.product.model", "unknown")
    yield Check(f"{name}: answers", True, f"{model}, {state.properties.get('ro.build.fingerprint', 'unknown')}")
    path = backend.tool_path()
    if state.tool:
        said = backend.phone.run(f"{path} {'--help' if setup.tool == 'benchmark_model' else '-h'}", setup.timeout_s)
        runs = said.code not in NOT_FOUND and said.code not in SIGNALLED
        found = f"{path}, hash {backend._version(state.tool)}" if runs else said.output.strip()[-200:]
        abi = state.properties.get("ro.product.cpu.abi", "unknown")
        yield Check(f"{name}: {setup.tool}", runs, found, f"it must be built for {abi}; {_whence(setup.tool)}")
    else:
        yield Check(f"{name}: {setup.tool}", False, f"no program {path}", _whence(setup.tool))
    free = state.free_bytes
    yield Check(
        f"{name}: space", free is not None and free >= adb.RESERVE,
        "unknown" if free is None else f"{free >> 20} MiB free", f"free storage; models are kept in {setup.folder}",
    )  # fmt: skip
    heat = _heat(state, setup.max_temperature_c)
    temperature = "unknown" if state.temperature_c is None else f"{state.temperature_c:.1f} °C"
    yield Check(
        f"{name}: temperature", heat is None, f"{temperature}, thermal status {state.thermal_status}",
        "let it cool down: out of its case, off the charger, screen off; an agent waits for that by itself",
    )  # fmt: skip
    policy = backend.clock_policy(state)
    yield replace(energy.check(backend.counter), name=f"{name}: energy")
    yield Check(
        f"{name}: clock policy", policy in ("fixed-performance", "performance"), policy,
        "set fixed_performance=true (Android 11 and later), or the governor performance on a rooted phone; without "
        "either the canary still shows how fast the phone is",
    )  # fmt: skip
    missing = sorted(set(setup.cores) - set(state.cores))
    yield Check(
        f"{name}: cores", not missing and (not setup.cores or len(setup.cores) >= setup.threads),
        f"{','.join(map(str, setup.cores)) or 'any'} of {','.join(map(str, sorted(state.cores))) or 'unknown'}",
        "the setting cores takes cores that the phone has, at least one for each thread",
    )  # fmt: skip
    yield Check(
        f"{name}: battery", not state.battery_saver, f"{state.battery_percent} %, battery saver "
        f"{'on' if state.battery_saver else 'off'}", "charge it, and turn the battery saver off",
    )  # fmt: skip
