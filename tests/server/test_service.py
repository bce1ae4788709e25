"""The service over HTTP: devices, leases, reports, lookups, pins, networks, calibrations. Real servers throughout."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from statistics import fmean
from typing import Any

import httpx
import pytest
from sqlalchemy import event, text
from tables_kit import PLAN, TARGET, WHOLE_PLAN, chain, conv, convs, failed, make_device, make_target, measured

from lut_db.estimates import Correction, Fit
from lut_db.measurements import MAX_SAMPLES, Measurement, Status
from lut_db.networks import Network
from lut_db.operators import Linear, Operator
from lut_db.plans import WHOLE, Plan
from lut_db.storage import models as m
from lut_db.storage import queries
from lut_db.wire import Calibration, DeviceState, Lease, Lookup, NetworksAnswer, Page, Pin, ReportOutcome, RowDetail

FIT = Fit(
    networks=9, mean_error=0.01, max_error=0.02, within_5_percent=1, within_10_percent=1, rank_correlation=1
)  # fmt: skip


class Lab:
    """What a search and an agent ask of a server, and nothing of its inside."""

    def __init__(self, client: httpx.Client):
        self.client = client

    def register(self, name: str = "bench", *targets: Any) -> None:
        device = make_device(name, *targets)
        answer = self.client.put(f"/v1/devices/{name}", json=device.model_dump(mode="json"))
        assert answer.status_code == 200, answer.text

    def pin(self, plan: Any = PLAN) -> Pin:
        answer = self.client.post("/v1/pins", json={"target": TARGET.key, "plan": plan.model_dump(mode="json")})
        assert answer.status_code == 201, answer.text
        return Pin.model_validate(answer.json())

    def lookup(self, pin: int, operators: dict[str, Operator], *, wait_s: float = 0.0, path: str = "pins") -> Lookup:
        """Each operator as a network of its own, and all of them as one."""
        body = {
            "operators": {key: operator.model_dump(mode="json") for key, operator in operators.items()},
            "networks": [*([key] for key in operators), list(operators)],
            "wait_s": wait_s,
        }
        answer = self.client.post(f"/v1/{path}/{pin}/lookup", json=body)
        assert answer.status_code == 200, answer.text
        return Lookup.model_validate(answer.json())

    def lease(self, name: str = "bench", *, wait_s: float = 0.0, **more: Any) -> Lease | None:
        body = {"target": TARGET.key, "wait_s": wait_s, **more}
        answer = self.client.post(f"/v1/devices/{name}/leases", json=body)
        assert answer.status_code in (200, 204), answer.text
        return Lease.model_validate(answer.json()) if answer.status_code == 200 else None

    def must_lease(self, name: str = "bench", **more: Any) -> Lease:
        lease = self.lease(name, **more)
        assert lease is not None
        return lease

    def report(
        self, token: int, *measurements: Measurement, canary_ms: float = 0.2, heavy_canary_ms: float | None = None
    ) -> ReportOutcome:
        body = {
            "measurements": [measurement.model_dump(mode="json") for measurement in measurements],
            "canary_ms": canary_ms, "heavy_canary_ms": heavy_canary_ms,
            "evidence": {"load": 0.01},
        }  # fmt: skip
        answer = self.client.post(f"/v1/leases/{token}/results", json=body)
        assert answer.status_code == 200, answer.text
        return ReportOutcome.model_validate(answer.json())

    def measure(self, latency_ms: Callable[[str], float] = lambda key: 1.0, name: str = "bench") -> int:
        """Leases and reports until nothing waits; returns how many were measured."""
        count = 0
        while (lease := self.lease(name)) is not None:
            keys = [item.key for item in (*lease.operators, *lease.networks)]
            count += len(keys)
            assert self.report(lease.token, *(measured(key, latency_ms(key)) for key in keys)).outcome == "accepted"
        return count

    def device(self, name: str = "bench") -> DeviceState:
        return DeviceState.model_validate(self.client.get(f"/v1/devices/{name}").json())

    def rows(self, **query: Any) -> Page:
        answer = self.client.get(f"/v1/targets/{TARGET.key}/rows", params=query)
        assert answer.status_code == 200, answer.text
        return Page.model_validate(answer.json())


@pytest.fixture
def sqlite_url(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'service.sqlite'}"


@pytest.fixture
def lab(start_server, sqlite_url: str) -> Lab:
    """A lab with one device, for what does not depend on the database."""
    made = Lab(start_server(sqlite_url).client)
    made.register()
    return made


@pytest.fixture
def lab_on_both(server) -> Lab:
    """A lab with one device, on SQLite and on PostgreSQL."""
    made = Lab(server.client)
    made.register()
    return made


def again(server, *keys: str, plan: str = PLAN.key) -> None:
    """Puts measured operators into the queue once more, as `lut-db remeasure` does."""
    with server.lab.database.write() as session:
        queries.lock_table(session, TARGET.key, plan)
        queries.enqueue(session, TARGET.key, plan, keys, queries.clock(session), again=True)


# --- devices --------------------------------------------------------------------------------------------------


def test_devices_and_targets(lab_on_both: Lab) -> None:
    lab = lab_on_both
    other = make_target("another machine")
    lab.register("bench", TARGET, other)
    lab.register("bench", TARGET, other)
    lab.register("second")
    assert [d["device"]["name"] for d in lab.client.get("/v1/devices").json()] == ["bench", "second"]
    state = lab.device()
    assert (state.state, state.device.targets) == ("ready", (TARGET, other))
    targets = {t["key"]: t for t in lab.client.get("/v1/targets").json()}
    assert targets[TARGET.key]["devices"] == ["bench", "second"]
    assert lab.client.get(f"/v1/targets/{other.key}").json()["devices"] == ["bench"]
    lab.register("bench", other)
    assert lab.client.get(f"/v1/targets/{TARGET.key}").json()["devices"] == ["second"]


def test_errors_are_problems_that_name_field_and_remedy(lab: Lab) -> None:
    def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.status_code == status == answer.json()["status"]
        return answer.json()

    client = lab.client
    key = conv(1).key
    assert problem(client.get("/v1/nothing"), 404)
    assert problem(client.delete("/v1/targets"), 405)
    assert problem(client.get("/v1/devices/nobody"), 404)["remedy"]
    assert problem(client.get("/v1/pins/77"), 404)["field"] == "id"
    assert problem(client.get("/v1/pins/0"), 422)["field"] == "id"
    assert problem(client.get(f"/v1/pins/{10**30}"), 422)["field"] == "id"
    assert problem(client.get("/v1/snapshots/1"), 404)["field"] == "snapshot"
    assert problem(client.get("/v1/rows/1"), 404)
    assert problem(client.post("/v1/leases/5/heartbeat"), 404)["field"] == "token"
    assert problem(client.post("/v1/pins", json={"target": TARGET.key, "plan": {"carriers": 0}}), 422)["field"] == (
        "plan.carriers"
    )
    whole = {"target": TARGET.key, "plan": WHOLE_PLAN.model_dump(mode="json")}
    assert problem(client.post("/v1/pins", json=whole), 422)["field"] == "plan.context"
    assert problem(client.post("/v1/pins", json={"target": "0" * 16, "plan": {}}), 404)["field"] == "target"
    json_text = {"content-type": "application/json"}
    for body in (b"{", b'{"target": NaN}', b'{"target": 1e999}', b"[" * 100_000, b"\xff\xfe", b"1" * 5000):
        assert problem(client.post("/v1/pins", content=body, headers=json_text), 422)["field"] == "body"
    wrong = {"operators": {key: conv(2).model_dump(mode="json")}, "networks": [[key]]}
    assert problem(client.post(f"/v1/pins/{lab.pin().id}/lookup", json=wrong), 422)["field"] == f"operators.{key}"
    other = {"target": make_target("never seen").key}
    assert problem(client.post("/v1/devices/bench/leases", json=other), 422)["field"] == "target"
    device = make_device("other").model_dump(mode="json")
    assert problem(client.put("/v1/devices/bench", json=device), 422)["field"] == "name"


def test_large_bodies_are_refused(start_server, sqlite_url: str) -> None:
    server = start_server(sqlite_url, max_body_bytes=2048)
    answer = server.client.post("/v1/pins", content=b" " * 4096, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["title"]) == (413, "Request Entity Too Large")
    pieces = (b" " * 1024 for _ in range(4))
    answer = server.client.post("/v1/pins", content=pieces, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_silent_devices_are_lost_and_said_to_be(start_server, database_url: str) -> None:
    lab = Lab(start_server(database_url, lost_after_s=0.05).client)
    lab.register()
    lookup = lab.lookup(lab.pin().id, convs(1))
    assert lookup.waiting_for is not None
    while lab.device().state != "lost":
        time.sleep(0.02)
    lookup = lab.lookup(lab.pin().id, convs(1))
    assert "bench is lost" in (lookup.waiting_for or "")


# --- lookups --------------------------------------------------------------------------------------------------


def test_from_nothing_to_an_estimate(lab_on_both: Lab) -> None:
    lab = lab_on_both
    operators = convs(3)
    pin = lab.pin()
    answer = lab.client.post(f"/v1/pins/{pin.id}/lookup", json={"networks": [list(operators)]})
    assert Lookup.model_validate(answer.json()) == Lookup(unknown=tuple(operators))
    first = lab.lookup(pin.id, operators)
    assert first.enqueued == 3
    assert {row.status for row in first.operators.values()} == {Status.PENDING}
    assert [estimate.status for estimate in first.networks] == [Status.PENDING] * 4
    assert "3 measurements are queued for bench" in (first.waiting_for or "")
    second = lab.lookup(pin.id, operators)
    assert second.enqueued == 0
    assert lab.measure(lambda key: 0.5) == 3
    told = lab.lookup(pin.id, operators)
    assert told.waiting_for is None
    assert told.networks[-1].latency_ms == pytest.approx(1.5)
    assert not told.networks[-1].corrected
    (row, *_) = lab.rows(kind="convolution", status="measured", plan=PLAN.key, limit=1).rows
    detail = RowDetail.model_validate(lab.client.get(f"/v1/rows/{row.id}").json())
    assert detail.samples[0].samples_ms == (0.5, 0.505)
    assert detail.evidence == {"load": 0.01}
    assert detail.definition.key == row.key
    assert lab.client.get(f"/v1/pins/{pin.id}").json()["rows"] == 3


def test_rows_come_in_pages(lab_on_both: Lab) -> None:
    lab = lab_on_both
    lab.lookup(lab.pin().id, convs(5))
    lab.measure()
    seen, after = [], 0
    while True:
        page = lab.rows(after=after, limit=2)
        seen += [row.key for row in page.rows]
        if page.next is None:
            break
        after = page.next
    assert seen == list(convs(5))
    assert lab.rows(status="failed").rows == ()


def test_a_lookup_waits_until_everything_is_there(lab: Lab) -> None:
    pin = lab.pin()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.lookup, pin.id, convs(2), wait_s=30.0)
        lease = lab.must_lease(wait_s=30.0)
        lab.report(lease.token, *(measured(operator.key) for operator in lease.operators))
        lookup = waiting.result()
    assert lookup.enqueued == 2
    assert lookup.networks[-1].latency_ms == pytest.approx(2.0)


def test_a_wait_that_is_over_says_what_is_pending(lab: Lab) -> None:
    lookup = lab.lookup(lab.pin().id, convs(2), wait_s=0.1)
    assert lookup.networks[-1].status is Status.PENDING
    assert lookup.enqueued == 2


def test_two_servers_over_one_database(start_server, database_url: str) -> None:
    """Who waits at one server is served by what happens at the other."""
    here, there = (Lab(start_server(database_url).client) for _ in range(2))
    here.register()
    pin = here.pin()
    with ThreadPoolExecutor(2) as pool:
        leasing = pool.submit(there.must_lease, wait_s=30.0)
        waiting = pool.submit(here.lookup, pin.id, convs(2), wait_s=30.0)
        lease = leasing.result()
        there.report(lease.token, *(measured(operator.key) for operator in lease.operators))
        assert waiting.result().networks[-1].latency_ms == pytest.approx(2.0)


def test_many_ask_and_each_is_measured_once(lab_on_both: Lab) -> None:
    lab = lab_on_both
    pins = [lab.pin().id for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        lookups = list(pool.map(lambda pin: lab.lookup(pin, convs(40)), pins))
    assert sum(lookup.enqueued for lookup in lookups) == 40
    assert lab.measure() == 40
    with ThreadPoolExecutor(8) as pool:
        lookups = list(pool.map(lambda pin: lab.lookup(pin, convs(40)), pins))
    assert {lookup.networks[-1].latency_ms for lookup in lookups} == {40.0}
    assert lab.measure() == 0


@pytest.mark.parametrize("size", [2, 60])
def test_a_lookup_in_the_table_takes_a_constant_number_of_statements(server, lab_on_both: Lab, size: int) -> None:
    lab = lab_on_both
    operators = convs(size)
    pin = lab.pin()
    lab.lookup(pin.id, operators)
    lab.measure()
    networks = [list(operators)] * (200 if size > 2 else 1)
    statements: list[str] = []
    event.listen(server.lab.database.engine, "before_cursor_execute", lambda *told: statements.append(told[2]))
    counts = []
    for _ in range(2):  # the first freezes, the second reads what is frozen
        statements.clear()
        answer = lab.client.post(f"/v1/pins/{pin.id}/lookup", json={"networks": networks})
        assert answer.json()["networks"][0]["latency_ms"] == pytest.approx(size)
        tending = ("leases.deadline", "calibrations")  # the task that looks after leases runs beside
        ours = [said for said in statements if not said.startswith("BEGIN") and not any(t in said for t in tending)]
        counts.append(len([said for said in ours if "strftime" not in said and "clock_timestamp" not in said]))
    assert counts == [9, 3]


# --- pins -----------------------------------------------------------------------------------------------------


def test_a_pin_keeps_what_it_read_whatever_is_measured_later(server, lab_on_both: Lab) -> None:
    lab = lab_on_both
    operators = convs(2)
    old = lab.pin()
    lab.lookup(old.id, operators)
    lab.measure(lambda key: 1.0)
    assert lab.lookup(old.id, operators).networks[-1].latency_ms == 2.0
    again(server, *operators)
    assert lab.measure(lambda key: 3.0) == 2
    assert lab.lookup(old.id, operators).networks[-1].latency_ms == 2.0
    assert lab.lookup(lab.pin().id, operators).networks[-1].latency_ms == 6.0
    assert {row.revision for row in lab.rows().rows} == {2}


def test_a_sealed_pin_never_changes(lab: Lab) -> None:
    pin = lab.pin()
    lab.lookup(pin.id, convs(2))
    lab.measure()
    lab.lookup(pin.id, convs(2))
    sealed = Pin.model_validate(lab.client.post(f"/v1/pins/{pin.id}/seal").json())
    assert (sealed.snapshot, sealed.rows) == (1, 2)
    assert lab.client.post(f"/v1/pins/{pin.id}/seal").json()["snapshot"] == 1
    assert lab.client.get("/v1/snapshots/1").json()["id"] == pin.id
    for path, number in (("pins", pin.id), ("snapshots", 1)):
        lookup = lab.lookup(number, convs(3), path=path, wait_s=5.0)
        assert (lookup.enqueued, lookup.waiting_for) == (0, None)
        assert [estimate.status for estimate in lookup.networks] == ["measured", "measured", "missing", "missing"]
    assert lab.client.get("/v1/snapshots/1").json()["rows"] == 2
    assert lab.measure() == 0


def test_a_correction_that_comes_later_does_not_alter_a_pin(server, lab_on_both: Lab) -> None:
    lab = lab_on_both

    def correct(scale: float) -> None:
        correction = Correction(scale=scale, relative_half_width=0.1, left_out=FIT)
        with server.lab.database.write() as session:
            queries.lock_table(session, TARGET.key, PLAN.key)
            queries.append_correction(session, TARGET.key, PLAN.key, correction, queries.clock(session))

    operators = convs(2)
    plain, waiting = lab.pin(), lab.pin()
    lab.lookup(plain.id, operators)
    lab.lookup(waiting.id, operators)  # answers pending: the correction stays open
    lab.measure()
    assert not lab.lookup(plain.id, operators).networks[-1].corrected
    correct(2.0)
    assert not lab.lookup(plain.id, operators).networks[-1].corrected
    estimate = lab.lookup(waiting.id, operators).networks[-1]
    assert (estimate.corrected, estimate.latency_ms, estimate.sum_ms) == (True, 4.0, 2.0)
    assert (estimate.low_ms, estimate.high_ms) == (pytest.approx(3.6), pytest.approx(4.4))
    correct(3.0)
    assert lab.lookup(waiting.id, operators).networks[-1].latency_ms == 4.0
    assert lab.lookup(lab.pin().id, operators).networks[-1].latency_ms == 6.0


# --- leases ---------------------------------------------------------------------------------------------------


def test_leases_come_oldest_first_up_to_what_is_asked(lab_on_both: Lab) -> None:
    lab = lab_on_both
    operators = convs(5)
    lab.lookup(lab.pin().id, operators)
    lease = lab.must_lease(max_operators=2)
    assert [operator.key for operator in lease.operators] == list(operators)[:2]
    assert (lease.plan, lease.target, lease.device) == (PLAN, TARGET, "bench")
    assert 0 < lease.expires_in_s <= 120
    lab.register("second")
    other = lab.must_lease("second", max_operators=3)
    assert [operator.key for operator in other.operators] == list(operators)[2:]
    assert other.token > lease.token


def test_known_operators_fill_up_carriers(lab_on_both: Lab) -> None:
    lab = lab_on_both
    lab.lookup(lab.pin().id, convs(10))
    lab.measure(lambda key: 0.25)
    lab.lookup(lab.pin().id, convs(2, start=10))
    lease = lab.must_lease()
    assert len(lease.operators) == 2
    assert {operator.key for operator in lease.fillers} == set(convs(10)) == set(lease.known_ms)
    assert set(lease.known_ms.values()) == {0.25}


def test_a_lease_says_what_stands_beside_what_in_networks(lab_on_both: Lab) -> None:
    lab = lab_on_both
    operators = convs(50)
    keys = list(operators)
    lab.lookup(lab.pin().id, convs(40))
    lease = lab.must_lease(max_operators=3)
    assert [operator.key for operator in lease.operators] == keys[:3]
    assert sorted(lease.successions) == sorted(pairwise(keys[:4])), "as they were asked for, in order"
    assert [operator.key for operator in lease.neighbours] == [keys[3]], "which comes behind the last"
    assert lease.mean_parameters == pytest.approx(fmean(operator.parameters for operator in convs(40).values()))
    lab.report(lease.token, *(measured(key) for key in keys[:3]))
    lab.measure()
    lab.lookup(lab.pin().id, operators)
    lease = lab.must_lease()
    there = {operator.key for operator in (*lease.operators, *lease.fillers)}
    assert {pair for pair in pairwise(keys[39:]) if there & set(pair)} <= set(lease.successions)
    assert {operator.key for operator in lease.neighbours} == {key for p in lease.successions for key in p} - there
    isolated = lab.pin(Plan(context="isolated"))
    lab.measure()
    lab.lookup(isolated.id, operators)
    lease = lab.must_lease()
    assert (lease.successions, lease.shortcuts, lease.neighbours, lease.mean_parameters) == ((), (), (), None)


@pytest.mark.parametrize(("count", "at_a_time"), [(9, 2), (9, 3), (30, 24)])
def test_what_kills_a_graph_takes_no_neighbour_with_it(lab_on_both: Lab, count: int, at_a_time: int) -> None:
    """One operator crashes every graph that it stands in, whether it is to be timed there or only stands beside."""
    lab = lab_on_both
    operators = convs(count)
    killer = list(operators)[4]
    lab.lookup(lab.pin().id, operators)
    stood_beside, well, ill = False, set[str](), set[str]()
    while (lease := lab.lease(max_operators=at_a_time)) is not None:
        wanted = {operator.key for operator in lease.operators}
        beside = {operator.key for operator in lease.neighbours}
        assert beside.isdisjoint(ill - well), "what came back"
        assert beside <= well or wanted.isdisjoint(ill), "beside what came back stands what is known to run"
        stood_beside |= bool(beside)
        fails = killer in wanted | beside
        (ill if fails else well).update(wanted)
        lab.report(lease.token, *map(failed if fails else measured, wanted))
    assert {row.key: row.status for row in lab.rows().rows} == {
        key: Status.FAILED if key == killer else Status.MEASURED for key in operators
    }
    assert stood_beside


def test_reports_are_idempotent(lab_on_both: Lab) -> None:
    lab = lab_on_both
    lab.lookup(lab.pin().id, convs(2))
    lease = lab.must_lease()
    results = [measured(operator.key) for operator in lease.operators]
    assert lab.report(lease.token, *results) == ReportOutcome(outcome="accepted", rows=2)
    assert lab.report(lease.token, *results) == ReportOutcome(outcome="repeated", rows=2)
    assert lab.report(lease.token) == ReportOutcome(outcome="repeated", rows=2)
    assert [row.revision for row in lab.rows().rows] == [1, 1]
    assert lab.client.post(f"/v1/leases/{lease.token}/heartbeat").status_code == 409
    bare = {"measurements": [results[0].model_dump(mode="json")]}
    assert lab.client.post(f"/v1/leases/{lease.token}/results", json=bare).json()["field"] == "canary_ms"
    twice = {"measurements": [results[0].model_dump(mode="json")] * 2, "canary_ms": 0.2}
    answer = lab.client.post(f"/v1/leases/{lease.token}/results", json=twice)
    assert (answer.status_code, answer.json()["field"]) == (422, "measurements.1.key")


def test_a_report_scaled_to_another_canary_is_not_believed(start_server, database_url: str) -> None:
    """Two devices start on an empty target: the first report sets the canary, the other measures again."""
    lab = Lab(start_server(database_url, refusal_pause_s=0.1).client)
    lab.register("bench")
    lab.register("second")
    lab.lookup(lab.pin().id, convs(4))
    first = lab.must_lease("bench", max_operators=1)
    other = lab.must_lease("second")
    assert (first.canary_ms, other.canary_ms) == (None, None)
    refused = lab.report(first.token, failed(first.operators[0].key, "load"), canary_ms=0.5)
    assert refused.requeued == 1
    keys = [operator.key for operator in other.operators]
    assert lab.report(other.token, *map(measured, keys), canary_ms=0.2).rows == 3
    first = lab.must_lease("bench", wait_s=30.0)
    assert first.canary_ms == 0.2
    key = first.operators[0].key
    outcome = lab.report(first.token, measured(key), canary_ms=0.3)
    assert outcome == ReportOutcome(outcome="accepted", rows=0, requeued=1)
    assert "0.3 ms" in (lab.device().reason or "")
    first = lab.must_lease("bench", wait_s=30.0)
    assert lab.report(first.token, measured(key), canary_ms=0.2).rows == 1


def test_a_report_scaled_to_another_heavy_canary_is_not_believed(lab_on_both: Lab) -> None:
    """Which only leases of heavy graphs tell. What is not believed sets no reference."""
    lab = lab_on_both
    lab.lookup(lab.pin().id, convs(4))

    def tell(canary_ms: float, heavy_canary_ms: float | None) -> ReportOutcome:
        lease = lab.must_lease(max_operators=1, wait_s=30.0)
        told.append((lease.canary_ms, lease.heavy_canary_ms))
        keys = [operator.key for operator in lease.operators]
        return lab.report(lease.token, *map(measured, keys), canary_ms=canary_ms, heavy_canary_ms=heavy_canary_ms)

    told: list[tuple[float | None, float | None]] = []
    assert tell(0.2, None).rows == 1
    assert tell(0.3, 2.0).requeued == 1, "at another speed"
    assert tell(0.2, 1.0).rows == 1
    assert tell(0.2, 1.1).requeued == 1
    assert "heavy canary of 1.1 ms" in (lab.device().reason or "")
    assert tell(0.2, None).rows == tell(0.2, 1.0).rows == 1
    assert told == [(None, None), (0.2, None), (0.2, None), (0.2, 1.0), (0.2, 1.0), (0.2, 1.0)]


def test_a_restarted_agent_gives_its_lease_up(lab_on_both: Lab) -> None:
    lab = lab_on_both
    lab.lookup(lab.pin().id, convs(1))
    old = lab.must_lease()
    new = lab.must_lease()
    assert new.token > old.token
    assert new.operators == old.operators
    assert lab.report(old.token, measured(conv(0).key, 9.0)) == ReportOutcome(outcome="late", rows=0)
    assert lab.report(new.token, measured(conv(0).key, 1.0)).outcome == "accepted"
    assert [row.latency_ms for row in lab.rows().rows] == [1.0]


def test_an_expired_lease_goes_back_and_its_report_is_late(start_server, database_url: str) -> None:
    lab = Lab(start_server(database_url, lease_s=0.2).client)
    lab.register("bench")
    lab.register("second")
    lab.lookup(lab.pin().id, convs(1))
    old = lab.must_lease("bench")
    new = lab.must_lease("second", wait_s=30.0)
    assert lab.report(old.token, measured(conv(0).key, 9.0)).outcome == "late"
    assert lab.client.post(f"/v1/leases/{old.token}/heartbeat").status_code == 409
    assert new.token > old.token


def test_a_heartbeat_keeps_a_lease(start_server, sqlite_url: str) -> None:
    server = start_server(sqlite_url, lease_s=3.0)
    lab = Lab(server.client)
    lab.register()
    lab.lookup(lab.pin().id, convs(1))
    lease = lab.must_lease()
    for _ in range(7):
        time.sleep(0.5)
        answer = lab.client.post(f"/v1/leases/{lease.token}/heartbeat")
        assert (answer.status_code, answer.json()) == (200, {"expires_in_s": 3.0})
    assert lab.report(lease.token, measured(conv(0).key)).outcome == "accepted"


def test_operators_that_kill_agents_end_as_failed_and_take_no_others_with_them(start_server, database_url: str) -> None:
    """An agent dies whenever operator 3 is among its own: the others are measured all the same."""
    lab = Lab(start_server(database_url, lease_s=600).client)
    lab.register()
    poison = conv(3).key
    pin = lab.pin()
    lab.lookup(pin.id, convs(20))
    leases = 0
    while (lease := lab.lease()) is not None:
        leases += 1
        assert lab.client.post(f"/v1/leases/{lease.token}/heartbeat").status_code == 200
        keys = [operator.key for operator in lease.operators]
        if poison not in keys:
            lab.report(lease.token, *(measured(key) for key in keys))
    assert leases < 40
    rows = lab.lookup(pin.id, convs(20)).operators
    assert {key for key, row in rows.items() if row.status is Status.FAILED} == {poison}
    assert "was lost while measuring" in (rows[poison].message or "")


def test_a_lease_that_never_arrived_holds_nothing_against_its_operators(lab: Lab) -> None:
    lab.lookup(lab.pin().id, convs(3))
    for _ in range(5):  # asking again gives up the one before, of which no heartbeat ever came
        assert len(lab.must_lease().operators) == 3


def test_a_lease_given_back_holds_nothing_against_its_operators(lab: Lab) -> None:
    lab.lookup(lab.pin().id, convs(3))
    for _ in range(5):
        lease = lab.must_lease()
        assert len(lease.operators) == 3
        assert lab.client.delete(f"/v1/leases/{lease.token}").status_code == 204
        assert lab.client.delete(f"/v1/leases/{lease.token}").status_code == 204
    assert lab.report(lease.token).outcome == "late"
    assert lab.measure() == 3


def test_refused_figures_are_taken_again_and_never_recorded(start_server, database_url: str) -> None:
    lab = Lab(start_server(database_url, refusal_pause_s=0.1).client)
    lab.register()
    pin = lab.pin()
    lab.lookup(pin.id, convs(1))
    for _ in range(5):
        lease = lab.must_lease(wait_s=30.0)
        outcome = lab.report(lease.token, failed(conv(0).key, "load", "another process used 0.9 of a core"))
        assert outcome == ReportOutcome(outcome="accepted", rows=0, requeued=1)
    assert lab.rows().rows == ()
    assert "0.9 of a core" in (lab.device().reason or "")
    lookup = lab.lookup(pin.id, convs(1))
    assert "0.9 of a core" in (lookup.waiting_for or "")
    assert "load" in (lookup.operators[conv(0).key].message or "")
    lease = lab.must_lease(wait_s=30.0)
    lab.report(lease.token, measured(conv(0).key))
    assert lab.device().reason is None


def test_a_device_that_stays_adrift_is_quarantined_until_it_is_released(start_server, database_url: str) -> None:
    lab = Lab(start_server(database_url, refusal_pause_s=0.01, quarantine_after=3).client)
    lab.register()
    lab.lookup(lab.pin().id, convs(1))
    for cause in ("drift", "load", "unreachable", "hot", "load"):
        lease = lab.must_lease(wait_s=30.0)
        lab.report(lease.token, failed(conv(0).key, cause, f"too much {cause}"))
        assert lab.device().state == "ready", "a busy machine gets quiet again, a phone comes back"
    lease = lab.must_lease(wait_s=30.0)
    lab.report(lease.token, failed(conv(0).key, "drift", "1.9 times its reference"))
    device = lab.device()
    assert device.state == "quarantined"
    assert "3 leases" in (device.reason or "")
    assert "1.9 times its reference" in (device.reason or "")
    asked = {"target": TARGET.key, "wait_s": 0}
    answer = lab.client.post("/v1/devices/bench/leases", json=asked)
    assert answer.status_code == 409
    assert "release" in answer.json()["remedy"]
    assert lab.client.post("/v1/devices/bench/release").json()["state"] == "ready"
    lease = lab.must_lease(wait_s=30.0)
    lab.report(lease.token, measured(conv(0).key))
    assert lab.device().reason is None
    assert lab.client.post("/v1/devices/nobody/release").status_code == 404


def test_devices_of_one_target_share_its_queue_once_they_agree(lab_on_both: Lab) -> None:
    lab = lab_on_both
    pin = lab.pin()
    lab.lookup(pin.id, convs(6))
    assert lab.measure(lambda key: 1.0 + int(key[:4], 16) / 65536) == 6
    table = {row.key: row.latency_ms or 0.0 for row in lab.rows().rows}
    lab.register("second")
    assert lab.lease("second") is None, "nothing waits: nobody is tested for nothing"
    lab.lookup(pin.id, convs(3, start=10))
    test = lab.must_lease("second")
    assert {operator.key for operator in test.operators} == set(table), "known operators first"
    lab.report(test.token, *(measured(key, latency_ms * 1.04) for key, latency_ms in table.items()))
    assert lab.device("second").agreement == {TARGET.key: pytest.approx(1.04)}
    assert len(lab.rows().rows) == 6, "what tested a device is in no table"
    assert lab.lookup(pin.id, convs(6)).operators[conv(0).key].row == 1
    first = lab.must_lease("bench", max_operators=1)
    second = lab.must_lease("second", max_operators=1)
    assert first.operators != second.operators, "one queue, each measurement once"
    lab.register("second")
    lab.report(second.token, measured(second.operators[0].key))
    assert {operator.key for operator in lab.must_lease("second").operators}.isdisjoint(table), "tested once"


def trial_of(lab: Lab, name: str, known: int) -> Lease:
    """The first lease of a device that comes to a table of so many operators while another one waits."""
    pin = lab.pin()
    lab.lookup(pin.id, convs(known))
    lab.measure()
    lab.register(name)
    lab.lookup(pin.id, convs(1, start=known))
    return lab.must_lease(name)


def test_a_device_on_trial_is_not_brought_to_the_speed_of_the_table(lab_on_both: Lab) -> None:
    test = trial_of(lab_on_both, "second", 20)
    assert (len(test.operators), len(test.fillers)) == (16, 4)
    assert test.known_ms == {}


def test_a_device_is_tested_by_another_table_where_what_waits_has_none_yet(lab_on_both: Lab) -> None:
    lab = lab_on_both
    lab.lookup(lab.pin().id, convs(5))
    lab.measure()
    lab.register("second")
    young = lab.pin(Plan(context="isolated"))
    lab.lookup(young.id, convs(2, start=8))
    test = lab.must_lease("second")
    assert {operator.key for operator in test.operators} == set(convs(5))
    assert test.plan == PLAN
    lab.report(test.token, *(measured(operator.key) for operator in test.operators))
    assert lab.device("second").agreement == {TARGET.key: 1.0}
    assert lab.must_lease("second").plan.context == "isolated"


def test_a_device_on_trial_sets_no_reference_and_gets_no_heavy_one(lab_on_both: Lab) -> None:
    """Memory that another device's memory must be compared with is not to be left out of what tests it."""
    lab = lab_on_both
    test = trial_of(lab, "second", 4)
    told = [measured(operator.key) for operator in test.operators]
    assert lab.report(test.token, *told, heavy_canary_ms=9.0).outcome == "accepted"
    assert lab.device("second").agreement == {TARGET.key: 1.0}
    waiting = lab.must_lease("second", max_operators=1)
    assert (waiting.canary_ms, waiting.heavy_canary_ms) == (0.2, None)
    assert lab.report(waiting.token, measured(waiting.operators[0].key), heavy_canary_ms=1.0).rows == 1
    assert trial_of(lab, "third", 6).heavy_canary_ms is None
    lab.lookup(lab.pin().id, convs(1, start=9))
    assert lab.must_lease("second", max_operators=1).heavy_canary_ms == 1.0


