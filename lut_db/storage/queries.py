"""Every query, named and described. Each takes a session and never commits: its caller owns the transaction.

Keys of workloads come in sets of thousands. A set travels as one bound parameter, a JSON array that the database
takes apart, so that the number of statements does not depend on its size.

Locks, where the database has them, are taken in the order device, lease, pin, table, queue.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    true,
    union,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, aliased, undefer

from lut_db import estimates, plans, targets
from lut_db.errors import NotFound
from lut_db.estimates import OperatorRow, Traits
from lut_db.measurements import Failure, Measurement, Status
from lut_db.networks import Network
from lut_db.operators import Operator
from lut_db.storage import models as m

SNAPSHOT_LOCK = 0x736E_6170
"""PostgreSQL advisory lock under which snapshots are numbered."""


# --- dialects -------------------------------------------------------------------------------------------------


def _dialect(session: Session) -> str:
    return session.get_bind().dialect.name


def _insert(session: Session, table: type[m.Base]) -> Any:
    """INSERT with ON CONFLICT, which both databases have and SQLAlchemy says per dialect."""
    insert = sqlite.insert if _dialect(session) == "sqlite" else postgresql.insert
    return insert(m.Base.metadata.tables[table.__tablename__]).execution_options(preserve_rowcount=True)


def _each(session: Session, values: Iterable[str]) -> Any:
    """A set of strings as a table of columns `value` and `position`, from one bound parameter."""
    array = literal(json.dumps(list(values)), Text)
    if _dialect(session) == "sqlite":
        members = func.json_each(array).table_valued(column("value", Text), column("key"))
        return select(members.c.value, members.c.key.label("position")).subquery()
    elements = func.jsonb_array_elements_text(cast(array, JSONB))
    return elements.table_valued(column("value", Text), with_ordinality="position").render_derived()


def _changed(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return max(result.rowcount, 0)


def clock(session: Session) -> datetime:
    """The database's time, the only one that judges deadlines and signs of life."""
    if _dialect(session) == "sqlite":
        now = session.execute(text("SELECT strftime('%Y-%m-%dT%H:%M:%f', 'now')")).scalar_one()
        return datetime.fromisoformat(now).replace(tzinfo=UTC)
    moment: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return moment.astimezone(UTC)


def lock_table(session: Session, target: str, plan: str) -> None:
    """Lets one transaction at a time add to a table or to its queue: what is being written is not asked again.

    On SQLite a writing transaction is alone anyway.
    """
    if _dialect(session) == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{target}/{plan}", 0))))


# --- targets, plans, devices ----------------------------------------------------------------------------------


def put_targets(session: Session, wanted: Sequence[targets.Target]) -> None:
    """Records targets that are not there yet."""
    rows = [{"key": target.key, "definition": target.model_dump(mode="json")} for target in wanted]
    session.execute(_insert(session, m.Target).on_conflict_do_nothing(), sorted(rows, key=lambda row: str(row["key"])))


def put_plan(session: Session, plan: plans.Plan) -> None:
    """Records a plan that is not there yet."""
    values = {"key": plan.key, "definition": plan.model_dump(mode="json")}
    session.execute(_insert(session, m.Plan).values(values).on_conflict_do_nothing())


def read_target(session: Session, key: str) -> targets.Target:
    """The target of this key. Raises NotFound."""
    record = session.get(m.Target, key)
    if record is None:
        raise NotFound(f"there is no target {key}", field="target", remedy="register a device that has it")
    return targets.Target.model_validate(record.definition)


CanaryName = Literal["canary_ms", "heavy_canary_ms"]
CANARIES: tuple[CanaryName, ...] = get_args(CanaryName)


def read_canaries(session: Session, target: str) -> tuple[float | None, float | None]:
    """The latencies in ms of the canary and of the heavy canary to which a target's tables are scaled, None until a
    report has set it."""
    found = session.execute(select(m.Target.canary_ms, m.Target.heavy_canary_ms).where(m.Target.key == target)).first()
    return (None, None) if found is None else (found[0], found[1])


def base_on_canary(session: Session, target: str, name: CanaryName, canary_ms: float) -> float:
    """Bases a target's tables on this latency of a canary, unless they have one; returns the one that holds."""
    base = getattr(m.Target, name)
    unset = update(m.Target).where(m.Target.key == target, base.is_(None))
    session.execute(unset.values({name: canary_ms}).execution_options(synchronize_session=False))
    return session.execute(select(base).where(m.Target.key == target)).scalar_one() or canary_ms


def read_plan(session: Session, key: str) -> plans.Plan:
    """The plan of this key. Raises NotFound."""
    record = session.get(m.Plan, key)
    if record is None:
        raise NotFound(f"there is no plan {key}", field="plan")
    return plans.Plan.model_validate(record.definition)


