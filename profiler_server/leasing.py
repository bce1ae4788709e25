"""Leases over a session: granting, settling and ending them. Nothing here commits; routes own transactions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from math import isclose
from statistics import fmean, median
from typing import Any, Literal

from sqlalchemy.orm import Session

from lut_db.errors import Conflict, InvalidInput
from lut_db.measurements import REFUSALS, Failure, Measurement
from lut_db.networks import Network
from lut_db.operators import OPERATOR, Operator
from lut_db.plans import Plan
from lut_db.storage import models as m
from lut_db.storage import queries
from lut_db.wire import Lease, Report, ReportOutcome
from profiler_server import scheduling
from profiler_server.settings import Settings

MIN_REFERENCE = 3
"""Reference operators below which nothing can be said of a device."""

CANARY_TOLERANCE = 1e-6
"""Relative difference up to which two latencies of the canary are the same figure, printed and read again."""


def grant(
    session: Session, device: str, target: str, max_operators: int, settings: Settings, *, give_up: bool
) -> m.Lease | None:
    """A new lease for a device, or None where nothing waits for the target.

    A lease that the device still holds is given up first: its agent was restarted. Without `give_up` it is kept
    and nothing is granted. Expired leases of every device are ended on the way. Raises NotFound, InvalidInput
    where the device does not have the target, Conflict where it is quarantined.
    """
    record = queries.lock_device(session, device)
    membership = session.get(m.DeviceTarget, (device, target), populate_existing=True)
    if membership is None:
        raise InvalidInput(
            f"device {device} does not have target {target}", field="target",
            remedy="register it with PUT /v1/devices/{name}",
        )  # fmt: skip
    if record.state == "quarantined":
        raise Conflict(
            f"device {device} is quarantined: {record.reason or 'no reason given'}", field="device",
            remedy=f"mend it, then POST /v1/devices/{device}/release",
        )  # fmt: skip
    now = queries.clock(session)
    queries.see_device(session, device, now)
    held = queries.lock_active_lease(session, device)
    ending = [lease for lease in queries.lock_expired(session, now) if held is None or lease.id != held.id]
    keeps = held is not None and not give_up and held.deadline > now
    if held is not None and not keeps:
        ending.append(held)
    end(session, ending, now, "expired")
    if keeps:
        return None
    asks = claimant(device, target, now, settings)
    oldest = queries.lock_oldest(session, asks)
    if oldest is None:
        return None
    deadline = now + timedelta(seconds=settings.lease_s)
    if not membership.joined:
        # By what is asked for now, or else by another table of the target: it joins them all.
        others = [plan for plan in queries.plans_of(session, target) if plan != oldest.plan]
        for plan in (oldest.plan, *others):
            reference = queries.reference_rows(session, target, plan, device, settings.reference_operators)
            if len(reference) >= MIN_REFERENCE:
                return queries.open_lease(session, device, target, plan, [], now, deadline, reference)
        membership.joined = True  # there is nothing to compare it with: the tables begin with it
    size = scheduling.lease_size(queries.read_plan(session, oldest.plan), max_operators, oldest.attempts)
    jobs = queries.lock_alike(session, asks, oldest, size)
    return queries.open_lease(session, device, target, oldest.plan, jobs, now, deadline)


def claimant(device: str, target: str, now: datetime, settings: Settings) -> queries.Claimant:
    """A device that asks for what waits for a target."""
    return queries.Claimant(
        device, target, now, seen_after=now - timedelta(seconds=settings.lost_after_s),
        failed_before=now - timedelta(seconds=settings.elsewhere_s),
    )  # fmt: skip


def compose(session: Session, token: int, settings: Settings) -> Lease | None:
    """A lease as it goes over the wire, with what is known beside it; None where it was lost in the meantime."""
    record = session.get(m.Lease, token)
    if record is None or record.state != "active":
        return None
    plan = queries.read_plan(session, record.plan)
    jobs = queries.jobs_of(session, [record])[token]
    keys = list(record.reference or [job.workload for job in jobs])
    definitions = queries.read_definitions(session, keys)
    wanted = [OPERATOR.validate_python(d) for kind, d in map(definitions.__getitem__, keys) if kind != m.NETWORK]
    networks = [Network.model_validate(d) for kind, d in map(definitions.__getitem__, keys) if kind == m.NETWORK]
    fillers = _fillers(session, record, plan, wanted, settings)
    known: dict[Network, float] = {}
    known_ms: dict[str, float] = {}
    canary_ms, heavy_canary_ms = queries.read_canaries(session, record.target)
    if record.reference is not None:  # a device on trial is not to be brought to the table's speed
        heavy_canary_ms = None
    else:
        known = _known_networks(session, record, networks, settings)
        known_ms = {workload.key: latency_ms for workload, latency_ms in [*fillers.items(), *known.items()]}
    beside = _beside(session, record, plan, wanted, fillers, came_back=any(job.attempts for job in jobs))
    left = record.deadline - queries.clock(session)
    return Lease(
        token=token, device=record.device, target=queries.read_target(session, record.target), plan=plan,
        operators=tuple(wanted), networks=tuple(networks), fillers=tuple(fillers), **beside,
        known_networks=tuple(known), known_ms=known_ms,
        canary_ms=canary_ms, heavy_canary_ms=heavy_canary_ms,
        expires_in_s=max(left.total_seconds(), 0.0),
    )  # fmt: skip


def _fillers(
    session: Session, record: m.Lease, plan: Plan, wanted: Sequence[Operator], settings: Settings
) -> dict[Operator, float]:
    """Operators of the table that fill up a lease's carriers, with their latencies in ms."""
    count = scheduling.filler_count(plan, len(wanted))
    if not (wanted and count):
        return {}
    measured = queries.measured_operators(
        session, record.target, record.plan, leave_out=[operator.key for operator in wanted],
        limit=settings.known_operators,
    )  # fmt: skip
    known = [(OPERATOR.validate_python(definition), latency_ms) for definition, latency_ms in measured]
    chosen = scheduling.choose_fillers(wanted, [operator for operator, _ in known], count, seed=record.id)
    return dict(known[index] for index in chosen)