def test_a_device_that_disagrees_is_kept_out_with_the_figures(lab_on_both: Lab) -> None:
    lab = lab_on_both
    test = trial_of(lab, "odd", 4)
    lab.report(test.token, *(measured(operator.key, 1.3) for operator in test.operators))
    odd = lab.device("odd")
    assert odd.state == "quarantined"
    assert "1.300 times" in (odd.reason or "")
    lab.client.post("/v1/devices/odd/release")
    test = lab.must_lease("odd")
    assert len(test.operators) == 4, "released, it is tested again"
    lab.report(test.token, *(failed(operator.key, "crashed") for operator in test.operators))
    assert "0 of 4" in (lab.device("odd").reason or "")
    assert lab.measure() == 1, "the others go on"


def test_failures_are_tried_three_times_unless_nothing_can_help(lab_on_both: Lab) -> None:
    lab = lab_on_both
    crashing, unsupported, silent = convs(3)
    pin = lab.pin()
    lab.lookup(pin.id, convs(3))
    tries = dict.fromkeys(convs(3), 0)
    while (lease := lab.lease()) is not None:
        for operator in lease.operators:
            tries[operator.key] += 1
        said = [failed(crashing, "crashed", "signal 11"), failed(unsupported, "unsupported")]
        keys = {operator.key for operator in lease.operators}
        lab.report(lease.token, *(one for one in said if one.key in keys))
    assert tries == {crashing: 3, unsupported: 1, silent: 3}
    rows = lab.lookup(pin.id, convs(3)).operators
    assert {row.status for row in rows.values()} == {Status.FAILED}
    assert "signal 11" in (rows[crashing].message or "")
    assert lab.lookup(pin.id, convs(3)).networks[-1].status is Status.FAILED


