"""Rows: one revision with its raw samples and the evidence around them."""

from __future__ import annotations

from typing import Any

from lut_db.storage import models as m
from lut_db.storage import queries
from lut_db.wire import API, Row, RowDetail
from profiler_server.lab import LabHere
from profiler_server.routes import Id, make_router

router = make_router("rows", f"{API}/rows")


def _fields(record: m.Row, kind: str) -> dict[str, Any]:
    failure = record.failure
    return {
        "id": record.id, "target": record.target, "plan": record.plan, "key": record.workload, "kind": kind,
        "revision": record.revision, "status": record.status, "latency_ms": record.latency_ms,
        "half_width_ms": record.half_width_ms, "spread": record.spread, "energy_j": record.energy_j,
        "stop": record.stop, "message": None if failure is None else f"{failure['cause']}: {failure['message']}",
        "device": record.device, "measured_at": record.measured_at,
    }  # fmt: skip


def row_of(record: m.Row, kind: str) -> Row:
    """A row as it goes over the wire, without its samples."""
    return Row.model_validate(_fields(record, kind))


@router.get("/{id}")
def read_row(id: Id, lab: LabHere) -> RowDetail:
    """One revision with its definition, raw samples and evidence."""
    with lab.database.read() as session:
        record, workload, evidence = queries.read_row(session, id)
    more = {"definition": workload.definition, "samples": record.samples, "evidence": evidence}
    return RowDetail.model_validate({**_fields(record, workload.kind), **more})
