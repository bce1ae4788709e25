"""Sessions of ONNX Runtime: how they are opened on a provider, and how their inputs and outputs are bound in place."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from device_agents import ort_profile
from device_agents.backends import Unreachable, Unsupported
from device_agents.settings import choice
from lut_db.targets import Precision

OPTIMIZATION = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
SETTING = {"graph_optimization": f"one of {', '.join(OPTIMIZATION)}; all by default"}
CPU = "CPUExecutionProvider"
ERRORS_ONLY = 3
FATAL_ONLY = 4
INPUT_SEED = 0
DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64,
          "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
          "tensor(float16)": np.float16, "tensor(bool)": np.bool_}  # fmt: skip
OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory")
DEVICE_FAILED = "CUDA failure"
FALLBACK = "session.disable_cpu_ep_fallback"

Model = bytes | str
"""A serialised model, or the path of a file."""


def level(settings: Mapping[str, str]) -> str:
    """The setting `graph_optimization`."""
    return choice(settings, "graph_optimization", tuple(OPTIMIZATION))


def session_options(threads: int, level: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = OPTIMIZATION[level]
    return options


def open_session(
    model: Model, options: onnxruntime.SessionOptions, provider: str = CPU, provider_options: Mapping[str, str] = {}
) -> onnxruntime.InferenceSession:  # fmt: skip
    """A session on a provider; others run what it cannot, as ONNX Runtime decides. Raises Unsupported."""
    with judging():
        # Without enable_fallback=0 a provider that fails is replaced by others, with a line on the terminal.
        return onnxruntime.InferenceSession(
            model, options, providers=[(provider, dict(provider_options))], enable_fallback=0
        )


@contextmanager
def judging() -> Iterator[None]:
    """Raises, in place of the runtime's exceptions, what they mean."""
    try:
        yield
    except Exception as error:  # the runtime's own exceptions have no common class
        raise judged(error) from error


def judged(error: Exception) -> Exception:
    """What an exception of the runtime means: the graph is Unsupported, unless memory ran out or the device failed,
    which end the measuring process and are tried again in smaller company."""
    text = str(error)
    if any(sign in text for sign in OUT_OF_MEMORY):
        return MemoryError(text)
    if DEVICE_FAILED in text:
        return RuntimeError(text)
    return Unsupported(f"ONNX Runtime cannot run the graph: {text}")


def open_on_one(
    model: Model, threads: int, level: str, provider: str, provider_options: Mapping[str, str] = {}
) -> onnxruntime.InferenceSession:
    """A session all of whose nodes are the provider's.

    Raises Unsupported with the names of nodes that ONNX Runtime gives to another one, those that only compute shapes
    too; and Unreachable where the provider itself does not start.
    """
    if provider not in onnxruntime.get_available_providers():
        raise Unreachable(f"this ONNX Runtime {onnxruntime.__version__} has no {provider}")
    options = session_options(threads, level)
    if provider == CPU:  # which has nobody to fall back to
        return open_session(model, options)
    options.add_session_config_entry(FALLBACK, "1")
    options.log_severity_level = FATAL_ONLY  # the refusal is told better below
    try:
        session = open_session(model, options, provider, provider_options)
    except Unsupported as refused:
        if "fallback to CPU EP" not in str(refused):
            raise
        elsewhere = _placed_elsewhere(model, threads, level, provider, provider_options)
        raise Unsupported(f"ONNX Runtime does not give all nodes to {provider}: {', '.join(elsewhere)}") from refused
    if provider not in session.get_providers():
        raise Unreachable(_did_not_start(provider))
    return session


def _did_not_start(provider: str) -> str:
    return f"{provider} does not start: its libraries (CUDA, cuDNN) are missing or of another version; see the log"


def _placed_elsewhere(
    model: Model, threads: int, level: str, provider: str, provider_options: Mapping[str, str]
) -> list[str]:
    """The nodes of the optimised graph that other providers run, each with its type and provider: as one run's profile
    tells it."""
    options = session_options(threads, level)
    with tempfile.TemporaryDirectory(prefix="onnxruntime-") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")
        session = open_session(model, options, provider, provider_options)
        if provider not in session.get_providers():
            raise Unreachable(_did_not_start(provider))
        inputs = made_up(session)
        with judging():
            session.run(None, inputs)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return ort_profile.elsewhere(events, provider)


def path_of(model: Path, precision: Precision) -> str:
    """The path of a file that is to be run. Raises Unsupported where a precision was asked for: a file has its own."""
    if precision != "fp32":
        raise Unsupported("a file is run in the precision that it was written in: leave the setting out")
    return str(model)


def made_up(session: onnxruntime.InferenceSession) -> dict[str, NDArray]:
    """Inputs by name: random numbers, zeros where they are integers, which may be indices. A file may leave the batch
    open, which is then one; raises Unsupported where it leaves more open, or has inputs of other types."""
    random = np.random.default_rng(INPUT_SEED)
    inputs: dict[str, NDArray] = {}
    for tensor in session.get_inputs():
        dtype = DTYPES.get(tensor.type)
        if dtype is None:
            raise Unsupported(f"nothing can be made up for input {tensor.name!r}, a {tensor.type}")
        open_sizes = [number for number, size in enumerate(tensor.shape) if not isinstance(size, int) or size < 1]
        if open_sizes not in ([], [0]):
            raise Unsupported(
                f"the file leaves sizes of input {tensor.name!r} open, {tensor.shape}: fix them, as with "
                "python -m onnxruntime.tools.make_dynamic_shape_fixed"
            )
        shape = [1 if number in open_sizes else size for number, size in enumerate(tensor.shape)]
        floats = np.issubdtype(dtype, np.floating)
        inputs[tensor.name] = (random.standard_normal(shape) if floats else np.zeros(shape)).astype(dtype)
    return inputs


def bind(session: onnxruntime.InferenceSession, device: str = "cpu", number: int = 0) -> onnxruntime.IOBinding:
    """Inputs and outputs in the device's memory, so that a run copies nothing. Inputs are made up."""
    binding = session.io_binding()
    for name, given in made_up(session).items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(given, device, number))
    for tensor in session.get_outputs():
        # A shape of no sizes may be a sequence's, or one that is not known.
        sizes = tensor.shape if tensor.type in DTYPES else ()
        if sizes and all(isinstance(size, int) and size > 0 for size in sizes):
            room: NDArray = np.zeros(tensor.shape, dtype=DTYPES[tensor.type])
            binding.bind_ortvalue_output(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(room, device, number))
        else:
            binding.bind_output(tensor.name, device, number)
    return binding
