"""What is particular to ONNX. That it says what the reference computes is tested in `test_formats.py`."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from operators_at_random import BY_KIND

from lut_db.canary import canary
from lut_db.lowering.onnx import ELEMENTS, OLDEST_OPSET, OPSET, Float, node_number, tensor_name, to_onnx
from lut_db.lowering.torch import to_torch
from lut_db.lowering.weights import made_up
from lut_db.networks import Network
from lut_db.operators import KINDS, Operator

HALF_TOLERANCE = 2e-2
"""Of the largest element: halves have eleven bits, and a sum of many loses some."""


def test_every_node_says_which_operator_it_belongs_to() -> None:
    model = to_onnx(canary())
    numbers = [node_number(node.name) for node in model.graph.node]
    assert None not in numbers
    assert sorted(set(numbers)) == list(range(len(canary().nodes)))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", HALF_TOLERANCE)])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_oldest_version_and_halves_come_close_to_the_reference(
    kind: str, precision: Float, tolerance: float
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
