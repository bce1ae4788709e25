"""The backends for NVIDIA GPUs, as far as a machine without one can try them; and with one, what they compute."""

from __future__ import annotations

import subprocess
import sys
import weakref
from math import prod

import numpy as np
import onnxruntime
import pytest
import torch
from gpus import gpu_backend
from hypothesis import HealthCheck, given, settings
from operators_at_random import BY_KIND

from device_agents import backends, ort_profile, ort_session
from device_agents.backends import Options, Unprofiled, Unreachable, Unsupported, cuda_onnxruntime, cuda_torch
from device_agents.backends.cuda_torch import Program, Setup, arithmetic
from device_agents.measuring import measure
from lut_db.canary import canary
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import to_onnx
from lut_db.lowering.torch import OperatorModule, to_torch
from lut_db.lowering.weights import made_up
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import KINDS, Activate, Add, Operator
from lut_db.plans import Plan
from lut_db.wire import Lease

CPU = torch.device("cpu")
NAMES = ("cuda-onnxruntime", "cuda-torch")
ELSEWHERE = "AzureExecutionProvider"
"""A provider that every ONNX Runtime has and that runs no operator here: to it the CPU is elsewhere."""
HALF_TOLERANCE = 2e-2
SOME = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
SETUPS = {
    "fp32": Setup(), "channels-last": Setup(channels_last=True), "fp16": Setup(precision="fp16"),
    "fp16-channels-last": Setup(precision="fp16", channels_last=True),
}  # fmt: skip


def some_inputs(network: Network, seed: int = 1) -> list[np.ndarray]:
    """Values that halves hold exactly: a layer norm of two that are almost equal makes much of how they are rounded."""
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float16).astype(np.float32) for shape in network.inputs]


