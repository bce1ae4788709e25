"""One contract for every kind of operator: ONNX Runtime and the PyTorch reference give the same numbers."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators_at_random import BY_KIND

from lut_db.canary import canary
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import node_number, tensor_name, to_onnx
from lut_db.lowering.weights import made_up
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import KINDS, Convolution, Operator
from search_client.sliced import reference


def run_onnx(network: Network, weights: list, inputs: list[np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        to_onnx(network, weights).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {tensor_name(i): values for i, values in enumerate(inputs)})


def agree(network: Network, seed: int) -> None:
    weights = made_up(network, seed)
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in network.inputs]
    with torch.inference_mode():
        expected = reference(network, weights)(*map(torch.from_numpy, inputs))
    outputs = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    for got, want, tensor in zip(run_onnx(network, weights, inputs), outputs, network.output_tensors, strict=True):
        assert got.shape == network.shapes[tensor]
        np.testing.assert_allclose(got, want.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_agrees_with_the_reference(kind: str) -> None:
    assert kind in BY_KIND, f"tests/operators_at_random.py has no strategy for the kind {kind!r}"

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operator=BY_KIND[kind], seed=st.integers(0, 1000))
    def check(operator: Operator, seed: int) -> None:
        agree(Network.of(operator), seed)

    check()


def test_whole_networks_agree_with_the_reference() -> None:
    agree(canary(), 0)


def test_every_node_says_which_operator_it_belongs_to() -> None:
    model = to_onnx(canary())
    numbers = [node_number(node.name) for node in model.graph.node]
    assert None not in numbers
    assert sorted(set(numbers)) == list(range(len(canary().nodes)))


def test_made_up_weights_are_the_same_every_time() -> None:
    assert to_onnx(canary(), seed=3).SerializeToString() == to_onnx(canary(), seed=3).SerializeToString()


def test_weights_that_do_not_fit_are_refused() -> None:
    build = NetworkBuilder()
    build.add(Convolution(input=(1, 3, 8, 8), filters=4, kernel=(3, 3)), build.input((1, 3, 8, 8)))
    network = build.network()
    with pytest.raises(InvalidInput, match=r"weights\[0\]\.weight"):
        to_onnx(network, [{"weight": np.zeros((4, 3, 1, 1), np.float32), "bias": np.zeros(4, np.float32)}])
    with pytest.raises(InvalidInput, match="bias"):
        to_onnx(network, [{"weight": np.zeros((4, 3, 3, 3), np.float32)}])
