"""Every operator gets its places, whatever the operators are."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations
from math import prod

import onnxruntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators_at_random import ANY
from tables_kit import sub_networks

from device_agents.packing import (
    MAX_BALLAST,
    MIN_BALLAST,
    ROOM_ACTIVATIONS,
    ROOM_PARAMETERS,
    WEIGHTED,
    Carrier,
    pack,
)
from lut_db.canary import canary
from lut_db.lowering.onnx import to_onnx
from lut_db.networks import Network
from lut_db.operators import (
    Activate,
    Add,
    ChannelBypass,
    Convolution,
    LayerNorm,
    Linear,
    Operator,
    Pool,
    ResidualAdd,
    SqueezeExcite,
)
from profiler_server.scheduling import beside
from search_client import networks
from search_client.architecture import Architecture


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    wanted=st.lists(ANY, min_size=1, max_size=8, unique_by=lambda operator: operator.key),
    fillers=st.lists(ANY, max_size=8, unique_by=lambda operator: operator.key),
    neighbours=st.lists(ANY, max_size=4, unique_by=lambda operator: operator.key),
    carriers=st.integers(1, 4),
    length=st.integers(1, 12),
    seed=st.integers(0, 100),
    mean=st.none() | st.floats(0, 1e6),
)
def test_every_wanted_operator_is_in_that_many_carriers(
    wanted: list[Operator], fillers: list[Operator], neighbours: list[Operator], carriers: int, length: int, seed: int,
    mean: float | None,
) -> None:  # fmt: skip
    """Whatever is said to come behind whatever, in networks that may never have been, of whatever weights."""
    said = [(a.key, b.key) for a, b in permutations([*wanted, *fillers, *neighbours], 2)] if neighbours else []
    packed = pack(wanted, fillers, carriers, length, seed, said, neighbours, said, mean)
    known = {operator.key: operator for operator in [*wanted, *fillers]}
    places = Counter(key for carrier in packed for key in set(carrier.places.values()))
    assert all(places[operator.key] >= carriers for operator in wanted)
    sizes = {operator.inputs[0][1:] for operator in known.values()}
    for carrier in packed:
        assert 1 <= len(carrier.places) <= length // 2 + 2 * len(sizes) + 1, "shares of each size may be rounded up"
        for node, key in carrier.places.items():
            assert carrier.network.nodes[node].operator == known[key]
        # A runtime drops what nothing reads: every tensor is read or returned.
        unread = {tensor for tensor, readers in enumerate(carrier.network.consumers()) if not readers}
        assert unread <= set(carrier.network.output_tensors)
    assert packed == pack(wanted, fillers, carriers, length, seed, said, neighbours, said, mean)


def test_a_clamp_follows_nothing_that_could_take_it_in() -> None:
    shape = (1, 8, 12, 12)
    clamp = Activate(input=shape, activation="relu")
    others = (
        Convolution(input=shape, filters=8, kernel=(1, 1)),
        Convolution(input=shape, filters=8, kernel=(1, 1), activation="relu6"),
        Pool(input=shape, mode="average", kernel=(3, 3), padding=(1, 1, 1, 1)),
        SqueezeExcite(input=shape, squeeze=4),
    )
    for carrier in pack([clamp, *others], [], 8, 5, 0):
        nodes = carrier.network.nodes
        for node in nodes:
            if node.operator == clamp:
                maker = nodes[node.inputs[0] - len(carrier.network.inputs)].operator
                assert maker.kind == "squeeze_excite" or getattr(maker, "activation", "") == "hard_swish"


def test_two_tables_do_not_follow_each_other() -> None:
    shape = (1, 8, 12, 12)
    sigmoid, addition = Activate(input=shape, activation="sigmoid"), Add(input=shape)
    others = (Convolution(input=shape, filters=8, kernel=(1, 1), activation="hard_sigmoid"), Add(input=shape))
    for carrier in pack([sigmoid, addition, *others], [], 8, 5, 0):
        nodes, inputs = carrier.network.nodes, len(carrier.network.inputs)
        for node in nodes:
            makers = [nodes[tensor - inputs] for tensor in node.inputs if tensor >= inputs]
            if node.operator == sigmoid:
                assert getattr(makers[0].operator, "activation", "none") != "hard_sigmoid"
            if node.operator == addition:
                assert all(maker.operator != sigmoid or maker.inputs[0] not in node.inputs for maker in makers)


def test_a_carrier_holds_no_more_than_a_device_can() -> None:
    """Each of these may be there; forty in one graph would be 40 GiB of weights, or of activations."""
    heavy = [Linear(input=(1, 1 << 14), features=(1 << 14) - number) for number in range(40)]
    wide = [Activate(input=(1, 256, 1 << 10, (1 << 10) - number), activation="relu") for number in range(20)]
    for operators in (heavy, wide):
        packed = pack(operators, [], 1, 40, 0)
        assert {key for carrier in packed for key in carrier.places.values()} == {o.key for o in operators}
        for carrier in packed:
            assert carrier.network.parameters <= 2 * ROOM_PARAMETERS
            assert sum(prod(shape) for shape in carrier.network.shapes) <= 2 * ROOM_ACTIVATIONS


def test_neighbours_take_no_more_room_than_there_is() -> None:
    """A large layer that came behind what is wanted stands there untimed, where there is room for it."""
    norm, large = LayerNorm(input=(1, 4, 12_000)), Linear(input=(1, 4, 12_000), features=12_000)
    other = Linear(input=(1, 4, 12_000), features=12_000, activation="relu")
    for carrier in pack([norm, large], [], 2, 12, 0, [(norm.key, other.key), (other.key, large.key)], [other]):
        assert carrier.network.parameters <= ROOM_PARAMETERS + MAX_BALLAST


def assert_weights(packed: Sequence[Carrier], asked: float, heaviest: int) -> None:
    """All have as many weights as asked, up to the smallest ballast and what was taken last, with what led to it."""
    for carrier in packed:
        lacking = asked - carrier.network.parameters
        assert lacking <= MIN_BALLAST**2 + 16 * MIN_BALLAST
        assert lacking >= -2 * heaviest


def test_carriers_are_alike_and_like_a_network() -> None:
    """What an operator costs depends on what else passes through the caches: none is packed among leftovers."""
    description = networks.load("mobilenet_v3", image_size=112)
    space = description.space
    found: dict[str, Operator] = {}
    for share in (2, 3, 4):
        widths = tuple(layer.widths[len(layer.widths) * share // 4 - 1] for layer in space.layers)
        network = description.network(Architecture(widths=widths, kernels=space.full.kernels))
        found.update({operator.key: operator for operator in network.operators})
    operators = list(found.values())
    packed = pack(operators, [], 6, 80, 0)
    assert len(packed) <= 1.3 * 6 * len(operators) / 40
    sizes = Counter(operator.inputs[0][2:] for operator in operators)
    heaviest = max(operator.parameters for operator in operators)
    assert_weights(packed, sum(operator.parameters for operator in operators) * 80 / len(operators), heaviest)
    assert_weights(pack(operators, [], 6, 80, 0, mean_parameters=80_000.0), 80 * 80_000.0, heaviest)
    for carrier in packed:
        assert 28 <= len(carrier.places) <= 52
        assert 50 <= len(carrier.network.nodes) <= 110
        read = {found[key].inputs[0][2:] for key in carrier.places.values()}
        assert len(read) >= len(sizes) - 1, "each goes from the largest maps to vectors"
        returned = [carrier.network.shapes[tensor] for tensor in carrier.network.output_tensors]
        assert all(len(shape) == 2 for shape in returned), "no map is a dead end, which a runtime may leave for the end"
        inputs = len(carrier.network.inputs)
        for number in carrier.places:
            node = carrier.network.nodes[number]
            if node.operator.inputs[0][1] == 3:
                assert node.inputs[0] < inputs, "what reads an image reads the graph's input"


def test_what_is_timed_reads_what_operators_make_in_a_network() -> None:
    """A pointwise layer behind a depthwise one wherever there is one that makes what it reads."""
    layers = []
    for channels in (8, 16, 24, 40):
        shape = (1, channels, 14, 14)
        layers.append(Convolution(input=shape, filters=channels, kernel=(3, 3), padding=(1,) * 4, groups=channels))
        layers.append(Convolution(input=shape, filters=channels + 8, kernel=(1, 1)))
    for carrier in pack(layers, [], 4, 8, 0):
        nodes, inputs = carrier.network.nodes, len(carrier.network.inputs)
        first = min(carrier.places)
        for number in carrier.places:
            node = nodes[number]
            if number != first and isinstance(node.operator, Convolution) and not node.operator.depthwise:
                maker = nodes[node.inputs[0] - inputs].operator
                assert isinstance(maker, Convolution)
                assert maker.depthwise


def test_operators_stand_between_those_that_they_stand_between_in_networks() -> None:
    """Also where those are not timed: a third of the network's operators, in an order of their own, are wanted."""
    description = networks.load("mobilenet_v3", image_size=112)
    network = description.network(description.space.full)
    successions = {(a.key, b.key) for a, b in pairwise(network.operators) if a.output in b.inputs}
    operators = list(dict.fromkeys(network.operators))
    wanted, others = operators[::3], [o for number, o in enumerate(operators) if number % 3]

    def share(said: list[tuple[str, str]], beside: list[Operator]) -> float:
        """How many of those that have one neighbour to read from in networks read from such a one."""
        known = total = 0
        for carrier in pack(wanted, [], 4, len(network.nodes), 0, said, beside):
            nodes, inputs = carrier.network.nodes, len(carrier.network.inputs)
            for number, key in carrier.places.items():
                makers = [nodes[tensor - inputs].operator.key for tensor in nodes[number].inputs if tensor >= inputs]
                if len(nodes[number].inputs) == 1 and any(after == key for _, after in successions):
                    total += 1
                    known += any((maker, key) in successions for maker in makers)
        return known / total

    assert share(sorted(successions), others) > 0.8
    assert share([], []) < 0.5


