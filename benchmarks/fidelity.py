"""Do the tables add up? Estimates of whole networks beside their measurements, through the whole system.

Random networks are asked for over HTTP from a service with an empty table and an agent of this machine: their
operators are measured as they are missing, in context and isolated, and a correction is fitted on other networks.
Before that each network is measured whole, and twice after it, in fresh processes. Estimates are compared with the mean
of the three; how far each measurement is from the one before shows how well the truth itself is known (leases are tied
to what their table knows, those of the correction's networks too, so a drift that all networks share is not in it).

Families: `plain chains` of convolutions with ReLU; `sub-networks` of a MobileNetV3 super-network of half the paper's
width (channel-level bypass, residuals of unequal width, squeeze-and-excite, hard-swish), with 6 MB of weights as the
chains have; and `large sub-networks` of the paper's own, whose 17 MB fill a processor's caches. No network of the test
is used for the correction.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from harness import Figures, agent, arguments, show, write
from numpy.typing import NDArray
from scipy.stats import spearmanr

from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import Convolution, GlobalPool, Linear, same_padding
from lut_db.plans import IN_CONTEXT, WHOLE, Plan
from lut_db.storage import Database, queries
from search_client import networks
from search_client.client import ProfilerClient
from search_client.embedded import EmbeddedService

SIZES = (224, 112)
TEST_NETWORKS = 40
CALIBRATION_NETWORKS = 64
MEASUREMENTS = 3
QUICK = (112,), 3, 5
QUICK_FAMILIES = 2
PATIENCE_S = 1800.0
TABLES = "tables.sqlite"
CONTEXTS = {"in_context": IN_CONTEXT, "isolated": Plan(context="isolated", carriers=1)}
FORMATS = {
    "ratio": "{:.3f}", "rank": "{:.4f}", "mean_error": "{:.2%}", "max_error": "{:.2%}",
    "within_2.5%": "{:.1%}", "within_5%": "{:.1%}", "within_10%": "{:.1%}",
}  # fmt: skip
# Widths and strides of MobileNetV1's separable blocks.
CHAIN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
CHAIN_STEM = 32
WIDTHS = 8


def sub_networks(width: float, size: int, count: int, seed: int) -> list[Network]:
    """Sub-networks with every width and kernel drawn evenly from its grid."""
    description = networks.load("mobilenet_v3", image_size=size, width=width)
    rng = random.Random(f"sub-networks {seed}")
    found: dict[str, Network] = {}
    while len(found) < count:
        architecture = description.space.full
        for number, layer in enumerate(description.space.layers):
            smallest = 1 if number == 0 else 0  # a removed stem leaves no network worth the name
            architecture = architecture.with_width(number, rng.choice(layer.widths[smallest:]))
            architecture = architecture.with_kernel(number, rng.choice(layer.kernels))
        network = description.network(description.canonical(architecture))
        found[network.key] = network
    return list(found.values())


def plain_chains(size: int, count: int, seed: int) -> list[Network]:
    """MobileNetV1-like chains of random widths and kernels, without any branch."""
    rng = random.Random(f"plain chains {seed}")
    found: dict[str, Network] = {}
    while len(found) < count:
        build = NetworkBuilder()
        tensor = build.input((1, 3, size, size))

        def add(filters: int, kernel: int, stride: int, groups: int = 1, build: NetworkBuilder = build) -> None:
            nonlocal tensor
            operator = Convolution(
                input=build.shape(tensor), filters=filters, kernel=(kernel, kernel), stride=(stride, stride),
                padding=same_padding(kernel), groups=groups, activation="relu",
            )  # fmt: skip
            tensor = build.add(operator, tensor)

        def width(full: int) -> int:
            return full * rng.randint(1, WIDTHS) // WIDTHS

        add(width(CHAIN_STEM), 3, 2)
        for filters, stride in CHAIN:
            channels = build.shape(tensor)[1]
            add(channels, rng.choice((3, 5)), stride, channels)
            add(width(filters), 1, 1)
        tensor = build.add(GlobalPool(input=build.shape(tensor)), tensor)
        build.add(Linear(input=build.shape(tensor), features=1000), tensor)
        network = build.network()
        found[network.key] = network
    return list(found.values())


FAMILIES: dict[str, Callable[[int, int, int], list[Network]]] = {
    "plain chains": plain_chains,
    "sub-networks": partial(sub_networks, 0.5),
    "large sub-networks": partial(sub_networks, 1.0),
}


def compare(estimated: Sequence[float] | NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float]:
    errors = np.abs(np.array(estimated) / measured - 1)
    return {
        "ratio": float(np.sum(estimated) / measured.sum()),
        "rank": float(spearmanr(estimated, measured).statistic),
        "mean_error": float(errors.mean()),
        "max_error": float(errors.max()),
        "within_2.5%": float((errors <= 0.025).mean()),
        "within_5%": float((errors <= 0.05).mean()),
        "within_10%": float((errors <= 0.10).mean()),
    }


def latencies(client: ProfilerClient, target: str, asked: Sequence[Network], plan: Plan) -> NDArray[np.float64]:
    rows = client.measure_networks(asked, plan, target)
    for row in rows:
        if row.latency_ms is None:
            raise SystemExit(f"a whole network was not measured: {row.message}")
    return np.array([row.latency_ms for row in rows])


def measure_again(
    folder: Path, service: EmbeddedService, client: ProfilerClient, asked: Sequence[Network], plan: Plan
) -> NDArray[np.float64]:
    """Latencies of networks in fresh sessions, new revisions of their rows."""
    target = service.target
    with closing(Database(f"sqlite:///{folder}/{TABLES}")) as opened, opened.write() as session:
        queries.lock_table(session, target, plan.key)
        keys = [network.key for network in asked]
        queries.enqueue(session, target, plan.key, keys, queries.clock(session), again=True)
    deadline = time.monotonic() + PATIENCE_S
    while any(state.pending for state in client.targets()):
        service.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"networks were not measured again within {PATIENCE_S:.0f} s")
        time.sleep(1)
    return latencies(client, target, asked, plan)


def run(
    backend: str, contexts: Sequence[str], family: str, size: int, tests: int, calibrations: int, folder: Path,
    tolerance: float, cores: str | None,
) -> Figures:  # fmt: skip
    draw = FAMILIES[family]
    asked = draw(size, tests + calibrations, 0)
    test, calibration = asked[:tests], asked[tests:]
    figures: Figures = {}
    case = f"{backend}, {family}, {size} px"
    noise = {"load_tolerance": tolerance}
    whole = WHOLE.model_copy(update=noise)
    length = {"carrier_length": round(float(np.median([len(network.nodes) for network in asked])))}
    with (
        EmbeddedService(str(folder / TABLES), folder, agent=agent(backend, cores)) as service,
        ProfilerClient(service.url, patience_s=PATIENCE_S, still_there=service.check) as client,
    ):
        first = latencies(client, service.target, test, whole)
        estimates = {}
        for name in contexts:
            client.open_pin(service.target, CONTEXTS[name].model_copy(update=noise | length))
            client.calibrate(calibration, whole)
            estimates[name.replace("_", " ")] = client.estimates(test)
        measurements = [first]
        while len(measurements) < MEASUREMENTS:
            measurements.append(measure_again(folder, service, client, test, whole))
    measured = np.mean(measurements, axis=0)
    for context, found in estimates.items():
        plain, corrected = [e.sum_ms or 0.0 for e in found], [e.latency_ms or 0.0 for e in found]
        figures[f"{case}: {context}, plain sum"] = compare(plain, measured)
        figures[f"{case}: {context}, corrected"] = compare(corrected, measured)
    figures[f"{case}: measured again"] = compare(np.concatenate(measurements[1:]), np.concatenate(measurements[:-1]))
    return figures


def main() -> None:
    options = arguments(
        (__doc__ or "").split("\n")[0],
        [
            ("--backend", {"default": "cpu-onnxruntime", "help": "cpu-litert, cuda-torch, …: without settings"}),
            ("--context", {"choices": list(CONTEXTS), "help": "only this one; a backend may have no other"}),
            ("--family", {"choices": list(FAMILIES), "help": "only this family"}),
            ("--size", {"type": int, "help": "only images of this size"}),
            ("--cores", {"help": "those that the agent may use, like 0-1; its default else"}),
            ("--load-tolerance", {"type": float, "default": IN_CONTEXT.load_tolerance, "metavar": "CORES"}),
        ],
    )
    sizes, tests, calibrations = QUICK if options.quick else (SIZES, TEST_NETWORKS, CALIBRATION_NETWORKS)
    families = list(FAMILIES)[: QUICK_FAMILIES if options.quick else None]
    figures: Figures = {}
    for family in [options.family] if options.family else families:
        for size in [options.size] if options.size else sizes:
            with tempfile.TemporaryDirectory(prefix="fidelity-") as folder:
                found = run(
                    options.backend, [options.context] if options.context else list(CONTEXTS), family, size, tests,
                    calibrations, Path(folder), options.load_tolerance, options.cores,
                )  # fmt: skip
            show(
                f"{options.backend}, {family}, {size} pixels: {tests} networks, correction from {calibrations} others",
                found,
                FORMATS,
            )
            figures.update(found)
    write(options.json, figures)


if __name__ == "__main__":
    main()