def test_what_failed_on_one_device_goes_to_another_first(start_server, database_url: str) -> None:
    lab = Lab(start_server(database_url, reference_operators=0).client)
    for name in ("bench", "second"):
        lab.register(name)
    crashing, other = convs(2)
    pin = lab.pin()
    lab.lookup(pin.id, convs(1))
    lease = lab.must_lease("bench")
    lab.report(lease.token, failed(crashing, "crashed", "signal 11"))
    assert lab.lease("bench") is None, "the other one may try it first"
    lab.lookup(pin.id, convs(2))
    assert [operator.key for operator in lab.must_lease("bench").operators] == [other], "it goes on meanwhile"
    lease = lab.must_lease("second", wait_s=30.0)
    assert [operator.key for operator in lease.operators] == [crashing]
    lab.report(lease.token, failed(crashing, "timed_out"))
    assert lab.lease("second") is None
    lease = lab.must_lease("bench")  # gives up the lease it held, whose measurement comes back too
    assert {operator.key for operator in lease.operators} <= {crashing, other}
    lab.report(lease.token, *(measured(operator.key) for operator in lease.operators))
    assert {lab.device(name).state for name in ("bench", "second")} == {"ready"}


def test_the_last_device_tries_again_what_failed_on_it(start_server, database_url: str) -> None:
    """One that is silent, quarantined or does not take it keeps nobody waiting."""
    server = start_server(database_url, reference_operators=0, lost_after_s=0.5, elsewhere_s=86_400)
    lab = Lab(server.client)
    (crashing,) = convs(1)
    for name in ("bench", "second"):
        lab.register(name)
    lab.lookup(lab.pin().id, convs(1))
    lab.report(lab.must_lease("bench").token, failed(crashing, "crashed"))
    assert lab.must_lease("bench", wait_s=30.0).operators[0].key == crashing, "second is lost by now"
    with server.lab.database.write() as session:
        queries.quarantine(session, "second", "for a test")
        queries.see_device(session, "second", queries.clock(session) + timedelta(days=1))
    assert lab.must_lease("bench").operators[0].key == crashing, "second is quarantined"


