"""The canary: one small network, always the same, that shows how fast a device is at this moment.

Shared machines and warm phones change speed by tens of percent within seconds. The canary runs
between what is timed, and latencies are stated at the speed at which the canary takes its reference time. It mixes
what networks are made of: blocked convolutions, depthwise, squeeze-and-excite, and linear layers whose weights
do not fit a core's own cache.
"""

from __future__ import annotations

from functools import cache

from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import Convolution, GlobalPool, Linear, SqueezeExcite, same_padding


@cache
def canary() -> Network:
    """About 25 million multiply-accumulates and 2 million parameters; takes about a millisecond on a fast core."""
    build = NetworkBuilder()
    tensor = build.input((1, 32, 28, 28))
    for filters, stride in ((64, 2), (128, 2), (256, 1)):
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
        tensor = build.add(Convolution(input=build.shape(tensor), filters=filters, kernel=(1, 1)), tensor)
    tensor = build.add(GlobalPool(input=build.shape(tensor)), tensor)
    for features in (1024, 1024, 512):
        tensor = build.add(Linear(input=build.shape(tensor), features=features, activation="relu"), tensor)
    return build.network()
