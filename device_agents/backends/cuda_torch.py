"""PyTorch on an NVIDIA GPU: a network's kernels, replayed as one CUDA graph.

    device-agent cuda-torch --setting gpu=0 --setting clocks_mhz=1410 --setting precision=fp16

A network is run eagerly a few times on a side stream, where cuDNN tries its algorithms, and captured once. A run is a
replay: the host launches one graph and has no part in what is measured. Kernels are those of eager PyTorch; nothing
that `torch.compile` would fuse is fused.

Time is told by the GPU. The events are captured *in* the graph (`external=True`, nodes that record), one before the
first kernel and one behind the last: events recorded around a replay would count how long the host takes to launch it
on an idle GPU, several microseconds beside networks of a hundred. For the times of nodes there is an event between any
two nodes, in the same graph. All kernels are on one stream, so they run one after the other and the times between
events add up to the whole. An event takes its own microsecond or so and keeps two kernels apart; that is the same for
every node, and `device_agents.measuring` takes it off by a twin of the graph without events inside. Prefixes of the
network in graphs of their own would need no events inside, but each node would be the difference of two latencies
thirty times its own, and drown in their noise.

What PyTorch does not compute costs nothing where it stands: rearrangements are views, and whoever reads one pays for
the copy, if it needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from device_agents import energy, evidence, nvml
from device_agents.backends import Backend, Check, Loaded, LoadFailed, NodeTimes, Options, Unsupported
from device_agents.settings import choice, switch
from lut_db.errors import InvalidInput
from lut_db.lowering.torch import to_torch
from lut_db.lowering.weights import Weights
from lut_db.networks import Network
from lut_db.targets import Precision, Target

INPUT_SEED = 0
OUT_OF_MEMORY = ("ALLOC_FAILED", "NOT_INITIALIZED", "out of memory", "unable to find an engine")
"""What the libraries beneath torch say where the GPU's memory is full; cuDNN has no engine left that fits then."""
EAGER_RUNS = 3
"""Before the capture: cuDNN's and cuBLAS' choices are made, and all memory is there."""
NEEDS_TORCH = (2, 9)
"""External events and `fp32_precision`."""

SETTINGS = {
    **nvml.SETTINGS,
    "precision": "fp32 or fp16, of weights and activations; fp32 by default",
    "tf32": "on or off: fp32 products in TensorFloat-32, ten bits of the mantissa; off by default",
    "channels_last": "on or off: maps in memory as NHWC; off by default",
    "l2_flush": "on or off: the GPU's cache is emptied before each run, as where other work comes between; off by "
    "default, as where a network runs over and over",
}
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """The settings that say how a network is run."""

    precision: Precision = "fp32"
    tf32: bool = False
    channels_last: bool = False
    l2_flush: bool = False

    @classmethod
    def of(cls, options: Options) -> Setup:
        given = options.settings
        return cls(
            precision=choice(given, "precision", tuple(DTYPES)), tf32=switch(given, "tf32"),
            channels_last=switch(given, "channels_last"), l2_flush=switch(given, "l2_flush"),
        )  # fmt: skip


def create(options: Options) -> Backend:
    setup = Setup.of(options)
    locked_mhz = nvml.locked_mhz(options)
    if (lack := _lack_of_torch()) is not None:
        raise InvalidInput(lack.found, field="backend", remedy=lack.remedy)
    return CudaTorch(nvml.Gpu.of(options), setup, locked_mhz)


def doctor(options: Options) -> Iterator[Check]:
    yield _lack_of_torch() or Check("torch", True, f"{torch.__version__}, CUDA {torch.version.cuda}")
    found_gpu = True
    for check in nvml.checks(options):
        found_gpu = found_gpu and (check.name != "GPU" or check.ok)
        yield check
    if found_gpu and torch.version.cuda is not None:
        yield Check(
            "CUDA", torch.cuda.is_available(), f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs",
            f"a driver for CUDA {torch.version.cuda}, or a build of torch for the CUDA that nvidia-smi names",
        )  # fmt: skip
        yield energy.check(lambda: energy.Nvml(nvml.Gpu.of(options).index))


def _lack_of_torch() -> Check | None:
    """What is wrong with this torch. Does not touch the GPU."""
    remedy = "pip install torch, a build with CUDA as https://pytorch.org/get-started/locally says"
    if torch.version.cuda is None:
        return Check("torch", False, f"torch {torch.__version__} is built without CUDA", remedy)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < NEEDS_TORCH:
        return Check("torch", False, f"torch {torch.__version__} cannot capture events in a CUDA graph",
                     f"torch {'.'.join(map(str, NEEDS_TORCH))} or newer")  # fmt: skip
    return None


