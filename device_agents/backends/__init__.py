"""Backends: one file for each way to run a network, found by its name.

The module `cpu_onnxruntime` is the backend `cpu-onnxruntime`. A backend is a module that defines

- `create(options: Options) -> Backend`;
- `doctor(options: Options) -> Iterator[Check]`, which checks everything it needs, one after the other;
- `SETTINGS: dict[str, str]`, its settings and what they mean;
- optionally `devices(options: Options) -> list[Options]`, where one process can serve several devices at once.

Backends know runtimes; how to measure is said once, in `device_agents.measuring`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput, LatencyLabError
from lut_db.lowering.weights import Weights
from lut_db.measurements import Cause, Evidence, Failure
from lut_db.networks import Network
from lut_db.plans import Plan
from lut_db.targets import Target

EXTRAS = {"torch": "cuda"}
"""The extra that brings a package, where it is not `agent`."""


class Unsupported(Exception):
    """The runtime cannot run this graph, now or later; the message says what of it."""


class LoadFailed(LatencyLabError):
    """This graph could not be made to run, or to go on running, this time: its runtime crashed on it or hung, or it did
    not fit. Others may run."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Unreachable(LatencyLabError):
    """The device does not answer, or is not fit to measure at present; the message says why."""


@dataclass(frozen=True)
class Options:
    """How a backend is to run: threads, the cores they are pinned to (none: free), whether energy is counted where the
    device can, and settings of its own."""

    threads: int = 1
    cores: tuple[int, ...] = ()
    energy: bool = True
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeTimes:
    """What nodes took: a row for each latency that `Loaded.time` returned, a column for each node.

    `total_ms` includes `layout_ms`: layout conversions charged to the node. `events[node]` counts the entries of a
    profile that were added up for a node in one run: each carries the profiler's own cost. `tick_ms` is what times are
    counted in, where that is known.
    """

    total_ms: NDArray[np.float64]
    layout_ms: NDArray[np.float64]
    events: NDArray[np.int64]
    tick_ms: float | None = None


class Loaded(Protocol):
    """A network that is ready to run."""

    @property
    def profiler_runs(self) -> bool:
        """Whether a profiler runs along, and takes time of its own."""

    def time(self, runs: int) -> Sequence[float]:
        """Runs it that often. Latencies in ms, as told by whatever is nearest to the runtime: one for each run, or
        fewer where a tool tells only means. Raises Unsupported, LoadFailed and Unreachable, as loading it does."""

    def node_times(self) -> NodeTimes:
        """The profile of all runs so far; ends profiling. Only for networks loaded with `profile=True`."""


class Watch(Protocol):
    """Looks at the device from the moment it is made until it is read."""

    def read(self, plan: Plan) -> tuple[Evidence, Failure | None]:
        """What was seen, and why results taken meanwhile must be refused, if they must."""


class Backend(Protocol):
    """A runtime on a device."""

    starts: bool
    """Whether each `Loaded.time` starts a tool afresh: it warms up by itself, and every start is dear."""

    def environment(self) -> dict[str, str]:
        """Variables that must be in the environment of a process that measures, from its start."""

    def target(self) -> Target:
        """What the latencies measured here are a property of."""

    def ready(self) -> None:
        """Returns when the device can measure: there, cool, awake. Raises Unreachable where it is not for now."""

    def watch(self) -> Watch:
        """Begins to watch the device."""

    def load(self, model: Network | Path, *, profile: bool) -> Loaded:
        """Makes a network with made-up weights, or a model in a file, ready to run, in a fresh session.

        Only networks can be profiled. Raises Unsupported where the runtime refuses the graph, LoadFailed where the
        graph, and nothing else, failed for now, and Unreachable where the device is gone.
        """

    def compute(self, network: Network, weights: Weights, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray]:
        """The network's outputs, to compare with the reference; in int8 with ranges of these inputs. Raises
        NotImplementedError where no tool tells."""


@runtime_checkable
class Unprofiled(Protocol):
    """A backend whose runtime does not tell what a node takes: operators cannot be measured in context."""

    unprofiled: str
    """Why, and what to do instead."""


@runtime_checkable
class Movable(Protocol):
    """A backend that may work on one of several cores at a time."""

    def move(self) -> bool:
        """Goes on on the next of its cores: what disturbs one may leave another alone. False where there is no other.
        Raises Unreachable where it was taken away."""


@dataclass(frozen=True)
class Check:
    """One thing that a backend needs: whether it is there, what was found, and what to do about a lack."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


class _Module(Protocol):
    SETTINGS: dict[str, str]

    def create(self, options: Options) -> Backend: ...

    def doctor(self, options: Options) -> Iterator[Check]: ...


def names() -> list[str]:
    """The backends that there are."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def module(name: str) -> _Module:
    """The module of a backend. Raises InvalidInput where there is none, or where its packages are missing."""
    if name not in names():
        raise InvalidInput(f"there is no backend {name!r}", field="backend", remedy=f"one of {', '.join(names())}")
    try:
        found: _Module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"{name} needs the package {error.name!r}", field="backend",
            remedy=f"pip install 'latency-lab[{EXTRAS.get(error.name or '', 'agent')}]'",
        ) from error  # fmt: skip
    return found


def create(name: str, options: Options) -> Backend:
    """The backend of this name. Raises InvalidInput as `module` does, and where it has no such setting."""
    found = module(name)
    unknown = sorted(set(options.settings) - set(found.SETTINGS))
    if unknown:
        known = ", ".join(found.SETTINGS) or "none"
        raise InvalidInput(f"{name} has no setting {unknown[0]!r}", field="settings", remedy=f"it has: {known}")
    return found.create(options)


def check_settings(name: str, options: Options) -> Iterator[Check]:
    """Whether an agent would take these settings."""
    try:
        for of_device in devices(name, options):
            create(name, of_device)
    except InvalidInput as error:
        yield Check(error.field or "settings", False, error.message, error.remedy or "see the backend's settings")
    else:
        yield Check("settings", True, ", ".join(f"{key}={value}" for key, value in options.settings.items()) or "none")


def devices(name: str, options: Options) -> list[Options]:
    """The options of each device that one process is to serve."""
    split = getattr(module(name), "devices", None)
    return [options] if split is None else split(options)
