"""Bodies of the HTTP interface, shared by the service, the search client and the agents.

A network goes over the wire as the keys of its operators. Definitions are sent only for operators that the
service may not know; it answers which it does not.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from lut_db.estimates import Correction, Estimate, OperatorRow
from lut_db.measurements import Evidence, Measurement, Milliseconds, Samples, Status, Stop, Value
from lut_db.networks import Network
from lut_db.operators import KEY_LENGTH, Operator
from lut_db.plans import WHOLE, Plan
from lut_db.targets import Device, Name, Target

API = "/v1"
MAX_WAIT_S = 60.0

Key = Annotated[str, Field(min_length=KEY_LENGTH, max_length=KEY_LENGTH, pattern=r"^[0-9a-f]+$")]
ShortKey = Annotated[str, Field(min_length=16, max_length=16, pattern=r"^[0-9a-f]+$")]
Wait = Annotated[float, Field(ge=0, le=MAX_WAIT_S)]


# --- agents ---------------------------------------------------------------------------------------------------


class DeviceState(Value):
    """A registered device. `state` is `ready`, `lost` (no heartbeat for a while) or `quarantined`, with the reason.

    `agreement` is, by target, the median ratio of reference operators measured on it to what the table said, for a
    device that came to a table which others had begun.
    """

    device: Device
    state: Literal["ready", "lost", "quarantined"]
    reason: str | None = None
    last_seen: datetime
    agreement: dict[ShortKey, float] = Field(default_factory=dict)


class LeaseRequest(Value):
    """Asks for work on one of a device's targets. Waits up to `wait_s` for it: 200 with a lease, or 204."""

    target: ShortKey
    max_operators: int = Field(default=128, ge=1, le=1024)
    wait_s: Wait = 30.0


class Lease(Value):
    """The right to measure these operators or networks on one device until `expires_in_s` have passed.

    `token` fences: it grows with every lease, and a report under a token that no longer holds changes nothing.
    `fillers` are operators already in the table: carriers are filled up with them, and they show drift, as
    `known_networks` do where whole networks are measured. `known_ms` is what the table says of both. `successions` says
    which operator, by its key, came right behind which in networks that were asked for, and `shortcuts` which made what
    another added there; those of them that are neither asked for here nor fillers are `neighbours`, which only stand
    beside others in carriers. `mean_parameters` are the weights that an operator has on average in those networks, None
    where none were told. `canary_ms` is the latency of the canary on which the target's tables are based, None until a
    first report has set it; `heavy_canary_ms` is that of the heavy canary, at the other's reference speed, None until a
    report of heavy graphs has set it, and for a device on trial.
    """

    token: int
    device: Name
    target: Target
    plan: Plan
    operators: tuple[Operator, ...] = ()
    networks: tuple[Network, ...] = ()
    fillers: tuple[Operator, ...] = ()
    successions: tuple[tuple[Key, Key], ...] = ()
    shortcuts: tuple[tuple[Key, Key], ...] = ()
    neighbours: tuple[Operator, ...] = ()
    mean_parameters: float | None = Field(default=None, ge=0)
    known_networks: tuple[Network, ...] = ()
    known_ms: dict[Key, float] = Field(default_factory=dict)
    canary_ms: float | None = Field(default=None, gt=0)
    heavy_canary_ms: float | None = Field(default=None, gt=0)
    expires_in_s: float


class Heartbeat(Value):
    """Answer to a heartbeat of a lease that still holds."""

    expires_in_s: float


class Report(Value):
    """The results of a lease: one measurement for each operator and network, and what was true around them.

    `canary_ms` is the latency of the canary to which the measurements were scaled: that of the lease, or, if it had
    none, the one measured with it, which becomes the target's. A report scaled to another one is not believed. So with
    `heavy_canary_ms`, where it was needed, at the canary's reference speed.
    """

    measurements: tuple[Measurement, ...]
    canary_ms: Milliseconds | None = None
    heavy_canary_ms: Milliseconds | None = None
    evidence: Evidence = Field(default_factory=dict)