def _beside(
    session: Session, record: m.Lease, plan: Plan, wanted: Sequence[Operator], fillers: Collection[Operator], *,
    came_back: bool,
) -> dict[str, Any]:  # fmt: skip
    """What a lease tells of the networks that its operators came from: which came behind which, which added what
    another made, those of both that are not in the lease's carriers themselves, and how many weights they have.

    Of the latter only those that nothing is held against: they stand in the same graphs. Operators that `came_back`
    stand beside what is known to run, and one alone beside fillers only: then a failure is its own.
    """
    if plan.context != "in_context":
        return {}
    keys = {operator.key for operator in (*wanted, *fillers)}
    behind, added = queries.read_beside(session, keys)
    may_stand = keys
    if not (came_back and len(wanted) == 1):
        around = {key for pair in (*behind, *added) for key in pair} - keys
        may_stand = keys | queries.harmless(session, record.target, record.plan, around, proven=came_back)
    behind = scheduling.successions([pair for pair in behind if may_stand.issuperset(pair)], keys)
    added = scheduling.few([pair for pair in added if pair[1] in keys and pair[0] in may_stand])
    others = {key for pair in (*behind, *added) for key in pair} - keys
    definitions = queries.read_definitions(session, others)
    neighbours = tuple(OPERATOR.validate_python(definitions[key][1]) for key in sorted(others))
    means = queries.read_mean_parameters(session, [operator.key for operator in wanted])
    return {
        "successions": tuple(behind), "shortcuts": tuple(added), "neighbours": neighbours,
        "mean_parameters": fmean(means) if means else None,
    }  # fmt: skip


def _known_networks(
    session: Session, record: m.Lease, networks: Sequence[Network], settings: Settings
) -> dict[Network, float]:
    """Whole networks of the table that tie a lease of others to it, with their latencies in ms."""
    if not networks:
        return {}
    oldest = queries.oldest_networks(
        session, record.target, record.plan, leave_out=[network.key for network in networks],
        limit=settings.known_operators,
    )  # fmt: skip
    chosen = scheduling.choose_known_networks([n.parameters for n in networks], [size for _, size, _ in oldest])
    known = {key: latency_ms for key, _, latency_ms in (oldest[index] for index in chosen)}
    definitions = queries.read_definitions(session, known)
    return {Network.model_validate(definitions[key][1]): latency_ms for key, latency_ms in known.items()}


def extend(session: Session, token: int, settings: Settings) -> float:
    """Moves the deadline of a lease that still holds, and returns the seconds left. Raises NotFound and Conflict."""
    device = queries.lease_device(session, token)
    queries.lock_device(session, device)
    lease = queries.lock_lease(session, token)
    now = queries.clock(session)
    queries.see_device(session, device, now)
    if lease.state != "active" or lease.deadline <= now:
        raise Conflict(
            f"lease {token} is lost", field="token", remedy="stop measuring and ask for another lease"
        )  # fmt: skip
    lease.deadline = now + timedelta(seconds=settings.lease_s)
    lease.taken = True
    session.flush()
    return settings.lease_s


