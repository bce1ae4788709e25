"""The client of the profiling service: what networks cost on a target, asked for once and kept.

LatencyLabError
└── ServiceError                  something between this client and the service
    ├── ServiceUnavailable        the service gave no answer, for as long as the patience lasted
    ├── AnswerNotUnderstood       it answered, but not in the words of this version
    ├── StillPending              measurements were waited for in vain; says which, and why
    ├── ServiceFault              it failed on this request (5xx)
    └── RequestRefused            it refused this request (4xx); field and remedy are the service's
        ├── UnknownRecord         404, also a NotFound
        ├── Contradicted          409, also a Conflict
        └── BadRequest            400 and 422, also an InvalidInput

Rows and the correction of a pin never change, so they are kept in memory and networks are added up here: only
operators that were never asked for go over the wire, with their definitions only if the service does not know
them. Every request may be repeated without harm and is, with growing, jittered pauses, when a connection breaks.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from lut_db.errors import Conflict, InvalidInput, LatencyLabError, NotFound
from lut_db.estimates import Correction, Estimate, OperatorRow, Traits, estimate
from lut_db.measurements import Status
from lut_db.networks import Network
from lut_db.operators import Operator
from lut_db.plans import WHOLE, Plan
from lut_db.wire import (
    API,
    Calibration,
    CalibrationRequest,
    Lookup,
    LookupRequest,
    NetworksAnswer,
    NetworksRequest,
    Pin,
    PinRequest,
    Problem,
    TargetState,
)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
POLL_S = 5.0
"""How long one request waits for measurements: short enough for a progress bar to move."""
ANSWER_S = 60.0
"""How long an answer may take beyond the time that the request asked the service to wait."""
OPERATORS_PER_REQUEST = 2000
NETWORKS_PER_REQUEST = 64
NETWORKS_PER_LOOKUP = 512
NETWORKS_PER_OPERATOR = 4
"""Networks in which an operator that is not measured yet is told: enough to show what it may stand beside."""

RETRIED = frozenset({502, 503, 504})

Answer = TypeVar("Answer", bound=BaseModel)


class ServiceError(LatencyLabError):
    """The profiling service could not be used."""


class ServiceUnavailable(ServiceError):
    """The profiling service does not answer."""


class AnswerNotUnderstood(ServiceError):
    """The profiling service gave an answer that this version does not understand."""


class StillPending(ServiceError):
    """Measurements did not arrive."""


class ServiceFault(ServiceError):
    """The profiling service failed on this request."""


class RequestRefused(ServiceError):
    """The profiling service refused this request."""


class UnknownRecord(RequestRefused, NotFound):
    """The profiling service has no such record."""


class Contradicted(RequestRefused, Conflict):
    """The request contradicts what the profiling service has recorded."""


class BadRequest(RequestRefused, InvalidInput):
    """The profiling service found the request invalid."""


@dataclass(frozen=True)
class Waiting:
    """What is being waited for: `pending` of `total` `things` are not measured yet; `reason` is the service's."""

    things: str
    pending: int
    total: int
    reason: str | None = None


