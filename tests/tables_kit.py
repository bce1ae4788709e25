"""Small makers of targets, operators, networks and measurements for tests of tables and service."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lut_db.measurements import Cause, Failure, Measurement, Samples
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import Convolution, Operator
from lut_db.plans import IN_CONTEXT, WHOLE
from lut_db.targets import Device, Target
from search_client import networks

PLAN = IN_CONTEXT
WHOLE_PLAN = WHOLE


def make_target(model: str = "test machine") -> Target:
    return Target(device_model=model, os_build="1", runtime="test", runtime_version="1")


TARGET = make_target()


def make_device(name: str = "bench", *targets: Target) -> Device:
    return Device(name=name, targets=targets or (TARGET,))


def conv(number: int) -> Operator:
    """The operator of this number; different numbers are different operators, of equal shapes in and out."""
    return Convolution(input=(1, 4, 8, 8), filters=4, kernel=(1, 1), padding=(number, number, 0, 0))


def convs(count: int, start: int = 0) -> dict[str, Operator]:
    return {operator.key: operator for operator in (conv(number) for number in range(start, start + count))}


def chain(*widths: int) -> Network:
    """A chain of 1x1 convolutions of these widths."""
    build = NetworkBuilder()
    tensor = build.input((1, 3, 8, 8))
    for width in widths:
        tensor = build.add(Convolution(input=build.shape(tensor), filters=width, kernel=(1, 1)), tensor)
    return build.network()


def measured(key: str, latency_ms: float = 1.0) -> Measurement:
    return Measurement(
        key=key, latency_ms=latency_ms, half_width_ms=latency_ms / 100, spread=0.01, stop="confident",
        samples=(Samples(carrier=key, samples_ms=(latency_ms, latency_ms * 1.01), counted=(0,), slowness=1.0),),
    )  # fmt: skip


def failed(key: str, cause: Cause = "crashed", message: str = "it broke") -> Measurement:
    return Measurement(key=key, failure=Failure(cause=cause, message=message))


def sub_networks(rng: random.Random, image_size: int, count: int, width: float = 1.0) -> Iterator[Network]:
    """Sub-networks of random widths, which add what differs in shape; narrow ones have few channels at first."""
    description = networks.load("mobilenet_v3", image_size=image_size, width=width)
    for _ in range(count):
        architecture = description.space.full
        for number, layer in enumerate(description.space.layers):
            architecture = architecture.with_width(number, rng.choice(layer.widths[1 if number == 0 else 0 :]))
        yield description.network(description.canonical(architecture))
