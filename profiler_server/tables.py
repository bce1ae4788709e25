"""Lookups over a session: what networks cost under a pin, and what whole networks were measured at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

from lut_db.errors import InvalidInput
from lut_db.estimates import OperatorRow, Traits, estimate
from lut_db.measurements import Status
from lut_db.networks import Network
from lut_db.operators import OPERATOR, Operator
from lut_db.plans import Plan
from lut_db.storage import models as m
from lut_db.storage import queries
from lut_db.wire import Lookup, LookupRequest, NetworksAnswer, Pin
from profiler_server.scheduling import beside
from profiler_server.settings import Settings
from profiler_server.waiting import waiting_for


def pin_of(session: Session, record: m.Pin) -> Pin:
    """A pin as it goes over the wire."""
    return Pin(
        id=record.id, target=record.target, plan=queries.read_plan(session, record.plan),
        rows=queries.count_pin_rows(session, record.id),
        correction=queries.read_correction(session, record.correction), snapshot=record.snapshot,
    )  # fmt: skip


def require_context(plan: Plan, *, whole: bool, field: str) -> None:
    """Raises InvalidInput unless `plan` measures whole networks, or operators, as asked."""
    if (plan.context == "whole") != whole:
        wanted = "'whole'" if whole else "'in_context' or 'isolated'"
        raise InvalidInput(
            f"this plan has context {plan.context!r}", field=f"{field}.context", remedy=f"give {wanted}"
        )  # fmt: skip


def check_definitions(operators: Mapping[str, Operator]) -> None:
    """Raises InvalidInput where a definition is not the one of its key."""
    for key, operator in operators.items():
        if operator.key != key:
            raise InvalidInput(
                f"this definition has the key {operator.key}", field=f"operators.{key}",
                remedy="send each operator under its own key, made by the same version of the vocabulary",
            )  # fmt: skip


def keys_of(request: LookupRequest) -> list[str]:
    """The distinct keys of a lookup, in the order in which they come first."""
    return list(dict.fromkeys(key for network in request.networks for key in network))


def read_lookup(
    session: Session, pin: m.Pin, request: LookupRequest, keys: Sequence[str], settings: Settings
) -> Lookup | None:
    """The answer to a lookup that changes nothing; None where something must be recorded, frozen or enqueued.

    A constant number of statements, however many networks and operators are asked for.
    """
    traits = queries.known_traits(session, keys)
    unknown = [key for key in keys if key not in traits]
    if unknown:
        undefined = tuple(key for key in unknown if key not in request.operators)
        return Lookup(unknown=undefined) if undefined else None
    rows = queries.frozen_rows(session, pin.id, keys)
    if pin.snapshot is None and (len(rows) < len(keys) or (not pin.correction_frozen and _tells(request, keys, rows))):
        return None
    return _answer(session, pin, request, rows, traits, settings)


def record_lookup(
    session: Session, pin: m.Pin, request: LookupRequest, keys: Sequence[str], settings: Settings, *, final: bool
) -> tuple[Lookup | None, int]:
    """Records definitions, freezes what the table holds and enqueues what it lacks.

    Returns the answer, and how many operators were put into the queue. Unless it is `final`, there is no answer
    while something is missing, and the correction stays open. The caller holds the pin.
    """
    queries.put_workloads(session, request.operators)
    traits = queries.known_traits(session, keys)
    unknown = tuple(key for key in keys if key not in traits)
    if unknown:
        return Lookup(unknown=unknown), 0
    enqueued = 0
    if pin.snapshot is None:
        queries.freeze_rows(session, pin, keys)
        rows = queries.frozen_rows(session, pin.id, keys)
        if len(rows) < len(keys):
            queries.lock_table(session, pin.target, pin.plan)
            queries.freeze_rows(session, pin, keys)
            rows = queries.frozen_rows(session, pin.id, keys)
            missing = [key for key in keys if key not in rows]
            enqueued = queries.enqueue(session, pin.target, pin.plan, missing, queries.clock(session))
            if enqueued:
                new = frozenset(missing)
                networks = _defined(session, [network for network in request.networks if not new.isdisjoint(network)])
                queries.put_beside(session, *beside(networks, new))
            if missing and not final:
                return None, enqueued
        if not pin.correction_frozen and _tells(request, keys, rows):
            queries.freeze_correction(session, pin)
    else:
        rows = queries.frozen_rows(session, pin.id, keys)
    return _answer(session, pin, request, rows, traits, settings), enqueued


def _defined(session: Session, networks: Sequence[Sequence[str]]) -> list[list[Operator]]:
    """Networks by the definitions of their operators."""
    definitions = queries.read_definitions(session, {key for network in networks for key in network})
    operators = {key: OPERATOR.validate_python(definition) for key, (_, definition) in definitions.items()}
    return [[operators[key] for key in network] for network in networks]


def _tells(request: LookupRequest, keys: Sequence[str], rows: Mapping[str, OperatorRow]) -> bool:
    """Whether an answer tells a latency that may be corrected: a network's or, where all is there, an operator's, which
    its reader may add up with others."""
    measured = {key for key, row in rows.items() if row.status is Status.MEASURED}
    all_there = len(rows) == len(keys)
    return bool(measured) and (all_there or any(net and measured.issuperset(net) for net in request.networks))


def _answer(
    session: Session, pin: m.Pin, request: LookupRequest, rows: Mapping[str, OperatorRow],
    traits: Mapping[str, Traits], settings: Settings,
) -> Lookup:  # fmt: skip
    told = dict(rows)
    missing = [key for key in traits if key not in told]
    waiting = None
    if missing and pin.snapshot is not None:
        told |= {key: OperatorRow(status=Status.MISSING) for key in missing}
    elif missing:
        told |= pending_rows(session, pin.target, pin.plan, missing)
        waiting = waiting_for(session, pin.target, settings)
    correction = queries.read_correction(session, pin.correction)
    return Lookup(
        operators=told, networks=tuple(estimate(network, told, traits, correction) for network in request.networks),
        correction=correction, waiting_for=waiting,
    )  # fmt: skip


def pending_rows(session: Session, target: str, plan: str, keys: Sequence[str]) -> dict[str, OperatorRow]:
    """What is said of workloads in the queue: that they are pending, and why they went back to it if they did."""
    failures = queries.last_failures(session, target, plan, keys)
    return {
        key: OperatorRow(
            status=Status.PENDING,
            message=f"{failures[key].cause}: {failures[key].message}" if key in failures else None,
        )
        for key in keys
    }


def ask_networks(session: Session, target: str, plan: Plan, networks: Mapping[str, Network]) -> None:
    """Puts whole networks without a row into the queue, once each."""
    queries.put_plan(session, plan)
    queries.put_workloads(session, networks)
    queries.lock_table(session, target, plan.key)
    queries.enqueue(session, target, plan.key, networks, queries.clock(session))


def answer_networks(
    session: Session, target: str, plan: Plan, keys: Sequence[str], settings: Settings
) -> NetworksAnswer:  # fmt: skip
    """The newest rows of whole networks, in the order asked; those still to come are pending."""
    rows = queries.newest_rows(session, target, plan.key, keys)
    missing = [key for key in dict.fromkeys(keys) if key not in rows]
    waiting = None
    if missing:
        rows |= pending_rows(session, target, plan.key, missing)
        waiting = waiting_for(session, target, settings)
    return NetworksAnswer(networks=tuple(rows[key] for key in keys), waiting_for=waiting)
