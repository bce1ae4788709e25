"""Calibrations: from the request to a stored correction. The fit is made outside any transaction, and kept once."""

from __future__ import annotations

from sqlalchemy.orm import Session

from lut_db.errors import InvalidInput, LatencyLabError
from lut_db.estimates import OperatorRow, Sums, Traits
from lut_db.measurements import Status
from lut_db.networks import Network
from lut_db.operators import canonical_key
from lut_db.storage import Database, queries
from lut_db.storage import models as m
from lut_db.wire import CalibratedNetwork, Calibration, CalibrationRequest
from profiler_server.correction import MIN_NETWORKS, Sample, fit_correction
from profiler_server.scheduling import beside
from profiler_server.settings import Settings
from profiler_server.tables import require_context
from profiler_server.waiting import waiting_for

MAX_REASONS = 3
"""Failures that a failed calibration tells of."""


def ask(session: Session, target: str, request: CalibrationRequest) -> m.Calibration:
    """Enqueues whole networks and their operators, those without a row, and opens the calibration.

    The same request is the same calibration, made again where it failed or what it was fitted to has been measured
    again. Raises InvalidInput and NotFound.
    """
    require_context(request.plan, whole=False, field="plan")
    require_context(request.whole, whole=True, field="whole")
    networks = {network.key: network for network in request.networks}
    if len(networks) < MIN_NETWORKS:
        raise InvalidInput(
            f"only {len(networks)} of these networks differ", field="networks",
            remedy=f"give at least {MIN_NETWORKS} different ones",
        )  # fmt: skip
    operators = {operator.key: operator for network in networks.values() for operator in network.operators}
    queries.read_target(session, target)
    for plan in sorted((request.plan, request.whole), key=lambda plan: plan.key):
        queries.put_plan(session, plan)
    queries.put_workloads(session, {**networks, **operators})
    now = queries.clock(session)
    wanted = {request.plan.key: list(operators), request.whole.key: list(networks)}
    for table, keys in sorted(wanted.items()):
        queries.lock_table(session, target, table)
        queries.enqueue(session, target, table, keys, now)
    queries.put_beside(session, *beside([network.operators for network in networks.values()], set(operators)))
    said = {"target": target, "plan": request.plan.key, "whole": request.whole.key, "networks": sorted(networks)}
    record = queries.put_calibration(
        session, canonical_key("calibration", said), target=target, plan=request.plan.key, whole=request.whole.key,
        networks=sorted(networks), operators=sorted(operators), now=now,
    )  # fmt: skip
    if record.state == "failed" or queries.is_overtaken(session, record):
        record.state, record.message, record.correction, record.left_out = "measuring", None, None, None
        session.flush()
    return record


def count_pending(session: Session, record: m.Calibration) -> int:
    """How many whole networks and operators of a calibration have no row yet, or are being measured again."""
    networks = queries.settled(session, record.target, record.whole, record.networks, newest=True)
    operators = queries.settled(session, record.target, record.plan, record.operators, newest=True)
    return len(record.networks) + len(record.operators) - networks - operators


def tell(session: Session, record: m.Calibration, settings: Settings) -> Calibration:
    """A calibration as it goes over the wire."""
    pending = count_pending(session, record) if record.state == "measuring" else 0
    return Calibration.model_validate(
        {
            "id": record.id, "target": record.target, "plan": queries.read_plan(session, record.plan),
            "state": record.state, "pending": pending, "message": record.message,
            "correction": queries.read_correction(session, record.correction), "networks": record.left_out or (),
            "waiting_for": waiting_for(session, record.target, settings) if pending else None,
        }
    )  # fmt: skip


def advance(database: Database, calibration: int) -> bool:
    """Fits a calibration all of whose measurements are there. True where this call ended it.

    Many may call it at once, in many processes: the state leaves `measuring` once, and only who takes it out
    stores a correction.
    """
    with database.read() as session:
        record = queries.read_calibration(session, calibration)
        if record.state != "measuring" or count_pending(session, record):
            return False
        wholes = queries.newest_rows(session, record.target, record.whole, record.networks)
        operators = queries.newest_rows(session, record.target, record.plan, record.operators)
        definitions = queries.read_definitions(session, record.networks)
    samples: dict[str, Sample] = {}
    reasons: list[str] = []
    for key in record.networks:
        network = Network.model_validate(definitions[key][1])
        failed = _first_failure(key, network, wholes, operators)
        if failed is not None:
            reasons.append(failed)
            continue
        sums = Sums.of((Traits.of(one), operators[one.key].latency_ms or 0.0) for one in network.operators)
        samples[key] = (sums, wholes[key].latency_ms or 0.0)
    left = f"; {len(reasons)} networks were left out: {'; '.join(reasons[:MAX_REASONS])}" if reasons else ""
    try:
        correction, left_out_ms = fit_correction(list(samples.values()))
    except LatencyLabError as error:
        with database.write() as session:
            return queries.end_calibration(session, calibration, "failed", f"{error}{left}")
    networks = [
        CalibratedNetwork(key=key, sum_ms=sums.total_ms, left_out_ms=predicted, measured_ms=measured)
        for (key, (sums, measured)), predicted in zip(samples.items(), left_out_ms, strict=True)
    ]
    with database.write() as session:
        if not queries.end_calibration(session, calibration, "fitted", left.removeprefix("; ") or None):
            return False
        queries.lock_table(session, record.target, record.plan)
        now = queries.clock(session)
        ended = queries.read_calibration(session, calibration)
        ended.correction = queries.append_correction(session, record.target, record.plan, correction, now)
        ended.left_out = [network.model_dump(mode="json") for network in networks]
        session.flush()
    return True


def _first_failure(
    key: str, network: Network, wholes: dict[str, OperatorRow], operators: dict[str, OperatorRow]
) -> str | None:
    """Why a network cannot take part in a fit, None where it can."""
    if wholes[key].status is not Status.MEASURED:
        return f"network {key}: {wholes[key].message}"
    for operator in network.operators:
        row = operators[operator.key]
        if row.status is not Status.MEASURED:
            return f"network {key}: operator {operator.key} ({operator.kind}): {row.message}"
    return None