def test_a_device_that_never_takes_it_keeps_nobody_waiting_for_ever(start_server, database_url: str) -> None:
    lab = Lab(start_server(database_url, reference_operators=0, elsewhere_s=0.5).client)
    (crashing,) = convs(1)
    for name in ("bench", "second"):
        lab.register(name)
    lab.lookup(lab.pin().id, convs(1))
    lab.report(lab.must_lease("bench").token, failed(crashing, "crashed"))
    assert lab.must_lease("bench", wait_s=30.0).operators[0].key == crashing


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"latency_ms": "NaN"}, "body"), ({"latency_ms": "Infinity"}, "body"), ({"latency_ms": "1e999"}, "body"),
        ({"latency_ms": "-1.0"}, "measurements.0.latency_ms"), ({"latency_ms": "0"}, "measurements.0.latency_ms"),
        ({"latency_ms": "1e9"}, "measurements.0.latency_ms"),
        ({"half_width_ms": "-1"}, "measurements.0.half_width_ms"),
        ({"energy_j": "-1"}, "measurements.0.energy_j"), ({"spread": "-0.5"}, "measurements.0.spread"),
        ({"samples": "[]"}, "measurements.0"), ({"canary_ms": "0"}, "canary_ms"), ({"canary_ms": "1e12"}, "canary_ms"),
        ({"samples_ms": "[-3.0]"}, "measurements.0.samples.0.samples_ms.0"),
        ({"samples_ms": "[1e12]"}, "measurements.0.samples.0.samples_ms.0"),
        ({"counted": "[7]"}, "measurements.0.samples.0"), ({"slowness": "0"}, "measurements.0.samples.0.slowness"),
        ({"samples_ms": "[" + "1.0," * MAX_SAMPLES + "1.0]"}, "measurements.0.samples.0.samples_ms"),
        ({"carrier": '"' + "x" * 1000 + '"'}, "measurements.0.samples.0.carrier"),
    ],
)  # fmt: skip
def test_nonsense_from_an_agent_is_refused(lab: Lab, change: dict[str, str], field: str) -> None:
    key = conv(0).key
    lab.lookup(lab.pin().id, convs(1))
    lease = lab.must_lease()
    said = {
        "key": f'"{key}"', "latency_ms": "1.0", "half_width_ms": "0.1", "spread": "0", "energy_j": "0.1",
        "stop": '"settled"', "canary_ms": "0.2", "carrier": f'"{key}"', "samples_ms": "[1.0]", "counted": "[0]",
        "slowness": "1.0",
    }  # fmt: skip

    def write(names: tuple[str, ...], **more: str) -> str:
        values = {**{name: said[name] for name in names}, **more}
        return "{" + ",".join(f'"{name}":{value}' for name, value in values.items()) + "}"

    def body() -> str:
        sample = write(("carrier", "samples_ms", "counted", "slowness"))
        names = ("key", "latency_ms", "half_width_ms", "spread", "energy_j", "stop")
        measurement = write(names, samples=said.get("samples", f"[{sample}]"))
        return write(("canary_ms",), measurements=f"[{measurement}]")

    sound = body()
    said |= change
    json_text = {"content-type": "application/json"}
    answer = lab.client.post(f"/v1/leases/{lease.token}/results", content=body(), headers=json_text)
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text[:500]
    assert answer.json()["detail"]
    assert lab.rows().rows == ()
    answer = lab.client.post(f"/v1/leases/{lease.token}/results", content=sound, headers=json_text)
    assert answer.json()["outcome"] == "accepted", "the lease still holds"


