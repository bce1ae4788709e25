"""From rows to a network's latency: the one place where operators are added up. Pure; server and client share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import Field

from lut_db.measurements import Status, Value

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Fit(Value):
    """How well a correction did on networks left out of its fit. Errors are relative to the measured latency."""

    networks: int = Field(ge=1)
    mean_error: float = Field(ge=0)
    max_error: float = Field(ge=0)
    within_5_percent: float = Field(ge=0, le=1)
    within_10_percent: float = Field(ge=0, le=1)
    rank_correlation: float = Field(ge=-1, le=1)


class Correction(Value):
    """A map from sums of operators to a whole network: `offset_ms + sum over kinds of scale[kind] * sum_ms[kind]`.

    A kind that `scales` does not name uses `scale`. `relative_half_width` is the 95 % quantile of the relative
    error on networks left out of the fit, corrected for their number: the estimate's interval.
    """

    scale: Positive
    scales: dict[str, Positive] = Field(default_factory=dict)
    offset_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relative_half_width: float = Field(ge=0, lt=1)
    left_out: Fit

    def apply(self, sums_ms: Mapping[str, float]) -> float:
        """Latency in ms of a network whose operators of each kind sum to `sums_ms[kind]`."""
        return self.offset_ms + sum(self.scales.get(kind, self.scale) * value for kind, value in sums_ms.items())


class OperatorRow(Value):
    """What a table says of one operator. `row` is the id of the revision that was read.

    `energy_j`, what one run adds to the energy of the device, is absent where the device does not count it.
    """

    status: Status
    latency_ms: float | None = None
    half_width_ms: float | None = None
    energy_j: float | None = None
    row: int | None = None
    message: str | None = None


class Estimate(Value):
    """A network's latency under a pin or snapshot.

    `status` is the least certain of its operators' statuses; without `measured` or `predicted` there is no
    latency. `sum_ms` is the plain sum of the rows. `corrected` is False where no correction was fitted yet:
    `latency_ms` is then the plain sum, and no interval is claimed. `energy_j` is the sum of the operators' energies,
    absent where that of any is.
    """

    status: Status
    latency_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    sum_ms: float | None = None
    energy_j: float | None = None
    corrected: bool = False


CERTAINTY = (Status.MEASURED, Status.PREDICTED, Status.PENDING, Status.MISSING, Status.FAILED)


def add_up(operators: Iterable[tuple[str, float]], correction: Correction | None) -> Estimate:
    """The estimate of a network from `(kind, latency_ms)` of each of its operators, all of them measured."""
    sums_ms: dict[str, float] = {}
    for kind, latency_ms in operators:
        sums_ms[kind] = sums_ms.get(kind, 0.0) + latency_ms
    total_ms = sum(sums_ms.values())
    if correction is None:
        return Estimate(status=Status.MEASURED, latency_ms=total_ms, sum_ms=total_ms)
    latency_ms = correction.apply(sums_ms)
    return Estimate(
        status=Status.MEASURED,
        latency_ms=latency_ms,
        low_ms=latency_ms * (1 - correction.relative_half_width),
        high_ms=latency_ms * (1 + correction.relative_half_width),
        sum_ms=total_ms,
        corrected=True,
    )


def estimate(
    network: Sequence[str],
    rows: Mapping[str, OperatorRow],
    kinds: Mapping[str, str],
    correction: Correction | None,
) -> Estimate:
    """The estimate of a network given as the keys of its operators, from their rows and kinds by key."""
    worst = max((rows[key].status if key in rows else Status.MISSING for key in network), key=CERTAINTY.index)
    if worst is not Status.MEASURED:
        return Estimate(status=worst)
    found = add_up(((kinds[key], rows[key].latency_ms or 0.0) for key in network), correction)
    energies = [rows[key].energy_j for key in network]
    counted = [energy_j for energy_j in energies if energy_j is not None]
    if not counted or len(counted) < len(energies):
        return found
    return found.model_copy(update={"energy_j": sum(counted)})
