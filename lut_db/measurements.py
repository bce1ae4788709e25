"""Measurements: raw samples and the evidence around them, or a failure. A failure is a value."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

MAX_MILLISECONDS = 3.6e6
"""No run of anything takes an hour: what says so is no latency."""
MAX_SAMPLES = 1 << 20
MAX_GRAPHS = 4096

Milliseconds = Annotated[float, Field(gt=0, le=MAX_MILLISECONDS, allow_inf_nan=False)]
Sample = Annotated[float, Field(ge=0, le=MAX_MILLISECONDS, allow_inf_nan=False)]
"""One reading in ms: a timer whose ticks are coarser than what it times reads zero now and then."""
Joules = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Status(StrEnum):
    """What is known of an operator, or of a network, on a target under a plan."""

    MEASURED = "measured"
    PREDICTED = "predicted"
    PENDING = "pending"
    MISSING = "missing"
    FAILED = "failed"


class Value(BaseModel):
    """A frozen value that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Cause = Literal["unsupported", "crashed", "timed_out", "out_of_memory", "load", "drift", "hot", "unreachable", "error"]

REFUSALS: frozenset[Cause] = frozenset({"load", "drift", "hot", "unreachable"})
"""No figure was taken, or it was not believed: the device is at fault, not the operator. Measured again, never
recorded."""

TRANSIENT: frozenset[Cause] = REFUSALS | {"crashed", "timed_out", "out_of_memory", "error"}
"""Worth another try, on another device if there is one."""


class Failure(Value):
    """Why there is no latency."""

    cause: Cause
    message: str = Field(max_length=4000)


class Samples(Value):
    """Raw latencies of one operator or network in one graph, in the order in which they were taken.

    `carrier` is the key of the graph. `visits` says how many were taken in a row, before others' turn; it is empty
    where that is not known. `counted` says which samples the statistic rests on: for the fastest fifth of a graph, the
    second fifth of a node's own where its profiler counts finely, else those of the runs in which the whole graph was
    fastest. Their mean, less `profiling_ms` but for a tenth of it at least, divided by `slowness`, is the latency at
    the reference speed. `slowness` is how slow the device was for this, by its canaries, what else the graph timed, and
    what its table knows. `layout_ms` is the part of their mean that went to layout conversions charged to this
    operator; `profiling_ms` is what the runtime's profiler adds to it (negative where a runtime's work between nodes
    outweighs that).
    """

    carrier: str = Field(max_length=64)
    samples_ms: tuple[Sample, ...] = Field(min_length=1, max_length=MAX_SAMPLES)
    visits: tuple[int, ...] = Field(default=(), max_length=MAX_SAMPLES)
    counted: tuple[int, ...] = Field(min_length=1, max_length=MAX_SAMPLES)
    slowness: float = Field(gt=0, allow_inf_nan=False)
    layout_ms: Sample = 0.0
    profiling_ms: float = Field(default=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_counted(self) -> Samples:
        if not all(0 <= position < len(self.samples_ms) for position in self.counted):
            raise ValueError(f"counted names samples beyond the {len(self.samples_ms)} of samples_ms")
        if self.visits and (min(self.visits) < 1 or sum(self.visits) != len(self.samples_ms)):
            raise ValueError(f"visits do not add up to the {len(self.samples_ms)} of samples_ms")
        return self


Stop = Literal["confident", "settled", "max_runs", "max_seconds"]
"""Why sampling ended: the interval was narrow enough, the noise no longer shrank, or a bound was reached."""


class Measurement(Value):
    """What a device says of one operator or network, named by its key.

    Exactly one of `latency_ms` and `failure` is there. `half_width_ms` is half the 95 % confidence interval of
    the statistic within a graph; `spread` is the largest relative distance of a carrier's value from
    `latency_ms`: it shows how much the neighbours matter. `energy_j` is what one run adds to the energy of a device
    that stands still, where the device counts it.
    """

    key: str = Field(min_length=32, max_length=32)
    latency_ms: Milliseconds | None = None
    half_width_ms: Sample | None = None
    spread: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    energy_j: Joules | None = None
    stop: Stop | None = None
    samples: tuple[Samples, ...] = Field(default=(), max_length=MAX_GRAPHS)
    failure: Failure | None = None

    @model_validator(mode="after")
    def _check_either(self) -> Measurement:
        if (self.latency_ms is None) == (self.failure is None):
            raise ValueError("a measurement has either latency_ms or failure")
        if self.latency_ms is not None and (not self.samples or self.half_width_ms is None or self.stop is None):
            raise ValueError("a measured latency comes with its samples, half_width_ms and stop")
        if self.latency_ms is None and self.energy_j is not None:
            raise ValueError("energy_j comes with a latency_ms")
        return self


Evidence = dict[str, JsonValue]
"""What was true around a lease: CPU model, versions, threads, cores, load, clocks, canary. Free of secrets."""
