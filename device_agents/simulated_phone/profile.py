"""LiteRT's own profile of a model in a file, run by run: what `benchmark_model --enable_op_profiling` tells.

The one place that knows how it is read. The Python interpreter tells no times of operators; the C interface of the
wheel's shared library, series 2.3, does.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ai_edge_litert
import numpy as np

SERIES = "2.3."
HOST_MEMORY = 1
CPU = 1
LOCK_TO_WRITE = 1
MIN_SEVERITY_OPTION, ACCELERATORS_OPTION, INTEGER, ERRORS_ONLY = 25, 24, 2, 3
FORCE_FP16 = 4
"""XNNPACK's flag."""
RUN, OPERATOR, DELEGATED = 1, 2, 8
FIRST_OF_RUN = "LiteRT::Run[buffer registration]"
INVOKE = "Invoke"
"""The entry, of type RUN, for what benchmark_model times: the interpreter's work without LiteRT's around it."""
ELEMENTS = {np.float32: 1, np.int32: 2, np.uint8: 3, np.int64: 4, np.bool_: 6, np.int16: 7, np.int8: 9, np.float16: 10,
            np.float64: 11}  # fmt: skip
"""LiteRT's numbers for the types of a tensor's elements."""
EVENT = np.dtype(
    [("tag", np.uint64), ("type", np.int32), ("start_us", np.uint64), ("elapsed_us", np.uint64),
     ("memory", np.uint64, 6), ("index", np.int64), ("subgraph", np.int64), ("source", np.int32)],
    align=True,
)  # fmt: skip
"""An entry of the profile; `tag` is the address of its name."""


class ProfileError(RuntimeError):
    """LiteRT refuses to profile; the message says what."""


class _Option(ctypes.Structure):
    _fields_ = (("tag", c_int), ("kind", c_int), ("value", c_int64))


class _Layout(ctypes.Structure):
    _fields_ = (
        ("rank", c_uint32, 7), ("has_strides", c_uint32, 1), ("sizes", c_int32 * 8), ("strides", c_uint32 * 8),
    )  # fmt: skip


class _TensorType(ctypes.Structure):
    _fields_ = (("element", c_int), ("layout", _Layout))


@ctypes.CFUNCTYPE(None, c_void_p)
def _keep(_: int) -> None:
    """Called by the runtime when it needs an option's text no longer; Python frees it."""


@dataclass(frozen=True)
class Event:
    """An operator's turn in one run. `index` counts the model's operators, or those inside the delegate."""

    name: str
    index: int
    delegated: bool
    start_us: float
    elapsed_us: float


@dataclass
class Run:
    """What the profiler saw of one run: microseconds in all, and its operators in turn."""

    elapsed_us: float
    events: list[Event]


