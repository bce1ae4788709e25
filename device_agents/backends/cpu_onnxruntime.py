"""ONNX Runtime on the CPU.

On x86 and Arm this runtime keeps feature maps in a blocked layout between convolutions and inserts nodes
`ReorderInput` and `ReorderOutput` where an operator wants plain maps. Such a conversion is charged to the operator
that forces it, the one at its plain end: then an operator's row depends less on its neighbours. In int8 the channels
come last between convolutions, and the nodes that convert are transposes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from device_agents import energy, evidence, fine_clock, ort_marks, ort_profile, ort_session
from device_agents.backends import Backend, Check, Loaded, LoadFailed, NodeTimes, Options, Unsupported
from device_agents.settings import choice
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import BYPASSES, Bypass, tensor_name, to_onnx
from lut_db.lowering.weights import Weights
from lut_db.networks import Network
from lut_db.targets import PRECISIONS, Precision, Target

INT8_KERNELS = ("all", "extended")
"""Optimisations that put int8 kernels in place of float32 between quantisers."""

LIBRARY = "onnxruntime_pybind11_state"
"""In the name of the library's file, which has the runtime in it."""

PLAIN_RUNS = 3
"""Runs from which it is told what a graph makes in each."""

ROOM = 4
"""How many entries a trace may have for each of a graph's, since what ends it is made elsewhere too."""

ANY_OBJECTS = 1 << 20
"""Room for all that a run makes, with a profiler: some seventy objects a kernel."""

SETTINGS = {
    **ort_session.SETTING,
    "precision": "fp32 or int8; fp32 by default",
    "huge_pages": "on or off: memory in huge pages; on by default where the system can",
    "bypass": "sum or concat: how what passes a depthwise layer by joins what it makes; sum by default in fp32",
    **fine_clock.SETTING,
    "powercap": f"the folder in which the system counts energy; {energy.POWERCAP} by default",
}


def create(options: Options) -> Backend:
    level = ort_session.level(options.settings)
    precision = choice(options.settings, "precision", PRECISIONS)
    if precision == "fp16":
        raise InvalidInput(
            "ONNX Runtime calculates fp16 in fp32 on processors, between conversions, for want of kernels",
            field="settings.precision", remedy="fp32 or int8 here; fp16 with cpu-litert",
        )  # fmt: skip
    if precision == "int8" and level not in INT8_KERNELS:
        raise InvalidInput(f"at {level!r} int8 runs in fp32 kernels", field="settings.graph_optimization",
                           remedy=f"one of {', '.join(INT8_KERNELS)}")  # fmt: skip
    bypass = choice({"bypass": "sum" if precision == "fp32" else "concat"} | options.settings, "bypass", BYPASSES)
    if precision == "int8" and bypass == "sum":
        raise InvalidInput("what is passed by would lose bits on its way through convolutions",
                           field="settings.bypass", remedy="concat in int8")  # fmt: skip
    fine_clock.check_setting(options.settings)
    return CpuOnnxruntime(options, level, evidence.huge_pages(options.settings), precision, bypass)


def doctor(options: Options) -> Iterator[Check]:
    yield Check("onnxruntime", True, onnxruntime.__version__)
    providers = onnxruntime.get_available_providers()
    yield Check("CPU provider", "CPUExecutionProvider" in providers, ", ".join(providers), "pip install onnxruntime")
    yield from evidence.cpu_checks(options.threads, options.cores)
    yield fine_clock.check(options.settings)
    yield energy.check(lambda: energy.of_processor(options.settings))


class CpuOnnxruntime:
    starts = False

    def __init__(self, options: Options, level: str, huge_pages: bool, precision: Precision, bypass: Bypass):
        self.options = options
        self.level = level
        self.huge_pages = huge_pages
        self.precision: Precision = precision
        self.bypass: Bypass = bypass

    def environment(self) -> dict[str, str]:
        return evidence.huge_page_environment(self.huge_pages) | fine_clock.environment(self.options.settings)

    def target(self) -> Target:
        return Target(
            device_model=evidence.cpu_model(),
            os_build=evidence.os_build(),
            runtime="onnxruntime",
            runtime_version=onnxruntime.__version__,
            threads=self.options.threads,
            cores=self.options.cores,
            precision=self.precision,
            clock_policy=evidence.clock_policy(),
            options={
                "graph_optimization": self.level,
                "huge_pages": "on" if self.huge_pages else "off",
                "bypass": self.bypass,
            },
        )

    def ready(self) -> None:
        """A processor always is."""

    def move(self) -> bool:
        return evidence.next_core(self.options.cores, self.options.threads)

    def watch(self) -> evidence.CpuWatch:
        return evidence.CpuWatch()

    def counter(self) -> energy.Counter:
        return energy.of_processor(self.options.settings)

    def load(self, model: Network | Path, *, profile: bool) -> Loaded:
        settings = ort_session.session_options(self.options.threads, self.level)
        if not profile:
            said = (
                ort_session.path_of(model, self.precision) if isinstance(model, Path)
                else _lowered(model, self.precision, self.bypass)
            )  # fmt: skip
            return _Session(ort_session.open_session(said, settings))
        assert isinstance(model, Network), "only networks can be profiled"
        profiled = _Profile(model, _lowered(model, self.precision, self.bypass), settings)
        tracer = fine_clock.Tracer.of(LIBRARY, self.options.settings)
        return _Profiled(profiled) if tracer is None else _Marked(profiled, tracer)

    def compute(self, network: Network, weights: Weights, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray]:
        model = to_onnx(network, weights, precision=self.precision, samples=[inputs], bypass=self.bypass)
        session = ort_session.open_session(
            model.SerializeToString(), ort_session.session_options(self.options.threads, self.level)
        )
        named = {tensor_name(tensor): values for tensor, values in enumerate(inputs)}
        return [np.asarray(output) for output in session.run(None, named)]