class CudaTorch:
    starts = False

    def __init__(self, gpu: nvml.Gpu, setup: Setup, locked_mhz: int | None):
        self.gpu = gpu
        self.setup = setup
        self.locked_mhz = locked_mhz
        self._swept: Tensor | None = None

    def environment(self) -> dict[str, str]:
        return self.gpu.environment()

    def target(self) -> Target:
        """Threads and cores are the host's, which has no part in a replay: they are left at their defaults."""
        setup = self.setup
        return Target(
            device_model=self.gpu.name,
            os_build=f"{evidence.os_build()}, driver {self.gpu.driver}",
            runtime="torch",
            runtime_version=f"{torch.__version__}, CUDA {torch.version.cuda}",
            accelerator="cuda",
            precision=setup.precision,
            clock_policy=self.gpu.clock_policy(self.locked_mhz),
            options={
                "tf32": "on" if setup.tf32 else "off",
                "channels_last": "on" if setup.channels_last else "off",
                "l2_flush": "on" if setup.l2_flush else "off",
                "power_limit_w": f"{self.gpu.power_limit_w()}",
            },
        )

    def ready(self) -> None:
        self.gpu.ready()

    def watch(self) -> nvml.GpuWatch:
        return nvml.GpuWatch(self.gpu, self.locked_mhz, host_matters=False)

    def counter(self) -> energy.Counter:
        if self.setup.l2_flush:
            raise energy.Absent("what empties the cache between two runs would be counted with them")
        return energy.Nvml(self.gpu.index)

    def load(self, model: Network | Path, *, profile: bool) -> Loaded:
        if isinstance(model, Path):
            raise Unsupported("torch runs networks, no files: cuda-onnxruntime runs ONNX")
        return self._session(model, None, profile=profile)

    def compute(self, network: Network, weights: Weights, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray]:
        session = self._session(network, weights, profile=False)
        session.write(inputs)
        session.time(1)
        return [output.float().cpu().numpy() for output in session.outputs]

    def _session(self, network: Network, weights: Weights | None, *, profile: bool) -> _Session:
        self.gpu.check_visible()
        device = torch.device("cuda", 0)
        if self.setup.l2_flush and self._swept is None:
            self._swept = torch.empty(nvml.FLUSH_BYTES, dtype=torch.uint8, device=device)
        with arithmetic(self.setup.tf32), torch.no_grad():
            return _Session(Program(network, weights, self.setup, device), profile, self._swept)


@contextmanager
def arithmetic(tf32: bool) -> Iterator[None]:
    """How products are computed while a network is run and captured: a captured graph keeps the kernels chosen."""
    cudnn = torch.backends.cudnn
    matmul, conv = torch.backends.cuda.matmul, cudnn.conv  # type: ignore[attr-defined]  # torch's stub leaves it out
    before = matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark
    # Convolutions are in TF32 unless they are told not to be.
    matmul.fp32_precision = conv.fp32_precision = "tf32" if tf32 else "ieee"
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark = before


class Program:
    """A network ready to be run on a device of torch, in its precision and layout; nothing in it is CUDA's own."""

    def __init__(self, network: Network, weights: Weights | None, setup: Setup, device: torch.device):
        self.network = network
        self.setup = setup
        dtype = DTYPES[setup.precision]
        self.module = to_torch(network, weights).to(device, dtype)
        if setup.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # left out of overloads
        self.inputs = [torch.empty(shape, dtype=dtype, device=device, memory_format=self._layout(len(shape)))
                       for shape in network.inputs]  # fmt: skip
        random = np.random.default_rng(INPUT_SEED)
        self.write([random.standard_normal(shape, dtype=np.float32) for shape in network.inputs])

    def _layout(self, rank: int) -> torch.memory_format:
        return torch.channels_last if self.setup.channels_last and rank == 4 else torch.contiguous_format

    def write(self, values: Sequence[NDArray[np.float32]]) -> None:
        """Fills the inputs, in place."""
        for tensor, given in zip(self.inputs, values, strict=True):
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(given)))

    def run(self, mark: Callable[[], None] = lambda: None) -> tuple[Tensor, ...]:
        """The outputs. `mark` is called before the first node and behind each."""
        return self.module.run(self.inputs, mark)


class _Session:
    """A program captured as a CUDA graph. `swept`: memory that is written before each run, to empty the cache."""

    def __init__(self, program: Program, profile: bool, swept: Tensor | None):
        self.program = program
        self.profiler_runs = profile
        self.swept = swept
        device = program.inputs[0].device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            try:
                for _ in range(EAGER_RUNS):
                    program.run()
                self.stream.synchronize()
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise  # the process ends with it: the graph is tried again in smaller company
            except RuntimeError as error:
                if any(word in str(error) for word in OUT_OF_MEMORY):
                    raise LoadFailed("out_of_memory", str(error)) from error
                raise Unsupported(f"torch cannot run the graph on this GPU: {error}") from error
        marks = len(program.network.nodes) + 1 if profile else 2
        self.events = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(marks)]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            if profile:
                events = iter(self.events)
                self.outputs = program.run(lambda: next(events).record())
            else:
                self.events[0].record()
                self.outputs = program.run()
                self.events[1].record()
        self.rows: list[list[float]] = []
        self.time(1)  # the first replay puts the graph onto the GPU
        self.rows.clear()

    def write(self, values: Sequence[NDArray[np.float32]]) -> None:
        """Fills the inputs of the runs to come."""
        self.program.write(values)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def time(self, runs: int) -> list[float]:
        times_ms = []
        with torch.cuda.stream(self.stream):
            for _ in range(runs):
                if self.swept is not None:
                    self.swept.zero_()
                self.graph.replay()
                self.stream.synchronize()
                times_ms.append(self.events[0].elapsed_time(self.events[-1]))
                if self.profiler_runs:
                    self.rows.append([begin.elapsed_time(end) for begin, end in pairwise(self.events)])
        return times_ms

    def node_times(self) -> NodeTimes:
        assert self.profiler_runs, "loaded without profile=True"
        nodes = len(self.program.network.nodes)
        times_ms = np.array(self.rows, dtype=np.float64).reshape(-1, nodes)
        return NodeTimes(total_ms=times_ms, layout_ms=np.zeros_like(times_ms), events=np.ones(nodes, dtype=np.int64))