def put_device(session: Session, device: targets.Device, now: datetime) -> None:
    """Registers a device, or renews its registration: its targets become those given, its state is kept."""
    put_targets(session, device.targets)
    insert = _insert(session, m.Device).values(name=device.name, state="ready", reason=None, last_seen=now)
    session.execute(insert.on_conflict_do_update(index_elements=["name"], set_={"last_seen": now}))
    keys = dict.fromkeys(target.key for target in device.targets)
    session.execute(
        delete(m.DeviceTarget).where(m.DeviceTarget.device == device.name, m.DeviceTarget.target.not_in(list(keys)))
    )
    again = _insert(session, m.DeviceTarget)
    session.execute(
        again.on_conflict_do_update(
            index_elements=["device", "target"], set_={"position": again.excluded.position}
        ),
        [{"device": device.name, "target": key, "position": position} for position, key in enumerate(keys)],
    )  # fmt: skip


def lock_device(session: Session, name: str) -> m.Device:
    """The device, held until the transaction ends: one claim or report of a device at a time. Raises NotFound."""
    query = select(m.Device).where(m.Device.name == name).with_for_update(key_share=True)
    device = session.execute(query).scalar_one_or_none()
    if device is None:
        raise NotFound(f"there is no device {name}", field="device", remedy="register it with PUT /v1/devices/{name}")
    return device


def see_device(session: Session, name: str, now: datetime) -> None:
    """Notes a sign of life."""
    session.execute(update(m.Device).where(m.Device.name == name).values(last_seen=now))


def note_accepted(session: Session, name: str) -> None:
    """Notes that a lease of the device was measured and believed."""
    session.execute(update(m.Device).where(m.Device.name == name).values(reason=None, refusals=0))


def note_refused(session: Session, name: str, reason: str, *, strike: bool) -> int:
    """Notes why the device's last lease was refused; returns the strikes since one was accepted."""
    device = session.get_one(m.Device, name, populate_existing=True)
    device.refusals += int(strike)
    device.reason = _clean(reason)
    session.flush()
    return device.refusals


def quarantine(session: Session, name: str, reason: str) -> None:
    """Gives a device no more leases, until it is released."""
    session.execute(
        update(m.Device).where(m.Device.name == name).values(state="quarantined", reason=_clean(reason))
    )  # fmt: skip


def release_device(session: Session, name: str) -> None:
    """Gives a quarantined device leases again. What it was kept out of a pool for is tested again."""
    session.execute(update(m.Device).where(m.Device.name == name).values(state="ready", reason=None, refusals=0))


def _clean(text: str) -> str:
    return text.replace("\x00", "\ufffd")  # PostgreSQL has no such character


def plans_of(session: Session, target: str) -> list[str]:
    """The plans under which a target has rows, those first that have the most."""
    query = select(m.Row.plan).where(m.Row.target == target).group_by(m.Row.plan)
    return list(session.scalars(query.order_by(func.count().desc(), m.Row.plan)))


def reference_rows(session: Session, target: str, plan: str, device: str, limit: int) -> dict[str, float]:
    """Latencies in ms of up to `limit` workloads of a table that other devices measured, evenly from fast to slow."""
    query = (
        select(m.Row.workload, m.Row.latency_ms)
        .where(*_newest(target, plan), m.Row.status == Status.MEASURED.value, m.Row.device != device)
        .order_by(m.Row.latency_ms, m.Row.workload)
    )
    found = [(key, latency_ms) for key, latency_ms in session.execute(query) if latency_ms is not None]
    count = min(limit, len(found))
    return dict(found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count))


@dataclass(frozen=True)
class DeviceView:
    """A device with its targets. `silent_s` are the seconds since its last sign of life; `agreement` is what reference
    operators said of it, by target."""

    device: targets.Device
    state: str
    reason: str | None
    last_seen: datetime
    silent_s: float
    agreement: dict[str, float]


