"""Plans: how to measure. The hash of a plan is part of a row's identity."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lut_db.operators import Record, canonical_key

Statistic = Literal["fastest_fifth", "median", "interquartile_mean"]
"""What a latency is of many runs: the mean of the fastest fifth, which is the undisturbed device; or of all runs."""

Context = Literal["in_context", "isolated", "whole"]
"""Where an operator is timed: among neighbours in carrier graphs, alone in a graph of its own, or, for a
network, as a whole."""


class Plan(Record):
    """How to measure.

    Carriers: in context, each operator is measured in `carriers` different graphs of about `carrier_length`
    operators, half of them adapters between the others, packed at random from `seed`. It should be about the number of
    operators of the networks that will be asked for: longer graphs leave less of an operator in the caches, shorter
    ones more. Elsewhere it is measured in as many fresh sessions of its graph, since where a runtime happens to place
    its memory matters. The row is the median over the carriers, from four on the mean of their
    middle half. Many carriers with few runs each make a better row than few with many: neighbours matter more.

    Stopping: after `warmup_runs` runs that are thrown away (tools on phones warm up by themselves), runs go on until
    the half-width of the 95 % confidence interval of the statistic is at most `relative_half_width` of it, or, after
    `settle_runs`, more runs no longer narrow it; within `min_runs` and `max_runs` and `max_seconds` per graph. Runs of
    the graphs of a lease are interleaved at random in rounds of `round_runs`.

    The canary runs all the while, and latencies are stated at its reference speed. What was timed beside looks at it
    that were slower than its fastest ones by more than a third of `drift_tolerance` is not counted.
    Runs of a round follow others that are not counted, until the caches hold what the graph needs.

    Refusal: a lease is refused when other processes used more than `load_tolerance` of one core while it was
    measured, or when a canary was slower than its reference by a factor of more than `1 + drift_tolerance`, or as
    much faster: so far off, it no longer speaks for other graphs. The same goes for what the table knows.
    """

    context: Context = "in_context"
    carriers: Annotated[int, Field(ge=1, le=32)] = 6
    carrier_length: Annotated[int, Field(ge=1, le=256)] = 64
    seed: Annotated[int, Field(ge=0)] = 0
    warmup_runs: Annotated[int, Field(ge=0, le=1000)] = 2
    round_runs: Annotated[int, Field(ge=1, le=1000)] = 8
    min_runs: Annotated[int, Field(ge=1, le=100_000)] = 24
    settle_runs: Annotated[int, Field(ge=1, le=100_000)] = 48
    max_runs: Annotated[int, Field(ge=1, le=100_000)] = 64
    max_seconds: Annotated[float, Field(gt=0, le=3600)] = 20.0
    relative_half_width: Annotated[float, Field(gt=0, lt=1)] = 0.01
    statistic: Statistic = "fastest_fifth"
    load_tolerance: Annotated[float, Field(gt=0)] = 0.3
    drift_tolerance: Annotated[float, Field(gt=0)] = 0.3

    @cached_property
    def key(self) -> str:
        return canonical_key("plan", self.model_dump(mode="json"))[:16]

    @model_validator(mode="after")
    def _check_runs(self) -> Plan:
        if self.max_runs < self.min_runs:
            raise ValueError(f"max_runs={self.max_runs} is below min_runs={self.min_runs}")
        return self


IN_CONTEXT = Plan()
WHOLE = Plan(context="whole", carriers=3, round_runs=10, min_runs=60, settle_runs=120, max_runs=240)
"""How whole networks are measured for calibrations and for checking a discovered network."""
