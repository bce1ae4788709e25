"""From rows to a network's latency: the one place where operators are added up. Pure; server and client share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import Field

from lut_db.measurements import Status, Value
from lut_db.operators import BaseOperator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Fit(Value):
    """How well a correction did on networks left out of its fit. Errors are relative to the measured latency."""

    networks: int = Field(ge=1)
    mean_error: float = Field(ge=0)
    max_error: float = Field(ge=0)
    within_5_percent: float = Field(ge=0, le=1)
    within_10_percent: float = Field(ge=0, le=1)
    rank_correlation: float = Field(ge=-1, le=1)


class Traits(NamedTuple):
    """What a correction asks of an operator: its family, and how many weights it has."""

    family: str
    parameters: int

    @classmethod
    def of(cls, operator: BaseOperator) -> Traits:
        return cls(operator.family, operator.parameters)


class Sums(NamedTuple):
    """What a correction asks of a network: the rows of its operators, summed by family in ms, and its weights."""

    by_family: Mapping[str, float]
    parameters: int

    @property
    def total_ms(self) -> float:
        return sum(self.by_family.values())

    @classmethod
    def of(cls, operators: Iterable[tuple[Traits, float]]) -> Sums:
        """From `(traits, latency_ms)` of each operator of a network."""
        sums_ms: dict[str, float] = {}
        parameters = 0
        for traits, latency_ms in operators:
            sums_ms[traits.family] = sums_ms.get(traits.family, 0.0) + latency_ms
            parameters += traits.parameters
        return cls(sums_ms, parameters)


class Correction(Value):
    """A map from a network's operators to its latency:

        offset_ms + (sum_ms / typical_ms) ** growth * sum over families of scale[family] * sum_ms[family]
                  + spill_ms * max(0, parameters - cached_parameters) / 1e6
                  + eviction * max(0, sum_ms - kept_ms) * parameters / 1e6

    A family that `scales` does not name uses `scale`. The longer a network takes, the more of what an operator needs
    has left the caches when it runs again: `growth` is by how much that slows all of them down, beside networks of
    `typical_ms`. Networks of more weights than a device's caches keep from one run to the next read the rest again:
    `spill_ms` is what a million of these costs. Where others use the caches too, less of them is left the longer a
    network takes: `eviction` is the ms that a million weights cost more for each ms beyond `kept_ms`. A correction has
    one of the two at most. `relative_half_width` is the 95 % quantile of the relative error on
    networks left out of the fit, corrected for their number: the estimate's interval.
    """

    scale: Positive
    scales: dict[str, Positive] = Field(default_factory=dict)
    growth: float = Field(default=0.0, ge=0, lt=1)
    typical_ms: Positive = 1.0
    offset_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    cached_parameters: int = Field(default=0, ge=0)
    spill_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    kept_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    eviction: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relative_half_width: float = Field(ge=0, lt=1)
    left_out: Fit

    def apply(self, sums: Sums) -> float:
        """Latency in ms of a network."""
        scaled = sum(self.scales.get(family, self.scale) * value for family, value in sums.by_family.items())
        grown = scaled * (sums.total_ms / self.typical_ms) ** self.growth
        spilt = max(0, sums.parameters - self.cached_parameters) / 1e6
        evicted = max(0.0, sums.total_ms - self.kept_ms) * sums.parameters / 1e6
        return self.offset_ms + grown + self.spill_ms * spilt + self.eviction * evicted


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


def add_up(operators: Iterable[tuple[Traits, float]], correction: Correction | None) -> Estimate:
    """The estimate of a network from `(traits, latency_ms)` of each of its operators, all of them measured."""
    sums = Sums.of(operators)
    total_ms = sums.total_ms
    if correction is None:
        return Estimate(status=Status.MEASURED, latency_ms=total_ms, sum_ms=total_ms)
    latency_ms = correction.apply(sums)
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
    traits: Mapping[str, Traits],
    correction: Correction | None,
) -> Estimate:
    """The estimate of a network given as the keys of its operators, from their rows and traits by key."""
    worst = max((rows[key].status if key in rows else Status.MISSING for key in network), key=CERTAINTY.index)
    if worst is not Status.MEASURED:
        return Estimate(status=worst)
    found = add_up(((traits[key], rows[key].latency_ms or 0.0) for key in network), correction)
    energies = [rows[key].energy_j for key in network]
    counted = [energy_j for energy_j in energies if energy_j is not None]
    if not counted or len(counted) < len(energies):
        return found
    return found.model_copy(update={"energy_j": sum(counted)})