def test_networks_too_large_as_a_whole_are_refused(lab: Lab) -> None:
    gibibyte = Linear(input=(1, 1 << 14), features=1 << 14).model_dump(mode="json")
    network = {"inputs": [[1, 1 << 14]], "nodes": [{"operator": gibibyte, "inputs": [number]} for number in range(50)]}
    answer = lab.client.post(f"/v1/targets/{TARGET.key}/networks", json={"networks": [network]})
    assert answer.status_code == 422
    assert answer.json()["field"] == "networks.0"
    assert "weights in all" in answer.json()["detail"]


def test_long_polls_end_when_work_comes(lab: Lab) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lab.lease, wait_s=30.0)
        lab.lookup(lab.pin().id, convs(1))
        lease = waiting.result()
    assert lease is not None
    assert lab.lease(wait_s=0.1) is not None  # given up and taken again: nothing else was there


# --- whole networks and calibrations --------------------------------------------------------------------------


def test_whole_networks_are_measured_once(lab: Lab) -> None:
    networks = [chain(4, width) for width in range(5, 9)]
    body = {"networks": [network.model_dump(mode="json") for network in [*networks, networks[0]]]}

    def ask(wait_s: float) -> NetworksAnswer:
        answer = lab.client.post(f"/v1/targets/{TARGET.key}/networks", json={**body, "wait_s": wait_s})
        assert answer.status_code == 200, answer.text
        return NetworksAnswer.model_validate(answer.json())

    assert {row.status for row in ask(0).networks} == {Status.PENDING}
    assert "4 measurements" in (ask(0.05).waiting_for or "")
    lease = lab.must_lease()
    assert lease.networks == tuple(networks)
    assert lease.plan == WHOLE_PLAN
    lab.report(lease.token, *(measured(network.key, 1.0 + i) for i, network in enumerate(networks)))
    answer = ask(30)
    assert [row.latency_ms for row in answer.networks] == [1.0, 2.0, 3.0, 4.0, 1.0]
    assert answer.waiting_for is None
    assert lab.lease() is None
    (row, *_) = lab.rows(kind="network").rows
    detail = RowDetail.model_validate(lab.client.get(f"/v1/rows/{row.id}").json())
    assert detail.definition == networks[0]


