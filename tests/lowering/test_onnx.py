"""What is particular to ONNX. That it says what the reference computes is tested in `test_formats.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators_at_random import ANY, BY_KIND

from device_agents.packing import pack
from lut_db.canary import canary
from lut_db.lowering.onnx import ELEMENTS, OLDEST_OPSET, OPSET, Bypass, node_number, tensor_name, to_onnx
from lut_db.lowering.torch import to_torch
from lut_db.lowering.weights import made_up
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import (
    KINDS,
    Activate,
    ChannelBypass,
    Convolution,
    Operator,
    SqueezeExcite,
    Upsample,
    same_padding,
)
from lut_db.targets import Precision

CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}
WITH_KERNELS = {
    "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool",
    "Softmax", "Sigmoid",
}  # fmt: skip
"""What runs on float32 only where no int8 kernel took its place."""
HALF_TOLERANCE = 2e-2
"""Of the largest element: halves have eleven bits, and a sum of many loses some."""


def optimized(
    network: Network, folder: Path, precision: Precision = "int8", bypass: Bypass = "concat"
) -> onnx.GraphProto:  # fmt: skip
    """The graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        to_onnx(network, precision=precision, bypass=bypass).SerializeToString(), options,
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    return onnx.load(options.optimized_model_filepath).graph


def test_every_node_says_which_operator_it_belongs_to() -> None:
    model = to_onnx(canary())
    numbers = [node_number(node.name) for node in model.graph.node]
    assert None not in numbers
    assert sorted(set(numbers)) == list(range(len(canary().nodes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimized")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(operators=st.lists(ANY, min_size=1, max_size=8, unique_by=lambda operator: operator.key))
def test_whatever_has_an_int8_kernel_runs_in_it(folder: Path, operators: list[Operator]) -> None:
    for carrier in pack(operators, [], 1, 8, 0):
        assert not {node.op_type for node in optimized(carrier.network, folder).node} & WITH_KERNELS


def test_a_network_is_converted_at_its_border_and_around_what_has_no_kernel(folder: Path) -> None:
    graph = optimized(canary(), folder)
    kinds = {output: node.op_type for node in graph.node for output in node.output}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    dequantizers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert {kinds.get(node.input[0], "input") for node in quantizers} == {"input", "HardSigmoid"}
    readers = {name: node.op_type for node in graph.node for name in node.input}
    assert {readers.get(node.output[0], "output") for node in dequantizers} == {"output", "HardSigmoid"}


def test_int8_is_the_same_in_the_oldest_version() -> None:
    network = canary()
    inputs = {tensor_name(i): np.ones(shape, np.float32) for i, shape in enumerate(network.inputs)}
    found = []
    for oldest, version in ((False, OPSET), (True, OLDEST_OPSET)):
        model = to_onnx(network, precision="int8", oldest=oldest)
        assert [opset.version for opset in model.opset_import] == [version]
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, inputs)[0])
    np.testing.assert_array_equal(*found)


def bypass(size: int = 8, activation: str = "relu", **fields: object) -> ChannelBypass:
    return ChannelBypass(
        input=(1, 16, size, size), filters=8, kernel=(3, 3), stride=(2, 2), padding=same_padding(3),
        activation=activation, **{"depthwise": True, **fields},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "kinds"),
    [
        (bypass(), ["Conv", "Relu", "Conv", "Add"]),
        (bypass(activation="none"), ["Conv", "Conv", "Add"]),
        (bypass(limit=12), ["Slice", "Conv", "Relu", "Conv", "Add"]),
        (bypass(size=9), ["Slice", "AveragePool", "Slice", "Conv", "Relu", "Concat"]),
        (bypass(activation="sigmoid"), ["Slice", "AveragePool", "Slice", "Conv", "Sigmoid", "Concat"]),
        (bypass(depthwise=False), ["Slice", "AveragePool", "Conv", "Relu", "Concat"]),
    ],
)
def test_which_bypasses_are_sums(operator: ChannelBypass, kinds: list[str]) -> None:
    said = to_onnx(Network.of(operator), bypass="sum")
    assert [node.op_type for node in said.graph.node] == kinds
    assert "Concat" in [node.op_type for node in to_onnx(Network.of(operator)).graph.node]


def test_a_sum_leaves_the_blocked_layout_nowhere(folder: Path) -> None:
    build = NetworkBuilder()
    tensor = build.input((1, 16, 16, 16))
    tensor = build.add(Convolution(input=(1, 16, 16, 16), filters=16, kernel=(1, 1), activation="hard_swish"), tensor)
    tensor = build.add(bypass(16, "hard_swish"), tensor)
    build.add(Convolution(input=(1, 16, 8, 8), filters=16, kernel=(1, 1)), tensor)
    kinds = [node.op_type for node in optimized(build.network(), folder, precision="fp32", bypass="sum").node]
    if "ReorderInput" not in kinds:
        pytest.skip("this processor's kernels have no blocked layout")
    assert kinds.count("ReorderInput") == kinds.count("ReorderOutput") == 1


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_clamp_that_stands_alone_is_not_left_out(folder: Path, activation: str) -> None:
    """Even where nothing below zero comes: what is behind it would seem to take no time."""
    build = NetworkBuilder()
    tensor = build.input((1, 8, 12, 12))
    for operator in (
        Convolution(input=(1, 8, 12, 12), filters=8, kernel=(3, 3), padding=same_padding(3), activation="relu"),
        SqueezeExcite(input=(1, 8, 12, 12), squeeze=4),
        Upsample(input=(1, 8, 12, 12), scale=2),
        Activate(input=(1, 8, 24, 24), activation=activation),
        Convolution(input=(1, 8, 24, 24), filters=8, kernel=(1, 1)),
    ):
        tensor = build.add(operator, tensor)
    graph = optimized(build.network(), folder)
    assert [node.op_type for node in graph.node if node.name.startswith("n3/") and node.op_type not in CONVERSIONS] == [
        "Relu" if activation == "relu" else "Clip"
    ]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", HALF_TOLERANCE)])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_oldest_version_and_halves_come_close_to_the_reference(
    kind: str, precision: Precision, tolerance: float
) -> None:
    dtype, element = ELEMENTS[precision]

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operator=BY_KIND[kind])
    def check(operator: Operator) -> None:
        network = Network.of(operator)
        weights = made_up(network)
        model = to_onnx(network, weights, precision=precision, oldest=True)
        young = getattr(operator, "activation", "") == "gelu"
        assert [opset.version for opset in model.opset_import] == [OPSET if young else OLDEST_OPSET]
        described = (*model.graph.input, *model.graph.output)
        assert {tensor.type.tensor_type.elem_type for tensor in described} == {element}
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in network.inputs]
        (found,) = session.run(None, {tensor_name(i): x.astype(dtype) for i, x in enumerate(inputs)})
        with torch.inference_mode():
            wanted = to_torch(network, weights)(*map(torch.from_numpy, inputs)).numpy()
        np.testing.assert_allclose(found, wanted, atol=tolerance * max(1.0, np.abs(wanted).max()))

    check()
