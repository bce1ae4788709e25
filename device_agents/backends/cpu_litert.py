"""LiteRT (TensorFlow Lite) on the CPU, by default through XNNPACK.

Spoken to through the C interface of the wheel's shared library: a run then is one call without copies, and the
runtime's own profiler can be read. With XNNPACK it tells the time of each of XNNPACK's operators, from the end of the
last one to its own, in whole ticks of its clock (`device_agents.xnnpack` says whose they are). Without XNNPACK it
counts the model's operators itself.

The profiler keeps room for half a million entries, some 80 MB, in each network loaded with `profile=True`.
"""

from __future__ import annotations

import ctypes
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from ctypes import byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path

import ai_edge_litert
import numpy as np
from numpy.typing import NDArray

from device_agents import energy, evidence, fine_clock
from device_agents.backends import Backend, Check, Loaded, NodeTimes, Options, Unsupported
from device_agents.settings import choice
from device_agents.xnnpack import attribute
from lut_db.errors import InvalidInput
from lut_db.lowering.int8 import Samples
from lut_db.lowering.tflite import ModelOperator, model_operators, to_nchw, to_nhwc, to_tflite
from lut_db.lowering.weights import Weights
from lut_db.measurements import Evidence, Failure
from lut_db.networks import Network
from lut_db.operators import Convolution
from lut_db.plans import Plan
from lut_db.targets import PRECISIONS, Precision, Target

PACKAGE = "ai-edge-litert"
SERIES = "2.3."
"""The series of the package whose C interface this file speaks; it is not fixed between series."""

SETTINGS = {
    "precision": "fp32, int8 or, with XNNPACK on a processor that can, fp16; fp32 by default",
    "xnnpack": "on or off: XNNPACK's kernels or the runtime's own; on by default",
    "huge_pages": "on or off: memory in huge pages; on by default where the system can",
    **fine_clock.SETTING,
    "powercap": f"the folder in which the system counts energy; {energy.POWERCAP} by default",
}
INPUT_SEED = 0


def create(options: Options) -> Backend:
    xnnpack = options.settings.get("xnnpack", "on")
    if xnnpack not in ("on", "off"):
        raise InvalidInput(f"{xnnpack!r} is neither on nor off", field="settings.xnnpack", remedy="on or off")
    precision = choice(options.settings, "precision", PRECISIONS)
    fine_clock.check_setting(options.settings)
    backend = CpuLitert(options, xnnpack == "on", evidence.huge_pages(options.settings), precision)
    if precision == "fp16":
        backend.check_fp16()
    return backend


def doctor(options: Options) -> Iterator[Check]:
    version = metadata.version(PACKAGE)
    yield Check(PACKAGE, version.startswith(SERIES), version, f"pip install '{PACKAGE}=={SERIES}*'")
    try:
        backend = CpuLitert(options, options.settings.get("xnnpack", "on") == "on", False)
        session = backend.probe()
        found = f"{_library().path.name}, {_profiler_name(session.backend.xnnpack)} answers"
        session.node_times()
    except (OSError, AttributeError, InvalidInput, Unsupported) as error:
        yield Check("C interface", False, str(error), f"pip install --force-reinstall '{PACKAGE}=={SERIES}*'")
    else:
        yield Check("C interface", True, found)
    yield from evidence.cpu_checks(options.threads, options.cores)
    yield fine_clock.check(options.settings)
    yield energy.check(lambda: energy.of_processor(options.settings))


_PROBE = Convolution(input=(1, 8, 8, 8), filters=8, kernel=(3, 3), padding=(1, 1, 1, 1), activation="relu")


def _profiler_name(xnnpack: bool) -> str:
    return "XNNPACK's profiler" if xnnpack else "LiteRT's profiler"


class _Watch(evidence.CpuWatch):
    """Watches the machine, and says where the times of nodes come from."""

    def __init__(self, xnnpack: bool):
        super().__init__()
        self.xnnpack = xnnpack

    def read(self, plan: Plan) -> tuple[Evidence, Failure | None]:
        facts, failure = super().read(plan)
        return {**facts, "node_times": _profiler_name(self.xnnpack)}, failure


