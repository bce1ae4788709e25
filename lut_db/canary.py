"""The canaries: networks, always the same, that show how fast a device is at this moment.

Shared machines and warm phones change speed by tens of percent within seconds. The canary runs
between what is timed, and latencies are stated at the speed at which the canary takes its reference time. What
slows a device down slows what it runs unequally: by its weights, by its maps, by its arithmetic. So the canary is a
network like those that are asked for, a mobile network for images of 224 pixels. (A smaller one, of maps of 28 pixels
and linear layers, was slowed down up to twice as much as such networks.)

A device's memory can be busy while its speed is the same. Then networks with many weights are slow, and what they spend
on each weight more is shown by the heavy canary, beside them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import Convolution, GlobalPool, Linear, SqueezeExcite, same_padding

STEM = 16
BLOCKS = ((16, 2), (24, 2), (40, 1), (48, 2), (48, 1), (96, 2), (96, 1), *[(160, 1)] * 3, *[(192, 1)] * 3)
HEAVY_BLOCKS = ((64, 2), (128, 2), *[(256, 1)] * 5)
"""The width and the stride of each block."""


@cache
def canary() -> Network:
    """About 120 million multiply-accumulates and 3 million parameters; takes some four milliseconds on a core."""
    build = NetworkBuilder()
    tensor = build.input((1, 3, 224, 224))
    stem = Convolution(
        input=build.shape(tensor), filters=STEM, kernel=(3, 3), stride=(2, 2), padding=same_padding(3),
        activation="hard_swish",
    )  # fmt: skip
    tensor = _pooled_blocks(build, build.add(stem, tensor), BLOCKS)
    return build.network(build.add(Linear(input=build.shape(tensor), features=1000), tensor))


@cache
def heavy_canary() -> Network:
    """About 120 million multiply-accumulates and 5 million parameters, as mobile networks for ImageNet have."""
    build = NetworkBuilder()
    tensor = _pooled_blocks(build, build.input((1, 32, 28, 28)), HEAVY_BLOCKS)
    return build.network(build.add(Linear(input=build.shape(tensor), features=1024, activation="relu"), tensor))


def heaviness(network: Network) -> float:
    """How much a network feels of what the heavy canary shows: nothing with as many weights as the canary has or fewer,
    all with as many as the heavy canary has or more."""
    light, heavy = canary().parameters, heavy_canary().parameters
    return min(1.0, max(0.0, (network.parameters - light) / (heavy - light)))


def _pooled_blocks(build: NetworkBuilder, tensor: int, blocks: Sequence[tuple[int, int]]) -> int:
    for filters, stride in blocks:
        tensor = _block(build, tensor, filters, stride)
    return build.add(GlobalPool(input=build.shape(tensor)), tensor)


def _block(build: NetworkBuilder, tensor: int, filters: int, stride: int) -> int:
    """An inverted residual block with squeeze-and-excite, without the residual."""
    channels = build.shape(tensor)[1] * 4
    tensor = build.add(
        Convolution(input=build.shape(tensor), filters=channels, kernel=(1, 1), activation="hard_swish"), tensor
    )
    depthwise = Convolution(
        input=build.shape(tensor), filters=channels, kernel=(3, 3), stride=(stride, stride),
        padding=same_padding(3), groups=channels, activation="relu",
    )  # fmt: skip
    tensor = build.add(depthwise, tensor)
    tensor = build.add(SqueezeExcite(input=build.shape(tensor), squeeze=channels // 4), tensor)
    return build.add(Convolution(input=build.shape(tensor), filters=filters, kernel=(1, 1)), tensor)
