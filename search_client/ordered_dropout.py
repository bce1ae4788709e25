"""Which widths and kernels every image of a batch trains: ordered dropout (NetAdaptV2, Sec. 2.3). numpy only.

Each image of a batch goes through a sub-network of its own. For each layer, each width is drawn for almost the same
number of images, so that no width is favoured. Draws depend on (seed, step, layer) alone and are made for the
global batch: any number of processes, each with its share, trains the same sub-networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput
from search_client.architecture import SearchSpace

Integers = NDArray[np.int64]
KernelMode = Literal["groups", "batch"]
_WIDTHS, _KERNELS = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Draw:
    """`widths` and `kernels`, each (images, layers): one sub-network per image."""

    widths: Integers
    kernels: Integers


def balanced(options: Sequence[int], count: int, random: np.random.Generator) -> Integers:
    """`count` options in random order, each as often as the next within one.

    Each is repeated floor(count / n) times; the rest is filled with distinct random picks.
    """
    repeated = np.repeat(np.asarray(options, dtype=np.int64), count // len(options))
    rest = random.choice(np.asarray(options, dtype=np.int64), size=count % len(options), replace=False)
    return random.permutation(np.concatenate([repeated, rest]))


def widths_of_layer(
    options: Sequence[int], batch: int, random: np.random.Generator, opened: float = 1.0, kept: float = 0.0
) -> Integers:
    """The widths of one layer for a batch: the largest for the share `kept` of the images, the rest balanced over
    the upper share `opened` of the options, at least the largest."""
    full = round(kept * batch)
    count = max(1, round(1 + opened * (len(options) - 1)))
    free = balanced(options[-count:], batch - full, random)
    return random.permutation(np.concatenate([np.full(full, options[-1], dtype=np.int64), free]))


def draw(
    space: SearchSpace, batch: int, *, seed: int, step: int, kernels: KernelMode = "groups",
    opened: float = 1.0, kept: float = 0.0, rank: int = 0, ranks: int = 1,
) -> Draw:  # fmt: skip
    """The sub-networks of the images `rank`, `rank + ranks`, … of a global batch of `batch` images.

    kernels `groups`: balanced over the images like widths, so a layer runs once for each of its kernel sizes.
    `batch`: one random kernel size per layer for the whole batch, which is faster. Tied layers draw as one.

    opened: the share of each layer's widths, from the largest down, that is drawn from. kept: the share of the
    images, drawn anew for each layer, that keep its full width. The paper's ordered dropout is 1 and 0.
    """
    if batch < 1 or not 0 <= rank < ranks:
        raise InvalidInput(f"batch={batch}, rank={rank}, ranks={ranks}", field="batch",
                           remedy="give a batch of at least 1 and a rank below ranks")  # fmt: skip
    widths = np.empty((batch, len(space.layers)), dtype=np.int64)
    sizes = np.empty_like(widths)
    for number, layer in enumerate(space.layers):
        random = np.random.default_rng([seed, step, space.tied(number)[0], _WIDTHS])
        widths[:, number] = widths_of_layer(layer.widths, batch, random, opened, kept)
        random = np.random.default_rng([seed, step, number, _KERNELS])
        if kernels == "groups":
            sizes[:, number] = balanced(layer.kernels, batch, random)
        else:
            sizes[:, number] = random.choice(np.asarray(layer.kernels))
    return Draw(widths[rank::ranks], sizes[rank::ranks])
