"""A small HTTP server that answers like the profiling service, from a table that is a formula, and breaks on demand.

For tests of how the client behaves when the network or the service misbehaves, which the real service must not do.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.base import BaseHTTPMiddleware

from lut_db.estimates import Correction, Fit, OperatorRow
from lut_db.measurements import Status
from lut_db.networks import Network
from lut_db.operators import BaseOperator, Operator
from lut_db.plans import IN_CONTEXT
from lut_db.targets import Target
from lut_db.wire import (
    Calibration,
    CalibrationRequest,
    Lookup,
    LookupRequest,
    NetworksAnswer,
    NetworksRequest,
    Pin,
    PinRequest,
    TargetState,
)

TARGET = Target(device_model="formula", os_build="none", runtime="formula", runtime_version="1")
CORRECTION = Correction(
    scale=1.1,
    scales={"linear": 2.0},
    growth=0.1,
    typical_ms=0.2,
    offset_ms=0.5,
    cached_parameters=100,
    spill_ms=50.0,
    kept_ms=0.1,
    eviction=20.0,
    relative_half_width=0.04,
    left_out=Fit(
        networks=12, mean_error=0.01, max_error=0.03, within_5_percent=1, within_10_percent=1, rank_correlation=1
    ),
)


def latency_ms(operator: BaseOperator | Network) -> float:
    """The table: a little for every operator, and the rest by its multiply-accumulates."""
    return 0.01 + operator.macs_with_elementwise / 1e6


@dataclass
class Table:
    """What the server knows and how it shall misbehave."""

    known: dict[str, Operator] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    corrected: bool = True
    per_poll: int = 10_000
    """How many pending operators are measured by one waiting lookup."""
    failing: set[str] = field(default_factory=set)
    """Kinds that no device can run."""
    stuck: bool = False
    faults: list[int | str] = field(default_factory=list)
    """What the next requests meet instead of an answer: a status, `drop`, `garbage`, or `-` for nothing."""
    requests: list[tuple[str, Any]] = field(default_factory=list)
    definitions: int = 0
    calibrations: int = 0
    pending: int = 0
    """Operators of the last calibration that were not measured when it was asked for."""
    whole: set[str] = field(default_factory=set)
    pins: set[int] = field(default_factory=set)
    """Pins that outlive the client that opened them."""

    def row(self, key: str) -> OperatorRow:
        if self.known[key].kind in self.failing:
            return OperatorRow(status=Status.FAILED, message="the runtime does not know this operator")
        if key not in self.measured:
            return OperatorRow(status=Status.PENDING)
        return OperatorRow(status=Status.MEASURED, latency_ms=latency_ms(self.known[key]), row=1)


class Faults(BaseHTTPMiddleware):
    def __init__(self, app: Any, table: Table) -> None:
        super().__init__(app)
        self.table = table

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        fault = self.table.faults.pop(0) if self.table.faults else "-"
        if fault == "-":
            answer: Response = await call_next(request)
            return answer
        if fault == "drop":
            # A body shorter than announced: the connection breaks in the middle of the answer.
            return Response(content=b"{", headers={"content-length": "1000"})
        if fault == "garbage":
            return PlainTextResponse("<html>a captive portal</html>")
        if fault == 422:
            problem = {
                "title": "Unprocessable", "status": 422, "detail": "kernel is even", "field": "kernel",
                "remedy": "give an odd one",
            }  # fmt: skip
            return JSONResponse(problem, 422, media_type="application/problem+json")
        return PlainTextResponse("upstream is away", int(fault))


def make_app(table: Table) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Faults, table=table)

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {}

    @app.get("/v1/targets")
    def targets() -> list[TargetState]:
        return [TargetState(key=TARGET.key, target=TARGET, devices=("formula",), rows=len(table.measured), pending=0)]

    @app.post("/v1/pins", status_code=201)
    def open_pin(request: PinRequest) -> Pin:
        return Pin(id=1, target=request.target, plan=request.plan)

    @app.get("/v1/pins/{number}")
    def get_pin(number: int) -> Response:
        if number in table.pins:
            pin = Pin(id=number, target=TARGET.key, plan=IN_CONTEXT, correction=CORRECTION)
            return JSONResponse(pin.model_dump(mode="json"))
        problem = {"title": "Not Found", "status": 404, "detail": f"no pin {number}", "field": "pin"}
        return JSONResponse(problem, 404, media_type="application/problem+json")

    @app.post("/v1/pins/{number}/lookup")
    def lookup(number: int, request: LookupRequest) -> Lookup:
        table.requests.append(("lookup", request))
        table.definitions += len(request.operators)
        for key, operator in request.operators.items():
            assert operator.key == key
            table.known[key] = operator
        keys = list(dict.fromkeys(key for network in request.networks for key in network))
        unknown = tuple(key for key in keys if key not in table.known)
        if unknown:
            return Lookup(unknown=unknown)
        pending = [key for key in keys if table.row(key).status is Status.PENDING]
        if request.wait_s and not table.stuck:
            table.measured.update(pending[: table.per_poll])
        return Lookup(
            operators={key: table.row(key) for key in keys},
            correction=CORRECTION if table.corrected else None,
            waiting_for="no agent is there" if table.stuck else "the device is busy",
        )

    @app.post("/v1/targets/{target}/networks")
    def networks(target: str, request: NetworksRequest) -> NetworksAnswer:
        table.requests.append(("networks", request))
        if request.wait_s and not table.stuck:
            table.whole.update(network.key for network in request.networks)
        return NetworksAnswer(
            networks=tuple(
                OperatorRow(status=Status.MEASURED, latency_ms=latency_ms(network), half_width_ms=0.001)
                if network.key in table.whole
                else OperatorRow(status=Status.PENDING)
                for network in request.networks
            ),
            waiting_for="no agent is there" if table.stuck else None,
        )

    @app.post("/v1/targets/{target}/calibrations", status_code=202)
    def calibrate(target: str, request: CalibrationRequest) -> Calibration:
        table.calibrations = len(request.networks)
        operators = {one.key: one for network in request.networks for one in network.operators}
        table.pending = len(operators.keys() - table.measured)
        if not table.stuck:
            table.known |= operators
            table.measured |= operators.keys()
        return Calibration(id=7, target=target, plan=request.plan, state="measuring", pending=table.pending)

    @app.get("/v1/calibrations/{number}")
    def calibration(number: int, request: Request) -> Calibration:
        common = {"id": number, "target": TARGET.key, "plan": IN_CONTEXT}
        if table.stuck:
            return Calibration(**common, state="measuring", pending=table.pending, waiting_for="no agent is there")
        if not table.corrected:
            return Calibration(**common, state="failed", message="the networks are all alike")
        return Calibration(**common, state="fitted", correction=CORRECTION)

    return app


@contextlib.contextmanager
def serve(table: Table) -> Iterator[str]:
    """The URL of a running server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(make_app(table), log_level="critical", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