def release(session: Session, token: int) -> int:
    """Gives a lease back; its measurements return to the queue, nothing held against them. Returns how many.

    A lease that no longer holds stays as it is. Raises NotFound.
    """
    device = queries.lease_device(session, token)
    queries.lock_device(session, device)
    lease = queries.lock_lease(session, token)
    now = queries.clock(session)
    queries.see_device(session, device, now)
    if lease.state != "active":
        return 0
    _, requeued = end(session, [lease], now, "released")
    return requeued


def expire(session: Session) -> int:
    """Ends every lease past its deadline. Returns how many."""
    now = queries.clock(session)
    leases = queries.lock_expired(session, now)
    end(session, leases, now, "expired")
    return len(leases)


def end(
    session: Session, leases: Sequence[m.Lease], now: datetime, state: Literal["expired", "released"]
) -> tuple[int, int]:
    """Ends leases whose results will not come. Returns rows written and measurements that went back to the queue.

    A measurement that was lost too often becomes a failed row; a lease that never arrived, or was given back, holds
    nothing against its measurements. The caller holds the leases.
    """
    if not leases:
        return 0, 0
    by_token = queries.jobs_of(session, leases)
    rows = requeued = 0
    for lease in sorted(leases, key=lambda lease: (lease.target, lease.plan, lease.id)):
        lease.state = state
        jobs = by_token[lease.id]
        if state == "released" or not lease.taken:
            queries.requeue(session, [(job, None) for job in jobs], now, attempts=0)
            requeued += len(jobs)
            continue
        queries.lock_table(session, lease.target, lease.plan)
        lost = Failure(cause="crashed", message=f"device {lease.device} was lost while measuring this")
        written, returned = _dispose(session, lease, [(job, lost) for job in jobs], now, now, None)
        rows += written
        requeued += returned
    session.flush()
    return rows, requeued


def settle(session: Session, token: int, report: Report, settings: Settings) -> ReportOutcome:
    """Takes the results of a lease, once.

    Told again, it answers what it answered; told late, it changes nothing. Measurements of the lease that the
    report does not mention go back to the queue, one attempt counted; measurements that the lease did not ask for
    are left out. Latencies scaled to another canary than the target's tables are refused like those of a device that
    drifted. Raises NotFound, and InvalidInput where a key comes twice or no canary comes with latencies.
    """
    said: dict[str, Measurement] = {}
    for number, measurement in enumerate(report.measurements):
        if said.setdefault(measurement.key, measurement) is not measurement:
            raise InvalidInput(
                f"{measurement.key} comes twice", field=f"measurements.{number}.key", remedy="report each key once"
            )
    if report.canary_ms is None and any(measurement.failure is None for measurement in report.measurements):
        raise InvalidInput(
            "latencies come without the canary's", field="canary_ms",
            remedy="run the canary between measurements and scale them to it",
        )  # fmt: skip
    device = queries.lease_device(session, token)
    queries.lock_device(session, device)
    lease = queries.lock_lease(session, token)
    now = queries.clock(session)
    queries.see_device(session, device, now)
    if lease.state == "reported":
        return ReportOutcome(outcome="repeated", rows=lease.rows, requeued=lease.requeued)
    if lease.state == "active" and lease.deadline <= now:
        end(session, [lease], now, "expired")
    if lease.state != "active":
        return ReportOutcome(outcome="late", rows=0)
    disbelief = _disbelief(session, lease, report, said)
    if lease.reference is not None:
        _admit(session, lease, lease.reference, said, disbelief, settings)
        lease.state = "reported"
        session.flush()
        return ReportOutcome(outcome="accepted", rows=0)
    queries.lock_table(session, lease.target, lease.plan)
    evidence = queries.put_evidence(session, dict(report.evidence))
    jobs = queries.jobs_of(session, [lease])[token]
    silence = Failure(cause="error", message="the report of its lease said nothing of it")
    measured: list[m.Pending] = []
    failed: list[tuple[m.Pending, Failure]] = []
    for job in jobs:
        told = said.get(job.workload)
        failure = silence if told is None else told.failure or disbelief
        if failure is None:
            measured.append(job)
        else:
            failed.append((job, failure))
    new = [queries.NewRow(said[job.workload], device, token, evidence, now) for job in measured]
    rows = queries.append_rows(session, lease.target, lease.plan, new)
    queries.drop(session, measured)
    later = now + timedelta(seconds=settings.refusal_pause_s)
    written, requeued = _dispose(session, lease, failed, now, later, evidence)
    refusal = next((failure for _, failure in failed if failure.cause in REFUSALS), None)
    if refusal is not None:
        _note_refused(session, device, refusal, settings)
    elif measured:
        queries.note_accepted(session, device)
    lease.state, lease.rows, lease.requeued = "reported", rows + written, requeued
    session.flush()
    return ReportOutcome(outcome="accepted", rows=lease.rows, requeued=lease.requeued)