def read_devices(session: Session, *, name: str | None = None, target: str | None = None) -> list[DeviceView]:
    """Devices by name, all of them or those with this name or target."""
    now = clock(session)
    query = (
        select(m.Device, m.Target, m.DeviceTarget.agreement)
        .join(m.DeviceTarget, m.DeviceTarget.device == m.Device.name)
        .join(m.Target, m.Target.key == m.DeviceTarget.target)
        .order_by(m.Device.name, m.DeviceTarget.position)
    )
    if name is not None:
        query = query.where(m.Device.name == name)
    if target is not None:
        serving = select(m.DeviceTarget.device).where(m.DeviceTarget.target == target)
        query = query.where(m.Device.name.in_(serving))
    records: dict[str, m.Device] = {}
    served: dict[str, list[targets.Target]] = {}
    agreements: dict[str, dict[str, float]] = {}
    for record, definition, agreement in session.execute(query.execution_options(populate_existing=True)):
        records[record.name] = record
        if agreement is not None:
            agreements.setdefault(record.name, {})[definition.key] = agreement
        served.setdefault(record.name, []).append(targets.Target.model_validate(definition.definition))
    return [
        DeviceView(
            device=targets.Device(name=key, targets=tuple(served[key])),
            state=record.state, reason=record.reason, last_seen=record.last_seen,
            silent_s=(now - record.last_seen).total_seconds(), agreement=agreements.get(key, {}),
        )
        for key, record in records.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class TargetView:
    """A target, the names of its devices, and how much is in its tables and in its queue."""

    key: str
    target: targets.Target
    devices: tuple[str, ...]
    rows: int
    pending: int


def read_targets(session: Session, key: str | None = None) -> list[TargetView]:
    """Targets by key, all of them or one. `rows` counts workloads, not their revisions."""
    only: list[ColumnElement[bool]] = [] if key is None else [m.Target.key == key]
    latest = aliased(m.Row)
    rows = (
        select(func.count()).where(latest.target == m.Target.key, latest.revision == 1).correlate(m.Target)
    ).scalar_subquery()
    pending = (
        select(func.count()).where(m.Pending.target == m.Target.key).correlate(m.Target)
    ).scalar_subquery()  # fmt: skip
    served: dict[str, list[str]] = {}
    devices = select(m.DeviceTarget.target, m.DeviceTarget.device).order_by(m.DeviceTarget.device)
    for target, device in session.execute(devices):
        served.setdefault(target, []).append(device)
    return [
        TargetView(
            key=record.key, target=targets.Target.model_validate(record.definition),
            devices=tuple(served.get(record.key, ())), rows=row_count, pending=pending_count,
        )
        for record, row_count, pending_count in session.execute(
            select(m.Target, rows, pending).where(*only).order_by(m.Target.key)
        )
    ]  # fmt: skip


# --- workloads ------------------------------------------------------------------------------------------------


def put_workloads(session: Session, wanted: Mapping[str, Operator | Network]) -> None:
    """Records the definitions of operators and networks that are not there yet."""
    if not wanted:
        return
    rows = [
        {
            "key": key,
            "kind": m.NETWORK if isinstance(definition, Network) else definition.kind,
            "family": m.NETWORK if isinstance(definition, Network) else definition.family,
            "parameters": definition.parameters,
            "definition": definition.model_dump(mode="json"),
        }
        for key, definition in sorted(wanted.items())  # one order for all: no deadlock between writers
    ]
    session.execute(_insert(session, m.Workload).on_conflict_do_nothing(), rows)


def known_traits(session: Session, keys: Iterable[str]) -> dict[str, Traits]:
    """What corrections ask of those of these operators that are known, by key."""
    each = _each(session, keys)
    query = select(m.Workload.key, m.Workload.family, m.Workload.parameters).where(
        m.Workload.key.in_(select(each.c.value)), m.Workload.kind != m.NETWORK
    )
    return {key: Traits(family, parameters) for key, family, parameters in session.execute(query)}


def read_definitions(session: Session, keys: Iterable[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and definition of these workloads, by key."""
    each = _each(session, keys)
    query = select(m.Workload).where(m.Workload.key.in_(select(each.c.value)))
    return {record.key: (record.kind, record.definition) for record in session.scalars(query)}


def put_beside(
    session: Session, successions: Iterable[tuple[str, str]], shortcuts: Iterable[tuple[str, str]],
    mean_parameters: Mapping[str, float],
) -> None:  # fmt: skip
    """Records that operators came right behind others, that they added what others had made, keys of what is recorded,
    `(before, after)`, and how many weights the operators around one have on average."""
    rows = [
        {"before": before, "after": after, "shortcut": shortcut}
        for shortcut, pairs in ((False, successions), (True, shortcuts))
        for before, after in sorted(set(pairs))
    ]
    if rows:
        session.execute(_insert(session, m.Succession).on_conflict_do_nothing(), rows)
    means = [{"key": key, "mean_parameters": mean} for key, mean in sorted(mean_parameters.items())]
    if means:
        session.execute(update(m.Workload), means)


def read_beside(session: Session, keys: Iterable[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What is recorded of these operators and of those beside them, as `put_beside` takes it."""
    each = _each(session, keys)
    sides = (
        select(m.Succession.before, m.Succession.after, m.Succession.shortcut).where(side.in_(select(each.c.value)))
        for side in (m.Succession.before, m.Succession.after)
    )
    found = [(bool(shortcut), (before, after)) for before, after, shortcut in session.execute(union(*sides))]
    return sorted(pair for added, pair in found if not added), sorted(pair for added, pair in found if added)


def read_mean_parameters(session: Session, keys: Iterable[str]) -> list[float]:
    """How many weights the operators around each of these have on average, of those of which it is recorded."""
    each = _each(session, keys)
    query = select(m.Workload.mean_parameters).where(m.Workload.key.in_(select(each.c.value)))
    return [mean for mean in session.scalars(query.order_by(m.Workload.key)) if mean is not None]


# --- rows -----------------------------------------------------------------------------------------------------


def _newest(target: str, plan: str) -> tuple[Any, ...]:
    """Conditions that keep the newest revision of every workload of a table."""
    other = aliased(m.Row)
    newest = select(func.max(other.revision)).where(
        other.target == m.Row.target, other.plan == m.Row.plan, other.workload == m.Row.workload
    )
    return (
        m.Row.target == target,
        m.Row.plan == plan,
        m.Row.revision == newest.correlate(m.Row).scalar_subquery(),
    )


def _operator_row(
    row: int, status: str, latency_ms: Any, half_width_ms: Any, energy_j: Any, failure: Any
) -> OperatorRow:
    return OperatorRow(
        status=Status(status), latency_ms=latency_ms, half_width_ms=half_width_ms, energy_j=energy_j, row=row,
        message=None if failure is None else f"{failure['cause']}: {failure['message']}",
    )  # fmt: skip


_SHORT = (
    m.Row.workload, m.Row.id, m.Row.status, m.Row.latency_ms, m.Row.half_width_ms, m.Row.energy_j, m.Row.failure
)  # fmt: skip


def newest_rows(session: Session, target: str, plan: str, keys: Iterable[str]) -> dict[str, OperatorRow]:
    """What a table says now of these workloads, by key; those without a row are left out."""
    each = _each(session, keys)
    query = select(*_SHORT).where(*_newest(target, plan), m.Row.workload.in_(select(each.c.value)))
    return {key: _operator_row(*rest) for key, *rest in session.execute(query)}


def settled(session: Session, target: str, plan: str, keys: Iterable[str], *, newest: bool = False) -> int:
    """How many of these workloads have a row, measured or failed; with `newest`, how many of them wait for no other."""
    each = _each(session, keys)
    query = select(func.count()).select_from(each)
    query = query.where(
        exists().where(m.Row.target == target, m.Row.plan == plan, m.Row.workload == each.c.value)
    )  # fmt: skip
    if newest:
        query = query.where(
            ~exists().where(
                m.Pending.target == target, m.Pending.plan == plan, m.Pending.workload == each.c.value
            )
        )  # fmt: skip
    return session.execute(query).scalar_one()


@dataclass(frozen=True)
class NewRow:
    """A row to be written: a measurement of a workload, by a device, under a lease, at a time."""

    measurement: Measurement
    device: str
    lease: int | None
    evidence: int | None
    measured_at: datetime


def put_evidence(session: Session, definition: dict[str, Any]) -> int:
    """Stores what was true around a lease, once for all its rows."""
    record = m.Evidence(definition=definition)
    session.add(record)
    session.flush()
    return record.id


def append_rows(session: Session, target: str, plan: str, new: Sequence[NewRow]) -> int:
    """Writes each as the next revision of its workload. The caller holds `lock_table`."""
    if not new:
        return 0
    each = _each(session, [row.measurement.key for row in new])
    query = (
        select(m.Row.workload, func.max(m.Row.revision))
        .where(m.Row.target == target, m.Row.plan == plan, m.Row.workload.in_(select(each.c.value)))
        .group_by(m.Row.workload)
    )
    revisions = {row[0]: row[1] for row in session.execute(query)}
    values = []
    for row in new:
        said = row.measurement
        revisions[said.key] = revisions.get(said.key, 0) + 1
        values.append(
            {
                "target": target, "plan": plan, "workload": said.key, "revision": revisions[said.key],
                "status": (Status.MEASURED if said.failure is None else Status.FAILED).value,
                "latency_ms": said.latency_ms, "half_width_ms": said.half_width_ms, "spread": said.spread,
                "energy_j": said.energy_j, "stop": said.stop,
                "samples": [sample.model_dump(mode="json") for sample in said.samples],
                "failure": None if said.failure is None else said.failure.model_dump(mode="json"),
                "evidence": row.evidence, "device": row.device, "lease": row.lease, "measured_at": row.measured_at,
            }
        )  # fmt: skip
    session.execute(_insert(session, m.Row), values)
    return len(values)


def page_of_rows(
    session: Session, target: str, *, plan: str | None = None, kind: str | None = None, status: str | None = None,
    after: int = 0, limit: int = 100,
) -> list[tuple[m.Row, str]]:  # fmt: skip
    """The newest revisions of a target's tables with the kinds of their workloads, by id, those after `after`."""
    newer = aliased(m.Row)
    replaced = exists().where(
        newer.target == m.Row.target, newer.plan == m.Row.plan, newer.workload == m.Row.workload,
        newer.revision > m.Row.revision,
    )  # fmt: skip
    query = (
        select(m.Row, m.Workload.kind)
        .join(m.Workload, m.Workload.key == m.Row.workload)
        .where(m.Row.target == target, m.Row.id > after, ~replaced)
        .order_by(m.Row.id)
        .limit(limit)
    )
    if plan is not None:
        query = query.where(m.Row.plan == plan)
    if kind is not None:
        query = query.where(m.Workload.kind == kind)
    if status is not None:
        query = query.where(m.Row.status == status)
    return [(row, found) for row, found in session.execute(query)]


def read_row(session: Session, row: int) -> tuple[m.Row, m.Workload, dict[str, Any]]:
    """One revision with its samples, its workload and its evidence. Raises NotFound."""
    query = (
        select(m.Row, m.Workload, m.Evidence.definition)
        .join(m.Workload, m.Workload.key == m.Row.workload)
        .outerjoin(m.Evidence, m.Evidence.id == m.Row.evidence)
        .where(m.Row.id == row)
        .options(undefer(m.Row.samples))
    )
    found = session.execute(query).one_or_none()
    if found is None:
        raise NotFound(f"there is no row {row}", field="id")
    return found[0], found[1], found[2] or {}


def measured_operators(
    session: Session, target: str, plan: str, *, leave_out: Iterable[str], limit: int
) -> list[tuple[dict[str, Any], float]]:
    """Definition and latency in ms of operators already measured in a table, those measured last first."""
    each = _each(session, leave_out)
    query = (
        select(m.Workload.definition, m.Row.latency_ms)
        .join(m.Workload, m.Workload.key == m.Row.workload)
        .where(
            *_newest(target, plan), m.Row.status == Status.MEASURED.value, m.Workload.kind != m.NETWORK,
            m.Row.workload.not_in(select(each.c.value)),
        )
        .order_by(m.Row.id.desc())
        .limit(limit)
    )  # fmt: skip
    return [(definition, latency_ms) for definition, latency_ms in session.execute(query)]


def harmless(session: Session, target: str, plan: str, keys: Iterable[str], *, proven: bool) -> set[str]:
    """Those of these operators beside which others may stand in a table: what is measured there and, unless it must be
    `proven` so, what was never tried. What failed or came back may be what kills a graph."""
    asked = set(keys)
    each = _each(session, asked)
    rows = select(m.Row.workload, m.Row.status).where(*_newest(target, plan), m.Row.workload.in_(select(each.c.value)))
    status = {row.workload: row.status for row in session.execute(rows)}
    measured = {workload for workload, said in status.items() if said == Status.MEASURED.value}
    if proven:
        return measured
    came_back = select(m.Pending.workload).where(
        m.Pending.target == target, m.Pending.plan == plan, m.Pending.attempts > 0,
        m.Pending.workload.in_(select(each.c.value)),
    )  # fmt: skip
    return measured | (asked - status.keys() - set(session.scalars(came_back)))


def oldest_networks(
    session: Session, target: str, plan: str, *, leave_out: Iterable[str], limit: int
) -> list[tuple[str, int, float]]:
    """Key, parameters and latency in ms of whole networks in a table, those that were measured first."""
    each = _each(session, leave_out)
    query = (
        select(m.Workload.key, m.Workload.parameters, m.Row.latency_ms)
        .join(m.Workload, m.Workload.key == m.Row.workload)
        .where(
            *_newest(target, plan), m.Row.status == Status.MEASURED.value, m.Workload.kind == m.NETWORK,
            m.Row.workload.not_in(select(each.c.value)),
        )
        .order_by(m.Row.id)
        .limit(limit)
    )  # fmt: skip
    found = session.execute(query)
    return [(key, parameters, latency_ms) for key, parameters, latency_ms in found if latency_ms is not None]


# --- the queue ------------------------------------------------------------------------------------------------


def enqueue(
    session: Session, target: str, plan: str, keys: Iterable[str], now: datetime, *, again: bool = False
) -> int:
    """Puts workloads without a row into the queue, once however many ask; with `again` also those with one.

    Returns how many were put there. The caller holds `lock_table`.
    """
    each = _each(session, keys)
    has_row = exists().where(m.Row.target == target, m.Row.plan == plan, m.Row.workload == each.c.value)
    moment = literal(now, m.Moment())
    source = (
        select(literal(target), literal(plan), each.c.value, literal(0), moment, moment)
        .where(true() if again else ~has_row)
        .order_by(each.c.position)  # what was asked first is measured first
    )
    names = ["target", "plan", "workload", "attempts", "not_before", "enqueued_at"]
    insert = _insert(session, m.Pending).from_select(names, source, include_defaults=False)
    return _changed(session.execute(insert.on_conflict_do_nothing()))


@dataclass(frozen=True)
class Queue:
    """What waits for a target: all of it, what a device has in hand, and what may not be tried again yet."""

    pending: int = 0
    leased: int = 0
    delayed: int = 0


def read_queue(session: Session, target: str, now: datetime) -> Queue:
    """How much waits for a target."""

    def many(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)

    query = select(
        func.count(),
        many(m.Pending.lease.is_not(None)),
        many(and_(m.Pending.lease.is_(None), m.Pending.not_before > now)),
    ).where(m.Pending.target == target)
    pending, leased, delayed = session.execute(query).one()
    return Queue(pending=pending, leased=int(leased), delayed=int(delayed))


def last_failures(session: Session, target: str, plan: str, keys: Iterable[str]) -> dict[str, Failure]:
    """Why workloads in the queue went back to it, by key; those that never failed are left out."""
    each = _each(session, keys)
    query = select(m.Pending.workload, m.Pending.last_failure).where(
        m.Pending.target == target, m.Pending.plan == plan, m.Pending.workload.in_(select(each.c.value)),
        m.Pending.last_failure.is_not(None),
    )  # fmt: skip
    return {key: Failure.model_validate(failure) for key, failure in session.execute(query)}


def any_expired(session: Session, now: datetime) -> bool:
    """Whether an active lease is past its deadline."""
    return bool(
        session.execute(select(exists().where(m.Lease.state == "active", m.Lease.deadline <= now))).scalar_one()
    )


@dataclass(frozen=True)
class Claimant:
    """Who asks for what waits for a target, and when.

    What failed on this device is left to another of the target that was seen after `seen_after`. What failed before
    `failed_before` has waited long enough for another.
    """

    device: str
    target: str
    now: datetime
    seen_after: datetime
    failed_before: datetime


def _claimable(asks: Claimant) -> tuple[ColumnElement[bool], ...]:
    """Conditions that keep what may be claimed."""
    others = exists().where(
        m.DeviceTarget.target == asks.target, m.DeviceTarget.device != asks.device,
        m.Device.name == m.DeviceTarget.device, m.Device.state == "ready", m.Device.last_seen > asks.seen_after,
    )  # fmt: skip
    mine = or_(
        m.Pending.failed_on.is_(None), m.Pending.failed_on != asks.device, m.Pending.not_before <= asks.failed_before,
        ~others,
    )  # fmt: skip
    return m.Pending.target == asks.target, m.Pending.lease.is_(None), m.Pending.not_before <= asks.now, mine


def has_claimable(session: Session, asks: Claimant) -> bool:
    """Whether something could be claimed, or a lease has expired that may bring something back."""
    waiting = exists().where(*_claimable(asks))
    expired = exists().where(m.Lease.state == "active", m.Lease.deadline <= asks.now)
    return bool(session.execute(select(waiting | expired)).scalar_one())


def lock_oldest(session: Session, asks: Claimant) -> m.Pending | None:
    """The oldest measurement that may be claimed, held; others' claims pass over it."""
    query = (
        select(m.Pending)
        .where(*_claimable(asks))
        .order_by(m.Pending.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return session.execute(query).scalar_one_or_none()


def lock_alike(session: Session, asks: Claimant, oldest: m.Pending, limit: int) -> list[m.Pending]:
    """Up to `limit` measurements of the same table that may be claimed, tried as often, oldest first, held."""
    query = (
        select(m.Pending)
        .where(*_claimable(asks), m.Pending.plan == oldest.plan, m.Pending.attempts == oldest.attempts)
        .order_by(m.Pending.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return list(session.scalars(query))


def requeue(
    session: Session, jobs: Sequence[tuple[m.Pending, Failure | None]], not_before: datetime, *, attempts: int,
    failed_on: str | None = None,
) -> None:  # fmt: skip
    """Puts leased measurements back, not to be tried before a time, `attempts` more counted, with their failures.

    `failed_on` is the device on which they were tried, where that is held against them.
    """
    values = [
        {
            "job": job.id,
            "tried": job.attempts + attempts,
            "moment": not_before,
            "why": failure.model_dump(mode="json") if failure else job.last_failure,
            "where": failed_on or job.failed_on,
        }
        for job, failure in jobs
    ]
    if values:
        table = m.Base.metadata.tables[m.Pending.__tablename__]
        change = (
            update(table)
            .where(table.c.id == bindparam("job"))
            .values(
                lease=None, attempts=bindparam("tried"), not_before=bindparam("moment"),
                last_failure=bindparam("why"), failed_on=bindparam("where"),
            )
        )  # fmt: skip
        session.execute(change, values)


def drop(session: Session, jobs: Sequence[m.Pending]) -> None:
    """Takes measurements out of the queue: a row says what became of them."""
    each = _each(session, [job.workload for job in jobs])
    tables = {(job.target, job.plan) for job in jobs}
    for target, plan in sorted(tables):
        session.execute(
            delete(m.Pending)
            .where(m.Pending.target == target, m.Pending.plan == plan, m.Pending.workload.in_(select(each.c.value)))
            .execution_options(synchronize_session=False)
        )


# --- leases ---------------------------------------------------------------------------------------------------


def open_lease(
    session: Session, device: str, target: str, plan: str, jobs: Sequence[m.Pending], now: datetime,
    deadline: datetime, reference: dict[str, float] | None = None,
) -> m.Lease:  # fmt: skip
    """Grants a device these measurements until a deadline. A second active lease of a device breaks an index."""
    lease = m.Lease(
        device=device, target=target, plan=plan, state="active", granted_at=now, deadline=deadline, reference=reference
    )
    session.add(lease)
    session.flush()
    for job in jobs:
        job.lease = lease.id
    session.flush()
    return lease


def lease_device(session: Session, token: int) -> str:
    """The device of a lease. Raises NotFound."""
    device = session.execute(select(m.Lease.device).where(m.Lease.id == token)).scalar_one_or_none()
    if device is None:
        raise NotFound(f"there is no lease {token}", field="token", remedy="ask for a lease first")
    return device


def lock_lease(session: Session, token: int) -> m.Lease:
    """The lease, held until the transaction ends. Raises NotFound."""
    query = select(m.Lease).where(m.Lease.id == token).with_for_update().execution_options(populate_existing=True)
    lease = session.execute(query).scalar_one_or_none()
    if lease is None:
        raise NotFound(f"there is no lease {token}", field="token", remedy="ask for a lease first")
    return lease


def lock_active_lease(session: Session, device: str) -> m.Lease | None:
    """The lease that a device holds, if it holds one, held until the transaction ends."""
    query = select(m.Lease).where(m.Lease.device == device, m.Lease.state == "active").with_for_update()
    return session.execute(query.execution_options(populate_existing=True)).scalar_one_or_none()


def holds_lease(session: Session, device: str) -> bool:
    """Whether a device has an active lease."""
    held = exists().where(m.Lease.device == device, m.Lease.state == "active")
    return bool(session.execute(select(held)).scalar_one())


def lock_expired(session: Session, now: datetime) -> list[m.Lease]:
    """Active leases past their deadline that nobody else is just now ending, held."""
    query = (
        select(m.Lease)
        .where(m.Lease.state == "active", m.Lease.deadline <= now)
        .order_by(m.Lease.id)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return list(session.scalars(query))


def jobs_of(session: Session, leases: Sequence[m.Lease]) -> dict[int, list[m.Pending]]:
    """The measurements of leases, in order, by token."""
    jobs: dict[int, list[m.Pending]] = {lease.id: [] for lease in leases}
    query = select(m.Pending).where(m.Pending.lease.in_(list(jobs))).order_by(m.Pending.id)
    for job in session.scalars(query.execution_options(populate_existing=True)):
        if job.lease is not None:
            jobs[job.lease].append(job)
    return jobs


# --- pins and snapshots ---------------------------------------------------------------------------------------


def open_pin(session: Session, target: str, plan: str, now: datetime) -> m.Pin:
    """Opens a pin on a table."""
    pin = m.Pin(target=target, plan=plan, opened_at=now)
    session.add(pin)
    session.flush()
    return pin


def read_pin(session: Session, pin: int, *, lock: bool = False) -> m.Pin:
    """The pin of this id; with `lock` nobody else changes or seals it until the transaction ends. Raises NotFound."""
    query = select(m.Pin).where(m.Pin.id == pin).execution_options(populate_existing=True)
    if lock:
        query = query.with_for_update(key_share=True)
    record = session.execute(query).scalar_one_or_none()
    if record is None:
        raise NotFound(f"there is no pin {pin}", field="id", remedy="open one with POST /v1/pins")
    return record


def read_snapshot(session: Session, number: int) -> m.Pin:
    """The sealed pin of this snapshot number. Raises NotFound."""
    record = session.execute(select(m.Pin).where(m.Pin.snapshot == number)).scalar_one_or_none()
    if record is None:
        raise NotFound(f"there is no snapshot {number}", field="snapshot", remedy="seal a pin to make one")
    return record


def count_pin_rows(session: Session, pin: int) -> int:
    """How many rows a pin has frozen."""
    return session.execute(select(func.count()).where(m.PinRow.pin == pin)).scalar_one()


def frozen_rows(session: Session, pin: int, keys: Iterable[str]) -> dict[str, OperatorRow]:
    """What a pin has read of these workloads, by key; those it has not read are left out."""
    each = _each(session, keys)
    query = (
        select(*_SHORT)
        .join(m.PinRow, m.PinRow.row == m.Row.id)
        .where(m.PinRow.pin == pin, m.PinRow.workload.in_(select(each.c.value)))
    )
    return {key: _operator_row(*rest) for key, *rest in session.execute(query)}


def freeze_rows(session: Session, pin: m.Pin, keys: Iterable[str]) -> int:
    """Freezes the newest row of each of these workloads that has one and that the pin has not read yet."""
    each = _each(session, keys)
    source = select(literal(pin.id, m.Id), m.Row.workload, m.Row.id).where(
        *_newest(pin.target, pin.plan), m.Row.workload.in_(select(each.c.value))
    )
    insert = _insert(session, m.PinRow).from_select(["pin", "workload", "row"], source)
    return _changed(session.execute(insert.on_conflict_do_nothing()))


def freeze_correction(session: Session, pin: m.Pin) -> None:
    """Freezes the newest correction of the pin's table, or that there is none."""
    query = (
        select(m.Correction.id)
        .where(m.Correction.target == pin.target, m.Correction.plan == pin.plan)
        .order_by(m.Correction.revision.desc())
        .limit(1)
    )
    pin.correction = session.execute(query).scalar_one_or_none()
    pin.correction_frozen = True
    session.flush()


def seal_pin(session: Session, pin: m.Pin) -> int:
    """Makes a pin the next snapshot. Sealed again, it keeps its number. The caller holds the pin."""
    number = pin.snapshot
    if number is None:
        if not pin.correction_frozen:
            freeze_correction(session, pin)
        if _dialect(session) == "postgresql":
            session.execute(select(func.pg_advisory_xact_lock(SNAPSHOT_LOCK)))
        newest = session.execute(select(func.coalesce(func.max(m.Pin.snapshot), 0))).scalar_one()
        number = pin.snapshot = (newest or 0) + 1
        session.flush()
    return number


def rows_of_pin(session: Session, pin: int) -> Select[Any]:
    """The statement for every frozen row of a pin with its workload and evidence, by key of the workload."""
    return (
        select(m.Row, m.Workload, m.Evidence.definition)
        .join(m.PinRow, m.PinRow.row == m.Row.id)
        .join(m.Workload, m.Workload.key == m.Row.workload)
        .outerjoin(m.Evidence, m.Evidence.id == m.Row.evidence)
        .where(m.PinRow.pin == pin)
        .options(undefer(m.Row.samples))
        .order_by(m.Row.workload)
    )


def pins_of(session: Session, *, sealed: bool) -> list[tuple[m.Pin, int]]:
    """Pins, or only the sealed ones, by id, with how many rows each has frozen."""
    count = select(func.count()).where(m.PinRow.pin == m.Pin.id).correlate(m.Pin).scalar_subquery()
    query = select(m.Pin, count).order_by(m.Pin.id)
    if sealed:
        query = query.where(m.Pin.snapshot.is_not(None))
    return [(pin, rows) for pin, rows in session.execute(query)]


# --- calibrations ---------------------------------------------------------------------------------------------


def read_correction(session: Session, correction: int | None) -> estimates.Correction | None:
    """The correction of this id; None for None."""
    record = None if correction is None else session.get(m.Correction, correction)
    return None if record is None else estimates.Correction.model_validate(record.definition)


def append_correction(session: Session, target: str, plan: str, correction: estimates.Correction, now: datetime) -> int:
    """Stores the next revision of a table's correction. The caller holds `lock_table`."""
    newest = session.execute(
        select(func.coalesce(func.max(m.Correction.revision), 0)).where(
            m.Correction.target == target, m.Correction.plan == plan
        )
    ).scalar_one()
    record = m.Correction(
        target=target, plan=plan, revision=newest + 1, definition=correction.model_dump(mode="json"), fitted_at=now
    )
    session.add(record)
    session.flush()
    return record.id


def put_calibration(
    session: Session,
    key: str,
    *,
    target: str,
    plan: str,
    whole: str,
    networks: Sequence[str],
    operators: Sequence[str],
    now: datetime,
) -> m.Calibration:
    """The calibration of this key, made now where there is none."""
    insert = _insert(session, m.Calibration).values(
        key=key,
        target=target,
        plan=plan,
        whole=whole,
        networks=list(networks),
        operators=list(operators),
        state="measuring",
        asked_at=now,
    )
    session.execute(insert.on_conflict_do_nothing(index_elements=["key"]))
    return session.execute(select(m.Calibration).where(m.Calibration.key == key)).scalar_one()


def is_overtaken(session: Session, record: m.Calibration) -> bool:
    """Whether what a calibration was fitted to was measured again, or waits for that."""
    correction = None if record.correction is None else session.get(m.Correction, record.correction)
    if correction is None:
        return False
    for plan, keys in ((record.plan, record.operators), (record.whole, record.networks)):
        each = _each(session, keys)
        since = exists().where(
            m.Row.target == record.target, m.Row.plan == plan, m.Row.workload.in_(select(each.c.value)),
            m.Row.measured_at > correction.fitted_at,
        )  # fmt: skip
        if settled(session, record.target, plan, keys, newest=True) < len(keys) or session.scalar(select(since)):
            return True
    return False


def read_calibration(session: Session, calibration: int) -> m.Calibration:
    """The calibration of this id. Raises NotFound."""
    record = session.get(m.Calibration, calibration)
    if record is None:
        raise NotFound(f"there is no calibration {calibration}", field="id")
    return record


def measuring_calibrations(session: Session) -> list[int]:
    """The calibrations whose fit is still to come, oldest first."""
    query = select(m.Calibration.id).where(m.Calibration.state == "measuring").order_by(m.Calibration.id)
    return list(session.scalars(query))


def end_calibration(session: Session, calibration: int, state: str, message: str | None = None) -> bool:
    """Takes a calibration from measuring to its end. False where somebody else already did."""
    message = None if message is None else message.replace("\x00", "�")
    change = (
        update(m.Calibration)
        .where(m.Calibration.id == calibration, m.Calibration.state == "measuring")
        .values(state=state, message=message)
        .execution_options(synchronize_session=False)
    )
    return _changed(session.execute(change)) == 1
