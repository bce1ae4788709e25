"""Backends: one file for each way to run a network, found by its name.

A backend is a module that defines `create(options: Options) -> Backend`. The module `cpu_onnxruntime` is the
backend `cpu-onnxruntime`. Backends know runtimes; how to measure is said once, in `device_agents.measuring`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput
from lut_db.networks import Network
from lut_db.targets import Target


class Unsupported(Exception):
    """The runtime cannot run this graph, now or later; the message says what of it."""


@dataclass(frozen=True)
class Options:
    """How a backend is to run: threads, the cores they are pinned to (none: free), and settings of its own."""

    threads: int = 1
    cores: tuple[int, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeTimes:
    """What a runtime's own profiler says, a row for each run and a column for each node of the network.

    `total_ms` includes `layout_ms`: layout conversions charged to the node. `events[node]` counts the entries of the
    profile that were added up for a node in one run: each carries the profiler's own cost.
    """

    total_ms: NDArray[np.float64]
    layout_ms: NDArray[np.float64]
    events: NDArray[np.int64]


class Loaded(Protocol):
    """A network that is ready to run."""

    def run(self) -> None:
        """Runs it once and returns when the result is there."""

    def node_times(self) -> NodeTimes:
        """The profile of all runs so far; ends profiling. Only for networks loaded with `profile=True`."""


class Backend(Protocol):
    """A runtime on a device."""

    def target(self) -> Target:
        """What the latencies measured here are a property of."""

    def load(self, network: Network, *, profile: bool) -> Loaded:
        """Makes a network with made-up weights ready to run, each time in a fresh session.

        Raises Unsupported where the runtime refuses the graph.
        """


def names() -> list[str]:
    """The backends that there are."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def create(name: str, options: Options) -> Backend:
    """The backend of this name. Raises InvalidInput where there is none, or where its packages are missing."""
    if name not in names():
        raise InvalidInput(f"there is no backend {name!r}", field="backend", remedy=f"one of {', '.join(names())}")
    try:
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"{name} needs the package {error.name!r}", field="backend", remedy="pip install 'latency-lab[agent]'"
        ) from error
    backend: Backend = module.create(options)
    return backend
