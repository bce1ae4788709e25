"""The application: routes over one database, and one task that tends what no request waits for."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.routing import APIRoute
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from lut_db import __version__
from lut_db.storage import queries
from profiler_server import calibrating, leasing, problems, routes
from profiler_server.lab import Lab
from profiler_server.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application with settings, by default those of the environment. Start-up raises StaleSchema."""
    chosen = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        lab: Lab = app.state.lab
        lab.bell.attach()
        await run_in_threadpool(prepare, lab)
        tending = asyncio.create_task(_tend(lab))
        try:
            yield
        finally:
            lab.bell.close()
            tending.cancel()
            with suppress(asyncio.CancelledError):
                await tending
            await run_in_threadpool(lab.database.close)

    app = FastAPI(
        title="latency-lab profiler", version=__version__, lifespan=lifespan, generate_unique_id_function=_operation_id,
        description="Measures operators and networks on real devices, once, and tells what networks cost.",
    )  # fmt: skip
    app.state.lab = Lab(chosen)
    for module in sorted(info.name for info in pkgutil.iter_modules(routes.__path__)):
        app.include_router(importlib.import_module(f"{routes.__name__}.{module}").router)
    app.add_middleware(problems.BodyLimit, most=chosen.max_body_bytes)
    problems.install(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def prepare(lab: Lab) -> None:
    """Makes the tables where that is allowed, and refuses any schema but the right one with StaleSchema."""
    allowed = lab.settings.auto_upgrade
    if allowed is None:
        file = lab.database.file
        allowed = file is not None and not file.exists()
    if allowed:
        lab.database.upgrade()
    lab.database.check()


async def _tend(lab: Lab) -> None:
    """Ends expired leases and fits calibrations whose agents or callers are gone, until it is cancelled."""
    while True:
        stroke = lab.bell.listen()
        try:
            if await run_in_threadpool(tend, lab):
                lab.bell.ring()
        except SQLAlchemyError:
            log.exception("the database could not be tended; trying again")
        await lab.pause(stroke, lab.settings.tend_s)


def tend(lab: Lab) -> bool:
    """One look after expired leases and calibrations. True where something changed."""
    with lab.database.read() as session:
        expired = queries.any_expired(session, queries.clock(session))
        calibrations = queries.measuring_calibrations(session)
    changed = False
    if expired:
        with lab.database.write() as session:
            changed = leasing.expire(session) > 0
    for calibration in calibrations:
        changed |= calibrating.advance(lab.database, calibration)
    return changed
