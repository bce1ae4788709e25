"""What the phone is and how it fares: identity, properties, battery, heat and clocks, and the faults asked for.

All of it changes only through the methods here. `Phone.tool` answers the commands that on a phone ask the system,
such as `getprop` or `dumpsys`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lut_db.errors import InvalidInput

LITTLE_MAX_KHZ, BIG_MAX_KHZ, MIN_KHZ = 1_704_000, 2_914_000, 300_000
FULL_LOAD_THREADS = 4
LOWEST_CLOCK = 0.35
CLOCK_PER_DEGREE = 0.05
FIXED_CLOCK = 0.85
FIXED_MODE_MARGIN_C = 8.0
STATUS_STEP_C = 3.0
SHUTDOWN_STATUS = 6
HISTORY = 1000
RAILS = ("S2M_VDD_CPUCL2", "S5M_VDD_INT")
"""Power rails whose energy it counts: what load draws, and what is drawn all the while."""
IDLE_POWER = 0.1

FAULTS = {
    "corrupt-push": "a byte of the next pushed file is wrong",
    "crash-run": "the next run of a model ends by a segmentation fault",
    "die": "the phone is gone after `after` seconds, and back `seconds` later (0: only when woken)",
    "drop-push": "the connection is dropped after `after` bytes of the next push",
    "drop-run": "connections are dropped `after` seconds into the next run of a model",
    "fail-run": "the next run of a model ends with an error",
    "freeze": "for `seconds` connections stay open and nothing is answered",
    "garbage": "the next run of a model prints nonsense and ends with 0",
    "hang": "the next shell command never answers nor ends",
    "hang-run": "the next run of a model never ends",
    "no-space": "storage is full after `after` bytes of the next push",
}


@dataclass(frozen=True)
class Identity:
    """What kind of phone it is."""

    model: str = "Pixel 8"
    manufacturer: str = "Google"
    device: str = "shiba"
    android: str = "15"
    api_level: int = 35
    build: str = "AP4A.250105.002"
    serial: str = "SIM00000001"
    little_cores: int = 4
    big_cores: int = 4
    storage_mib: int = 512
    rooted: bool = False

    def __post_init__(self) -> None:
        if self.little_cores < 0 or self.big_cores < 0 or not self.cores:
            raise InvalidInput("a phone needs a core", field="cores", remedy="give counts of 0 or more, one above 0")
        if self.cores > 32:
            raise InvalidInput(f"{self.cores} cores", field="cores", remedy="32 at most")
        if self.api_level < 21:
            raise InvalidInput(f"API level {self.api_level}", field="api_level", remedy="21 or above")

    @property
    def cores(self) -> int:
        return self.little_cores + self.big_cores

    @property
    def incremental(self) -> str:
        return str(int(hashlib.sha256(self.build.encode()).hexdigest()[:6], 16))

    @property
    def fingerprint(self) -> str:
        return (
            f"{self.manufacturer.lower()}/{self.device}/{self.device}:{self.android}/{self.build}/{self.incremental}"
            ":user/release-keys"
        )

    def max_khz(self, core: int) -> int:
        """The highest clock of a core: the little ones come first."""
        return LITTLE_MAX_KHZ if core < self.little_cores else BIG_MAX_KHZ

    def properties(self) -> dict[str, str]:
        slug = self.device
        return {
            "persist.sys.timezone": "UTC",
            "ro.board.platform": "zuma",
            "ro.boot.hardware": slug,
            "ro.build.characteristics": "nosdcard",
            "ro.build.fingerprint": self.fingerprint,
            "ro.build.id": self.build,
            "ro.build.tags": "release-keys",
            "ro.build.type": "user",
            "ro.build.version.incremental": self.incremental,
            "ro.build.version.release": self.android,
            "ro.build.version.sdk": str(self.api_level),
            "ro.debuggable": "0",
            "ro.hardware": slug,
            "ro.product.brand": self.manufacturer.lower(),
            "ro.product.cpu.abi": "arm64-v8a",
            "ro.product.cpu.abilist": "arm64-v8a",
            "ro.product.device": slug,
            "ro.product.manufacturer": self.manufacturer,
            "ro.product.model": self.model,
            "ro.product.name": slug,
            "ro.secure": "1",
            "ro.serialno": self.serial,
            "ro.soc.manufacturer": self.manufacturer,
            "ro.soc.model": "Tensor G3",
            "sys.boot_completed": "1",
        }


@dataclass
class Climate:
    """How it behaves under load. Temperatures in degrees Celsius.

    Under full load the temperature approaches `ambient_c + rise_c` with the time constant `seconds`; above
    `throttle_c` clocks fall by 5 % for each degree, down to 35 %. Under full load its power rails draw `watts` more
    than at rest, when they draw a tenth of that; at 0 they are not counted.
    """

    speed: float = 1.0
    noise: float = 0.0
    ambient_c: float = 27.0
    rise_c: float = 8.0
    seconds: float = 60.0
    throttle_c: float = 42.0
    watts: float = 0.0

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("speed", self.speed > 0, "above 0: 2 makes every run take twice as long"),
            ("noise", 0 <= self.noise < 1, "at least 0 and below 1: the standard deviation of log latency"),
            ("seconds", self.seconds > 0, "above 0"),
            ("watts", self.watts >= 0, "0 or above"),
        ):
            if not ok:
                raise InvalidInput(f"{getattr(self, name)}", field=name, remedy=remedy)


@dataclass
class Fault:
    """Something that is to go wrong the next `times` times, where a command or path contains `match`."""

    name: str
    times: int = 1
    after: float = 0.0
    seconds: float = 0.0
    match: str = ""

    def __post_init__(self) -> None:
        if self.name not in FAULTS:
            raise InvalidInput(f"there is no fault {self.name!r}", field="fault", remedy=f"one of {', '.join(FAULTS)}")
        if self.times < 1 or self.after < 0 or self.seconds < 0:
            raise InvalidInput("a fault needs times >= 1, after >= 0, seconds >= 0", field="fault")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """`NAME`, or `NAME:times=2,after=4096,match=/data`."""
        name, _, rest = text.partition(":")
        given: dict[str, Any] = {}
        for pair in filter(None, rest.split(",")):
            key, _, value = pair.partition("=")
            try:
                given[key] = {"times": int, "after": float, "seconds": float, "match": str}[key](value)
            except (KeyError, ValueError) as error:
                raise InvalidInput(f"{pair!r}", field="fault", remedy="times, after, seconds or match") from error
        return cls(name, **given)


@dataclass
class ToolResult:
    """What a command prints and ends with."""

    out: str = ""
    err: str = ""
    code: int = 0


@dataclass
class Phone:
    """The state of one phone. `clock` gives seconds; tests may move it."""

    identity: Identity = field(default_factory=Identity)
    climate: Climate = field(default_factory=Climate)
    clock: Callable[[], float] = time.monotonic
    battery_level: int = 85
    usb_powered: bool = True
    fixed_performance: bool = False
    gpu: str = "full"
    nnapi: str = "full"
    benchmark_format: str = "new"
    faults: list[Fault] = field(default_factory=list)
    history: deque[str] = field(default_factory=lambda: deque(maxlen=HISTORY))
    on_reboot: Callable[[], None] = field(default=lambda: None)

    def __post_init__(self) -> None:
        self.props = self.identity.properties()
        self.settings: dict[str, dict[str, str]] = {
            "global": {"airplane_mode_on": "0", "stay_on_while_plugged_in": "0"},
            "secure": {"android_id": "5349500000000001"},
            "system": {"screen_brightness": "102", "screen_off_timeout": "60000"},
        }
        self.governors = ["sched_pixel"] * self.identity.cores
        self.temperature_c = self.climate.ambient_c
        self.status_override: int | None = None
        self.loads: dict[object, int] = {}
        self.awake = True
        self.joules = dict.fromkeys(RAILS, 0.0)
        self._began = self._seen = self.clock()

    # --- faults ------------------------------------------------------------------------------------------------

    def take(self, name: str, subject: str = "") -> Fault | None:
        """The fault of this name that is due for a command or path, counted down; None where there is none."""
        for fault in self.faults:
            if fault.name == name and fault.match in subject:
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
                return fault
        return None

    # --- heat and clocks ---------------------------------------------------------------------------------------

    @property
    def load(self) -> float:
        """From 0 to 1."""
        return min(1.0, sum(self.loads.values()) / FULL_LOAD_THREADS)

    def begin_load(self, key: object, threads: int) -> None:
        self.warm()
        self.loads[key] = max(1, min(threads, self.identity.cores))

    def end_load(self, key: object) -> None:
        self.warm()
        self.loads.pop(key, None)

    def warm(self) -> None:
        """Brings the temperature, and what the power rails have used, up to now."""
        now = self.clock()
        for rail, watts in zip(RAILS, (self.climate.watts * self.load, IDLE_POWER * self.climate.watts), strict=True):
            self.joules[rail] += watts * (now - self._seen)
        target = self.climate.ambient_c + self.climate.rise_c * self.load
        self.temperature_c = target + (self.temperature_c - target) * math.exp(
            (self._seen - now) / self.climate.seconds
        )
        self._seen = now

    def set_temperature(self, celsius: float) -> None:
        self.warm()
        self.temperature_c = celsius

    @property
    def _excess_c(self) -> float:
        limit = self.climate.throttle_c + (FIXED_MODE_MARGIN_C if self.fixed_performance else 0.0)
        return max(0.0, self.temperature_c - limit)

    def clock_share(self, core: int | None = None) -> float:
        """The share of its highest clock that a core (None: any) has under load: less when hot, or when fixed."""
        share = FIXED_CLOCK if self.fixed_performance else 1.0
        if core is not None and self.governors[core] == "powersave":
            share = LOWEST_CLOCK
        return max(LOWEST_CLOCK, share - CLOCK_PER_DEGREE * self._excess_c)

    def pace(self) -> float:
        """How many times longer a run takes than on this machine, on a big core."""
        return self.climate.speed / self.clock_share()

    def khz(self, core: int) -> int:
        """The present clock of a core."""
        top = self.identity.max_khz(core)
        if self.loads or self.governors[core] in ("performance", "powersave") or self.fixed_performance:
            return int(top * self.clock_share(core))
        return MIN_KHZ

    @property
    def thermal_status(self) -> int:
        """Android's: 0 none, 1 light, 2 moderate, 3 severe, 4 critical, 5 emergency."""
        if self.status_override is not None:
            return self.status_override
        excess = self.temperature_c - self.climate.throttle_c
        return 0 if excess <= 0 else min(5, 1 + int(excess / STATUS_STEP_C))

    @property
    def battery_c(self) -> float:
        """The battery follows the cores sluggishly."""
        return self.climate.ambient_c + 0.5 * (self.temperature_c - self.climate.ambient_c)

    def sensors(self) -> list[tuple[str, float]]:
        """Thermal zones: name and degrees Celsius."""
        return [
            ("BIG", self.temperature_c),
            ("LITTLE", self.climate.ambient_c + 0.8 * (self.temperature_c - self.climate.ambient_c)),
            ("VIRTUAL-SKIN", self.climate.ambient_c + 0.7 * (self.temperature_c - self.climate.ambient_c)),
            ("battery", self.battery_c),
        ]

    def system_files(self) -> dict[str, str]:
        """Files below /sys that follow the state, and their text."""
        files: dict[str, str] = {}
        for number, (name, celsius) in enumerate(self.sensors()):
            zone = f"sys/class/thermal/thermal_zone{number}"
            files |= {f"{zone}/temp": f"{round(celsius * 1000)}\n", f"{zone}/type": f"{name}\n"}
        every = f"0-{self.identity.cores - 1}\n" if self.identity.cores > 1 else "0\n"
        files |= {f"sys/devices/system/cpu/{name}": every for name in ("online", "possible", "present")}
        for core in range(self.identity.cores):
            folder = f"sys/devices/system/cpu/cpu{core}/cpufreq"
            current = f"{self.khz(core)}\n"
            files |= {
                f"{folder}/scaling_cur_freq": current,
                f"{folder}/cpuinfo_cur_freq": current,
                f"{folder}/cpuinfo_max_freq": f"{self.identity.max_khz(core)}\n",
                f"{folder}/cpuinfo_min_freq": f"{MIN_KHZ}\n",
                f"{folder}/scaling_max_freq": f"{self.identity.max_khz(core)}\n",
                f"{folder}/scaling_min_freq": f"{MIN_KHZ}\n",
                f"{folder}/scaling_available_governors": "sched_pixel conservative powersave performance schedutil\n",
            }
        if self.climate.watts:
            at_ms = round(1e3 * (self._seen - self._began))
            lines = [
                f"CH{n}(T={at_ms})[{rail}], {round(1e6 * used)}\n" for n, (rail, used) in enumerate(self.joules.items())
            ]
            files["sys/bus/iio/devices/iio:device0/energy_value"] = f"t={at_ms}\n{''.join(lines)}"
        supply = "sys/class/power_supply/battery"
        files |= {
            f"{supply}/capacity": f"{self.battery_level}\n",
            f"{supply}/temp": f"{round(self.battery_c * 10)}\n",
            f"{supply}/status": "Charging\n" if self.usb_powered else "Discharging\n",
        }
        return files

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can say it."""
        self.warm()
        return {
            "temperature_c": self.temperature_c,
            "thermal_status": self.thermal_status,
            "pace": self.pace(),
            "load": self.load,
            "battery_level": self.battery_level,
            "usb_powered": self.usb_powered,
            "fixed_performance": self.fixed_performance,
            "governors": list(self.governors),
            "climate": asdict(self.climate),
            "faults": [asdict(fault) for fault in self.faults],
            "history": list(self.history),
        }

    # --- commands ----------------------------------------------------------------------------------------------

    def tool(self, argv: list[str]) -> ToolResult:
        """What a command of the phone's own answers. `argv[0]` is its name."""
        self.warm()
        name, *arguments = argv
        answer: Callable[[list[str]], ToolResult] | None = getattr(self, f"_{name}", None)
        if name not in TOOLS or answer is None:
            return ToolResult(err=f"{name}: inaccessible or not found\n", code=127)
        return answer(arguments)

    def _getprop(self, arguments: list[str]) -> ToolResult:
        if not arguments:
            return ToolResult("".join(f"[{name}]: [{self.props[name]}]\n" for name in sorted(self.props)))
        default = arguments[1] if len(arguments) > 1 else ""
        return ToolResult(self.props.get(arguments[0], default) + "\n")

    def _setprop(self, arguments: list[str]) -> ToolResult:
        if len(arguments) != 2:
            return ToolResult(err="usage: setprop NAME VALUE\n\nSets an Android system property.\n", code=1)
        name, value = arguments
        if name.startswith("ro.") or (len(value) > 91):
            return ToolResult(
                err=f"Failed to set property '{name}' to '{value}'.\nSee dmesg for error reason.\n", code=1
            )
        self.props[name] = value
        return ToolResult()

    def _settings(self, arguments: list[str]) -> ToolResult:
        verb, *rest = arguments or [""]
        wanted = {"get": 2, "put": 3, "delete": 2, "list": 1}
        if verb not in wanted or len(rest) < wanted[verb] or rest[0] not in self.settings:
            return ToolResult(
                err="Invalid namespace or command\nusage: settings [get|put|delete|list] NAMESPACE …\n", code=255
            )
        table = self.settings[rest[0]]
        if verb == "get":
            return ToolResult(table.get(rest[1], "null") + "\n")
        if verb == "list":
            return ToolResult("".join(f"{key}={value}\n" for key, value in sorted(table.items())))
        if verb == "put":
            table[rest[1]] = rest[2]
            return ToolResult()
        return ToolResult(f"Deleted {int(table.pop(rest[1], None) is not None)} rows\n")

    def _id(self, arguments: list[str]) -> ToolResult:
        if arguments:
            plain = {"-u": "2000", "-g": "2000", "-un": "shell", "-gn": "shell"}
            text = plain.get(
                "".join(arguments).replace("--", "-").replace("-n", "n") if len(arguments) > 1 else arguments[0]
            )
            if text is None:
                return ToolResult(err=f"id: Unknown option '{arguments[0]}'\n", code=1)
            return ToolResult(text + "\n")
        groups = "1004(input),1007(log),1011(adb),1015(sdcard_rw),1028(sdcard_r),3003(inet),3009(readproc)"
        return ToolResult(f"uid=2000(shell) gid=2000(shell) groups=2000(shell),{groups} context=u:r:shell:s0\n")

    def _whoami(self, arguments: list[str]) -> ToolResult:
        return ToolResult("shell\n")

    def _hostname(self, arguments: list[str]) -> ToolResult:
        return ToolResult("localhost\n")

    def _uname(self, arguments: list[str]) -> ToolResult:
        fields = {
            "s": "Linux", "n": "localhost", "r": "5.15.148-android14-11-gbb9c3e2", "v": "#1 SMP PREEMPT Thu Jan 2",
            "m": "aarch64", "o": "Toybox",
        }  # fmt: skip
        letters = "".join(argument.removeprefix("-") for argument in arguments) or "s"
        letters = "snrvmo" if "a" in letters else letters
        unknown = [letter for letter in letters if letter not in fields]
        if unknown:
            return ToolResult(err=f"uname: Unknown option '{unknown[0]}'\n", code=1)
        return ToolResult(" ".join(text for letter, text in fields.items() if letter in letters) + "\n")

    def _svc(self, arguments: list[str]) -> ToolResult:
        if arguments[:2] == ["power", "stayon"] and len(arguments) == 3:
            self.settings["global"]["stay_on_while_plugged_in"] = "7" if arguments[2] == "true" else "0"
            return ToolResult()
        return ToolResult(err="Control the device\nusage: svc power stayon [true|false]\n", code=255)

    def _input(self, arguments: list[str]) -> ToolResult:
        if len(arguments) == 2 and arguments[0] == "keyevent":
            key = arguments[1].removeprefix("KEYCODE_")
            if key in ("26", "POWER"):
                self.awake = not self.awake
            elif key in ("224", "WAKEUP"):
                self.awake = True
            elif key in ("223", "SLEEP"):
                self.awake = False
            return ToolResult()
        return ToolResult(err="Usage: input [<source>] <command> [<arg>...]\n", code=255)

    def _wm(self, arguments: list[str]) -> ToolResult:
        known = {"size": "Physical size: 1080x2400\n", "density": "Physical density: 420\n"}
        if arguments and arguments[0] in known:
            return ToolResult(known[arguments[0]])
        return ToolResult(err="Window manager (window) commands: size, density\n", code=255)

    def _reboot(self, arguments: list[str]) -> ToolResult:
        self.on_reboot()
        return ToolResult()

    def _cmd(self, arguments: list[str]) -> ToolResult:
        service, *rest = arguments or [""]
        if service == "power" and rest[:1] == ["set-fixed-performance-mode-enabled"] and len(rest) == 2:
            if self.identity.api_level < 30:
                return ToolResult(err="Unknown command: set-fixed-performance-mode-enabled\n", code=255)
            self.fixed_performance = rest[1] == "true"
            return ToolResult()
        if service == "thermalservice" and rest[:1] == ["override-status"] and len(rest) == 2:
            if not rest[1].isdigit() or int(rest[1]) > SHUTDOWN_STATUS:
                return ToolResult(err=f"Error: {rest[1]} is not a status\n", code=255)
            self.status_override = int(rest[1])
            return ToolResult()
        if service == "thermalservice" and rest == ["reset"]:
            self.status_override = None
            return ToolResult()
        if service == "settings":
            return self._settings(rest)
        if service == "-l":
            return ToolResult("Currently running services:\n  battery\n  power\n  settings\n  thermalservice\n")
        if service in ("power", "thermalservice"):
            return ToolResult(err=f"Unknown command: {' '.join(rest)}\n", code=255)
        return ToolResult(err=f"cmd: Can't find service: {service}\n", code=20)

    def _dumpsys(self, arguments: list[str]) -> ToolResult:
        service, *rest = arguments or [""]
        if service == "battery":
            return self._dump_battery(rest)
        if service == "thermalservice":
            return ToolResult(self._dump_thermal())
        if service == "power":
            wakefulness = "Awake" if self.awake else "Asleep"
            return ToolResult(f"POWER MANAGER (dumpsys power)\n\nPower Manager State:\n  mWakefulness={wakefulness}\n")
        if service in ("-l", ""):
            return ToolResult("Currently running services:\n  battery\n  power\n  thermalservice\n")
        return ToolResult(err=f"Can't find service: {service}\n", code=0)

    def _dump_battery(self, arguments: list[str]) -> ToolResult:
        match arguments:
            case ["unplug"]:
                self.usb_powered = False
                return ToolResult()
            case ["reset"]:
                self.usb_powered = True
                return ToolResult()
            case ["set", "level", level] if level.isdigit() and int(level) <= 100:
                self.battery_level = int(level)
                return ToolResult()
            case []:
                text = (
                    "Current Battery Service state:\n"
                    "  AC powered: false\n"
                    f"  USB powered: {str(self.usb_powered).lower()}\n"
                    "  Wireless powered: false\n"
                    "  Dock powered: false\n"
                    f"  Max charging current: {500000 if self.usb_powered else 0}\n"
                    f"  Max charging voltage: {5000000 if self.usb_powered else 0}\n"
                    f"  Charge counter: {44750 * self.battery_level}\n"
                    f"  status: {2 if self.usb_powered else 3}\n"
                    "  health: 2\n"
                    "  present: true\n"
                    f"  level: {self.battery_level}\n"
                    "  scale: 100\n"
                    f"  voltage: {3500 + 8 * self.battery_level}\n"
                    f"  temperature: {round(self.battery_c * 10)}\n"
                    "  technology: Li-ion\n"
                )
                return ToolResult(text)
        return ToolResult(err="Unknown set option: " + " ".join(arguments) + "\n", code=255)

    def _dump_thermal(self) -> str:
        types = {"BIG": 0, "LITTLE": 0, "VIRTUAL-SKIN": 3, "battery": 2}
        lines = [
            f"\tTemperature{{mValue={celsius:.3f}, mType={types[name]}, mName={name}, mStatus={self.thermal_status}}}"
            for name, celsius in self.sensors()
        ]
        listeners = "\tcallbacks: 1\n\tkilled: false\n\tbroadcasts count: -1"
        return "\n".join([
            f"IsStatusOverride: {str(self.status_override is not None).lower()}",
            "ThermalEventListeners:", listeners, "ThermalStatusListeners:", listeners,
            f"Thermal Status: {self.thermal_status}",
            "Cached temperatures:", *lines, "HAL Ready: true", "HAL connection:",
            "\tThermal HAL AIDL 2 connected: yes", "Current temperatures from HAL:", *lines,
            "Current cooling devices from HAL:",
            f"\tCoolingDevice{{mValue={int(self._excess_c)}, mType=2, mName=thermal-cpufreq-2}}", "",
        ])  # fmt: skip


TOOLS = (
    "cmd", "dumpsys", "getprop", "hostname", "id", "input", "reboot", "setprop", "settings", "svc", "uname", "whoami",
    "wm",
)  # fmt: skip
"""Commands that `Phone.tool` answers; those that need processes or files are in `toolbox.py`."""
