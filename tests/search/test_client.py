"""The client against servers that misbehave. What it says to the real service is tested with the real service."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_server import CORRECTION, TARGET, Table, latency_ms, serve

from lut_db.errors import Conflict, InvalidInput, LatencyLabError, NotFound
from lut_db.estimates import Traits, add_up
from lut_db.measurements import Status
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import Convolution, GlobalPool, Linear
from lut_db.plans import IN_CONTEXT
from search_client import client as client_module
from search_client.client import (
    AnswerNotUnderstood,
    BadRequest,
    Contradicted,
    ProfilerClient,
    ServiceError,
    ServiceFault,
    ServiceUnavailable,
    StillPending,
    UnknownRecord,
    Waiting,
)


def make_network(*widths: int) -> Network:
    build = NetworkBuilder()
    tensor = build.input((1, 3, 8, 8))
    for width in widths:
        tensor = build.add(
            Convolution(input=build.shape(tensor), filters=width, kernel=(3, 3), padding=(1, 1, 1, 1)), tensor
        )
    tensor = build.add(GlobalPool(input=build.shape(tensor)), tensor)
    build.add(Linear(input=build.shape(tensor), features=10), tensor)
    return build.network()


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def url(table: Table) -> Iterator[str]:
    with serve(table) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[ProfilerClient]:
    with ProfilerClient(url, service_patience_s=20) as client:
        client.open_pin(TARGET.key, IN_CONTEXT)
        yield client


def test_estimates_add_up_what_the_table_says(client: ProfilerClient, table: Table) -> None:
    networks = [make_network(8, 16), make_network(8, 8)]
    estimates = client.estimates(networks)
    for network, estimate in zip(networks, estimates, strict=True):
        expected = add_up([(Traits.of(one), latency_ms(one)) for one in network.operators], CORRECTION)
        assert estimate == expected
        assert estimate.corrected
    assert client.correction == CORRECTION


def test_nothing_is_asked_twice_and_definitions_travel_once(client: ProfilerClient, table: Table) -> None:
    client.estimates([make_network(8, 16)])
    assert table.definitions == 4
    requests = client.counters.requests
    client.estimates([make_network(8, 16), make_network(8, 16)])
    assert client.counters.requests == requests

    client.estimates([make_network(8, 24)])  # the first convolution is known
    assert table.definitions == 7
    asked = {key for name, request in table.requests for network in request.networks for key in network}
    assert len(asked) == 7

    with ProfilerClient(client.base_url) as other:
        other.open_pin(TARGET.key, IN_CONTEXT)
        other.estimates([make_network(8, 16)])
        assert table.definitions == 7
        assert other.counters.requests == 2
        assert other.counters.measured == 0
        assert other.counters.answered_without_measuring == 4


def test_counters(client: ProfilerClient, table: Table) -> None:
    client.estimates([make_network(8, 16), make_network(8, 24)])
    client.estimates([make_network(8, 16)])
    counted = client.counters
    assert (counted.networks, counted.lookups, counted.operators, counted.measured) == (3, 12, 7, 7)
    assert counted.answered_without_measuring == 5
    client.measure_networks([make_network(8, 16)])
    client.measure_networks([make_network(8, 16), make_network(4)])
    assert (counted.whole_networks, counted.whole_networks_measured) == (3, 2)


def test_waits_for_what_is_pending_and_tells(url: str, table: Table) -> None:
    table.per_poll = 2
    told: list[Waiting] = []
    with ProfilerClient(url, progress=told.append) as client:
        client.open_pin(TARGET.key, IN_CONTEXT)
        (estimate,) = client.estimates([make_network(8, 16)])
    assert estimate.status is Status.MEASURED
    assert [one.pending for one in told] == [2, 0]
    assert told[0] == Waiting("operators", 2, 4, "the device is busy")


def test_a_failed_operator_makes_no_number(client: ProfilerClient, table: Table) -> None:
    table.failing.add("global_pool")
    failed, convolution = client.estimates([make_network(8), Network.of(make_network(8).operators[0])])
    assert failed.status is Status.FAILED
    assert failed.latency_ms is None
    assert convolution.latency_ms is not None
    assert list(client.failures.values()) == ["the runtime does not know this operator"]


@pytest.mark.parametrize("ask", ["estimates", "networks", "calibration"])
def test_patience_ends_with_what_is_pending_and_why(url: str, table: Table, ask: str) -> None:
    table.stuck = True
    with ProfilerClient(url, patience_s=0.05, poll_s=0.02) as client:
        client.open_pin(TARGET.key, IN_CONTEXT)
        asking = {
            "estimates": client.estimates,
            "networks": client.measure_networks,
            "calibration": client.calibrate,
        }[ask]
        networks = [make_network(8, 16)] * (5 if ask == "calibration" else 1)
        with pytest.raises(StillPending, match="no agent is there") as caught:
            asking(networks)
    assert TARGET.key in str(caught.value)
    assert "device-agent" in str(caught.value.remedy)
    if ask == "estimates":
        assert "2 convolution, 1 global_pool, 1 linear" in str(caught.value)


def test_a_calibration_is_waited_for(client: ProfilerClient, table: Table) -> None:
    calibration = client.calibrate([make_network(width) for width in range(4, 10)])
    assert calibration.correction == CORRECTION
    assert client.counters.calibrated == len(table.measured)
    assert client.counters.whole_networks_measured == 6
    client.calibrate([make_network(width) for width in range(4, 10)])
    assert client.counters.calibrated == len(table.measured)
    assert client.counters.whole_networks_measured == 6
    table.corrected = False
    with pytest.raises(ServiceFault, match="all alike"):
        client.calibrate([make_network(width) for width in range(4, 10)])


@pytest.mark.parametrize("fault", [502, 503, 504, "drop"])
def test_what_may_pass_is_tried_again(client: ProfilerClient, table: Table, fault: int | str) -> None:
    table.faults += [fault, fault, "-", fault]
    (estimate,) = client.estimates([make_network(8, 16)])
    assert estimate.status is Status.MEASURED
    assert client.counters.retries == 3


def test_a_refusal_keeps_field_and_remedy(client: ProfilerClient, table: Table) -> None:
    table.faults.append(422)
    with pytest.raises(BadRequest) as caught:
        client.targets()
    assert (caught.value.field, caught.value.remedy) == ("kernel", "give an odd one")
    assert client.counters.retries == 0
    with pytest.raises(UnknownRecord, match="no pin 99"):
        client.use_pin(99)


@pytest.mark.parametrize(("status", "error"), [(400, BadRequest), (409, Contradicted), (500, ServiceFault)])
def test_other_refusals(client: ProfilerClient, table: Table, status: int, error: type[ServiceError]) -> None:
    table.faults.append(status)
    with pytest.raises(error, match="upstream is away"):
        client.targets()


def test_an_answer_of_something_else_is_recognised(client: ProfilerClient, table: Table) -> None:
    table.faults.append("garbage")
    with pytest.raises(AnswerNotUnderstood, match="profiler-server"):
        client.targets()


def test_a_service_that_is_down_is_explained() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with ProfilerClient(url, service_patience_s=0.5) as client:
            assert not client.ready()
            with pytest.raises(ServiceUnavailable) as caught:
                client.targets()
    text = str(caught.value)
    assert url in text
    assert "attempts" in text
    assert "ConnectError" in text
    assert "profiler-server" in text


def test_a_better_explanation_comes_first() -> None:
    class Died(LatencyLabError):
        """It died."""

    def explain() -> None:
        raise Died

    with (
        ProfilerClient("http://127.0.0.1:9", service_patience_s=60, still_there=explain) as client,
        pytest.raises(Died),
    ):
        client.targets()


@pytest.mark.parametrize("url", ["", "lab:8000", "ftp://lab", "http://"])
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ProfilerClient(url)
    assert caught.value.field == "server"


def test_reading_needs_a_pin(url: str) -> None:
    with ProfilerClient(url) as client, pytest.raises(InvalidInput, match="open_pin"):
        client.estimates([make_network(8)])


def test_large_batches_are_cut(client: ProfilerClient, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "OPERATORS_PER_REQUEST", 3)
    monkeypatch.setattr(client_module, "NETWORKS_PER_REQUEST", 2)
    networks = [make_network(width, width) for width in range(4, 12)]
    assert all(estimate.status is Status.MEASURED for estimate in client.estimates(networks))
    longest = max(len(network.operators) for network in networks)
    lookups = [request.networks for name, request in table.requests if name == "lookup"]
    assert len(lookups) > 1
    assert all(len({key for network in asked for key in network}) < 3 + longest for asked in lookups)
    assert len(client.measure_networks(networks)) == 8


def test_operators_are_asked_for_in_networks_that_they_are_in(client: ProfilerClient, table: Table) -> None:
    networks = [make_network(8, width) for width in range(4, 16)]
    sequences = [tuple(operator.key for operator in network.operators) for network in networks]

    def told() -> list[tuple[tuple[str, ...], ...]]:
        asked = [request.networks for name, request in table.requests if name == "lookup"]
        return list(dict.fromkeys(each for each in asked if set(each) <= set(sequences)))

    client.estimates(networks[:1])
    client.estimates(networks[:1])
    assert told() == [(sequences[0],)], "once, whatever is asked while it waits"
    client.estimates(networks)
    assert told()[1:] == [tuple(sequences[1:])]


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6), max_size=12),
    st.sets(st.sampled_from("abcdefg")),
)
def test_what_is_lacking_is_told_in_a_few_networks(networks: list[list[str]], lacking: set[str]) -> None:
    told = [network for some in client_module._told(networks, lacking) for network in some]
    assert all(lacking & set(network) for network in told)
    few = client_module.NETWORKS_PER_OPERATOR
    for key in lacking:
        having = sum(key in network for network in networks)
        assert sum(key in network for network in told) >= min(few, having)
    assert len(told) <= few * len(lacking)


def test_the_error_tree() -> None:
    assert issubclass(UnknownRecord, NotFound)
    assert issubclass(Contradicted, Conflict)
    assert issubclass(BadRequest, InvalidInput)
    for error in (ServiceUnavailable, AnswerNotUnderstood, StillPending, ServiceFault, UnknownRecord):
        assert issubclass(error, ServiceError)