def packed_like(drawn: list[Network]) -> list[Carrier]:
    """Carriers of a third of the operators, with all that is known of the others."""
    operators = list(dict.fromkeys(operator for network in drawn for operator in network.operators))
    wanted, others = operators[::3], [o for number, o in enumerate(operators) if number % 3]
    behind, added, _ = beside([network.operators for network in drawn], {operator.key for operator in wanted})
    return pack(wanted, [], 4, len(drawn[0].nodes), 0, behind, others, added)


def test_operators_without_weights_are_in_carriers_of_some_length() -> None:
    weightless = [Activate(input=(1, 8 + number, 12, 12), activation="hard_swish") for number in range(24)]
    for mean in (None, 0.0):
        packed = pack(weightless, [], 6, 32, 0, mean_parameters=mean)
        assert len(packed) < 2 * 6 * len(weightless) / 16


def test_heavy_operators_are_in_carriers_like_networks_too() -> None:
    """They come last in a walk, and find room there; carriers are no shorter, and hardly heavier, for them."""
    drawn = list(sub_networks(random.Random(0), 112, 6, width=1.0))
    operators = sorted(dict.fromkeys(o for n in drawn for o in n.operators), key=lambda operator: operator.parameters)
    light = random.Random(0).sample(operators[:-64], 60)
    length = len(drawn[0].nodes)
    mean = sum(network.parameters for network in drawn) / sum(len(network.nodes) for network in drawn)
    for heavy in (operators[-1:], operators[-4:], operators[-24:]):
        behind, added, _ = beside([network.operators for network in drawn], {o.key for o in (*heavy, *light)})
        packed = pack(
            heavy, light, 6, length, 0, behind, [o for o in operators if o not in (*heavy, *light)], added, mean
        )
        timing = [carrier for carrier in packed if {o.key for o in heavy} & set(carrier.places.values())]
        assert min(len(carrier.network.nodes) for carrier in timing) > length / 2
        assert_weights(packed, mean * length, operators[-1].parameters)


