"""A GPU for the tests: the backends that need one, or, without one, its driver's library as far as NVML goes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass, field, replace

import pytest

from device_agents import backends, energy
from device_agents.backends import Backend, Options
from lut_db.errors import InvalidInput

SUCCESS, NOT_SUPPORTED, INSUFFICIENT_SIZE, GPU_IS_LOST = 0, 3, 7, 15
SM, MEMORY, GRAPHICS = 1, 2, 0
THERMAL_COUNTER = 75
FLAG, COUNT, POINTER = c_uint, c_uint, c_void_p
BURST_S = 0.1
"""In place of a second: what is tested is that there are joules, not how exact they are."""


def gpu_backend(name: str, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend that may need a GPU, shown to this process alone. Skips, with what is lacking, where there is none."""
    try:
        backend = backends.create(name, Options(settings=settings))
    except InvalidInput as lack:
        if not name.startswith("cuda-"):
            raise
        pytest.skip(f"{name} cannot be tried here: {lack}")
    if name.startswith("cuda-"):
        monkeypatch.setattr(energy.Nvml, "burst_s", BURST_S)
        for variable, value in backend.environment().items():
            monkeypatch.setenv(variable, value)
    return backend


class _Process(ctypes.Structure):
    """nvmlProcessInfo_v2_t of nvml.h."""

    _fields_ = (("pid", c_uint), ("memory", c_ulonglong), ("gpu_instance", c_uint), ("compute_instance", c_uint))


class _Field(ctypes.Structure):
    """nvmlFieldValue_t of nvml.h."""

    _fields_ = (
        ("id", c_uint), ("scope", c_uint), ("timestamp", ctypes.c_longlong), ("latency", ctypes.c_longlong),
        ("type", c_uint), ("status", c_uint), ("value", c_ulonglong),
    )  # fmt: skip


@dataclass(frozen=True)
class Board:
    """What a GPU is like at a moment. None: its driver does not tell."""

    sm_mhz: int | None = 1410
    memory_mhz: int | None = 2619
    application_mhz: int | None = 1980
    default_mhz: int | None = 1980
    temperature_c: int | None = 41
    power_mw: int | None = 123_456
    limit_mw: int | None = 700_000
    reasons: int | None = 0
    heat_counter: int | None = 0
    energy_mj: int | None = 5_000
    persistence: int | None = 1
    mig: int | None = None
    users: tuple[int, ...] | None = ()
    lost: bool = False


@dataclass
class Library:
    """`libnvidia-ml.so.1` as C sees it: functions that write through pointers and return a status.

    `absent` are functions that a driver of some age does not export.
    """

    boards: list[Board] = field(default_factory=lambda: [Board(users=(os.getpid(),))])
    absent: Sequence[str] = ()
    name: bytes = b"NVIDIA H100 80GB HBM3"
    driver: bytes = b"580.65.06"

    def change(self, **what: object) -> None:
        self.boards[0] = replace(self.boards[0], **what)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Callable[..., int]:
        made = None if name in self.absent else _FUNCTIONS.get(name)
        if made is None:
            raise AttributeError(name)
        arguments, run = made

        def call(*given: int) -> int:
            return int(run(self, *given))

        function = ctypes.CFUNCTYPE(c_int, *arguments)(call)
        self.__dict__[name] = function  # kept, as long as somebody may call it
        return function

    def board(self, handle: int) -> Board:
        return self.boards[handle - 1]


def _text(text: bytes, buffer: int, length: int) -> int:
    assert len(text) < length
    ctypes.memmove(buffer, text + b"\0", len(text) + 1)
    return SUCCESS


def _told(library: Library, handle: int, value: int | None, place: int, kind: type = c_uint) -> int:
    if library.board(handle).lost:
        return GPU_IS_LOST
    if value is None:
        return NOT_SUPPORTED
    kind.from_address(place).value = value  # type: ignore[attr-defined]
    return SUCCESS


def _fact(name: str, kind: type = c_uint) -> tuple[Sequence[type], Callable[..., int]]:
    """A function of a handle that tells one fact."""
    return (POINTER, POINTER), lambda library, handle, place: _told(
        library, handle, getattr(library.board(handle), name), place, kind
    )