class CpuLitert:
    starts = False

    def __init__(self, options: Options, xnnpack: bool, huge_pages: bool, precision: Precision = "fp32"):
        self.options = options
        self.xnnpack = xnnpack
        self.huge_pages = huge_pages
        self.precision: Precision = precision

    def check_fp16(self) -> None:
        """Raises InvalidInput where XNNPACK has no kernels of fp16 for this processor."""
        why = "the runtime's own kernels are of fp32 and int8"
        if self.xnnpack:
            try:
                session = self.probe()
                session.node_times()
                assert session.profile is not None
                if any(FP16_KERNEL in entry.name for entry in session.profile.entries or ()):
                    return
                why = "XNNPACK ran fp32 instead"
            except Unsupported as error:
                why = str(error)
        raise InvalidInput(
            f"no fp16 here: {why}", field="settings.precision",
            remedy="fp32 or int8; fp16 takes xnnpack=on and F16C and AVX2 (x86) or FEAT_FP16 (Arm v8.2)",
        )  # fmt: skip

    def probe(self) -> _Session:
        """A profiled session that ran once, in whatever process: one that was not started to measure has no fine
        clock."""
        options = replace(self.options, settings={**self.options.settings, "fine_clock": "off"})
        session = _Session(Network.of(_PROBE), CpuLitert(options, self.xnnpack, self.huge_pages, self.precision), True)
        session.time(1)
        return session

    def environment(self) -> dict[str, str]:
        return evidence.huge_page_environment(self.huge_pages) | fine_clock.environment(self.options.settings)

    def target(self) -> Target:
        return Target(
            device_model=evidence.cpu_model(),
            os_build=evidence.os_build(),
            runtime="litert",
            runtime_version=metadata.version(PACKAGE),
            threads=self.options.threads,
            cores=self.options.cores,
            precision=self.precision,
            clock_policy=evidence.clock_policy(),
            options={"xnnpack": "on" if self.xnnpack else "off", "huge_pages": "on" if self.huge_pages else "off"},
        )

    def ready(self) -> None:
        """A processor always is."""

    def move(self) -> bool:
        return evidence.next_core(self.options.cores, self.options.threads)

    def watch(self) -> evidence.CpuWatch:
        return _Watch(self.xnnpack)

    def counter(self) -> energy.Counter:
        return energy.of_processor(self.options.settings)

    def load(self, model: Network | Path, *, profile: bool) -> Loaded:
        return _Session(model, self, profile)

    def compute(self, network: Network, weights: Weights, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray]:
        session = _Session(network, self, False, weights, [inputs])
        session.write([to_nhwc(values) for values in inputs])
        session.time(1)
        return [to_nchw(values) for values in session.read()]


# --- the C interface -------------------------------------------------------------------------------------------

HOST_MEMORY = 1
LOCK_TO_READ, LOCK_TO_WRITE = 0, 1
CPU = 1
"""The processor as an accelerator, in a set of bits."""
LONGEST_SHAPE = 8
ELEMENTS: dict[int, type[np.generic]] = {
    1: np.float32, 2: np.int32, 3: np.uint8, 4: np.int64, 6: np.bool_, 7: np.int16, 9: np.int8, 10: np.float16,
    11: np.float64,
}  # fmt: skip
"""Types of a tensor's elements."""

MIN_SEVERITY_OPTION, ACCELERATORS_OPTION = 25, 24
ERRORS_ONLY = 3
INTEGER = 2
CPU_OPTIONS, RUNTIME_OPTIONS = b"xnnpack", b"runtime_options_string"
"""What the runtime calls the options for its processor kernels and for itself; both are TOML."""
FP16_FLAGS = 1 | 2 | 4
"""XNNPACK's: kernels of int8, of uint8, and of fp16 in place of fp32, or none at all."""
FP16_KERNEL = ", F16)"
"""How the name goes on of an operator of XNNPACK that has one kernel for each precision."""


class _Layout(ctypes.Structure):
    _fields_ = (
        ("rank", c_uint32, 7), ("has_strides", c_uint32, 1), ("sizes", c_int32 * LONGEST_SHAPE),
        ("strides", c_uint32 * LONGEST_SHAPE),
    )  # fmt: skip