def test_an_operator_adds_what_it_adds_in_networks() -> None:
    """A runtime does a sum within a convolution where both have its layout, and apart where what is added is a sum of
    other widths. What is added was made before what it is added to, not just in time."""
    drawn = list(sub_networks(random.Random(0), 64, 6, width=0.5))
    natures: dict[str, set[bool]] = defaultdict(set)

    def sums(network: Network) -> Iterator[tuple[int, Operator, bool]]:
        """Those that add, and whether what they add is a sum of different widths, or something added to one."""
        inputs, wide = len(network.inputs), set[int]()
        for number, node in enumerate(network.nodes):
            if len(node.inputs) == 2:
                yield number, node.operator, node.inputs[1] in wide
                if isinstance(node.operator, ResidualAdd) or node.inputs[1] in wide:
                    wide.add(inputs + number)

    for network in drawn:
        for _, operator, wide in sums(network):
            natures[operator.key].add(wide)
    alike = before = total = 0
    for carrier in packed_like(drawn):
        for number, operator, wide in sums(carrier.network):
            if number in carrier.places:
                main, other = carrier.network.nodes[number].inputs
                total += 1
                alike += wide in natures[operator.key]
                before += other < main
    assert total > 40
    assert alike > 0.85 * total
    assert before > 0.85 * total


