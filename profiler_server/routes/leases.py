"""Leases: heartbeats, results, giving back."""

from __future__ import annotations

from fastapi import Response

from lut_db.wire import API, Heartbeat, Report, ReportOutcome
from profiler_server import leasing
from profiler_server.lab import LabHere
from profiler_server.routes import Id, make_router

router = make_router("leases", f"{API}/leases")


@router.post("/{token}/heartbeat")
def extend_lease(token: Id, lab: LabHere) -> Heartbeat:
    """Extends a lease that still holds; 409 where it is lost."""
    with lab.database.write() as session:
        return Heartbeat(expires_in_s=leasing.extend(session, token, lab.settings))


@router.post("/{token}/results")
def report_results(token: Id, report: Report, lab: LabHere) -> ReportOutcome:
    """Takes the results of a lease. A repeated or late report changes nothing and is told so."""
    with lab.database.write() as session:
        outcome = leasing.settle(session, token, report, lab.settings)
    lab.bell.ring()
    return outcome


@router.delete("/{token}", status_code=204)
def release_lease(token: Id, lab: LabHere) -> Response:
    """Gives a lease back: its measurements return to the queue."""
    with lab.database.write() as session:
        leasing.release(session, token)
    lab.bell.ring()
    return Response(status_code=204)
