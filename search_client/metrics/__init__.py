"""Metrics: what a network costs. One file each; the name of the file is the metric's name in a recipe.

A metric is a module of this package with

    UNIT: str                      of its costs, as it is printed
    NEEDS_SERVICE: bool            whether it asks the profiling service
    costs(networks, service)       one cost for each network, None for one that has none

Its docstring's first line says what it counts. `service` is what gives estimates of latency and energy, or None.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lut_db.errors import InvalidInput
from lut_db.estimates import Estimate, OperatorRow
from lut_db.networks import Network
from lut_db.operators import Operator
from lut_db.wire import Pin


class Estimates(Protocol):
    """Something that estimates networks under a pin: the client of the service."""

    @property
    def pin(self) -> Pin: ...

    def estimates(self, networks: Sequence[Network]) -> list[Estimate]: ...

    def row(self, operator: Operator) -> OperatorRow | None: ...


@dataclass(frozen=True)
class Metric:
    """A metric that was found. `costs` gives one cost for each network, None for one that has none."""

    name: str
    unit: str
    description: str
    needs_service: bool
    costs: Callable[[Sequence[Network], Estimates | None], list[float | None]]


def names() -> list[str]:
    """The names of all metrics."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Metric:
    """The metric of this name. Raises InvalidInput where there is none."""
    # Only a name that the package lists is ever imported.
    if name not in names():
        raise InvalidInput(f"{name!r} is no metric", field="search.metric", remedy=f"one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Metric(
        name=name,
        unit=module.UNIT,
        description=(module.__doc__ or "").splitlines()[0],
        needs_service=module.NEEDS_SERVICE,
        costs=module.costs,
    )