def test_few_channels_are_an_image_only_where_nothing_makes_them() -> None:
    drawn = list(sub_networks(random.Random(0), 64, 6, width=0.5))
    stems = {network.nodes[0].operator.key for network in drawn}
    narrow = 0
    for carrier in packed_like(drawn):
        for number, key in carrier.places.items():
            node = carrier.network.nodes[number]
            if node.operator.inputs[0][1] <= 4:
                narrow += key not in stems
                assert (node.inputs[0] < len(carrier.network.inputs)) == (key in stems)
    assert narrow > 20


def test_what_makes_maps_smaller_stands_behind_what_it_stands_behind_in_networks() -> None:
    """Most carriers hold other operators of the larger maps, to which the walk climbs back."""
    drawn = list(sub_networks(random.Random(0), 64, 6, width=0.5))
    behind: dict[str, set[str]] = defaultdict(set)
    smaller: set[str] = set()
    for network in drawn:
        for one, other in pairwise(network.operators):
            behind[one.key].add(other.key)
            if other.output[2:] != other.inputs[0][2:]:
                smaller.add(other.key)
    total = alike = 0
    for carrier in packed_like(drawn):
        inputs, consumers = len(carrier.network.inputs), carrier.network.consumers()
        for number, key in carrier.places.items():
            if behind[key] and behind[key] <= smaller and carrier.network.nodes[number].operator.output[2] > 4:
                total += 1
                alike += any(carrier.network.nodes[n].operator.key in behind[key] for n in consumers[inputs + number])
    assert total > 20
    assert alike > 0.7 * total


def test_nothing_that_two_begin_with_is_read_by_both() -> None:
    """ONNX Runtime pools once for a pool and for a bypass that pools alike: one of them would take no time."""
    shape = (1, 16, 14, 14)
    operators = (
        Pool(input=shape, mode="average", kernel=(2, 2), stride=(2, 2)),
        ChannelBypass(input=shape, filters=0, kernel=(1, 1), stride=(2, 2)),
        ChannelBypass(input=shape, filters=4, kernel=(1, 1), stride=(2, 2), limit=12),
        Convolution(input=shape, filters=16, kernel=(1, 1), stride=(2, 2)),
    )
    for carrier in pack(operators, [], 8, 8, 0):
        readers = carrier.network.consumers()
        for tensor in range(len(readers)):
            kinds = [carrier.network.nodes[number].operator.kind for number in readers[tensor]]
            assert len([kind for kind in kinds if kind not in WEIGHTED]) <= 1


def test_a_carrier_runs() -> None:
    for carrier in pack(canary().operators, [], 2, 8, 0):
        onnxruntime.InferenceSession(to_onnx(carrier.network).SerializeToString(), providers=["CPUExecutionProvider"])
