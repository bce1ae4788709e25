"""Measures a model file on a device, without any service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from device_agents.backends import Backend
from device_agents.measuring import PATIENCE_S, STOPS, load_canaries, unsteady
from device_agents.sampling import sample, statistic
from lut_db.errors import MeasurementRefused
from lut_db.measurements import Evidence, Stop
from lut_db.plans import WHOLE
from lut_db.targets import Target


class Bench(BaseModel):
    """The latency of a model file as it was at this moment: not scaled to any table's speed.

    `between_sessions` is the largest relative distance of a session's latency from `latency_ms`, their median.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    target: Target
    latency_ms: float
    half_width_ms: float
    p5_ms: float
    p95_ms: float
    runs: int
    sessions: int
    between_sessions: float
    stop: Stop
    canary_ms: float
    evidence: Evidence

    def __str__(self) -> str:
        return (
            f"{self.model} on {self.target}\n"
            f"latency   {self.latency_ms:.4g} ms +/- {self.half_width_ms:.2g} (95 %), "
            f"from {self.p5_ms:.4g} to {self.p95_ms:.4g} (5 to 95 %)\n"
            f"sampling  {self.runs} runs in {self.sessions} sessions, which differ by {self.between_sessions:.1%} "
            f"at most; ended: {self.stop}\n"
            f"canary    {self.canary_ms:.4g} ms"
        )


def bench_file(
    backend: Backend, model: Path, runs: int, sessions: int, load_tolerance: float = WHOLE.load_tolerance
) -> Bench:  # fmt: skip
    """Measures a file under the plan of whole networks. Raises Unsupported, LoadFailed, Unreachable
    and MeasurementRefused."""
    backend.ready()
    plan = WHOLE.model_copy(
        update={
            "min_runs": min(WHOLE.min_runs, runs), "max_runs": runs, "carriers": sessions,
            "load_tolerance": load_tolerance,
        }
    )  # fmt: skip
    canaries = load_canaries(backend)
    loaded = [backend.load(model, profile=False) for _ in range(sessions)]
    watch = backend.watch()
    sampled = sample(
        [session.time for session in loaded], canaries, plan, plan.seed, starts=backend.starts,
        patience_s=PATIENCE_S,
    )  # fmt: skip
    timed = sampled.graphs
    for record in timed:
        if record.failure is not None:
            raise record.failure
    facts, refusal = watch.read(plan)
    refusal = refusal or unsteady(sampled.canary_over_time(plan.statistic), plan)
    if refusal is not None:
        raise MeasurementRefused(refusal.message, field=refusal.cause)
    values = np.array([statistic(record.times_ms, plan.statistic) for record in timed])
    latency_ms = float(np.median(values))
    low, high = np.percentile(np.concatenate([record.times_ms for record in timed]), (5, 95))
    return Bench(
        model=model.name, target=backend.target(), latency_ms=latency_ms,
        half_width_ms=float(np.median([record.half_width_ms(plan) for record in timed])),
        p5_ms=float(low), p95_ms=float(high), runs=sum(record.done for record in timed), sessions=sessions,
        between_sessions=float(np.abs(values / latency_ms - 1).max()),
        stop=max((record.stop or "max_runs" for record in timed), key=STOPS.index),
        canary_ms=sampled.canary_ms(plan.statistic), evidence=facts,
    )  # fmt: skip
