"""Pins and snapshots: tables that never change under their reader, and lookups in them."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from lut_db.storage import models as m
from lut_db.storage import queries
from lut_db.wire import API, Lookup, LookupRequest, Pin, PinRequest
from profiler_server import tables
from profiler_server.lab import Lab, LabHere
from profiler_server.routes import Id, make_router

router = make_router("pins", API)


@router.post("/pins", status_code=201)
def open_pin(asked: PinRequest, lab: LabHere) -> Pin:
    """Opens a pin on the table of a target and plan."""
    tables.require_context(asked.plan, whole=False, field="plan")
    with lab.database.write() as session:
        queries.read_target(session, asked.target)
        queries.put_plan(session, asked.plan)
        record = queries.open_pin(session, asked.target, asked.plan.key, queries.clock(session))
        return tables.pin_of(session, record)


@router.get("/pins/{id}")
def read_pin(id: Id, lab: LabHere) -> Pin:
    """A pin, and how many rows it has frozen."""
    with lab.database.read() as session:
        return tables.pin_of(session, queries.read_pin(session, id))


@router.post("/pins/{id}/seal")
def seal_pin(id: Id, lab: LabHere) -> Pin:
    """Seals a pin: it becomes a numbered snapshot that never changes. Sealed again, it keeps its number."""
    with lab.database.write() as session:
        record = queries.read_pin(session, id, lock=True)
        queries.seal_pin(session, record)
        return tables.pin_of(session, record)


@router.post("/pins/{id}/lookup")
async def look_up(id: Id, asked: LookupRequest, lab: LabHere, request: Request) -> Lookup:
    """What networks cost under a pin. What the table lacks is enqueued, once, and waited for up to a given time."""
    return await _look_up(lab, lambda session: queries.read_pin(session, id), asked, request)


@router.get("/snapshots/{number}")
def read_snapshot(number: Id, lab: LabHere) -> Pin:
    """A snapshot: the sealed pin of this number."""
    with lab.database.read() as session:
        return tables.pin_of(session, queries.read_snapshot(session, number))


@router.post("/snapshots/{number}/lookup")
async def look_up_snapshot(number: Id, asked: LookupRequest, lab: LabHere, request: Request) -> Lookup:
    """What networks cost under a snapshot. What it lacks is missing, and is not enqueued."""
    return await _look_up(lab, lambda session: queries.read_snapshot(session, number), asked, request)


async def _look_up(lab: Lab, find: Callable[[Session], m.Pin], asked: LookupRequest, request: Request) -> Lookup:
    database, settings = lab.database, lab.settings
    keys = tables.keys_of(asked)

    def read() -> tuple[m.Pin, Lookup | None]:
        tables.check_definitions(asked.operators)
        with database.read() as session:
            pin = find(session)
            return pin, tables.read_lookup(session, pin, asked, keys, settings)

    pin, answer = await run_in_threadpool(read)
    if answer is not None:
        return answer

    def record(final: bool) -> tuple[Lookup | None, int]:
        with database.write() as session:
            held = queries.read_pin(session, pin.id, lock=True)
            return tables.record_lookup(session, held, asked, keys, settings, final=final)

    def settled() -> bool:
        with database.read() as session:
            return queries.settled(session, pin.target, pin.plan, keys) == len(keys)

    answer, enqueued = await run_in_threadpool(record, asked.wait_s == 0)
    if enqueued:
        lab.bell.ring()
    if answer is None:
        await lab.until(settled, asked.wait_s, request)
        answer, more = await run_in_threadpool(record, True)
        enqueued += more
    assert answer is not None
    return answer.model_copy(update={"enqueued": enqueued})
