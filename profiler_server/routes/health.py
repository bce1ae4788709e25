"""Whether the process lives, and whether it can serve."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from profiler_server.lab import LabHere
from profiler_server.routes import make_router

router = make_router("health")


class Health(BaseModel):
    """The process lives, or can serve."""

    status: Literal["ok"] = "ok"


@router.get("/healthz")
async def healthz() -> Health:
    """The process lives."""
    return Health()


@router.get("/readyz")
def readyz(lab: LabHere) -> Health:
    """The database is reached and its schema is the right one; 503 otherwise."""
    lab.database.check()
    return Health()