class _TensorType(ctypes.Structure):
    _fields_ = (("element", c_int), ("layout", _Layout))


class _Option(ctypes.Structure):
    """A setting of an environment; of the kinds of values only integers are wanted."""

    _fields_ = (("tag", c_int), ("kind", c_int), ("value", c_int64))


EVENT = np.dtype(
    [("tag", np.uint64), ("type", np.int32), ("start", np.uint64), ("elapsed", np.uint64),
     ("memory", np.uint64, 6), ("index", np.int64), ("subgraph", np.int64), ("source", np.int32)],
    align=True,
)  # fmt: skip
"""An entry of the profile; `tag` is the address of its name."""

STATUSES = {
    1: "invalid argument", 2: "out of memory", 3: "runtime failure", 4: "missing input", 5: "unsupported",
    6: "not found", 500: "file not readable", 501: "not a valid TFLite file", 504: "compilation failed",
    1000: "index out of bounds", 1001: "invalid type", 1002: "invalid graph",
}  # fmt: skip

RETURN_NOTHING = (
    "LiteRtDestroyEnvironment", "LiteRtDestroyModel", "LiteRtDestroyOptions", "LiteRtDestroyCompiledModel",
    "LiteRtDestroyTensorBuffer",
)  # fmt: skip


@ctypes.CFUNCTYPE(None, c_void_p)
def _ignore(_: int) -> None:
    """Called by the runtime when it needs an option's text no longer, which Python frees."""


class _Library:
    """The shared library, with the status of every call checked, and one environment for the whole process."""

    def __init__(self) -> None:
        name = {"darwin": "libLiteRt.dylib", "win32": "libLiteRt.dll"}.get(sys.platform, "libLiteRt.so")
        self.path = Path(ai_edge_litert.__file__).with_name(name)
        self.functions = ctypes.CDLL(str(self.path))
        for name in RETURN_NOTHING:
            getattr(self.functions, name).restype = None
        options = (_Option * 2)(
            _Option(MIN_SEVERITY_OPTION, INTEGER, ERRORS_ONLY), _Option(ACCELERATORS_OPTION, INTEGER, CPU)
        )
        self.environment = self.make("LiteRtCreateEnvironment", len(options), options)

    def call(self, name: str, *arguments: object) -> None:
        """Raises Unsupported where the runtime refuses."""
        self.check(name, getattr(self.functions, name)(*arguments))

    def check(self, name: str, status: int) -> None:
        if status:
            raise Unsupported(f"LiteRT refused: {name} gave status {status}, {STATUSES.get(status, 'unknown')}")

    def make(self, name: str, *arguments: object) -> c_void_p:
        """What a call puts into its last argument."""
        made = c_void_p()
        self.call(name, *arguments, byref(made))
        return made

    def count(self, name: str, *arguments: object) -> int:
        counted = c_size_t()
        self.call(name, *arguments, byref(counted))
        return counted.value


@cache
def _library() -> _Library:
    version = metadata.version(PACKAGE)
    if not version.startswith(SERIES):
        raise InvalidInput(
            f"{PACKAGE} {version} has another C interface",
            field="backend",
            remedy=f"pip install '{PACKAGE}=={SERIES}*'",
        )
    return _Library()