class ProfiledModel:
    """A model compiled with LiteRT's profiler. `inputs` and `outputs` are as `Interpreter.get_…_details` tells them.

    Lives as long as its process. Raises ProfileError where LiteRT refuses.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        xnnpack: bool,
        inputs: Sequence[dict[str, Any]],
        outputs: Sequence[dict[str, Any]],
        fp16: bool = False,
    ) -> None:
        version = metadata.version("ai-edge-litert")
        if not version.startswith(SERIES):
            raise ProfileError(f"ai-edge-litert {version} has another C interface than {SERIES}*")
        self.library = ctypes.CDLL(str(Path(ai_edge_litert.__file__).with_name("libLiteRt.so")))
        options = (_Option * 2)(
            _Option(MIN_SEVERITY_OPTION, INTEGER, ERRORS_ONLY), _Option(ACCELERATORS_OPTION, INTEGER, CPU)
        )
        self.environment = self._make("LiteRtCreateEnvironment", len(options), options)
        source = self._make("LiteRtCreateModelFromFile", self.environment, str(path).encode())
        chosen = self._make("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", chosen, CPU)
        kernels = "xnnpack" if xnnpack else "builtin"
        flags = f"flags = {FORCE_FP16}\n" if fp16 else ""
        settings = f'num_threads = {threads}\nkernel_mode = "{kernels}"\n{flags}'
        self.texts = [settings.encode(), b"enable_profiling = true\n"]
        for name, text in zip((b"xnnpack", b"runtime_options_string"), self.texts, strict=True):
            opaque = self._make("LiteRtCreateOpaqueOptions", name, c_char_p(text), _keep)
            self._call("LiteRtAddOpaqueOptions", chosen, opaque)
        self.model = self._make("LiteRtCreateCompiledModel", self.environment, source, chosen)
        buffers = [[self._buffer(tensor) for tensor in side] for side in (inputs, outputs)]
        self.arrays = [(c_void_p * len(side))(*side) for side in buffers]
        self.profiler = self._make("LiteRtCompiledModelGetProfiler", self.model)
        if not self.profiler:
            raise ProfileError("LiteRT made no profiler")
        self._call("LiteRtStartProfiler", self.profiler)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise ProfileError(f"{name} gave status {status}")

    def _make(self, name: str, *arguments: object) -> c_void_p:
        made = c_void_p()
        self._call(name, *arguments, byref(made))
        return made

    def _buffer(self, tensor: dict[str, Any]) -> c_void_p:
        """A buffer for a tensor, with random values in it."""
        if tensor["dtype"] not in ELEMENTS:
            raise ProfileError(f"tensor {tensor['name']!r} has elements of type {tensor['dtype']}")
        kind = _TensorType(element=ELEMENTS[tensor["dtype"]])
        kind.layout.rank = len(tensor["shape"])
        kind.layout.sizes[: kind.layout.rank] = [int(size) for size in tensor["shape"]]
        count = int(np.prod(tensor["shape"], dtype=np.int64))
        values = np.random.default_rng().uniform(0, 0.5, count).astype(tensor["dtype"])
        buffer = self._make(
            "LiteRtCreateManagedTensorBuffer", self.environment, HOST_MEMORY, byref(kind), c_size_t(values.nbytes)
        )
        address = c_void_p()
        self._call("LiteRtLockTensorBuffer", buffer, byref(address), LOCK_TO_WRITE)
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
        self._call("LiteRtUnlockTensorBuffer", buffer)
        return buffer

    def run(self) -> float:
        """Seconds that one run took."""
        inputs, outputs = self.arrays
        begin = time.perf_counter()
        status = self.library.LiteRtRunCompiledModel(
            self.model, c_size_t(0), c_size_t(len(inputs)), inputs, c_size_t(len(outputs)), outputs
        )
        taken = time.perf_counter() - begin
        if status:
            raise ProfileError(f"LiteRtRunCompiledModel gave status {status}")
        return taken

    def runs(self) -> list[Run]:
        """What the profiler saw since the last call."""
        self._call("LiteRtStopProfiler", self.profiler)
        counted = c_int()
        self._call("LiteRtGetNumProfilerEvents", self.profiler, byref(counted))
        found = np.zeros(counted.value, EVENT)
        if len(found):
            self._call("LiteRtGetProfilerEvents", self.profiler, len(found), found.ctypes.data_as(c_void_p))
        runs: list[Run] = []
        for event in found:
            name, kind = ctypes.string_at(int(event["tag"])).decode(), int(event["type"])
            if name == FIRST_OF_RUN:
                runs.append(Run(0.0, []))
            elif not runs and kind in (RUN, OPERATOR, DELEGATED):
                raise ProfileError(f"the profile begins with {name!r}, not with a run")
            elif kind == RUN and name == INVOKE:
                runs[-1].elapsed_us += float(event["elapsed_us"])
            elif kind in (OPERATOR, DELEGATED):
                runs[-1].events.append(Event(
                    name, int(event["index"]), kind == DELEGATED, float(event["start_us"]), float(event["elapsed_us"]),
                ))  # fmt: skip
        self._call("LiteRtResetProfiler", self.profiler)
        self._call("LiteRtStartProfiler", self.profiler)
        return runs
