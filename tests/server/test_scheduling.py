"""What a lease holds and what becomes of its measurements: pure functions."""

from __future__ import annotations

import random
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables_kit import sub_networks

from lut_db.measurements import REFUSALS, TRANSIENT, Failure
from lut_db.operators import Convolution, Linear, ResidualAdd
from lut_db.plans import WHOLE, Plan
from profiler_server.scheduling import (
    MAX_ATTEMPTS,
    MAX_NETWORKS,
    MIN_FILLERS,
    beside,
    choose_fillers,
    choose_known_networks,
    fate,
    few,
    filler_count,
    lease_size,
    shortcuts,
    successions,
)

channels = st.integers(1, 6)
convolutions = st.builds(
    lambda inputs, filters: Convolution(input=(1, inputs, 8, 8), filters=filters, kernel=(1, 1)), channels, channels
)


def test_suspects_go_out_in_ever_smaller_company() -> None:
    assert [lease_size(Plan(), 128, attempts) for attempts in range(MAX_ATTEMPTS)] == [128, 16, 1]
    assert lease_size(WHOLE, 128, 0) == MAX_NETWORKS
    assert lease_size(Plan(), 1, 1) == 1


@given(st.sampled_from(sorted(TRANSIENT)), st.integers(0, 10))
def test_fate_of_a_failure(cause, attempts: int) -> None:
    decided = fate(Failure(cause=cause, message=""), attempts)
    if cause in REFUSALS:
        assert (decided.record, decided.attempts, decided.pause) == (False, 0, True)
    else:
        assert decided.record == (attempts + 1 >= MAX_ATTEMPTS)


def test_what_is_unsupported_is_not_tried_again() -> None:
    assert fate(Failure(cause="unsupported", message=""), 0).record


def test_only_carriers_are_filled_up() -> None:
    assert filler_count(Plan(carrier_length=80), 30) == 50
    assert filler_count(Plan(carrier_length=80), 100) == MIN_FILLERS, "they tie it to its table"
    assert filler_count(Plan(context="isolated"), 1) == filler_count(WHOLE, 1) == 0


@given(
    st.lists(convolutions, max_size=5), st.lists(convolutions, max_size=20), st.integers(0, 25), st.integers(0, 2**63)
)
def test_fillers_are_distinct_repeatable_and_as_many_as_there_are(wanted, known, count: int, seed: int) -> None:
    chosen = choose_fillers(wanted, known, count, seed)
    assert chosen == choose_fillers(wanted, known, count, seed)
    assert len(chosen) == len(set(chosen)) == min(count, len(known))
    assert all(0 <= index < len(known) for index in chosen)


SEQUENCES = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12), max_size=8)


@given(SEQUENCES, st.sets(st.sampled_from("abcdefgh")), st.integers(1, 4))
def test_successions_are_those_of_the_networks(networks: list[list[str]], keys: set[str], most: int) -> None:
    found = successions(networks, keys, most)
    asked = {pair for network in networks for pair in pairwise(network) if pair[0] != pair[1]}
    assert len(set(found)) == len(found)
    assert set(found) <= {pair for pair in asked if keys & set(pair)}
    assert len(found) <= 2 * most * len(keys)
    for key in keys:
        before, behind = ({pair for pair in asked if pair[side] == key} for side in (1, 0))
        assert len(before & set(found)) >= min(most, len(before)), "as many as there are, up to what is told"
        assert len(behind & set(found)) >= min(most, len(behind))
    assert successions(networks, keys, len(asked) + 1) == list(
        dict.fromkeys(pair for network in networks for pair in pairwise(network) if pair in asked and keys & set(pair))
    )