def _clock(names: dict[int, str]) -> tuple[Sequence[type], Callable[..., int]]:
    """A function of a handle and a kind of clock."""
    return (POINTER, FLAG, POINTER), lambda library, handle, which, place: _told(
        library, handle, getattr(library.board(handle), names[which]), place
    )


def _handle(library: Library, index: int, place: int) -> int:
    c_void_p.from_address(place).value = index + 1
    return SUCCESS


def _count(library: Library, place: int) -> int:
    c_uint.from_address(place).value = len(library.boards)
    return SUCCESS


def _mig(library: Library, handle: int, now: int, pending: int) -> int:
    return _told(library, handle, library.board(handle).mig, now)


def _processes(library: Library, handle: int, count: int, place: int | None) -> int:
    users = library.board(handle).users
    if users is None:
        return NOT_SUPPORTED
    room = c_uint.from_address(count)
    if room.value < len(users) or place is None:
        room.value = len(users)
        return INSUFFICIENT_SIZE if users else SUCCESS
    room.value = len(users)
    for number, pid in enumerate(users):
        _Process.from_address(place + number * ctypes.sizeof(_Process)).pid = pid
    return SUCCESS


def _fields(library: Library, handle: int, count: int, place: int) -> int:
    for number in range(count):
        asked = _Field.from_address(place + number * ctypes.sizeof(_Field))
        counted = library.board(handle).heat_counter if asked.id == THERMAL_COUNTER else None
        asked.status, asked.value = (NOT_SUPPORTED, 0) if counted is None else (SUCCESS, counted)
    return SUCCESS


_FUNCTIONS: dict[str, tuple[Sequence[type], Callable[..., int]]] = {
    "nvmlInitWithFlags": ((FLAG,), lambda library, flags: SUCCESS),
    "nvmlDeviceGetCount_v2": ((POINTER,), _count),
    "nvmlDeviceGetHandleByIndex_v2": ((COUNT, POINTER), _handle),
    "nvmlSystemGetDriverVersion": (
        (POINTER, COUNT), lambda library, buffer, length: _text(library.driver, buffer, length),
    ),
    "nvmlDeviceGetName": (
        (POINTER, POINTER, COUNT), lambda library, handle, buffer, length: _text(library.name, buffer, length),
    ),
    "nvmlDeviceGetUUID": (
        (POINTER, POINTER, COUNT),
        lambda library, handle, buffer, length: _text(b"GPU-%08d-0000-0000-0000-000000000000" % handle, buffer, length),
    ),
    "nvmlDeviceGetMigMode": ((POINTER, POINTER, POINTER), _mig),
    "nvmlDeviceGetClockInfo": _clock({SM: "sm_mhz", MEMORY: "memory_mhz"}),
    "nvmlDeviceGetApplicationsClock": _clock({GRAPHICS: "application_mhz"}),
    "nvmlDeviceGetDefaultApplicationsClock": _clock({GRAPHICS: "default_mhz"}),
    "nvmlDeviceGetTemperature": (
        (POINTER, FLAG, POINTER),
        lambda library, handle, sensor, place: _told(library, handle, library.board(handle).temperature_c, place),
    ),
    "nvmlDeviceGetPowerUsage": _fact("power_mw"),
    "nvmlDeviceGetPowerManagementLimit": _fact("limit_mw"),
    "nvmlDeviceGetPersistenceMode": _fact("persistence"),
    "nvmlDeviceGetTotalEnergyConsumption": _fact("energy_mj", c_ulonglong),
    "nvmlDeviceGetCurrentClocksEventReasons": _fact("reasons", c_ulonglong),
    "nvmlDeviceGetCurrentClocksThrottleReasons": _fact("reasons", c_ulonglong),
    "nvmlDeviceGetComputeRunningProcesses_v3": ((POINTER, POINTER, POINTER), _processes),
    "nvmlDeviceGetComputeRunningProcesses_v2": ((POINTER, POINTER, POINTER), _processes),
    "nvmlDeviceGetFieldValues": ((POINTER, c_int, POINTER), _fields),
}  # fmt: skip


def play_driver(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Puts a driver's library under pynvml for the time of a test. Skips where there is no pynvml."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    made = Library()
    monkeypatch.setattr(pynvml, "nvmlLib", made)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made
