"""Joules that one inference adds on the target, from the profiling service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lut_db.errors import InvalidInput
from lut_db.estimates import Estimate
from lut_db.networks import Network

if TYPE_CHECKING:
    from search_client.metrics import Estimates

UNIT = "J"
NEEDS_SERVICE = True


def costs(networks: Sequence[Network], service: Estimates | None) -> list[float | None]:
    """The sum of the operators' joules; None for a network whose operators cannot all be measured on the target.

    Raises InvalidInput that names the target and an operator where the device does not count its energy.
    """
    if service is None:
        raise InvalidInput("energy needs a profiling service", field="search.metric", remedy="give --server")
    return [
        _cost(network, estimate, service)
        for network, estimate in zip(networks, service.estimates(networks), strict=True)
    ]


def _cost(network: Network, estimate: Estimate, service: Estimates) -> float | None:
    if estimate.latency_ms is None or estimate.energy_j is not None:
        return estimate.energy_j
    for operator in network.operators:
        row = service.row(operator)
        if row is None or row.energy_j is None:
            break
    raise InvalidInput(
        f"target {service.pin.target} has no energy of {operator.kind} of {operator.inputs[0]} ({operator.key}), only "
        "its latency",
        field="search.metric",
        remedy="`device-agent doctor NAME` beside the device says why its energy is not counted; rows measured before "
        "it was are measured again by `lut-db remeasure --status measured`, for a new pin. Or search by latency",
    )