@dataclass
class Counters:
    """What a client asked for and what came of it.

    `lookups` counts the operators of all networks estimated, each as often as it occurs; `operators` the distinct
    ones among them, `measured` those that had to be measured because of this client; `calibrated` are operators that
    had to be measured for a calibration. `requests` are HTTP requests, repeated ones (`retries`) included.
    """

    networks: int = 0
    lookups: int = 0
    operators: int = 0
    measured: int = 0
    calibrated: int = 0
    failed: int = 0
    whole_networks: int = 0
    whole_networks_measured: int = 0
    requests: int = 0
    retries: int = 0

    @property
    def answered_without_measuring(self) -> int:
        """Lookups answered from the table or from memory: all but the first one of each operator measured."""
        return self.lookups - self.measured

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class ProfilerClient:
    """Speaks with one service, about one pin at a time.

    >>> with ProfilerClient("http://127.0.0.1:8000") as client:
    ...     client.open_pin(client.targets()[0].key, IN_CONTEXT)
    ...     client.estimates([network])

    `patience_s` is how long measurements may stand still, `service_patience_s` how long the service may be away,
    before an error tells so. `progress` is called whenever something is waited for. `still_there` is called before
    a request is repeated and may raise a better explanation than this client has.
    """

    def __init__(
        self,
        base_url: str,
        *,
        patience_s: float = 900.0,
        service_patience_s: float = 60.0,
        poll_s: float = POLL_S,
        progress: Callable[[Waiting], None] | None = None,
        still_there: Callable[[], None] | None = None,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise InvalidInput(f"{base_url!r}: {error}", field="server") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidInput(f"{base_url!r} is no URL of a service", field="server", remedy="like http://lab:8000")
        self.base_url = str(url).rstrip("/")
        self.counters = Counters()
        self.progress = progress
        self.waited_s = 0.0
        """Seconds spent waiting for measurements, all in all."""
        self._patience_s = patience_s
        self._service_patience_s = service_patience_s
        self._poll_s = poll_s
        self._still_there = still_there
        self._jitter = random.Random()  # of its own: a search's random numbers must not depend on retries
        # A proxy from the environment has no business between two processes of one machine.
        self._http = httpx.Client(
            base_url=self.base_url, timeout=ANSWER_S, trust_env=url.host not in ("127.0.0.1", "localhost", "::1")
        )
        self._pin: Pin | None = None
        self._correction: Correction | None = None
        self._rows: dict[str, OperatorRow] = {}
        self._traits: dict[str, Traits] = {}

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- targets and pins -------------------------------------------------------------------------------------

    def targets(self) -> list[TargetState]:
        """Every target that the service knows."""
        return self._read(TypeAdapter(list[TargetState]), self._send("GET", f"{API}/targets"))

    def open_pin(self, target: str, plan: Plan) -> Pin:
        """Opens a pin on a target's table and reads under it from now on."""
        return self._take(self._post(f"{API}/pins", PinRequest(target=target, plan=plan), Pin))

    def use_pin(self, number: int) -> Pin:
        """Goes on with a pin that was opened before: what it has read it reads again. Raises UnknownRecord."""
        return self._take(self._get(f"{API}/pins/{number}", Pin))

    def seal(self) -> Pin:
        """Makes what the pin has read a numbered snapshot that nothing changes any more."""
        return self._post(f"{API}/pins/{self.pin.id}/seal", None, Pin)

    @property
    def pin(self) -> Pin:
        if self._pin is None:
            raise InvalidInput("no pin is open", field="pin", remedy="call open_pin or use_pin first")
        return self._pin

    @property
    def correction(self) -> Correction | None:
        """The correction of the pin, as far as it was read: see `estimates`."""
        return self._correction

    @property
    def failures(self) -> dict[str, str]:
        """Why there is no latency, by key, of every operator that failed."""
        failed = {key: row.message for key, row in self._rows.items() if row.status is Status.FAILED}
        return {key: message or "no reason given" for key, message in failed.items()}

    def row(self, operator: Operator) -> OperatorRow | None:
        """What the pin says of an operator, latency and energy; None where no estimate has asked for it."""
        return self._rows.get(operator.key)

    def _take(self, pin: Pin) -> Pin:
        if self._pin is None or self._pin.id != pin.id:
            self._rows.clear()
        self._pin, self._correction = pin, pin.correction
        return pin

    # --- estimates --------------------------------------------------------------------------------------------

    def estimates(self, networks: Sequence[Network]) -> list[Estimate]:
        """What these networks cost under the pin, in order, once everything they lack is measured.

        A network has a latency only if each of its operators has: one that failed makes it `failed`, one that a
        sealed pin does not hold makes it `missing`. Raises StillPending when measurements stand still.
        """
        definitions: dict[str, Operator] = {}
        keys: list[list[str]] = []
        for network in networks:
            keys.append([operator.key for operator in network.operators])
            definitions.update(zip(keys[-1], network.operators, strict=True))
        self._traits.update((key, Traits.of(operator)) for key, operator in definitions.items())
        lacking = {key: operator for key, operator in definitions.items() if key not in self._rows}
        self.counters.networks += len(networks)
        self.counters.lookups += sum(map(len, keys))
        self.counters.operators += len(lacking)
        self._learn(lacking, keys, definitions)
        return [estimate(network, self._rows, self._traits, self._correction) for network in keys]

    def _learn(
        self, lacking: Mapping[str, Operator], networks: Sequence[Sequence[str]], definitions: Mapping[str, Operator]
    ) -> None:
        """Reads the rows of operators that were never asked for, and waits for those that must be measured.

        They are asked for in networks that they are in: the service has them measured beside what they stand beside.
        """
        pending: dict[str, Operator] = {}
        for some in _told(networks, lacking):
            answer = self._lookup(some, definitions, wait_s=0.0)
            asked = dict.fromkeys(key for network in some for key in network if key in lacking)
            pending.update({key: lacking[key] for key in self._keep(asked, answer)})
        if pending:
            with self._waiting():
                self._await(pending)

    def _await(self, pending: dict[str, Operator]) -> None:
        """Reads the rows of these operators until none is pending."""
        total = len(pending)
        patience = _Patience(self._patience_s)
        while pending:
            some = list(pending)[:OPERATORS_PER_REQUEST]
            answer = self._lookup([some], pending, wait_s=self._poll_s)
            still = set(self._keep(some, answer))
            measured = [key for key in some if key not in still]
            self.counters.measured += len(measured)
            for key in measured:
                del pending[key]
            self._tell(Waiting("operators", len(pending), total, answer.waiting_for if pending else None))
            if pending and patience.out(len(pending)):
                raise self._pending(list(pending.values()), answer.waiting_for)

    def _lookup(
        self, networks: Sequence[Sequence[str]], operators: Mapping[str, Operator], wait_s: float
    ) -> Lookup:  # fmt: skip
        """One lookup of these networks; definitions go along only if the service asks for them."""
        request = LookupRequest(networks=tuple(map(tuple, networks)), wait_s=wait_s)
        path = f"{API}/pins/{self.pin.id}/lookup"
        answer = self._post(path, request, Lookup, wait_s)
        if answer.unknown:
            request = request.model_copy(update={"operators": {key: operators[key] for key in answer.unknown}})
            answer = self._post(path, request, Lookup, wait_s)
            if answer.unknown:
                raise AnswerNotUnderstood(
                    f"{self.base_url} does not recognise operators whose definitions it was just sent",
                    remedy="install the same version of latency-lab on both sides",
                )
        return answer

    def _keep(self, asked: Iterable[str], answer: Lookup) -> list[str]:
        """Keeps the rows that will not change any more; the keys that are still pending come back."""
        if answer.correction is not None:
            self._correction = answer.correction
        pending = []
        for key in asked:
            row = answer.operators.get(key)
            if row is None:
                raise AnswerNotUnderstood(f"{self.base_url} left operator {key} out of its answer")
            if row.status is Status.PENDING:
                pending.append(key)
                continue
            if row.status is Status.MEASURED and row.latency_ms is None:
                raise AnswerNotUnderstood(f"{self.base_url} calls operator {key} measured, but gives no latency")
            self._rows[key] = row
            self.counters.failed += row.status is Status.FAILED
        return pending

    def _pending(self, operators: Sequence[Operator], reason: str | None) -> StillPending:
        kinds: dict[str, int] = {}
        for operator in operators:
            kinds[operator.kind] = kinds.get(operator.kind, 0) + 1
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        first = operators[0]
        return StillPending(
            f"no measurement arrived in {self._patience_s:.0f} s; pending on target {self.pin.target}: {what}; "
            f"the first is {first.kind} of {first.inputs[0]} ({first.key}); "
            f"the service says: {reason or 'nothing'}",
            remedy=self._agent_remedy,
        )

    @property
    def _agent_remedy(self) -> str:
        return f"see that an agent of this target runs: device-agent BACKEND --server {self.base_url}"

    # --- whole networks ---------------------------------------------------------------------------------------

    def measure_networks(
        self, networks: Sequence[Network], plan: Plan = WHOLE, target: str | None = None
    ) -> list[OperatorRow]:
        """The rows of whole networks measured on the device, in order; the pin's target unless another is named.

        A network that could not be measured has status `failed` and no latency.
        """
        target = target or self.pin.target
        rows: list[OperatorRow] = []
        with self._waiting():
            for some in _chunks(list(networks), NETWORKS_PER_REQUEST):
                rows += self._measure(some, plan, target)
        self.counters.whole_networks += len(networks)
        return rows

    def _measure(self, networks: list[Network], plan: Plan, target: str) -> tuple[OperatorRow, ...]:
        """One request's worth of whole networks."""
        path = f"{API}/targets/{target}/networks"
        patience = _Patience(self._patience_s)
        unmeasured: int | None = None
        while True:
            wait_s = 0.0 if unmeasured is None else self._poll_s
            request = NetworksRequest(networks=tuple(networks), plan=plan, wait_s=wait_s)
            answer = self._post(path, request, NetworksAnswer, wait_s)
            if len(answer.networks) != len(networks):
                raise AnswerNotUnderstood(
                    f"{self.base_url} answered {len(answer.networks)} of {len(networks)} networks"
                )
            pending = sum(row.status is Status.PENDING for row in answer.networks)
            if unmeasured is None:
                unmeasured = pending
            if pending or unmeasured:
                self._tell(Waiting("networks", pending, unmeasured, answer.waiting_for if pending else None))
            if not pending:
                self.counters.whole_networks_measured += unmeasured
                return answer.networks
            if patience.out(pending):
                raise StillPending(
                    f"{pending} of {len(networks)} whole networks were not measured on target {target} in "
                    f"{self._patience_s:.0f} s; the service says: {answer.waiting_for or 'nothing'}",
                    remedy=self._agent_remedy,
                )

    def calibrate(self, networks: Sequence[Network], whole: Plan = WHOLE) -> Calibration:
        """Has a correction of the pin's table fitted on these networks (5 to 256), measured whole.

        Raises ServiceFault with the reason where no correction could be fitted.
        """
        request = CalibrationRequest(plan=self.pin.plan, whole=whole, networks=tuple(networks))
        self.measure_networks(networks, whole)  # what then is pending are operators
        with self._waiting():
            return self._calibrate(request)

    def _calibrate(self, request: CalibrationRequest) -> Calibration:
        answer = self._post(f"{API}/targets/{self.pin.target}/calibrations", request, Calibration)
        total = answer.pending
        patience = _Patience(self._patience_s)
        while answer.state == "measuring":
            answer = self._get(f"{API}/calibrations/{answer.id}", Calibration, self._poll_s)
            total = max(total, answer.pending)
            self._tell(Waiting("operators", answer.pending, total, answer.waiting_for))
            if answer.state == "measuring" and patience.out(answer.pending):
                raise StillPending(
                    f"calibration {answer.id} waits for {answer.pending} measurements on target {answer.target} "
                    f"since {self._patience_s:.0f} s; the service says: {answer.waiting_for or 'nothing'}",
                    remedy=self._agent_remedy,
                )
        self.counters.calibrated += total
        if answer.state == "failed" or answer.correction is None:
            raise ServiceFault(
                f"calibration {answer.id} failed: {answer.message or 'no reason given'}",
                remedy="a recipe with calibration: {networks: 0} does without a correction",
            )
        return answer

    # --- the wire ---------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the service is there and can work, asked once."""
        try:
            return self._http.get("/readyz", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - begin

    def _tell(self, waiting: Waiting) -> None:
        if self.progress is not None:
            self.progress(waiting)

    def _get(self, path: str, answer: type[Answer], wait_s: float = 0.0) -> Answer:
        params = {"wait_s": wait_s} if wait_s else None
        return self._read(TypeAdapter(answer), self._send("GET", path, params=params, wait_s=wait_s))

    def _post(self, path: str, body: BaseModel | None, answer: type[Answer], wait_s: float = 0.0) -> Answer:
        content = body.model_dump_json().encode() if body is not None else None
        return self._read(TypeAdapter(answer), self._send("POST", path, content=content, wait_s=wait_s))

    def _read(self, adapter: TypeAdapter[Any], response: httpx.Response) -> Any:
        try:
            return adapter.validate_json(response.content)
        except ValidationError as error:
            raise AnswerNotUnderstood(
                f"{response.request.method} {response.request.url}: {_first(error)}",
                remedy="is this a profiler-server, and of the same version as this client?",
            ) from error

    def _send(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        params: dict[str, float] | None = None,
        wait_s: float = 0.0,
    ) -> httpx.Response:
        """Sends one request until it is answered, for as long as the service's patience lasts."""
        headers = {"content-type": "application/json"} if content is not None else None
        deadline = time.monotonic() + self._service_patience_s
        attempts = 0
        while True:
            attempts += 1
            self.counters.requests += 1
            try:
                response = self._http.request(
                    method, path, content=content, params=params, headers=headers, timeout=ANSWER_S + wait_s
                )
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code not in RETRIED:
                    if response.is_success:
                        return response
                    raise self._refusal(response)
                trouble = f"status {response.status_code}: {_problem(response).detail}"
            if self._still_there is not None:
                self._still_there()
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempts - 1, 10)) * self._jitter.uniform(0.5, 1.0)
            if time.monotonic() + pause > deadline:
                raise ServiceUnavailable(
                    f"{self.base_url} did not answer {method} {path}: {attempts} attempts in "
                    f"{self._service_patience_s:.0f} s, the last ended with {trouble}",
                    field="server",
                    remedy="start a service with `profiler-server`, correct --server, or leave --server out: "
                    "a service of its own is then started",
                )
            self.counters.retries += 1
            time.sleep(pause)

    def _refusal(self, response: httpx.Response) -> ServiceError:
        problem = _problem(response)
        if response.status_code >= 500:
            return ServiceFault(f"{self.base_url}: {problem.detail}", field=problem.field, remedy=problem.remedy)
        causes: dict[int, type[RequestRefused]] = {
            400: BadRequest, 404: UnknownRecord, 409: Contradicted, 422: BadRequest,
        }  # fmt: skip
        cause = causes.get(response.status_code, RequestRefused)
        return cause(problem.detail, field=problem.field, remedy=problem.remedy)