def test_shortcuts_are_those_of_the_networks() -> None:
    """Told by operators in their order alone, they are nearly what the graphs say: of two operators that make tensors
    of one shape behind each other, the first is taken, which is seldom of another kind."""
    rng = random.Random(0)
    total = right = alike = 0
    for network in sub_networks(rng, 32, 24):
        inputs = len(network.inputs)
        asked: set[tuple[str, str]] = set()
        for node in network.nodes:
            if len(node.inputs) == 2:
                made = network.nodes[node.inputs[1] - inputs]
                while isinstance(made.operator, Convolution) and made.operator.residual:
                    made = network.nodes[made.inputs[1] - inputs]
                asked.add((made.operator.key, node.operator.key))
        keys = {key for _, key in asked}
        found = shortcuts([network.operators], keys)
        assert {key for _, key in found} == keys
        sums = {operator.key: isinstance(operator, ResidualAdd) for operator in network.operators}
        total += len(asked)
        right += len(asked & set(found))
        alike += len({(sums[made], key) for made, key in asked} & {(sums[made], key) for made, key in found})
        some = set(rng.sample(sorted(keys), len(keys) // 2))
        assert shortcuts([network.operators], some) == [pair for pair in found if pair[1] in some]
    assert total > 200
    assert right > 0.8 * total
    assert alike > 0.97 * total


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"))), st.integers(1, 3))
def test_few_are_told_of_each(pairs: list[tuple[str, str]], most: int) -> None:
    found = few(pairs, most)
    assert len(set(found)) == len(found)
    for second in "xy":
        asked = list(dict.fromkeys(pair for pair in pairs if pair[1] == second))
        assert [pair for pair in found if pair[1] == second] == asked[:most]


def test_networks_tell_how_many_weights_their_operators_have() -> None:
    small, large = (tuple(dict.fromkeys(network.operators)) for network in sub_networks(random.Random(0), 32, 2))
    both = set(small) & set(large)
    assert both
    assert set(small) - both
    means = {network: fmean(operator.parameters for operator in network) for network in (small, large)}
    *_, told = beside([small, large], {operator.key for operator in small})
    assert told == {
        operator.key: pytest.approx(fmean(means.values()) if operator in both else means[small]) for operator in small
    }
    assert beside([large], {"none"}) == ([], [], {})
    assert beside([large[:1]], {large[0].key}) == ([], [], {}), "what is asked for alone tells of no network"


def test_neighbours_come_before_strangers() -> None:
    def conv(inputs: int, filters: int) -> Convolution:
        return Convolution(input=(1, inputs, 8, 8), filters=filters, kernel=(1, 1))

    wanted = [conv(3, 4)]
    strangers = [Linear(input=(1, width), features=7) for width in range(10, 20)]
    known = [*strangers, conv(5, 6), conv(4, 5), conv(2, 3)]
    for seed in range(20):
        chosen = choose_fillers(wanted, known, 4, seed)
        assert set(chosen[:2]) == {11, 12}  # reads what is made, makes what is read
        assert chosen[2] == 10  # two steps away
        assert chosen[3] < 10
    assert len({tuple(choose_fillers(wanted, known, 6, seed)) for seed in range(20)}) > 1


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.lists(st.integers(0, 100), max_size=40))
def test_known_networks_are_distinct_alike_and_as_many_as_tie_a_lease(wanted: list[int], known: list[int]) -> None:
    chosen = choose_known_networks(wanted, known)
    near = [size for size in known if any((one + 1) / 2 <= size + 1 <= (one + 1) * 2 for one in wanted)]
    assert len(set(chosen)) == len(chosen) == min(max(6, min(12, len(wanted))), len(near), 32)
    assert {known[index] for index in chosen} <= set(near)
    assert bool(chosen) == bool(near)


def test_known_networks_are_as_large_as_the_wanted() -> None:
    known = [1, 2, 29, 30, 31, 40, 41, 42, 60, 500, 1000, 2000]
    assert choose_known_networks([9000], known) == [], "none that fits other caches speaks for it"
    assert {known[index] for index in choose_known_networks([30, 41, 65], known)} == {30, 31, 40, 41, 42, 60}
    assert {known[index] for index in choose_known_networks([1, 2, 2000, 500, 40, 1000], known)} >= {1, 2, 2000}