class ReportOutcome(Value):
    """`accepted`, or nothing changed: `repeated` (this report came before) or `late` (the lease was lost)."""

    outcome: Literal["accepted", "repeated", "late"]
    rows: int = Field(description="rows written")
    requeued: int = Field(default=0, description="measurements that go back to the queue")


# --- tables ---------------------------------------------------------------------------------------------------


class PinRequest(Value):
    """Opens a view of one table, target and plan, that never changes under its reader."""

    target: ShortKey
    plan: Plan


class Pin(Value):
    """A pin. `snapshot` is its number once it is sealed."""

    id: int
    target: ShortKey
    plan: Plan
    rows: int = Field(default=0, description="rows frozen so far")
    correction: Correction | None = None
    snapshot: int | None = None


class LookupRequest(Value):
    """Asks what networks cost, each given as the keys of its operators in the order in which they run: what came behind
    what there also does where an operator is measured."""

    operators: dict[Key, Operator] = Field(default_factory=dict, max_length=20_000)
    networks: tuple[tuple[Key, ...], ...] = Field(min_length=1, max_length=4096)
    wait_s: Wait = 0.0


class Lookup(Value):
    """Answer to a lookup.

    Where `unknown` is not empty nothing was done: ask again with the definitions of these operators.
    """

    unknown: tuple[Key, ...] = ()
    operators: dict[Key, OperatorRow] = Field(default_factory=dict)
    networks: tuple[Estimate, ...] = ()
    correction: Correction | None = None
    enqueued: int = Field(default=0, description="operators that this request put into the queue")
    waiting_for: str | None = Field(default=None, description="why pending operators are not measured yet")


class NetworksRequest(Value):
    """Asks for whole networks to be measured, once each under this plan."""

    networks: tuple[Network, ...] = Field(min_length=1, max_length=256)
    plan: Plan = WHOLE
    wait_s: Wait = 0.0


class NetworksAnswer(Value):
    """The rows of whole networks, in the order asked."""

    networks: tuple[OperatorRow, ...]
    waiting_for: str | None = None


class CalibrationRequest(Value):
    """Asks for a correction of the table of `plan`, fitted on these networks measured whole under `whole`."""

    plan: Plan
    whole: Plan = WHOLE
    networks: tuple[Network, ...] = Field(min_length=5, max_length=256)


class CalibratedNetwork(Value):
    """One network of a calibration: the corrected estimate made by a fit that left it out, beside the measurement."""

    key: Key
    sum_ms: float
    left_out_ms: float
    measured_ms: float


class Calibration(Value):
    """A calibration. `state` is `measuring`, `fitted`, or `failed` with the message that says why."""

    id: int
    target: ShortKey
    plan: Plan
    state: Literal["measuring", "fitted", "failed"]
    pending: int = 0
    message: str | None = None
    correction: Correction | None = None
    networks: tuple[CalibratedNetwork, ...] = ()
    waiting_for: str | None = None


class Row(Value):
    """One revision of one operator or network in a table, without its raw samples."""

    id: int
    target: ShortKey
    plan: ShortKey
    key: Key
    kind: str
    revision: int
    status: Status
    latency_ms: float | None = None
    half_width_ms: float | None = None
    spread: float | None = None
    energy_j: float | None = None
    stop: Stop | None = None
    message: str | None = None
    device: Name
    measured_at: datetime


class RowDetail(Row):
    """One revision with its definition, raw samples and evidence."""

    definition: Annotated[Operator, Field()] | Network
    samples: tuple[Samples, ...] = ()
    evidence: Evidence = Field(default_factory=dict)


class Page(BaseModel):
    """One page of rows; `next` is the cursor of the following page."""

    rows: tuple[Row, ...]
    next: int | None = None


class TargetState(Value):
    """A target, how many rows its tables hold and how many measurements wait for it."""

    key: ShortKey
    target: Target
    devices: tuple[Name, ...]
    rows: int
    pending: int


class Problem(BaseModel):
    """An error, as `application/problem+json` (RFC 9457). `field` names what was wrong, `remedy` what to do."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = None
    remedy: str | None = None
