"""Calibrations: how far they are, and what came of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request
from starlette.concurrency import run_in_threadpool

from lut_db.storage import queries
from lut_db.wire import API, Calibration, Wait
from profiler_server import calibrating
from profiler_server.lab import LabHere
from profiler_server.routes import Id, make_router

router = make_router("calibrations", f"{API}/calibrations")


@router.get("/{id}")
async def read_calibration(
    id: Id, lab: LabHere, request: Request, wait_s: Annotated[Wait, Query(description="wait for its end")] = 0.0
) -> Calibration:
    """A calibration, its correction and its error on networks left out of the fit."""

    def ended() -> bool:
        if calibrating.advance(lab.database, id):
            lab.bell.ring()
        with lab.database.read() as session:
            return queries.read_calibration(session, id).state != "measuring"

    def tell() -> Calibration:
        with lab.database.read() as session:
            return calibrating.tell(session, queries.read_calibration(session, id), lab.settings)

    await lab.until(ended, wait_s, request)
    return await run_in_threadpool(tell)
