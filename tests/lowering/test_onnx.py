"""What is particular to ONNX. That it says what the reference computes is tested in `test_formats.py`."""

from __future__ import annotations

from lut_db.canary import canary
from lut_db.lowering.onnx import node_number, to_onnx


def test_every_node_says_which_operator_it_belongs_to() -> None:
    model = to_onnx(canary())
    numbers = [node_number(node.name) for node in model.graph.node]
    assert None not in numbers
    assert sorted(set(numbers)) == list(range(len(canary().nodes)))
