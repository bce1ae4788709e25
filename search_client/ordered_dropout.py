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


def draw(
    space: SearchSpace, batch: int, *, seed: int, step: int, kernels: KernelMode = "groups",
    rank: int = 0, ranks: int = 1,
) -> Draw:  # fmt: skip
    """The sub-networks of the images `rank`, `rank + ranks`, … of a global batch of `batch` images.

    kernels `groups`: balanced over the images like widths, so a layer runs once for each of its kernel sizes.
    `batch`: one random kernel size per layer for the whole batch, which is faster. Tied layers draw as one.
    """
    if batch < 1 or not 0 <= rank < ranks:
        raise InvalidInput(f"batch={batch}, rank={rank}, ranks={ranks}", field="batch",
                           remedy="give a batch of at least 1 and a rank below ranks")  # fmt: skip
    widths = np.empty((batch, len(space.layers)), dtype=np.int64)
    sizes = np.empty_like(widths)
    for number, layer in enumerate(space.layers):
        first = space.tied(number)[0]
        widths[:, number] = balanced(layer.widths, batch, np.random.default_rng([seed, step, first, _WIDTHS]))
        random = np.random.default_rng([seed, step, number, _KERNELS])
        if kernels == "groups":
            sizes[:, number] = balanced(layer.kernels, batch, random)
        else:
            sizes[:, number] = random.choice(np.asarray(layer.kernels))
    return Draw(widths[rank::ranks], sizes[rank::ranks])