def _note_refused(session: Session, device: str, refusal: Failure, settings: Settings) -> None:
    """Notes a refused lease. A busy machine gets quiet and a phone comes back; one that stays adrift needs a hand."""
    strike = refusal.cause in ("drift", "hot")
    refusals = queries.note_refused(session, device, f"{refusal.cause}: {refusal.message}", strike=strike)
    if refusals >= settings.quarantine_after:
        queries.quarantine(
            session, device,
            f"{refusals} leases were refused with none accepted between them, the last: {refusal.message}",
        )  # fmt: skip


def _admit(
    session: Session, lease: m.Lease, reference: dict[str, float], said: dict[str, Measurement],
    disbelief: Failure | None, settings: Settings,
) -> None:  # fmt: skip
    """Lets a device into the pool of a target, or keeps it out with the figures."""
    told = [said[key] for key in reference if key in said]
    failures = [measurement.failure for measurement in told if measurement.failure is not None]
    refusal = disbelief or next((failure for failure in failures if failure.cause in REFUSALS), None)
    if refusal is not None:
        _note_refused(session, lease.device, refusal, settings)
        return
    ratios = [of.latency_ms / reference[of.key] for of in told if of.latency_ms is not None]
    if 2 * len(ratios) < len(reference):
        why = failures[0].message if failures else "the report said nothing of them"
        queries.quarantine(
            session, lease.device,
            f"only {len(ratios)} of {len(reference)} reference operators of target {lease.target} were measured: {why}",
        )  # fmt: skip
        return
    agreement = median(ratios)
    membership = session.get_one(m.DeviceTarget, (lease.device, lease.target), populate_existing=True)
    membership.agreement = agreement
    if abs(agreement - 1) <= settings.pool_tolerance:
        membership.joined = True
        queries.note_accepted(session, lease.device)
        return
    queries.quarantine(
        session, lease.device,
        f"{len(ratios)} reference operators of target {lease.target} took {agreement:.3f} times what the table says "
        f"({min(ratios):.3f} to {max(ratios):.3f}), beyond the tolerance of {settings.pool_tolerance:.0%}",
    )  # fmt: skip


def _disbelief(session: Session, lease: m.Lease, report: Report, said: dict[str, Measurement]) -> Failure | None:
    """Why the latencies of a report are not believed. The first that are believed base the tables on their canaries."""
    if report.canary_ms is None or all(measurement.failure is not None for measurement in said.values()):
        return None
    for name in queries.CANARIES:
        told_ms = getattr(report, name)
        if told_ms is None or (name == "heavy_canary_ms" and lease.reference is not None):  # a trial was not told it
            continue
        holds_ms = queries.base_on_canary(session, lease.target, name, told_ms)
        if not isclose(holds_ms, told_ms, rel_tol=CANARY_TOLERANCE):
            what = name.removesuffix("_ms").replace("_", " ")
            message = f"scaled to a {what} of {told_ms:.6g} ms; the target's tables are scaled to {holds_ms:.6g} ms"
            return Failure(cause="drift", message=message)
    return None


def _dispose(
    session: Session, lease: m.Lease, failed: Sequence[tuple[m.Pending, Failure]], now: datetime, later: datetime,
    evidence: int | None,
) -> tuple[int, int]:  # fmt: skip
    """Writes failed rows or puts measurements back, as `scheduling.fate` says. Returns (rows, requeued)."""
    fates: dict[scheduling.Fate, list[tuple[m.Pending, Failure]]] = {}
    for job, failure in failed:
        fates.setdefault(scheduling.fate(failure, job.attempts), []).append((job, failure))
    recorded: list[tuple[m.Pending, Failure]] = []
    for decided, jobs in fates.items():
        if decided.record:
            recorded += jobs
        else:
            queries.requeue(
                session, jobs, later if decided.pause else now, attempts=decided.attempts,
                failed_on=lease.device if decided.attempts else None,
            )  # fmt: skip
    new = [
        queries.NewRow(Measurement(key=job.workload, failure=failure), lease.device, lease.id, evidence, now)
        for job, failure in recorded
    ]
    rows = queries.append_rows(session, lease.target, lease.plan, new)
    queries.drop(session, [job for job, _ in recorded])
    return rows, len(failed) - len(recorded)
