"""Snapshots as files: a sealed pin in JSON, complete in itself, and back into any database."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field, ValidationError
from sqlalchemy.orm import Session

from lut_db.errors import Conflict, InvalidInput, StorageError
from lut_db.estimates import Correction
from lut_db.measurements import Evidence, Measurement, Value
from lut_db.operators import Operator
from lut_db.plans import Plan
from lut_db.storage import models as m
from lut_db.storage import queries
from lut_db.targets import Name, Target


class SnapshotRow(Value):
    """One frozen row: what was measured, what came of it, by which device and when. `evidence` is an index."""

    operator: Operator
    measurement: Measurement
    device: Name
    measured_at: datetime
    evidence: int | None = None


class SnapshotFile(Value):
    """A snapshot: one table of a target and plan, as it was frozen, with its correction and its canaries' latencies."""

    format: Literal["latency-lab snapshot"] = "latency-lab snapshot"
    vocabulary: Literal[1] = 1
    target: Target
    plan: Plan
    canary_ms: float | None = Field(default=None, gt=0)
    heavy_canary_ms: float | None = Field(default=None, gt=0)
    correction: Correction | None = None
    evidence: tuple[Evidence, ...] = ()
    rows: tuple[SnapshotRow, ...] = Field(default=())


def export_snapshot(session: Session, number: int) -> SnapshotFile:
    """The snapshot of this number. Raises NotFound."""
    pin = queries.read_snapshot(session, number)
    evidence: dict[int, tuple[int, Evidence]] = {}
    rows = []
    for row, workload, definition in session.execute(queries.rows_of_pin(session, pin.id)):
        place = None
        if row.evidence is not None:
            place, _ = evidence.setdefault(row.evidence, (len(evidence), definition))
        said = {
            "key": row.workload, "latency_ms": row.latency_ms, "half_width_ms": row.half_width_ms,
            "spread": row.spread, "energy_j": row.energy_j, "stop": row.stop, "samples": row.samples,
            "failure": row.failure,
        }  # fmt: skip
        rows.append(
            SnapshotRow.model_validate(
                {
                    "operator": workload.definition, "measurement": said, "device": row.device,
                    "measured_at": row.measured_at, "evidence": place,
                }
            )
        )  # fmt: skip
    canary_ms, heavy_canary_ms = queries.read_canaries(session, pin.target)
    return SnapshotFile(
        target=queries.read_target(session, pin.target), plan=queries.read_plan(session, pin.plan),
        canary_ms=canary_ms, heavy_canary_ms=heavy_canary_ms,
        correction=queries.read_correction(session, pin.correction),
        evidence=tuple(definition for _, definition in evidence.values()), rows=tuple(rows),
    )  # fmt: skip


def parse_snapshot(text: str | bytes) -> SnapshotFile:
    """Reads a snapshot file. Raises InvalidInput that names the offending field."""
    try:
        snapshot = SnapshotFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            first["msg"], field=".".join(map(str, first["loc"])) or "file", remedy="give a file that lut-db exported"
        ) from error
    seen: set[str] = set()
    for number, row in enumerate(snapshot.rows):
        if row.operator.key != row.measurement.key:
            raise InvalidInput(
                f"the definition has the key {row.operator.key}", field=f"rows.{number}.measurement.key"
            )  # fmt: skip
        if row.measurement.key in seen:
            raise InvalidInput("this operator comes twice", field=f"rows.{number}.operator")
        if row.evidence is not None and not 0 <= row.evidence < len(snapshot.evidence):
            raise InvalidInput("there is no such evidence in the file", field=f"rows.{number}.evidence")
        if row.measured_at.tzinfo is None:
            raise InvalidInput("the time has no zone", field=f"rows.{number}.measured_at", remedy="write it in UTC")
        seen.add(row.measurement.key)
    return snapshot


def import_snapshot(session: Session, snapshot: SnapshotFile) -> int:
    """Stores a snapshot as a sealed pin of its own, and returns its number here.

    Its rows and its correction become the next revisions of the table; pins that are already there keep theirs.
    Raises Conflict where the table is scaled to another latency of a canary: the two cannot be mixed.
    """
    target, plan = snapshot.target.key, snapshot.plan.key
    queries.put_targets(session, [snapshot.target])
    for field in queries.CANARIES:
        told_ms = getattr(snapshot, field)
        if told_ms is None:
            continue
        holds_ms = queries.base_on_canary(session, target, field, told_ms)
        if holds_ms != told_ms:
            raise Conflict(
                f"the rows are scaled to a canary of {told_ms} ms, this database's to {holds_ms} ms",
                field=field, remedy="import it into a database of its own",
            )  # fmt: skip
    queries.put_plan(session, snapshot.plan)
    queries.put_workloads(session, {row.operator.key: row.operator for row in snapshot.rows})
    pin = queries.open_pin(session, target, plan, queries.clock(session))
    queries.lock_table(session, target, plan)
    evidence = [queries.put_evidence(session, dict(definition)) for definition in snapshot.evidence]
    new = [
        queries.NewRow(
            row.measurement, row.device, None, None if row.evidence is None else evidence[row.evidence], row.measured_at
        )
        for row in snapshot.rows
    ]
    queries.append_rows(session, target, plan, new)
    frozen = queries.freeze_rows(session, pin, [row.operator.key for row in snapshot.rows])
    if frozen != len(snapshot.rows):
        raise StorageError(f"{frozen} of {len(snapshot.rows)} rows were frozen")
    if snapshot.correction is not None:
        pin.correction = queries.append_correction(session, target, plan, snapshot.correction, pin.opened_at)
    pin.correction_frozen = True
    session.flush()
    return queries.seal_pin(session, pin)


def list_snapshots(session: Session) -> list[tuple[m.Pin, int]]:
    """The sealed pins with how many rows each holds."""
    return queries.pins_of(session, sealed=True)