def test_known_networks_tie_a_lease_to_its_table(lab_on_both: Lab) -> None:
    lab = lab_on_both

    def ask(*networks: Network) -> Lease:
        body = {"networks": [network.model_dump(mode="json") for network in networks]}
        answer = lab.client.post(f"/v1/targets/{TARGET.key}/networks", json=body)
        assert answer.status_code == 200, answer.text
        return lab.must_lease()

    known = [chain(4, width) for width in (7, 8, 9, 11, 12, 13, 14)]
    first = ask(*known)
    assert (first.known_networks, first.known_ms) == ((), {})
    lab.report(first.token, *(measured(network.key, 2.5) for network in known))
    second = ask(chain(4, 10))
    assert second.networks == (chain(4, 10),)
    assert set(second.known_networks) == set(known[:-1]), "the six with about as many weights"
    assert second.known_ms == {network.key: 2.5 for network in second.known_networks}


def calibrate(lab: Lab, networks: list[Any]) -> tuple[int, Calibration]:
    body = {"plan": PLAN.model_dump(mode="json"), "networks": [network.model_dump(mode="json") for network in networks]}
    answer = lab.client.post(f"/v1/targets/{TARGET.key}/calibrations", json=body)
    assert answer.status_code in (200, 202), answer.text
    return answer.status_code, Calibration.model_validate(answer.json())