@dataclass
class _Tensor:
    """A tensor of the model's border and the buffer that holds it."""

    buffer: c_void_p
    shape: tuple[int, ...]
    dtype: type[np.generic]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class _Session:
    """A model ready to run, with buffers for its inputs and outputs."""

    def __init__(
        self, model: Network | Path, backend: CpuLitert, profile: bool, weights: Weights | None = None,
        samples: Samples | None = None,
    ):  # fmt: skip
        self.backend = backend
        self.profiler_runs = profile
        self.library = library = _library()
        made: list[tuple[str, c_void_p]] = []
        # The runtime reads these where they are: the model with its weights, and the options.
        kept: list[bytes] = []
        weakref.finalize(self, _destroy, library, made, kept)

        def make(destroy: str, name: str, *arguments: object) -> c_void_p:
            handle = library.make(name, *arguments)
            made.append((destroy, handle))
            return handle

        if isinstance(model, Path):
            source = make("LiteRtDestroyModel", "LiteRtCreateModelFromFile", library.environment, str(model).encode())
        else:
            kept.append(to_tflite(model, weights, precision=backend.precision, samples=samples))
            source = make(
                "LiteRtDestroyModel", "LiteRtCreateModelFromBuffer", library.environment, c_char_p(kept[0]),
                c_size_t(len(kept[0])),
            )  # fmt: skip
        options = make("LiteRtDestroyOptions", "LiteRtCreateOptions")
        library.call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        kernels = "delegate" if backend.xnnpack else "builtin"
        flags = f"flags = {FP16_FLAGS}\n" if backend.precision == "fp16" else ""
        for identifier, text in (
            (CPU_OPTIONS, f'num_threads = {backend.options.threads}\nkernel_mode = "{kernels}"\n{flags}'),
            (RUNTIME_OPTIONS, f"enable_profiling = {'true' if profile else 'false'}\n"),
        ):
            kept.append(text.encode())
            opaque = library.make("LiteRtCreateOpaqueOptions", identifier, c_char_p(kept[-1]), _ignore)
            library.call("LiteRtAddOpaqueOptions", options, opaque)
        self.model = make(
            "LiteRtDestroyCompiledModel", "LiteRtCreateCompiledModel", library.environment, source, options
        )

        signature = library.make("LiteRtGetModelSignature", source, c_size_t(0))
        self.inputs = self._tensors(make, signature, "Input")
        self.outputs = self._tensors(make, signature, "Output")
        random = np.random.default_rng(INPUT_SEED)
        # Whole numbers may index something: zeros always can.
        self.write(
            [random.standard_normal(tensor.shape).astype(tensor.dtype) if np.issubdtype(tensor.dtype, np.floating)
             else np.zeros(tensor.shape, tensor.dtype) for tensor in self.inputs]
        )  # fmt: skip
        self.arguments = (
            self.model, c_size_t(0), c_size_t(len(self.inputs)), _addresses(self.inputs), c_size_t(len(self.outputs)),
            _addresses(self.outputs),
        )  # fmt: skip
        self.profile: _Profile | None = None
        self.timed = 0
        self.passed_ms = 0.0
        # What a runtime does only in the first run belongs to loading.
        self._run()
        if profile:
            assert isinstance(model, Network), "only networks can be profiled"
            self.profile = _Profile(library, self.model, model, model_operators(kept[0], model), backend)

    def _tensors(self, make: Callable[..., c_void_p], signature: c_void_p, side: str) -> list[_Tensor]:
        """The tensors of one side with fresh buffers, of one example where their number is left open.

        Raises Unsupported where inputs leave other sizes open: their latency would be of sizes that nobody asked for.
        """
        library = self.library
        count = library.count(f"LiteRtGetNumSignature{side}s", signature)
        layouts = (_Layout * count)()
        if side == "Output":
            library.call(
                "LiteRtGetCompiledModelOutputTensorLayouts", self.model, c_size_t(0), c_size_t(count), layouts,
                ctypes.c_bool(True),
            )  # fmt: skip
        tensors = []
        for number in range(count):
            if side == "Input":
                library.call(
                    "LiteRtGetCompiledModelInputTensorLayout", self.model, c_size_t(0), c_size_t(number),
                    byref(layouts[number]),
                )  # fmt: skip
            tensor = library.make(f"LiteRtGetSignature{side}TensorByIndex", signature, c_size_t(number))
            kind = _TensorType()
            library.call("LiteRtGetRankedTensorType", tensor, byref(kind))
            if side == "Input" and any(size < 1 for size in kind.layout.sizes[1 : kind.layout.rank]):
                raise Unsupported(f"input {number} leaves open more than how many examples it takes")
            kind.layout = layouts[number]
            if kind.element not in ELEMENTS:
                raise Unsupported(f"{side.lower()} {number} has elements of LiteRT's type {kind.element}")
            shape = tuple(kind.layout.sizes[: kind.layout.rank])
            described = _Tensor(c_void_p(), shape, ELEMENTS[kind.element])
            described.buffer = make(
                "LiteRtDestroyTensorBuffer", "LiteRtCreateManagedTensorBuffer", library.environment, HOST_MEMORY,
                byref(kind), c_size_t(described.bytes),
            )  # fmt: skip
            tensors.append(described)
        return tensors

    def write(self, values: Sequence[NDArray]) -> None:
        """Fills the inputs."""
        for tensor, given in zip(self.inputs, values, strict=True):
            if given.shape != tensor.shape:
                raise InvalidInput(f"shape {given.shape} where the model takes {tensor.shape}", field="inputs")
            array = np.ascontiguousarray(given, tensor.dtype)
            address = self._lock(tensor, LOCK_TO_WRITE)
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
            self.library.call("LiteRtUnlockTensorBuffer", tensor.buffer)

    def read(self) -> list[NDArray]:
        """Copies of the outputs."""
        found = []
        for tensor in self.outputs:
            address = self._lock(tensor, LOCK_TO_READ)
            found.append(np.frombuffer(ctypes.string_at(address, tensor.bytes), tensor.dtype).reshape(tensor.shape))
            self.library.call("LiteRtUnlockTensorBuffer", tensor.buffer)
        return found

    def _lock(self, tensor: _Tensor, mode: int) -> c_void_p:
        address = c_void_p()
        self.library.call("LiteRtLockTensorBuffer", tensor.buffer, byref(address), mode)
        return address

    def _run(self) -> float:
        """Runs the model once; the time that it took, in ms."""
        begin = time.perf_counter()
        status = self.library.functions.LiteRtRunCompiledModel(*self.arguments)
        elapsed_ms = (time.perf_counter() - begin) * 1e3
        self.library.check("LiteRtRunCompiledModel", status)
        return elapsed_ms

    def time(self, runs: int) -> list[float]:
        times_ms = []
        with nullcontext() if self.profile is None else self.profile.clock.running():
            for _ in range(runs):
                times_ms.append(self._run())
                self.timed += 1
                self.passed_ms += times_ms[-1]
                if self.profile is not None:
                    self.profile.drain_if_full()
        return times_ms

    def node_times(self) -> NodeTimes:
        assert self.profile is not None, "loaded without profile=True"
        times = self.profile.node_times()
        if len(times.total_ms) != self.timed:
            raise Unsupported(f"the profile tells {len(times.total_ms)} runs of {self.timed}")
        return self.profile.clock.believed(times, self.passed_ms)


