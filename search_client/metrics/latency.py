"""Latency in ms of one inference on the target, from the profiling service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lut_db.errors import InvalidInput
from lut_db.networks import Network

if TYPE_CHECKING:
    from search_client.metrics import Estimates

UNIT = "ms"
NEEDS_SERVICE = True


def costs(networks: Sequence[Network], service: Estimates | None) -> list[float | None]:
    """Corrected milliseconds; None for a network whose operators cannot all be measured on the target."""
    if service is None:
        raise InvalidInput("latency needs a profiling service", field="search.metric", remedy="give --server")
    return [estimate.latency_ms for estimate in service.estimates(networks)]
