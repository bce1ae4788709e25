"""Every metric, found by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lut_db.errors import InvalidInput
from lut_db.estimates import Estimate, OperatorRow
from lut_db.measurements import Status
from lut_db.networks import Network
from lut_db.operators import Convolution, Operator, SqueezeExcite
from lut_db.plans import IN_CONTEXT
from lut_db.wire import Pin
from search_client import metrics

NETWORKS = [
    Network.of(Convolution(input=(1, 3, 8, 8), filters=8, kernel=(3, 3))),
    Network.of(SqueezeExcite(input=(1, 16, 4, 4), squeeze=8)),
]


class Service:
    """Estimates the first network only."""

    def __init__(self, energy_j: float | None = 2e-3) -> None:
        self.pin = Pin(id=1, target="0" * 16, plan=IN_CONTEXT)
        self.energy_j = energy_j

    def row(self, operator: Operator) -> OperatorRow:
        return OperatorRow(status=Status.MEASURED, latency_ms=1.4, energy_j=self.energy_j)

    def estimates(self, networks: Sequence[Network]) -> list[Estimate]:
        known = Estimate(status=Status.MEASURED, latency_ms=1.5, sum_ms=1.4, energy_j=self.energy_j)
        return [known if network == NETWORKS[0] else Estimate(status=Status.FAILED) for network in networks]


@pytest.mark.parametrize("name", metrics.names())
def test_a_metric_gives_one_cost_for_each_network(name: str) -> None:
    metric = metrics.load(name)
    assert metric.name == name
    assert metric.unit
    assert metric.description
    costs = metric.costs(NETWORKS, Service())
    assert len(costs) == 2
    assert costs[0] is not None
    assert costs[0] > 0
    assert metric.costs([], Service()) == []
    if metric.needs_service:
        with pytest.raises(InvalidInput):
            metric.costs(NETWORKS, None)
    else:
        assert metric.costs(NETWORKS, None) == costs


def test_the_metrics() -> None:
    assert metrics.names() == ["energy", "latency", "macs", "parameters"]
    assert metrics.load("latency").costs(NETWORKS, Service()) == [1.5, None]
    assert metrics.load("energy").costs(NETWORKS, Service()) == [2e-3, None]
    assert metrics.load("macs").costs(NETWORKS, None) == [8 * 6 * 6 * 27 / 1e6, 2 * 16 * 8 / 1e6]
    assert metrics.load("parameters").costs(NETWORKS, None)[0] == (8 * 27 + 8) / 1e3


@pytest.mark.parametrize("name", ["latancy", "__init__", "../client", "os"])
def test_an_unknown_metric_lists_what_exists(name: str) -> None:
    with pytest.raises(InvalidInput, match="energy, latency, macs, parameters"):
        metrics.load(name)


def test_a_device_that_counts_no_energy_is_named() -> None:
    with pytest.raises(InvalidInput, match=f"{'0' * 16} has no energy of convolution of .1, 3, 8, 8.") as refused:
        metrics.load("energy").costs(NETWORKS, Service(energy_j=None))
    assert "device-agent doctor" in (refused.value.remedy or "")