def _addresses(tensors: Sequence[_Tensor]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(tensors))(*(tensor.buffer for tensor in tensors))


def _destroy(library: _Library, made: list[tuple[str, c_void_p]], kept: list[bytes]) -> None:
    """Gives back what a session made, the last first, and then what it kept for the runtime."""
    while made:
        name, handle = made.pop()
        getattr(library.functions, name)(handle)
    kept.clear()


# --- the profile -----------------------------------------------------------------------------------------------

OPERATOR, DELEGATED = 2, 8
"""Types of entries: an operator of the model, counted by its index; an operator of XNNPACK, in the order of running."""
FIRST_OF_RUN = "LiteRT::Run[buffer registration]"
SURROUNDINGS = frozenset({FIRST_OF_RUN, "LiteRT::Run[Buffer sync]", "invoke", "Invoke"})
"""Entries of the whole run and of what the runtime does around the operators."""
FULL = 1 << 18
"""Entries after which the profiler is emptied: half of what it can hold."""


@dataclass(frozen=True)
class _Entry:
    """What one entry of a run says: the type, the name, and the index that the profiler gave it."""

    type: int
    name: str
    index: int


class _Profile:
    """Collects the runtime's profile and tells it by the network's nodes."""

    def __init__(
        self, library: _Library, model: c_void_p, network: Network, operators: list[ModelOperator], backend: CpuLitert
    ):
        self.library = library
        self.nodes = len(network.nodes)
        self.operators = operators
        self.backend = backend
        self.profiler = library.make("LiteRtCompiledModelGetProfiler", model)
        if not self.profiler:
            raise Unsupported("LiteRT made no profiler for this network")
        self.clock = fine_clock.Clock(library.path.name, backend.options.settings)
        self.entries: list[_Entry] | None = None
        self.charges: list[tuple[int, float]] = []
        self.runs: list[NDArray[np.float64]] = []
        library.call("LiteRtStartProfiler", self.profiler)

    def drain_if_full(self) -> None:
        if self._count() >= FULL:
            self._drain()
            self.library.call("LiteRtStartProfiler", self.profiler)

    def node_times(self) -> NodeTimes:
        self.library.call("LiteRtStopProfiler", self.profiler)
        self._drain()
        times = np.stack(self.runs) if self.runs else np.zeros((0, self.nodes))
        events = np.bincount([node for node, _ in self.charges], minlength=self.nodes)
        return NodeTimes(total_ms=times, layout_ms=np.zeros_like(times), events=events, tick_ms=self.clock.tick_ms)

    def _count(self) -> int:
        counted = c_int()
        self.library.call("LiteRtGetNumProfilerEvents", self.profiler, byref(counted))
        return counted.value

    def _drain(self) -> None:
        """Adds up what the profiler holds, run by run."""
        count = self._count()
        if not count:
            return
        events = np.zeros(count, EVENT)
        self.library.call("LiteRtGetProfilerEvents", self.profiler, count, events.ctypes.data_as(c_void_p))
        names = [ctypes.string_at(int(address)).decode() for address in events["tag"]]
        begins = [number for number, name in enumerate(names) if name == FIRST_OF_RUN]
        if not begins or begins[0] != 0:
            raise Unsupported(f"the profile begins with {names[0]!r}, not with a run")
        for begin, end in zip(begins, [*begins[1:], count], strict=True):
            kept = [number for number in range(begin, end) if names[number] not in SURROUNDINGS]
            entries = [
                _Entry(int(events["type"][number]), names[number], int(events["index"][number])) for number in kept
            ]
            if self.entries is None:
                self.entries = entries
                self.charges = _charges(entries, self.operators, self.backend)
            elif entries != self.entries:
                raise Unsupported(f"run {len(self.runs)} of the profile differs from the first")
            ticks = events["elapsed"][kept].astype(np.float64)
            times_ms = np.zeros(self.nodes)
            for (node, lost), value in zip(self.charges, ticks, strict=True):
                times_ms[node] += (value + lost) * self.clock.tick_ms
            self.runs.append(times_ms)


