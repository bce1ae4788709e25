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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from device_agents import energy, evidence, fine_clock, ort_profile, ort_session
from device_agents.backends import Backend, Check, Loaded, NodeTimes, Options, Unsupported
from device_agents.settings import choice
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import tensor_name, to_onnx
from lut_db.lowering.weights import Weights
from lut_db.networks import Network
from lut_db.targets import PRECISIONS, Precision, Target

INT8_KERNELS = ("all", "extended")
"""Optimisations that put int8 kernels in place of float32 between quantisers."""

LIBRARY = "onnxruntime_pybind11_state"
"""In the name of the library's file, which has the profiler in it."""

SETTINGS = {
    **ort_session.SETTING,
    "precision": "fp32 or int8; fp32 by default",
    "huge_pages": "on or off: memory in huge pages; on by default where the system can",
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
    fine_clock.check_setting(options.settings)
    return CpuOnnxruntime(options, level, evidence.huge_pages(options.settings), precision)


def doctor(options: Options) -> Iterator[Check]:
    yield Check("onnxruntime", True, onnxruntime.__version__)
    providers = onnxruntime.get_available_providers()
    yield Check("CPU provider", "CPUExecutionProvider" in providers, ", ".join(providers), "pip install onnxruntime")
    yield from evidence.cpu_checks(options.threads, options.cores)
    yield fine_clock.check(options.settings)
    yield energy.check(lambda: energy.of_processor(options.settings))


class CpuOnnxruntime:
    starts = False

    def __init__(self, options: Options, level: str, huge_pages: bool, precision: Precision = "fp32"):
        self.options = options
        self.level = level
        self.huge_pages = huge_pages
        self.precision: Precision = precision

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
            options={"graph_optimization": self.level, "huge_pages": "on" if self.huge_pages else "off"},
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
        return _Session(model, self.options, self.level, profile, self.precision)

    def compute(self, network: Network, weights: Weights, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray]:
        model = to_onnx(network, weights, precision=self.precision, samples=[inputs]).SerializeToString()
        session = ort_session.open_session(model, ort_session.session_options(self.options.threads, self.level))
        named = {tensor_name(tensor): values for tensor, values in enumerate(inputs)}
        return [np.asarray(output) for output in session.run(None, named)]


@lru_cache(maxsize=1)
def _lowered(network: Network, precision: Precision) -> bytes:
    """A model file. Kept, since sessions of one network are loaded one after the other."""
    return to_onnx(network, precision=precision).SerializeToString()


class _Session:
    def __init__(self, model: Network | Path, options: Options, level: str, profile: bool, precision: Precision):
        settings = ort_session.session_options(options.threads, level)
        self.folder = tempfile.TemporaryDirectory(prefix="onnxruntime-") if profile else None
        if self.folder is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = os.path.join(self.folder.name, "profile")
            settings.optimized_model_filepath = os.path.join(self.folder.name, "optimized.onnx")
        said = (
            ort_session.path_of(model, precision) if isinstance(model, Path)
            else _lowered(model, precision)
        )  # fmt: skip
        self.session = ort_session.open_session(said, settings)
        if self.folder is not None:
            assert isinstance(model, Network), "only networks can be profiled"
            self.nodes = len(model.nodes)
            # Only the graph is wanted; the weights would fill the disk.
            optimized = Path(settings.optimized_model_filepath)
            self.owners = ort_profile.owners_in_graph(onnx.load(optimized).graph, model)
            optimized.unlink()
            self.clock = fine_clock.Clock(LIBRARY, options.settings, still=options.threads == 1)
        self.binding = ort_session.bind(self.session)
        self.timed = 0
        self.passed_ms = 0.0

    def time(self, runs: int) -> list[float]:
        times_ms = []
        self.timed += runs
        with ort_session.judging(), nullcontext() if self.folder is None else self.clock.running():
            for _ in range(runs):
                begin = time.perf_counter()
                self.session.run_with_iobinding(self.binding)
                times_ms.append((time.perf_counter() - begin) * 1e3)
        self.passed_ms += sum(times_ms)
        return times_ms

    def node_times(self) -> NodeTimes:
        assert self.folder is not None, "loaded without profile=True"
        path = Path(self.session.end_profiling())
        events = json.loads(path.read_text())
        self.folder.cleanup()
        times = ort_profile.node_times(events, self.owners, self.nodes, self.clock.tick_ms)
        if len(times.total_ms) != self.timed:  # it keeps a million events
            raise Unsupported(f"ONNX Runtime's profile tells {len(times.total_ms)} of {self.timed} runs: plan fewer")
        return self.clock.believed(times, self.passed_ms)