class _Patience:
    """Runs out when a count has not fallen for a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._least: int | None = None
        self._since = time.monotonic()

    def out(self, count: int) -> bool:
        now = time.monotonic()
        if self._least is None or count < self._least:
            self._least, self._since = count, now
        return now - self._since > self._seconds


def _problem(response: httpx.Response) -> Problem:
    """The error that a response tells, also where something in between answered for the service."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        text = response.text.strip().splitlines()
        return Problem(
            title=response.reason_phrase,
            status=response.status_code,
            detail=f"{response.request.method} {response.request.url}: {response.status_code} "
            f"{response.reason_phrase}" + (f": {text[0][:200]}" if text else ""),
        )


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"


def _told(networks: Sequence[Sequence[str]], lacking: Collection[str]) -> Iterator[list[Sequence[str]]]:
    """Those of these networks that tell where operators stand, some for each that is lacking, by requests."""
    told: Counter[str] = Counter()
    some: list[Sequence[str]] = []
    asked: set[str] = set()
    for network in networks:
        if any(key in lacking and told[key] < NETWORKS_PER_OPERATOR for key in network):
            told.update(set(network))
            some.append(network)
            asked.update(network)
        if len(asked) >= OPERATORS_PER_REQUEST or len(some) >= NETWORKS_PER_LOOKUP:
            yield some
            some, asked = [], set()
    if some:
        yield some


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