def _charges(
    entries: Sequence[_Entry], operators: Sequence[ModelOperator], backend: CpuLitert
) -> list[tuple[int, float]]:
    """For every entry of a run: the network's node that pays for it, and what its rounding took off, in ticks.

    Raises Unsupported where an entry is not one of what the model's operators are known to become.
    """
    own: dict[int, int] = {}
    for number, entry in enumerate(entries):
        if entry.type not in (OPERATOR, DELEGATED):
            raise Unsupported(f"the profile has an entry {entry.name!r} of the unknown type {entry.type}")
        if entry.type == DELEGATED:
            if not backend.xnnpack:
                raise Unsupported(f"the profile names {entry.name!r} of a delegate where none was asked for")
            continue
        known = 0 <= entry.index < len(operators) and operators[entry.index].code == entry.name
        if not known or entry.index in own:
            raise Unsupported(f"the profile names an operator {entry.name!r}, {entry.index}, that the model has not")
        own[entry.index] = number
    if not backend.xnnpack and len(own) < len(operators):
        missing = min(set(range(len(operators))) - set(own))
        raise Unsupported(f"the profile does not tell operator {missing}, {operators[missing].code}")
    ran = [number for number, entry in enumerate(entries) if entry.type == DELEGATED]
    charged = dict.fromkeys(range(len(entries)), (0, 0.0))
    for index, number in own.items():
        charged[number] = (operators[index].owner, 0.0)
    names = [entries[number].name for number in ran]
    attributed = attribute(names, operators, set(own), fp16=backend.precision == "fp16")
    for number, (operator, lost) in zip(ran, attributed, strict=True):
        charged[number] = (operator.owner, lost)
    return list(charged.values())
