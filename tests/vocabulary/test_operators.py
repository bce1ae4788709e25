"""Keys are stable; shapes, counts and graphs are right; what cannot be is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operators_at_random import ANY
from pydantic import ValidationError

from lut_db.networks import Network, NetworkBuilder, Node
from lut_db.operators import OPERATOR, Activate, ChannelBypass, Convolution, GlobalPool, Linear, Operator, same_padding


@given(ANY)
def test_an_operator_survives_json(operator: Operator) -> None:
    again = OPERATOR.validate_json(operator.model_dump_json())
    assert again == operator
    assert again.key == operator.key


@given(ANY, st.randoms())
def test_the_order_of_fields_does_not_matter(operator: Operator, rng: random.Random) -> None:
    fields = list(operator.model_dump(mode="json").items())
    rng.shuffle(fields)
    assert OPERATOR.validate_python(dict(fields)).key == operator.key


@given(ANY, ANY)
def test_keys_tell_operators_apart(one: Operator, other: Operator) -> None:
    assert (one.key == other.key) == (one == other)


def test_keys_are_stable_across_processes_and_versions() -> None:
    """A key that changes loses every row: raise VOCABULARY_VERSION knowingly or leave it."""
    operator = Convolution(input=(1, 3, 8, 8), filters=4, kernel=(3, 3))
    assert operator.key == "48e10637af68021a8f6b7c1aec8fa47a"
    code = "from lut_db.operators import OPERATOR; import sys; print(OPERATOR.validate_json(sys.argv[1]).key)"
    done = subprocess.run(
        [sys.executable, "-c", code, operator.model_dump_json()], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.stdout.strip() == operator.key


@given(ANY)
def test_counts_are_whole_and_sizes_positive(operator: Operator) -> None:
    assert operator.macs_with_elementwise >= operator.macs >= 0
    assert operator.parameters >= 0
    assert operator.bytes(1) * 4 == operator.bytes()
    assert min(operator.output) >= 1
    assert json.loads(Network.of(operator).model_dump_json())["nodes"][0]["operator"]["kind"] == operator.kind


@pytest.mark.parametrize(
    ("channels", "limit", "filters", "out"), [(4, 4, 0, 4), (4, 6, 5, 5), (4, 6, 2, 4), (4, 2, 1, 2), (32, 1, 0, 1)]
)
def test_the_width_of_a_bypass(channels: int, limit: int, filters: int, out: int) -> None:
    """Z = max(min(C, T), M), NetAdaptV2 Sec. 2.2."""
    assert max(min(channels, limit), filters) == out
    bypassed = filters < min(channels, limit)
    if bypassed and not (filters == 0 and limit >= channels):
        operator = ChannelBypass(input=(1, channels, 8, 8), filters=filters, kernel=(1, 1), limit=limit)
        assert operator.output[1] == out
    else:
        with pytest.raises(ValidationError, match=r"no channel to bypass|identity"):
            ChannelBypass(input=(1, channels, 8, 8), filters=filters, kernel=(1, 1), limit=limit)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"filters": 0}, "filters"),
        ({"kernel": (300, 300)}, "kernel"),
        ({"input": (1, 3, 70_000, 8)}, "input"),
        ({"groups": 2}, "groups=2 must divide"),
        ({"kernel": (9, 9)}, "dimension must be at least 1"),
        ({"input": (1, 60_000, 60_000, 8)}, "elements"),
        ({"dilatation": 2}, "dilatation"),
    ],
)
def test_hostile_operators_are_refused(change: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Convolution(**{"input": (1, 3, 8, 8), "filters": 4, "kernel": (3, 3), **change})


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        (Linear(input=(1, 1 << 14), features=1 << 14), "weights in all"),
        (Activate(input=(1, 1 << 14, 128, 128), activation="relu"), "elements in all"),
    ],
)
def test_a_graph_whose_tensors_are_too_much_together_is_refused(operator: Operator, says: str) -> None:
    """Each is 1 GiB, which may be; fifty of them may not."""

    def chain(count: int) -> Network:
        return Network(
            inputs=operator.inputs, nodes=tuple(Node(operator=operator, inputs=(tensor,)) for tensor in range(count))
        )

    assert len(chain(1).nodes) == 1
    with pytest.raises(ValidationError, match=says):
        chain(50)


@pytest.mark.parametrize(
    "shape",
    [(1, 1 << 20), (1 << 15, 1 << 14), (1, 0), (1, 2, 3, 4, 5), (), (9,) * 100_000, (1, 10**5000)],
    ids=lambda shape: f"{len(shape)} sizes",
)
def test_inputs_that_nothing_holds_are_refused(shape: tuple[int, ...]) -> None:
    """An input that no node reads has no operator to refuse it."""
    operator = Convolution(input=(1, 3, 8, 8), filters=4, kernel=(3, 3))
    with pytest.raises(ValidationError, match=r"inputs\n.*(no shape|elements)") as refused:
        Network(inputs=(operator.input, shape), nodes=(Node(operator=operator, inputs=(0,)),))
    assert len(refused.value.errors()[0]["msg"]) < 200


def test_a_graph_refuses_wrong_wiring() -> None:
    operator = Convolution(input=(1, 3, 8, 8), filters=4, kernel=(3, 3))
    for inputs, says in (((1,), "does not exist"), ((0, 0), "reads 1 tensors")):
        with pytest.raises(ValidationError, match=says):
            Network(inputs=((1, 3, 8, 8),), nodes=(Node(operator=operator, inputs=inputs),))
    with pytest.raises(ValidationError, match="expects shape"):
        Network(inputs=((1, 4, 8, 8),), nodes=(Node(operator=operator, inputs=(0,)),))
    with pytest.raises(ValidationError, match="outputs"):
        Network(inputs=((1, 3, 8, 8),), nodes=(Node(operator=operator, inputs=(0,)),), outputs=(5,))


def test_a_network_counts_what_it_holds() -> None:
    build = NetworkBuilder()
    tensor = build.input((1, 3, 8, 8))
    tensor = build.add(
        Convolution(input=(1, 3, 8, 8), filters=4, kernel=(3, 3), padding=same_padding(3), stride=(2, 2)), tensor
    )
    tensor = build.add(GlobalPool(input=build.shape(tensor)), tensor)
    build.add(Linear(input=build.shape(tensor), features=10), tensor)
    network = build.network()
    assert network.macs == 4 * 4 * 4 * 27 + 40
    assert network.macs_with_elementwise == network.macs + 64
    assert network.parameters == 4 * 27 + 4 + 40 + 10
    assert network.consumers() == [[0], [1], [2], []]
    assert Network.model_validate_json(network.model_dump_json()).key == network.key
