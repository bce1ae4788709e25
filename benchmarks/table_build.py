"""How fast a table is built and how well it repeats: in context and isolated, beside the usual way.

The operators of random sub-networks are measured through the whole system, several times from nothing (each time under
a plan with another seed, so nothing is known), as a search asks for them: in networks. The usual way is measured in
this process: every operator in a session of its own, 500 runs, their mean. `cv` is the latency-weighted median over
operators of the coefficient of variation of their rows over the builds; for the canaries it is that of their speed over
the leases, for the heavy one beside the other.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import httpx
import numpy as np
from fidelity import sub_networks
from harness import Figures, agent, arguments, show, write
from numpy.typing import NDArray

from device_agents import backends, evidence
from device_agents.backends import Options
from lut_db.networks import Network
from lut_db.operators import Operator
from lut_db.plans import Plan
from lut_db.wire import API
from search_client.client import ProfilerClient
from search_client.embedded import EmbeddedService

IMAGE_SIZE = 112
NETWORKS, BUILDS, USUAL_OPERATORS = 12, 5, 60
QUICK = 2, 3, 8
PATIENCE_S = 600.0
USUAL_RUNS = 500
PLANS = {"in context": Plan(), "isolated": Plan(context="isolated", carriers=1)}
FORMATS = {"operators": "{:.0f}", "operators_per_minute": "{:.0f}", "share_in_kernels": "{:.1%}", "cv": "{:.2%}"}


def operators(asked_for: Iterable[Network]) -> list[Operator]:
    """The distinct operators of networks."""
    return list(dict.fromkeys(operator for network in asked_for for operator in network.operators))


def spread(builds: Sequence[Sequence[float]]) -> float:
    """The latency-weighted median of the coefficients of variation; builds in rows, operators in columns."""
    values: NDArray[np.float64] = np.array(builds)
    means = values.mean(axis=0)
    variation = values.std(axis=0, ddof=1) / means
    order = np.argsort(variation)
    weight = np.cumsum(means[order]) / means.sum()
    return float(variation[order][np.searchsorted(weight, 0.5)])


def through_the_system(
    backend: str, asked_for: Sequence[Network], builds: int, folder: Path, tolerance: float, cores: str | None
) -> Figures:
    figures: Figures = {}
    speeds: dict[str, list[float]] = {"slowness": [], "heavy_slowness": []}
    wanted = operators(asked_for)
    each = [Network.of(operator) for operator in wanted]
    with EmbeddedService(str(folder / "tables.sqlite"), folder, agent=agent(backend, cores)) as service:
        for name, plan in PLANS.items():
            rows, seconds, leases = [], 0.0, []
            for seed in range(builds):
                asked = plan.model_copy(update={"seed": seed, "load_tolerance": tolerance})
                with ProfilerClient(service.url, patience_s=PATIENCE_S, still_there=service.check) as client:
                    client.open_pin(service.target, asked)
                    begin = time.perf_counter()
                    client.estimates(asked_for)  # asked in networks, operators get the neighbours that they have there
                    estimates = client.estimates(each)
                    seconds += time.perf_counter() - begin
                failed = [operator.kind for operator, e in zip(wanted, estimates, strict=True) if e.sum_ms is None]
                if failed:
                    raise SystemExit(f"operators were not measured: {', '.join(sorted(set(failed)))}")
                rows.append([e.sum_ms or 0.0 for e in estimates])
                leases += evidence_of(service.url, service.target, asked)
            for fact, told in speeds.items():
                told += [float(lease[fact]) for lease in leases if fact in lease]
            figures[f"{backend}: {name}"] = {
                "operators": len(wanted),
                "operators_per_minute": 60 * builds * len(wanted) / seconds,
                "share_in_kernels": sum(x["seconds_in_kernels"] for x in leases) / seconds,
                "cv": spread(rows),
            }
    for fact, told in speeds.items():
        if len(told) > 1:
            canary = "canary" if fact == "slowness" else "heavy canary"
            figures[f"{backend}: {canary}"] = {"cv": float(np.std(told, ddof=1) / np.mean(told))}
    return figures


def evidence_of(url: str, target: str, plan: Plan) -> list[dict[str, float]]:
    """What was true around every lease from which the rows of a plan came."""
    row_of_lease: dict[str, int] = {}  # rows of one lease were written at one moment
    with httpx.Client(base_url=url + API, trust_env=False) as http:
        after: int | None = 0
        while after is not None:
            asked = {"plan": plan.key, "after": after, "limit": 1000}
            page = http.get(f"/targets/{target}/rows", params=asked).raise_for_status().json()
            row_of_lease.update({row["measured_at"]: row["id"] for row in page["rows"]})
            after = page["next"]
        return [http.get(f"/rows/{row}").raise_for_status().json()["evidence"] for row in row_of_lease.values()]


def the_usual_way(backend: str, wanted: Sequence[Operator], builds: int) -> dict[str, float]:
    options = Options(cores=evidence.default_cores(1))
    os.sched_setaffinity(0, options.cores)
    runtime = backends.create(backend, options)
    rows, kernels = [], 0.0
    begin = time.perf_counter()
    for _ in range(builds):
        means = []
        for operator in wanted:
            times_ms = runtime.load(Network.of(operator), profile=False).time(USUAL_RUNS)
            means.append(float(np.mean(times_ms)))
            kernels += sum(times_ms) / 1e3
        rows.append(means)
    seconds = time.perf_counter() - begin
    return {
        "operators": len(wanted),
        "operators_per_minute": 60 * builds * len(wanted) / seconds,
        "share_in_kernels": kernels / seconds,
        "cv": spread(rows),
    }


def main() -> None:
    options = arguments(
        (__doc__ or "").split("\n")[0],
        [
            ("--backend", {"default": "cpu-onnxruntime", "help": "cpu-onnxruntime or cpu-litert"}),
            ("--cores", {"help": "those that the agent may use, like 0-1; its default else"}),
            ("--load-tolerance", {"type": float, "default": Plan().load_tolerance, "metavar": "CORES"}),
        ],
    )
    count, builds, usual = QUICK if options.quick else (NETWORKS, BUILDS, USUAL_OPERATORS)
    asked_for = sub_networks(1.0, IMAGE_SIZE, count, seed=0)
    with tempfile.TemporaryDirectory(prefix="table-build-") as folder:
        figures = through_the_system(
            options.backend, asked_for, builds, Path(folder), options.load_tolerance, options.cores
        )
    wanted = operators(asked_for)
    chosen = random.Random(0).sample(wanted, min(usual, len(wanted)))
    figures[f"{options.backend}: the usual way"] = the_usual_way(options.backend, chosen, builds)
    show(f"{options.backend}: {builds} builds of a table", figures, FORMATS)
    write(options.json, figures)


if __name__ == "__main__":
    main()
