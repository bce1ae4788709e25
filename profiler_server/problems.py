"""Errors over HTTP: `application/problem+json` for every one of them, no SQL, no stack."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lut_db.errors import Conflict, InvalidInput, LatencyLabError, MeasurementRefused, NotFound, StorageError
from lut_db.wire import Problem

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
MAX_DETAIL = 2000

STATUS: tuple[tuple[type[LatencyLabError], HTTPStatus], ...] = (
    (InvalidInput, HTTPStatus.UNPROCESSABLE_ENTITY),
    (NotFound, HTTPStatus.NOT_FOUND),
    (Conflict, HTTPStatus.CONFLICT),
    (MeasurementRefused, HTTPStatus.CONFLICT),
    (StorageError, HTTPStatus.SERVICE_UNAVAILABLE),
    (LatencyLabError, HTTPStatus.INTERNAL_SERVER_ERROR),
)
"""Status of each error of the tree; the first that fits counts."""

DOCUMENTED: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": HTTPStatus(code).phrase, "content": {MEDIA_TYPE: {}}}
    for code in (400, 404, 409, 413, 422, 503)
}
"""The errors of every route, for its OpenAPI description."""

log = logging.getLogger(__name__)


def problem(
    status: int, detail: str, *, field: str | None = None, remedy: str | None = None, headers: Any = None
) -> Response:
    """The response that tells of an error."""
    body = Problem(
        title=HTTPStatus(status).phrase, status=status, detail=detail[:MAX_DETAIL], field=field, remedy=remedy
    )
    return Response(
        body.model_dump_json(exclude_none=True), status_code=status, media_type=MEDIA_TYPE, headers=headers
    )  # fmt: skip


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem."""

    @app.exception_handler(LatencyLabError)
    async def ours(_request: Request, error: LatencyLabError) -> Response:
        status = next(status for cause, status in STATUS if isinstance(error, cause))
        return problem(status, error.message, field=error.field, remedy=error.remedy)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        said = error.errors()
        first = said[0]
        where = first["loc"][1:] if len(first["loc"]) > 1 else first["loc"]
        field = ".".join(str(part) for part in where)
        if first["type"] == "json_invalid":
            return problem(
                HTTPStatus.UNPROCESSABLE_ENTITY, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}",
                field="body", remedy="send JSON as RFC 8259 has it, without NaN and infinities",
            )  # fmt: skip
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        return problem(
            HTTPStatus.UNPROCESSABLE_ENTITY, f"{first['msg']}{more}", field=field[:200],
            remedy="see /openapi.json for what is expected",
        )  # fmt: skip

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(SQLAlchemyError)
    async def storage(_request: Request, error: SQLAlchemyError) -> Response:
        # What the database said is for the log: it may hold SQL, values and addresses.
        log.error("the database refused", exc_info=error)
        if isinstance(error, DBAPIError | PoolTimeout):
            return problem(
                HTTPStatus.SERVICE_UNAVAILABLE, "the database did not answer, or was busy for too long",
                remedy="try again", headers={"Retry-After": str(RETRY_AFTER_S)},
            )  # fmt: skip
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the tables could not be used")

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, _error: Exception) -> Response:
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "something went wrong in the service; its log says what")


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return value


class _StrictRequest(Request):
    """A request whose body is JSON to the letter: Python's reader would let NaN and infinities in."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return json.loads(body, parse_constant=_reject_constant, parse_float=_finite)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    """A route that reads its body strictly."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class BodyLimit:
    """Refuses bodies larger than `most` bytes before they are held in memory."""

    def __init__(self, app: ASGIApp, most: int):
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = f"the body is larger than {self._most} bytes"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            response = problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large, remedy="ask in smaller batches")
            await response(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large)
            return message

        await self._app(scope, counted, send)
