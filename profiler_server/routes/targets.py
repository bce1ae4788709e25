"""Targets: what is in their tables, whole networks measured on them, and calibrations asked for."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from starlette.concurrency import run_in_threadpool

from lut_db.errors import NotFound
from lut_db.measurements import Status
from lut_db.operators import KINDS
from lut_db.storage import models as m
from lut_db.storage import queries
from lut_db.storage.queries import TargetView
from lut_db.wire import (
    API,
    Calibration,
    CalibrationRequest,
    NetworksAnswer,
    NetworksRequest,
    Page,
    ShortKey,
    TargetState,
)
from profiler_server import calibrating, tables
from profiler_server.lab import LabHere
from profiler_server.routes import MAX_ID, make_router
from profiler_server.routes.rows import row_of

router = make_router("targets", f"{API}/targets")

KIND_PATTERN = f"^({'|'.join([*sorted(KINDS), m.NETWORK])})$"


def _state(view: TargetView) -> TargetState:
    return TargetState(
        key=view.key, target=view.target, devices=view.devices, rows=view.rows, pending=view.pending
    )  # fmt: skip


@router.get("")
def list_targets(lab: LabHere) -> list[TargetState]:
    """Every target, its devices, and how much is in its tables and its queue."""
    with lab.database.read() as session:
        return [_state(view) for view in queries.read_targets(session)]


@router.get("/{key}")
def read_target(key: ShortKey, lab: LabHere) -> TargetState:
    """One target, its devices, and how much is in its tables and its queue."""
    with lab.database.read() as session:
        views = queries.read_targets(session, key)
    if not views:
        raise NotFound(f"there is no target {key}", field="key", remedy="register a device that has it")
    return _state(views[0])


@router.get("/{key}/rows")
def list_rows(
    key: ShortKey,
    lab: LabHere,
    plan: Annotated[ShortKey | None, Query(description="only rows of this plan")] = None,
    kind: Annotated[str | None, Query(pattern=KIND_PATTERN, description="an operator kind, or 'network'")] = None,
    status: Annotated[Status | None, Query(description="'measured' or 'failed'")] = None,
    after: Annotated[int, Query(ge=0, le=MAX_ID, description="the cursor that the page before gave")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page:
    """The newest revision of every operator and network in a target's tables, page by page."""
    with lab.database.read() as session:
        queries.read_target(session, key)
        found = queries.page_of_rows(
            session, key, plan=plan, kind=kind, status=status, after=after, limit=limit + 1
        )  # fmt: skip
    rows = tuple(row_of(record, of_kind) for record, of_kind in found[:limit])
    return Page(rows=rows, next=rows[-1].id if len(found) > limit else None)


@router.post("/{key}/networks")
async def measure_networks(
    key: ShortKey, asked: NetworksRequest, lab: LabHere, request: Request
) -> NetworksAnswer:  # fmt: skip
    """Measures whole networks, once each under a plan, and waits up to a given time for the results."""
    tables.require_context(asked.plan, whole=True, field="plan")
    networks = {network.key: network for network in asked.networks}
    keys = [network.key for network in asked.networks]

    def settled() -> bool:
        with lab.database.read() as session:
            return queries.settled(session, key, asked.plan.key, networks) == len(networks)

    def begin() -> bool:
        with lab.database.read() as session:
            queries.read_target(session, key)
        if settled():
            return True
        with lab.database.write() as session:
            tables.ask_networks(session, key, asked.plan, networks)
        lab.bell.ring()
        return False

    def answer() -> NetworksAnswer:
        with lab.database.read() as session:
            return tables.answer_networks(session, key, asked.plan, keys, lab.settings)

    if not await run_in_threadpool(begin) and asked.wait_s > 0:
        await lab.until(settled, asked.wait_s, request)
    return await run_in_threadpool(answer)


@router.post("/{key}/calibrations", status_code=202, responses={200: {"model": Calibration}})
def calibrate(key: ShortKey, asked: CalibrationRequest, lab: LabHere, response: Response) -> Calibration:
    """Asks for a correction fitted on whole networks. The same request is the same calibration: 200 once it ended."""
    with lab.database.write() as session:
        calibration = calibrating.ask(session, key, asked).id
    calibrating.advance(lab.database, calibration)
    lab.bell.ring()
    with lab.database.read() as session:
        told = calibrating.tell(session, queries.read_calibration(session, calibration), lab.settings)
    if told.state != "measuring":
        response.status_code = 200
    return told
