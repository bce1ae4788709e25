"""The routes of the service, a module for each noun. Every module has a `router`; routes own transactions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from profiler_server.problems import DOCUMENTED, StrictRoute

MAX_ID = (1 << 63) - 1
Id = Annotated[int, Path(ge=1, le=MAX_ID)]
"""A number that the database gave."""


def make_router(tag: str, prefix: str = "") -> APIRouter:
    """A router whose bodies are read strictly and whose errors are documented."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=StrictRoute, responses=DOCUMENTED)