@lru_cache(maxsize=1)
def _lowered(network: Network, precision: Precision, bypass: Bypass) -> bytes:
    """A model file. Kept, since sessions of one network are loaded one after the other."""
    return to_onnx(network, precision=precision, bypass=bypass).SerializeToString()


class _Session:
    profiler_runs = False

    def __init__(self, session: onnxruntime.InferenceSession):
        self.session = session
        self.binding = ort_session.bind(session)

    def time(self, runs: int) -> list[float]:
        times_ms = []
        with ort_session.judging():
            for _ in range(runs):
                begin = time.perf_counter()
                self.session.run_with_iobinding(self.binding)
                times_ms.append((time.perf_counter() - begin) * 1e3)
        return times_ms

    def node_times(self) -> NodeTimes:
        raise AssertionError("loaded without profile=True")


class _Profile:
    """A network in a session whose runs are profiled until that is ended."""

    def __init__(self, network: Network, lowered: bytes, settings: onnxruntime.SessionOptions):
        self.nodes = len(network.nodes)
        self.folder = tempfile.TemporaryDirectory(prefix="onnxruntime-")
        settings.enable_profiling = True
        settings.profile_file_prefix = os.path.join(self.folder.name, "profile")
        settings.optimized_model_filepath = os.path.join(self.folder.name, "optimized.onnx")
        self.session = ort_session.open_session(lowered, settings)
        # Only the graph is wanted; the weights would fill the disk.
        optimized = Path(settings.optimized_model_filepath)
        self.owners = ort_profile.owners_in_graph(onnx.load(optimized).graph, network)
        optimized.unlink()

    def end(self) -> Sequence[Mapping[str, Any]]:
        events: list[dict[str, Any]] = json.loads(Path(self.session.end_profiling()).read_text())
        self.folder.cleanup()
        return events


class _Profiled(_Session):
    """Profiled in every run, in microseconds."""

    profiler_runs = True

    def __init__(self, profile: _Profile):
        super().__init__(profile.session)
        self.profile = profile
        self.clock = fine_clock.Clock(LIBRARY, {"fine_clock": "off"})
        self.timed = 0
        self.passed_ms = 0.0

    def time(self, runs: int) -> list[float]:
        times_ms = super().time(runs)
        self.timed += runs
        self.passed_ms += sum(times_ms)
        return times_ms

    def node_times(self) -> NodeTimes:
        times = ort_profile.node_times(self.profile.end(), self.profile.owners, self.profile.nodes)
        if len(times.total_ms) != self.timed:  # it keeps a million events
            raise Unsupported(f"ONNX Runtime's profile tells {len(times.total_ms)} of {self.timed} runs: plan fewer")
        return self.clock.believed(times, self.passed_ms)


@contextmanager
def _odd() -> Iterator[None]:
    """What makes marks odd once, as other threads of the runtime may, need not be so in the next session."""
    try:
        yield
    except Unsupported as odd:
        raise LoadFailed("error", str(odd)) from odd


class _Marked(_Session):
    """Profiled in its first runs alone, which show how to tell kernels apart afterwards."""

    def __init__(self, profile: _Profile, tracer: fine_clock.Tracer):
        super().__init__(profile.session)
        self.tracer = tracer
        self.nodes = profile.nodes
        with _odd():
            self._mark(profile)
        self.durations_ns: list[NDArray[np.int64]] = []

    def _mark(self, profile: _Profile) -> None:
        super().time(1)
        _, profiled = self._trace(1, ANY_OBJECTS)
        names = [name for name, _ in ort_profile.kernels_by_run(profile.end())[-1]]
        super().time(1)
        plain = [self._trace(1, ANY_OBJECTS)[1] for _ in range(PLAIN_RUNS)]
        self.marks = ort_marks.find_marks(profiled, plain, len(names))
        charges = [ort_profile.charge(name, profile.owners) for name in names]
        self.charges = [charges[number] for number in self.marks.kernels]
        for name, (node, _), mark in zip(names, charges, self.marks.within(len(names)), strict=True):
            if node != self.charges[mark][0]:
                raise Unsupported(f"ONNX Runtime makes nothing at which {name} begins; {ort_marks.REMEDY}")

    def _trace(self, runs: int, room: int, places: NDArray[np.int64] | None = None) -> tuple[list[float], NDArray]:
        return self.tracer.trace(lambda: super(_Marked, self).time(runs), room, places)

    def time(self, runs: int) -> list[float]:
        with _odd():
            times_ms, trace = self._trace(runs, runs * ROOM * len(self.marks.order), self.marks.places)
            self.durations_ns.append(self.marks.durations_ns(trace, runs))
        return times_ms

    def node_times(self) -> NodeTimes:
        durations_ms = np.concatenate(self.durations_ns) / 1e6
        of_node = np.array([node for node, _ in self.charges])[:, None] == np.arange(self.nodes)
        of_layout = of_node & np.array([layout for _, layout in self.charges])[:, None]
        return NodeTimes(
            total_ms=durations_ms @ of_node, layout_ms=durations_ms @ of_layout,
            events=np.zeros(self.nodes, dtype=np.int64), tick_ms=1e-6,
        )  # fmt: skip