def test_a_calibration_is_fitted_once_everything_is_measured(server, lab_on_both: Lab) -> None:
    lab = lab_on_both
    networks = [chain(*range(2, 2 + length)) for length in range(1, 13)]
    latencies = {network.key: 1.1 * len(network.nodes) for network in networks}
    status, first = calibrate(lab, networks)
    assert (status, first.state, first.pending) == (202, "measuring", 24)
    assert first.waiting_for is not None
    assert calibrate(lab, networks[::-1])[1].id == first.id
    with ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(lab.client.get, f"/v1/calibrations/{first.id}", params={"wait_s": 30}) for _ in range(4)
        ]  # fmt: skip
        assert lab.measure(lambda key: latencies.get(key, 1.0)) == 24
        told = [Calibration.model_validate(one.result().json()) for one in waiting]
    for calibration in told:
        assert calibration == told[0]
        assert (calibration.state, calibration.pending) == ("fitted", 0)
    correction = told[0].correction
    assert correction is not None
    assert correction.scale == pytest.approx(1.1, rel=1e-3)
    assert correction.left_out.networks == len(told[0].networks) == 12
    for network in told[0].networks:
        assert network.left_out_ms == pytest.approx(latencies[network.key], rel=0.01)
    assert calibrate(lab, networks)[0] == 200
    with server.lab.database.read() as session:
        assert session.query(m.Correction).count() == 1
    operators = {operator.key: operator for network in networks for operator in network.operators}
    estimate = lab.lookup(lab.pin().id, operators).networks[-1]
    assert estimate.corrected
    assert estimate.low_ms < estimate.latency_ms < estimate.high_ms