def expected(network: Network, weights: list[dict[str, np.ndarray]], inputs: list[np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return to_torch(network, weights)(*map(torch.from_numpy, inputs)).numpy()


def close(found: np.ndarray, wanted: np.ndarray, precision: str) -> None:
    tolerance = 1e-4 if precision == "fp32" else HALF_TOLERANCE
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


# --- with a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{}, {"precision": "fp16"}], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_computes_what_the_reference_does(
    name: str, setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = gpu_backend(name, setting, monkeypatch)
    weights, inputs = made_up(canary()), some_inputs(canary())
    (found,) = backend.compute(canary(), weights, inputs)
    close(found, expected(canary(), weights, inputs), setting.get("precision", "fp32"))


@pytest.mark.parametrize("setting", [{"l2_flush": "on"}, {"channels_last": "on"}, {"tf32": "on"}], ids=str)
def test_settings_of_torch_on_a_gpu(setting: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = gpu_backend("cuda-torch", setting, monkeypatch).load(canary(), profile=True)
    runs = loaded.time(5)
    times = loaded.node_times()
    # The events between nodes split the time between the first and the last.
    np.testing.assert_allclose(times.total_ms.sum(axis=1), runs, rtol=0.05)


# --- without one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_refused_before_anything_is_looked_for(name: str) -> None:
    for wrong, message in (
        ({"colour": "red"}, "no setting 'colour'"), ({"precision": "int8"}, "settings.precision"),
        ({"tf32": "maybe"}, "neither on nor off"), ({"clocks_mhz": "fast"}, "settings.clocks_mhz"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            backends.create(name, Options(settings=wrong))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_torch_without_cuda_is_explained() -> None:
    with pytest.raises(InvalidInput, match=r"without CUDA .*pip install torch"):
        backends.create("cuda-torch", Options())
    checks = list(cuda_torch.doctor(Options()))
    assert checks[0].name == "torch"
    assert not checks[0].ok
    assert "pytorch.org" in checks[0].remedy


@pytest.mark.skipif(
    cuda_onnxruntime.PROVIDER in onnxruntime.get_available_providers(), reason="this ONNX Runtime is built for CUDA"
)
def test_onnxruntime_without_cuda_is_explained() -> None:
    with pytest.raises(InvalidInput, match=r"no CUDA .*pip install onnxruntime-gpu"):
        backends.create("cuda-onnxruntime", Options())
    lacks = {check.name: check for check in cuda_onnxruntime.doctor(Options()) if not check.ok}
    assert "pip install onnxruntime-gpu" in lacks["CUDA provider"].remedy
    with pytest.raises(Unreachable, match="no CUDAExecutionProvider"):
        ort_session.open_on_one(to_onnx(canary()).SerializeToString(), 1, "all", cuda_onnxruntime.PROVIDER)


def test_an_agent_starts_without_torch_and_names_the_package() -> None:
    code = """
import sys
sys.modules["torch"] = None
from device_agents import backends, cli
from lut_db.errors import InvalidInput
assert "cuda-torch" in backends.names()
backends.create("cpu-onnxruntime", backends.Options())
try:
    backends.module("cuda-torch")
except InvalidInput as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs the package 'torch'" in done.stdout
    assert "pip install 'latency-lab[cuda]'" in done.stdout


# --- torch, all but CUDA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_program_computes_what_the_reference_does(kind: str, name: str) -> None:
    setup = SETUPS[name]

    @SOME
    @given(operator=BY_KIND[kind])
    def check(operator: Operator) -> None:
        network = Network.of(operator)
        weights, inputs = made_up(network), some_inputs(network)
        program = Program(network, weights, setup, CPU)
        places = [tensor.data_ptr() for tensor in program.inputs]
        program.write(inputs)
        assert [tensor.data_ptr() for tensor in program.inputs] == places  # a captured graph reads there
        (found,) = program.run()
        assert found.dtype == cuda_torch.DTYPES[setup.precision]
        close(found.detach().float().numpy(), expected(network, weights, inputs), setup.precision)

    check()


def test_marks_stand_around_every_node() -> None:
    marks: list[str] = []
    program = Program(canary(), None, Setup(), CPU)
    for number, module in enumerate(program.module.nodes):
        module.register_forward_hook(lambda *_, number=number: marks.append(f"node {number}"))
    program.run(lambda: marks.append("mark"))
    nodes = range(len(canary().nodes))
    assert marks == ["mark", *(word for number in nodes for word in (f"node {number}", "mark"))]


def test_tensors_are_let_go_when_nobody_reads_them_any_more() -> None:
    """As an engine's memory planner does it: on a GPU the next tensor is then in the same place, and in its cache."""
    build = NetworkBuilder()
    shape = (1, 4, 8, 8)
    first = last = build.add(Activate(input=shape, activation="relu"), build.input(shape))
    for _ in range(4):
        last = build.add(Activate(input=shape, activation="sigmoid"), last)
    build.add(Add(input=shape), last, first)
    program = Program(build.network(), None, Setup(), CPU)
    made: list[weakref.ref[torch.Tensor]] = []
    for module in program.module.nodes:
        assert isinstance(module, OperatorModule)
        module.register_forward_hook(lambda _module, _inputs, output: made.append(weakref.ref(output)))
    alive: list[int] = []
    program.run(lambda: alive.append(sum(tensor() is not None for tensor in made)))
    assert alive == [0, 1, 2, 2, 2, 2, 1]


def test_outputs_and_inputs_that_are_asked_for_are_kept() -> None:
    network = canary().model_copy(update={"outputs": (0, 1, len(canary().nodes))})
    inputs = some_inputs(network)
    program = Program(network, None, Setup(), CPU)
    program.write(inputs)
    outputs = program.run()
    assert [tuple(output.shape) for output in outputs] == [network.shapes[tensor] for tensor in network.output_tensors]
    np.testing.assert_array_equal(outputs[0].numpy(), inputs[0])


def test_products_are_exact_unless_asked_otherwise_and_only_meanwhile() -> None:
    def now() -> tuple[str, str, bool]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark

    before = now()
    with arithmetic(tf32=False):
        assert now() == ("ieee", "ieee", True)
    assert now() == before

    def fail_in_between() -> None:
        with arithmetic(tf32=True):
            assert now() == ("tf32", "tf32", True)
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        fail_in_between()
    assert now() == before


# --- ONNX Runtime, all but CUDA --------------------------------------------------------------------------------


def test_nodes_on_another_provider_are_refused_by_name() -> None:
    network = canary()
    with pytest.raises(Unsupported, match=f"not give all nodes to {ELSEWHERE}") as refused:
        ort_session.open_on_one(to_onnx(network).SerializeToString(), 1, "basic", ELSEWHERE)
    message = str(refused.value)
    for number in range(len(network.nodes)):
        assert f"n{number}/" in message
    assert "n0/conv (Conv) on CPUExecutionProvider" in message


def test_nodes_that_only_compute_shapes_are_named_too() -> None:
    from onnx import TensorProto, helper

    from lut_db.lowering.onnx import IR_VERSION, OPSET

    graph = helper.make_graph(
        [helper.make_node("Shape", ["x"], ["sizes"], name="sizes_of_x"),
         helper.make_node("Expand", ["one", "sizes"], ["y"], name="fill")],
        "shapes", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3]),
                   helper.make_tensor_value_info("one", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    with pytest.raises(Unsupported, match=r"sizes_of_x \(Shape\) on CPUExecutionProvider"):
        ort_session.open_on_one(model.SerializeToString(), 1, "disabled", ELSEWHERE)


def test_what_is_in_place_and_what_is_copied_between_devices() -> None:
    def node(name: str, kind: str, provider: str) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": kind, "provider": provider}}

    gpu, cpu = cuda_onnxruntime.PROVIDER, ort_session.CPU
    events = [
        {"cat": "Session", "name": "model_run", "args": {}}, node("n0/conv", "Conv", gpu),
        node("Memcpy_token_1", "MemcpyToHost", gpu), node("n1/gather", "Gather", cpu), node("n1/gather", "Gather", cpu),
    ]  # fmt: skip
    assert ort_profile.elsewhere(events, gpu) == [
        f"Memcpy_token_1 (MemcpyToHost) on {gpu}", f"n1/gather (Gather) on {cpu}",
    ]  # fmt: skip
    assert ort_profile.elsewhere(events[:2], gpu) == []


def test_what_an_error_of_the_runtime_means() -> None:
    for text, kind in (
        ("CUDA failure 2: out of memory ; GPU=0", MemoryError),
        ("BFCArena: Failed to allocate memory for requested buffer of size 268435456", MemoryError),
        ("CUDA failure 700: an illegal memory access was encountered", RuntimeError),
        ("Could not find an implementation for Resize(19) node", Unsupported),
    ):
        assert type(ort_session.judged(Exception(text))) is kind
    with pytest.raises(Unsupported, match="cannot run the graph"):
        ort_session.open_session(b"no model", ort_session.session_options(1, "all"))


def test_a_sweep_writes_as_much_as_it_is_told() -> None:
    size = 1 << 20
    sweep = cuda_onnxruntime.Sweep(ort_session.CPU, {}, "cpu", size)
    sweep.run()
    (written,) = sweep.binding.copy_outputs_to_cpu()
    assert written.nbytes == size
    assert prod(written.shape) == size // 4
    (value,) = ort_session.made_up(sweep.session).values()
    np.testing.assert_array_equal(written, np.full(size // 4, value[0]))


def test_a_plan_in_context_is_refused_at_once_where_nodes_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.create("cpu-onnxruntime", Options())
    assert not isinstance(backend, Unprofiled)
    monkeypatch.setattr(backend, "unprofiled", cuda_onnxruntime.UNPROFILED, raising=False)
    assert isinstance(backend, Unprofiled)
    assert cuda_onnxruntime.CudaOnnxruntime.unprofiled == cuda_onnxruntime.UNPROFILED
    operator = Activate(input=(1, 4, 8, 8), activation="relu")
    light = {"carriers": 1, "warmup_runs": 0, "min_runs": 4, "settle_runs": 4, "max_runs": 4, "load_tolerance": 64.0}

    def lease(plan: Plan) -> Lease:
        return Lease(
            token=1, device="here", target=backend.target(), plan=plan, expires_in_s=60, operators=(operator,)
        )  # fmt: skip

    (refused,) = measure(backend, lease(Plan(**light))).measurements
    assert refused.failure is not None
    assert (refused.failure.cause, refused.failure.message) == ("unsupported", cuda_onnxruntime.UNPROFILED)
    (measured,) = measure(backend, lease(Plan(**light, context="isolated"))).measurements
    assert measured.latency_ms is not None
