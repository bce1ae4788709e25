"""One contract for every format and every kind of operator: the runtimes that read the format and the PyTorch
reference give the same numbers."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators_at_random import BY_KIND

import lut_db.lowering
from lut_db.canary import canary
from lut_db.errors import InvalidInput
from lut_db.lowering import onnx, tflite
from lut_db.lowering.torch import to_torch
from lut_db.lowering.weights import Weights, made_up
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import KINDS, Activate, Convolution, Linear, Operator
from lut_db.targets import Precision
from search_client import networks
from search_client.architecture import Architecture

Arrays = Sequence[np.ndarray]
Run = Callable[[Network, Weights, Arrays, Precision], Arrays]

INT8_ERROR = 0.15
"""Root mean square of the error of int8 over that of the values, where these nearly cancel each other."""
INT8_USUAL_ERROR = 0.025
"""That of most networks: 0.01 is what 8 bits leave."""
INT8_FLOOR = 1e-3
"""Error of values that are all but zero."""


def run_onnx(bypass: onnx.Bypass) -> Run:
    def run(network: Network, weights: Weights, inputs: Arrays, precision: Precision) -> Arrays:
        model = onnx.to_onnx(network, weights, precision=precision, samples=[inputs], bypass=bypass)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {onnx.tensor_name(i): values for i, values in enumerate(inputs)})

    return run


def run_tflite(resolver: OpResolverType) -> Run:
    def run(network: Network, weights: Weights, inputs: Arrays, precision: Precision) -> Arrays:
        model = tflite.to_tflite(network, weights, precision=precision, samples=[inputs])
        interpreter = Interpreter(model_content=model, experimental_op_resolver_type=resolver, num_threads=1)
        interpreter.allocate_tensors()
        for described, values in zip(interpreter.get_input_details(), inputs, strict=True):
            interpreter.set_tensor(described["index"], tflite.to_nhwc(values))
        interpreter.invoke()
        return [
            tflite.to_nchw(interpreter.get_tensor(described["index"])) for described in interpreter.get_output_details()
        ]

    return run


def run_torch_channels_last(network: Network, weights: Weights, inputs: Arrays, precision: Precision) -> Arrays:
    """Other kernels than the reference's, and other strides of every tensor."""
    module = to_torch(network, weights)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads leave it out
    given = [torch.from_numpy(values) for values in inputs]
    laid_out = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]
    with torch.inference_mode():
        return [output.numpy() for output in module.run(laid_out)]


def torch_weights(*arguments: object, **options: object) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in to_torch(*arguments, **options).state_dict().items()}


RUNTIMES: dict[str, Run] = {
    "onnx in ONNX Runtime": run_onnx("concat"),
    "onnx with summed bypasses in ONNX Runtime": run_onnx("sum"),
    "tflite in LiteRT with XNNPACK": run_tflite(OpResolverType.BUILTIN),
    "tflite in LiteRT": run_tflite(OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES),
    "torch with channels last": run_torch_channels_last,
}
HELPERS = {"weights", "int8", "qdq"}
LOWERINGS: dict[str, Callable[..., object]] = {
    "onnx": onnx.to_onnx, "tflite": tflite.to_tflite, "torch": torch_weights,
}  # fmt: skip
"""What each format says of a network, in a form that can be compared."""
IN_INT8 = ("onnx", "tflite")
"""The formats that say networks in int8 too."""
RUNS = [(runtime, precision) for precision in ("fp32", "int8") for runtime in RUNTIMES
        if precision == "fp32" or runtime.split()[0] in IN_INT8]  # fmt: skip


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def agree(runtime: str, network: Network, seed: int, precision: Precision = "fp32") -> float:
    """The error, relative to the values."""
    weights = made_up(network, seed)
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in network.inputs]
    with torch.inference_mode():
        expected = to_torch(network, weights)(*map(torch.from_numpy, inputs))
    outputs = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    found = RUNTIMES[runtime](network, weights, inputs, precision)
    errors = []
    for got, want, tensor in zip(found, outputs, network.output_tensors, strict=True):
        assert got.shape == network.shapes[tensor]
        if precision == "int8":
            assert got.dtype == np.float32
            assert rms(got - want.numpy()) <= INT8_ERROR * rms(want.numpy()) + INT8_FLOOR
        else:
            np.testing.assert_allclose(got, want.numpy(), atol=1e-4, rtol=1e-4)
        errors.append(rms(got - want.numpy()) / max(rms(want.numpy()), INT8_FLOOR))
    return max(errors)