def test_a_calibration_leaves_out_what_failed_and_fails_with_too_little(lab: Lab) -> None:
    networks = [chain(4, width) for width in range(5, 12)]
    broken = {network.key for network in networks[:2]}

    def work() -> None:
        while (lease := lab.lease()) is not None:
            keys = [item.key for item in (*lease.operators, *lease.networks)]
            lab.report(
                lease.token, *(failed(key, "unsupported") if key in broken else measured(key) for key in keys)
            )  # fmt: skip

    _, calibration = calibrate(lab, networks)
    work()
    told = lab.client.get(f"/v1/calibrations/{calibration.id}", params={"wait_s": 30}).json()
    assert told["state"] == "fitted"
    assert "2 networks were left out" in told["message"]
    assert len(told["networks"]) == 5
    _, calibration = calibrate(lab, networks[:6])
    told = lab.client.get(f"/v1/calibrations/{calibration.id}", params={"wait_s": 30}).json()
    assert told["state"] == "failed"
    assert "too few" in told["message"]
    body = {"plan": PLAN.model_dump(mode="json"), "networks": [networks[0].model_dump(mode="json")] * 6}
    answer = lab.client.post(f"/v1/targets/{TARGET.key}/calibrations", json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, "networks")


def test_a_calibration_is_made_again_when_its_rows_are(server, lab_on_both: Lab) -> None:
    lab = lab_on_both
    networks = [chain(*range(2, 2 + length)) for length in range(1, 7)]
    whole = {network.key: float(len(network.nodes)) for network in networks}

    def again(plan: Plan, keys: Collection[str]) -> None:
        with server.lab.database.write() as session:
            queries.lock_table(session, TARGET.key, plan.key)
            queries.enqueue(session, TARGET.key, plan.key, keys, queries.clock(session), again=True)

    def ended() -> Calibration:
        _, calibration = calibrate(lab, networks)
        told = lab.client.get(f"/v1/calibrations/{calibration.id}", params={"wait_s": 30})
        return Calibration.model_validate(told.json())

    calibrate(lab, networks)
    while (lease := lab.lease()) is not None:
        keys = [item.key for item in (*lease.operators, *lease.networks)]
        lab.report(
            lease.token, *(failed(key, "unsupported") if key in whole else measured(key) for key in keys)
        )  # fmt: skip
    broken = ended()
    assert broken.state == "failed"
    assert ended() == broken, "asked again, it is tried again"
    again(WHOLE, whole)
    assert (calibrate(lab, networks)[1].state, calibrate(lab, networks)[1].pending) == ("measuring", len(whole))
    lab.measure(lambda key: whole.get(key, 1.0))
    first = ended()
    assert (first.id, first.state) == (broken.id, "fitted")
    assert ended() == first, "nothing has changed"
    operators = {operator.key for network in networks for operator in network.operators}
    again(PLAN, operators)
    assert calibrate(lab, networks)[1].pending == len(operators)
    lab.measure(lambda key: 2.0)
    second = ended()
    assert (second.id, second.state) == (first.id, "fitted")
    assert first.correction is not None
    assert second.correction is not None
    assert second.correction.scale == pytest.approx(first.correction.scale / 2)


def test_a_correction_comes_with_operators_of_a_network_that_cannot_be_estimated(lab: Lab) -> None:
    """A reader adds those that were measured up in other networks."""
    networks = [chain(*range(2, 2 + length)) for length in range(1, 7)]
    _, calibration = calibrate(lab, networks)
    whole = {network.key: float(len(network.nodes)) for network in networks}
    lab.measure(lambda key: whole.get(key, 1.0))
    fitted = lab.client.get(f"/v1/calibrations/{calibration.id}", params={"wait_s": 30}).json()
    assert fitted["state"] == "fitted"
    good, bad = convs(2)
    lab.lookup(lab.pin().id, convs(2))
    lease = lab.must_lease()
    lab.report(lease.token, measured(good), failed(bad, "unsupported"))
    for _ in range(2):
        answer = lab.client.post(f"/v1/pins/{lab.pin().id}/lookup", json={"networks": [[good, bad]]})
        told = Lookup.model_validate(answer.json())
        assert told.networks[0].status is Status.FAILED
        assert told.correction is not None


# --- readiness ------------------------------------------------------------------------------------------------


def test_health_and_readiness(server) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok"}
    assert server.client.get("/readyz").json() == {"status": "ok"}
    with server.lab.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    answer = server.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert server.client.get("/healthz").status_code == 200


def test_a_database_without_tables_says_nothing_of_its_inside(server) -> None:
    with server.lab.database.write() as session:
        session.execute(text("DROP TABLE device_targets"))
    answer = server.client.get("/v1/devices")
    assert answer.status_code == 503
    assert "SELECT" not in answer.text
    assert "device_targets" not in answer.text
