"""ONNX Runtime on an NVIDIA GPU (the package `onnxruntime-gpu`).

    device-agent cuda-onnxruntime --setting gpu=0 --setting clocks_mhz=1410

A run is what a program that calls ONNX Runtime waits for: the host launches kernel after kernel and then waits for the
GPU, which is synchronised before the clock is read. Inputs and outputs stay in the GPU's memory. Small networks take as
long as the host takes to launch them, so the host's processor, its threads and cores are part of the target.

Nothing falls back to the CPU in silence. Sessions are opened with ONNX Runtime's own refusal of that
(`session.disable_cpu_ep_fallback`), which goes by the optimised graph and counts nodes that only compute shapes. A
refused graph is run once with the fallback allowed, for its profile to name the nodes that are elsewhere.

In fp16 the graph itself is in halves, weights, inputs and outputs too, as `lut_db.lowering.onnx` says it. Graphs are
said in the oldest version of ONNX's operators that has them all: this provider lacks kernels for newer ones (of Pad,
since 19), and a kernel for an older one does not count.

There are no times of nodes. What the profiler tells of a node on this provider is how long the *host* took to launch
it. Kernels' own times come from CUPTI, which the published packages are built without; a build that has it (category
`Kernel`) tells whole microseconds, as much as a small operator takes, and finds the node that a kernel belongs to by
comparing start times with a list that is in order of end times, so that some get none or a wrong one, as a remark in
its source says. A node as the difference of two prefixes of the graph would be the difference of two latencies thirty
times its own. So plans in context are refused; `isolated` and `whole` ones are not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from device_agents import energy, evidence, nvml, ort_session
from device_agents.backends import Backend, Check, Loaded, NodeTimes, Options, Unsupported
from device_agents.settings import choice, switch
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import IR_VERSION, OPSET, to_onnx
from lut_db.lowering.weights import Weights
from lut_db.networks import Network
from lut_db.targets import Precision, Target

PROVIDER = "CUDAExecutionProvider"
OFFERED: tuple[Precision, ...] = ("fp32", "fp16")
"""What this provider has kernels for."""
UNPROFILED = (
    "ONNX Runtime's profiler does not tell what a node takes on a GPU, only how long the host took to launch it: "
    "measure with a plan whose context is isolated or whole, or in context with the backend cuda-torch"
)

SETTINGS = {
    **nvml.SETTINGS,
    **ort_session.SETTING,
    "precision": "fp32 or fp16, of weights and activations; fp32 by default. A file is run as it is",
    "tf32": "on or off: fp32 products in TensorFloat-32, ten bits of the mantissa; off by default",
    "l2_flush": "on or off: the GPU's cache is emptied before each run, as where other work comes between; off by "
    "default, as where a network runs over and over",
}


def create(options: Options) -> Backend:
    given = options.settings
    level = ort_session.level(given)
    precision = choice(given, "precision", OFFERED)
    tf32, l2_flush = switch(given, "tf32"), switch(given, "l2_flush")
    locked_mhz = nvml.locked_mhz(options)
    lack = _provider()
    if not lack.ok:
        raise InvalidInput(lack.found, field="backend", remedy=lack.remedy)
    return CudaOnnxruntime(
        options, nvml.Gpu.of(options), locked_mhz, level=level, precision=precision, tf32=tf32, l2_flush=l2_flush
    )


def _provider() -> Check:
    """Whether this ONNX Runtime is built for CUDA. Does not touch the GPU."""
    providers = onnxruntime.get_available_providers()
    found = f"onnxruntime {onnxruntime.__version__} has {', '.join(providers)}"
    return Check(
        "CUDA provider", PROVIDER in providers, found if PROVIDER in providers else f"{found}, no CUDA",
        "pip uninstall onnxruntime, then pip install onnxruntime-gpu: both are one package to Python, and the latter "
        "has the CPU provider too",
    )  # fmt: skip


@cache
def _find_libraries() -> None:
    """Loads CUDA and cuDNN from the packages of Python that bring them, where they are installed."""
    onnxruntime.preload_dlls()


def doctor(options: Options) -> Iterator[Check]:
    provider = _provider()
    yield provider
    found_gpu = True
    for check in nvml.checks(options):
        found_gpu = found_gpu and (check.name != "GPU" or check.ok)
        yield check
    if found_gpu and provider.ok:
        yield energy.check(lambda: energy.Nvml(nvml.Gpu.of(options).index))
    yield from evidence.cpu_checks(options.threads, options.cores)


class CudaOnnxruntime:
    starts = False
    unprofiled = UNPROFILED

    def __init__(
        self, options: Options, gpu: nvml.Gpu, locked_mhz: int | None, *, level: str, precision: Precision, tf32: bool,
        l2_flush: bool,
    ):  # fmt: skip
        self.options = options
        self.gpu = gpu
        self.locked_mhz = locked_mhz
        self.level = level
        self.precision = precision
        self.tf32 = tf32
        self.l2_flush = l2_flush
        self._sweep: Sweep | None = None

    def environment(self) -> dict[str, str]:
        return self.gpu.environment()

    def target(self) -> Target:
        return Target(
            device_model=self.gpu.name,
            os_build=f"{evidence.os_build()}, driver {self.gpu.driver}",
            runtime="onnxruntime",
            runtime_version=f"{onnxruntime.__version__}, CUDA {onnxruntime.cuda_version or 'unknown'}",
            accelerator="cuda",
            threads=self.options.threads,
            cores=self.options.cores,
            precision=self.precision,
            clock_policy=self.gpu.clock_policy(self.locked_mhz),
            options={
                "graph_optimization": self.level,
                "tf32": "on" if self.tf32 else "off",
                "l2_flush": "on" if self.l2_flush else "off",
                "power_limit_w": f"{self.gpu.power_limit_w()}",
                "host": evidence.cpu_model(),
            },
        )

    def ready(self) -> None:
        self.gpu.ready()

    def watch(self) -> nvml.GpuWatch:
        return nvml.GpuWatch(self.gpu, self.locked_mhz, host_matters=True)

    def counter(self) -> energy.Counter:
        if self.l2_flush:
            raise energy.Absent("what empties the cache between two runs would be counted with them")
        return energy.Nvml(self.gpu.index)

    def load(self, model: Network | Path, *, profile: bool) -> Loaded:
        if profile:
            raise Unsupported(self.unprofiled)
        if isinstance(model, Network):
            return self._session(to_onnx(model, precision=self.precision, oldest=True).SerializeToString())
        return self._session(ort_session.path_of(model, self.precision))

    def compute(self, network: Network, weights: Weights, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray]:
        session = self._session(to_onnx(network, weights, 0, self.precision, oldest=True).SerializeToString())
        session.write(inputs)
        session.time(1)
        return [np.asarray(output).astype(np.float32) for output in session.binding.copy_outputs_to_cpu()]

    def _session(self, model: ort_session.Model) -> _Session:
        self.gpu.check_visible()
        _find_libraries()
        if self.l2_flush and self._sweep is None:
            self._sweep = Sweep(PROVIDER, {"device_id": "0"}, "cuda")
        # TF32 is on unless it is told not to be.
        options = {"device_id": "0", "use_tf32": "1" if self.tf32 else "0"}
        session = ort_session.open_on_one(model, self.options.threads, self.level, PROVIDER, options)
        return _Session(session, self._sweep)


class Sweep:
    """Writes more of the device's memory than its caches hold."""

    def __init__(
        self, provider: str, provider_options: dict[str, str], device: str, size: int = nvml.FLUSH_BYTES
    ) -> None:  # fmt: skip
        elements = size // 4
        expand = helper.make_node("Expand", ["x", "shape"], ["y"])
        graph = helper.make_graph(
            [expand], "sweep",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [elements])],
            [helper.make_tensor("shape", TensorProto.INT64, [1], [elements])],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        self.session = ort_session.open_on_one(model.SerializeToString(), 1, "all", provider, provider_options)
        self.binding = ort_session.bind(self.session, device)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()


class _Session:
    profiler_runs = False

    def __init__(self, session: onnxruntime.InferenceSession, sweep: Sweep | None):
        self.session = session
        self.sweep = sweep
        self.binding = ort_session.bind(session, "cuda")
        self.binding.synchronize_inputs()
        self.time(1)  # cuDNN tries its algorithms in the first run

    def write(self, values: Sequence[NDArray[np.float32]]) -> None:
        """Fills the inputs."""
        for tensor, given in zip(self.session.get_inputs(), values, strict=True):
            array: NDArray = np.ascontiguousarray(given, ort_session.DTYPES[tensor.type])
            self.binding.bind_ortvalue_input(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        self.binding.synchronize_inputs()

    def time(self, runs: int) -> list[float]:
        times_ms = []
        with ort_session.judging():
            for _ in range(runs):
                if self.sweep is not None:
                    self.sweep.run()
                begin = time.perf_counter()
                self.session.run_with_iobinding(self.binding)
                self.binding.synchronize_outputs()
                times_ms.append((time.perf_counter() - begin) * 1e3)
        return times_ms

    def node_times(self) -> NodeTimes:
        raise Unsupported(UNPROFILED)