def test_every_format_is_run() -> None:
    formats = {module.name for module in pkgutil.iter_modules(lut_db.lowering.__path__)} - HELPERS
    assert formats == set(LOWERINGS) == {runtime.split()[0] for runtime in RUNTIMES}


@pytest.mark.parametrize(("runtime", "precision"), RUNS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_agrees_with_the_reference(kind: str, runtime: str, precision: Precision) -> None:
    assert kind in BY_KIND, f"tests/operators_at_random.py has no strategy for the kind {kind!r}"

    errors = []

    # What 8 bits leave is a matter of statistics: always of the same examples.
    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=precision == "int8",
        database=None,
    )  # fmt: skip
    @given(operator=BY_KIND[kind], seed=st.integers(0, 1000))
    def check(operator: Operator, seed: int) -> None:
        errors.append(agree(runtime, Network.of(operator), seed, precision))

    check()
    assert np.median(errors) <= INT8_USUAL_ERROR


def sub_network() -> Network:
    """A small MobileNetV3 that lost filters in every second layer: with bypasses and paddings of every sort."""
    description = networks.load("mobilenet_v3", image_size=33, classes=10, width=0.25)
    space = description.space
    widths = tuple(
        layer.widths[len(layer.widths) // 2] if number % 2 else layer.widths[-1]
        for number, layer in enumerate(space.layers)
    )
    return description.network(Architecture(widths=widths, kernels=space.full.kernels), batch=2)


@pytest.mark.parametrize("network", [canary(), sub_network()], ids=["canary", "sub-network"])
@pytest.mark.parametrize(("runtime", "precision"), RUNS)
def test_whole_networks_agree_with_the_reference(runtime: str, precision: Precision, network: Network) -> None:
    assert agree(runtime, network, 0, precision) <= INT8_ERROR


@pytest.mark.parametrize(("runtime", "precision"), RUNS)
def test_every_output_that_is_asked_for_is_returned(runtime: str, precision: Precision) -> None:
    nodes = len(canary().nodes)
    agree(runtime, canary().model_copy(update={"outputs": (1, nodes - 2, nodes)}), 0, precision)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_made_up_weights_are_the_same_every_time(lowering: str) -> None:
    lower = LOWERINGS[lowering]
    assert lower(canary(), seed=3) == lower(canary(), seed=3) != lower(canary(), seed=4)


@pytest.mark.parametrize("lowering", IN_INT8)
def test_made_up_ranges_are_the_same_every_time(lowering: str) -> None:
    lower = LOWERINGS[lowering]
    assert lower(canary(), seed=3, precision="int8") == lower(canary(), seed=3, precision="int8")


@pytest.mark.parametrize("lowering", IN_INT8)
def test_ranges_are_those_of_the_samples(lowering: str) -> None:
    network = Network.of(Activate(input=(1, 4, 6, 6), activation="relu"))
    samples = [[np.full(network.inputs[0], value, np.float32)] for value in (-3.0, 100.0)]
    lower = LOWERINGS[lowering]
    assert lower(network, precision="int8", samples=samples) != lower(network, precision="int8", samples=samples[:1])


@pytest.mark.parametrize("lowering", IN_INT8)
def test_a_network_that_overflows_is_refused_in_int8(lowering: str) -> None:
    network = Network.of(Linear(input=(1, 2), features=2))
    weights = [{"weight": np.full((2, 2), 1e38, np.float32), "bias": np.zeros(2, np.float32)}]
    with pytest.raises(InvalidInput, match="overflows"):
        LOWERINGS[lowering](network, weights, precision="int8", samples=[[np.full((1, 2), 10, np.float32)]])


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_weights_that_do_not_fit_are_refused(lowering: str) -> None:
    lower = LOWERINGS[lowering]
    build = NetworkBuilder()
    build.add(Convolution(input=(1, 3, 8, 8), filters=4, kernel=(3, 3)), build.input((1, 3, 8, 8)))
    network = build.network()
    with pytest.raises(InvalidInput, match=r"weights\[0\]\.weight"):
        lower(network, [{"weight": np.zeros((4, 3, 1, 1), np.float32), "bias": np.zeros(4, np.float32)}])
    with pytest.raises(InvalidInput, match="bias"):
        lower(network, [{"weight": np.zeros((4, 3, 3, 3), np.float32)}])
