"""Weights of a network, one mapping from name to array for each node, as `operator.weights` names and shapes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput
from lut_db.networks import Network

Array = NDArray[np.float32]
Weights = Sequence[Mapping[str, Array]]


def made_up(network: Network, seed: int = 0) -> list[dict[str, Array]]:
    """Random weights that keep activations near unit variance through any number of nodes.

    Denormal or overflowing activations would run at another speed than real ones.
    """
    random = np.random.default_rng(seed)
    made: list[dict[str, Array]] = []
    for operator in network.operators:
        arrays = {}
        for name, shape in operator.weights.items():
            scale = 0.1 if len(shape) == 1 else sqrt(2.0 / prod(shape[1:]))
            arrays[name] = (random.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(np.float32)
        made.append(arrays)
    return made


def checked(network: Network, weights: Weights) -> Weights:
    """The weights, if there is exactly one array of the right shape for every name of every node."""
    if len(weights) != len(network.nodes):
        raise InvalidInput(f"{len(weights)} mappings for {len(network.nodes)} nodes", field="weights")
    for number, (operator, arrays) in enumerate(zip(network.operators, weights, strict=True)):
        expected = operator.weights
        if set(arrays) != set(expected):
            raise InvalidInput(
                f"{operator.kind} takes {sorted(expected)}, not {sorted(arrays)}", field=f"weights[{number}]"
            )
        for name, shape in expected.items():
            if tuple(arrays[name].shape) != tuple(shape):
                raise InvalidInput(
                    f"shape {tuple(arrays[name].shape)} where {operator.kind} needs {tuple(shape)}",
                    field=f"weights[{number}].{name}",
                )
    return weights
