"""The tables. Latencies are append-only revisions; only the queue, leases and devices are ever changed in place.

targets ── device_targets ── devices          what a latency is a property of, and who can measure it
plans, workloads                              how to measure; operators and whole networks
rows ── evidence                              revisions of what the table says, with raw samples
pending ── leases                             the queue, and the right to measure a part of it
pins ── pin_rows ── rows                      views that never change under their reader
calibrations ── corrections                   from sums of operators to networks
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy import UniqueConstraint as Unique
from sqlalchemy import text as sql_text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

NETWORK = "network"
"""The kind of a workload that is a whole network; every other kind is an operator's."""


class Moment(TypeDecorator[datetime]):
    """A point in time, in UTC. Naive datetimes are refused: nobody knows what they mean."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone: give one, as in datetime.now(UTC)")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Id = BigInteger().with_variant(Integer(), "sqlite")
"""64 bits on both: SQLite numbers rows by itself only where the type is INTEGER, which holds 64 bits there."""


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: Moment(),
        float: Double(),
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
    }


class Target(Base):
    """What a latency is a property of. `canary_ms` is the latency of the canary to which its tables are scaled, and
    `heavy_canary_ms` that of the heavy canary, once a lease needed it."""

    __tablename__ = "targets"

    key: Mapped[str] = mapped_column(String(16), primary_key=True)
    definition: Mapped[dict[str, Any]]
    canary_ms: Mapped[float | None]
    heavy_canary_ms: Mapped[float | None]


class Device(Base):
    """A physical unit. `state` is `ready` or `quarantined`; whether it is lost follows from `last_seen`.

    `refusals` counts the leases refused because it was adrift or hot, since one was accepted.
    """

    __tablename__ = "devices"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    refusals: Mapped[int] = mapped_column(default=0, server_default="0")
    last_seen: Mapped[datetime]


class DeviceTarget(Base):
    """A target that a device can measure, in the order in which the device named them.

    `joined`: its figures go into the target's tables. `agreement` is the median of reference operators measured on
    it over what the table said, for a device that came to a table which others had begun.
    """

    __tablename__ = "device_targets"

    device: Mapped[str] = mapped_column(ForeignKey("devices.name"), primary_key=True)
    target: Mapped[str] = mapped_column(ForeignKey("targets.key"), primary_key=True, index=True)
    position: Mapped[int]
    joined: Mapped[bool] = mapped_column(default=False, server_default=sql_text("false"))
    agreement: Mapped[float | None]


class Plan(Base):
    """How to measure."""

    __tablename__ = "plans"

    key: Mapped[str] = mapped_column(String(16), primary_key=True)
    definition: Mapped[dict[str, Any]]


class Workload(Base):
    """What can be measured: an operator, or a whole network. `family` and `parameters` are what corrections ask of
    it, `mean_parameters` the weights that an operator has on average in the networks for which it was last put in a
    queue."""

    __tablename__ = "workloads"

    key: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), index=True)
    family: Mapped[str] = mapped_column(String(64))
    parameters: Mapped[int] = mapped_column(BigInteger)
    mean_parameters: Mapped[float | None]
    definition: Mapped[dict[str, Any]]


class Evidence(Base):
    """What was true around a lease: stored once, referenced by its rows."""

    __tablename__ = "evidence"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    definition: Mapped[dict[str, Any]]


class Lease(Base):
    """The right of one device to measure some workloads. The id grows with every lease: it is the fencing token.

    `rows` and `requeued` are the outcome of the accepted report, so that its repetition can be answered.
    `taken` says that it arrived: its device has sent a heartbeat.
    `reference` makes it a test of a device that wants to join: latencies in the table, in ms, by operator.
    """

    __tablename__ = "leases"
    __table_args__ = (
        Index(
            "uq_leases_device_active", "device", unique=True,
            sqlite_where=sql_text("state = 'active'"), postgresql_where=sql_text("state = 'active'"),
        ),
        Index("ix_leases_state_deadline", "state", "deadline"),
        {"sqlite_autoincrement": True},
    )  # fmt: skip

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.name"))
    target: Mapped[str] = mapped_column(ForeignKey("targets.key"))
    plan: Mapped[str] = mapped_column(ForeignKey("plans.key"))
    state: Mapped[str] = mapped_column(String(16))
    granted_at: Mapped[datetime]
    deadline: Mapped[datetime]
    taken: Mapped[bool] = mapped_column(default=False, server_default=sql_text("false"))
    reference: Mapped[dict[str, Any] | None]
    rows: Mapped[int] = mapped_column(default=0)
    requeued: Mapped[int] = mapped_column(default=0)


class Succession(Base):
    """That one operator came right behind another in a network that was asked for, or added what that had made: what
    carriers are made like."""

    __tablename__ = "successions"

    before: Mapped[str] = mapped_column(ForeignKey("workloads.key"), primary_key=True)
    after: Mapped[str] = mapped_column(ForeignKey("workloads.key"), primary_key=True, index=True)
    shortcut: Mapped[bool] = mapped_column(primary_key=True)


class Row(Base):
    """One revision of what the table of a target and plan says of a workload. Never changed, never deleted.

    `device` is a name, not a reference: rows of an imported snapshot were measured by devices of another lab.
    """

    __tablename__ = "rows"
    __table_args__ = (
        Unique("target", "plan", "workload", "revision"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    target: Mapped[str] = mapped_column(ForeignKey("targets.key"))
    plan: Mapped[str] = mapped_column(ForeignKey("plans.key"))
    workload: Mapped[str] = mapped_column(ForeignKey("workloads.key"))
    revision: Mapped[int]
    status: Mapped[str] = mapped_column(String(16))
    latency_ms: Mapped[float | None]
    half_width_ms: Mapped[float | None]
    spread: Mapped[float | None]
    energy_j: Mapped[float | None]
    stop: Mapped[str | None] = mapped_column(String(16))
    samples: Mapped[list[Any]] = mapped_column(deferred=True)
    failure: Mapped[dict[str, Any] | None]
    evidence: Mapped[int | None] = mapped_column(ForeignKey("evidence.id"))
    device: Mapped[str] = mapped_column(String(64))
    lease: Mapped[int | None] = mapped_column(ForeignKey("leases.id"))
    measured_at: Mapped[datetime]


class Pending(Base):
    """A measurement that somebody waits for: at most one for each target, plan and workload, however many ask.

    `failed_on` is the device on which it was tried last and failed; another one is to try it next.
    """

    __tablename__ = "pending"
    __table_args__ = (
        Unique("target", "plan", "workload"),
        Index("ix_pending_target_lease_not_before", "target", "lease", "not_before"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    target: Mapped[str] = mapped_column(ForeignKey("targets.key"))
    plan: Mapped[str] = mapped_column(ForeignKey("plans.key"))
    workload: Mapped[str] = mapped_column(ForeignKey("workloads.key"))
    lease: Mapped[int | None] = mapped_column(ForeignKey("leases.id"), index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[datetime]
    enqueued_at: Mapped[datetime]
    last_failure: Mapped[dict[str, Any] | None]
    failed_on: Mapped[str | None] = mapped_column(String(64))


class Correction(Base):
    """One revision of the map from sums of operators to networks, for a target and plan."""

    __tablename__ = "corrections"
    __table_args__ = (
        Unique("target", "plan", "revision"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    target: Mapped[str] = mapped_column(ForeignKey("targets.key"))
    plan: Mapped[str] = mapped_column(ForeignKey("plans.key"))
    revision: Mapped[int]
    definition: Mapped[dict[str, Any]]
    fitted_at: Mapped[datetime]


class Pin(Base):
    """A view of one table. `snapshot` is its number once sealed; a sealed pin never changes."""

    __tablename__ = "pins"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    target: Mapped[str] = mapped_column(ForeignKey("targets.key"))
    plan: Mapped[str] = mapped_column(ForeignKey("plans.key"))
    correction: Mapped[int | None] = mapped_column(ForeignKey("corrections.id"))
    correction_frozen: Mapped[bool] = mapped_column(default=False)
    snapshot: Mapped[int | None] = mapped_column(Id, unique=True)
    opened_at: Mapped[datetime]


class PinRow(Base):
    """The revision that a pin read first."""

    __tablename__ = "pin_rows"

    pin: Mapped[int] = mapped_column(ForeignKey("pins.id"), primary_key=True)
    workload: Mapped[str] = mapped_column(ForeignKey("workloads.key"), primary_key=True)
    row: Mapped[int] = mapped_column(ForeignKey("rows.id"))


class Calibration(Base):
    """A request for a correction. `key` is the hash of the request: asked twice, it is one calibration.

    `networks` and `operators` are the keys of what it needs; `left_out` is what the fit says of each network.
    """

    __tablename__ = "calibrations"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(Id, primary_key=True, autoincrement=True)
    key: Mapped[str] = mapped_column(String(32), unique=True)
    target: Mapped[str] = mapped_column(ForeignKey("targets.key"))
    plan: Mapped[str] = mapped_column(ForeignKey("plans.key"))
    whole: Mapped[str] = mapped_column(ForeignKey("plans.key"))
    networks: Mapped[list[Any]]
    operators: Mapped[list[Any]]
    state: Mapped[str] = mapped_column(String(16), index=True)
    message: Mapped[str | None] = mapped_column(Text)
    correction: Mapped[int | None] = mapped_column(ForeignKey("corrections.id"))
    left_out: Mapped[list[Any] | None]
    asked_at: Mapped[datetime]
