"""Every operator gets its places, whatever the operators are."""

from __future__ import annotations

from collections import Counter

import onnxruntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators_at_random import ANY

from device_agents.packing import pack
from lut_db.canary import canary
from lut_db.lowering.onnx import to_onnx
from lut_db.operators import Operator


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    wanted=st.lists(ANY, min_size=1, max_size=8, unique_by=lambda operator: operator.key),
    fillers=st.lists(ANY, max_size=8, unique_by=lambda operator: operator.key),
    carriers=st.integers(1, 4),
    length=st.integers(1, 12),
    seed=st.integers(0, 100),
)
def test_every_wanted_operator_is_in_that_many_carriers(
    wanted: list[Operator], fillers: list[Operator], carriers: int, length: int, seed: int
) -> None:
    packed = pack(wanted, fillers, carriers, length, seed)
    known = {operator.key: operator for operator in [*wanted, *fillers]}
    places = Counter(key for carrier in packed for key in set(carrier.places.values()))
    assert all(places[operator.key] >= carriers for operator in wanted)
    for carrier in packed:
        assert 1 <= len(carrier.places) <= length
        for node, key in carrier.places.items():
            assert carrier.network.nodes[node].operator == known[key]
        # A runtime drops what nothing reads: every tensor is read or returned.
        unread = {tensor for tensor, readers in enumerate(carrier.network.consumers()) if not readers}
        assert unread <= set(carrier.network.output_tensors)
    assert packed == pack(wanted, fillers, carriers, length, seed)


def test_a_carrier_runs() -> None:
    for carrier in pack(canary().operators, [], 2, 8, 0):
        onnxruntime.InferenceSession(to_onnx(carrier.network).SerializeToString(), providers=["CPUExecutionProvider"])
