"""Weights of a network, one mapping from name to array for each node, as `operator.weights` names and shapes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput
from lut_db.networks import Network
from lut_db.operators import (
    BaseOperator,
    Convolution,
    LayerNorm,
    Linear,
    MatMul,
    Shape,
    Softmax,
    TransposedConvolution,
)

Array = NDArray[np.float32]
Weights = Sequence[Mapping[str, Array]]

LARGEST = 1e30
"""Activations beyond this overflow whatever the weights."""


def made_up(network: Network, seed: int = 0) -> list[dict[str, Array]]:
    """Random weights that keep activations near unit variance through any number of nodes.

    Denormal or overflowing activations would run at another speed than real ones.
    """
    random = np.random.default_rng(seed)
    made: list[dict[str, Array]] = []
    sizes = [1.0] * len(network.inputs)
    for node in network.nodes:
        operator = node.operator
        read = [sizes[tensor] for tensor in node.inputs]
        arrays = {}
        for name, shape in operator.weights.items():
            scale = 0.1 if len(shape) == 1 else sqrt(2.0 / _fan_in(operator, shape)) / read[0]
            arrays[name] = (random.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(np.float32)
            if isinstance(operator, LayerNorm) and name == "weight":
                arrays[name] += np.float32(1)
        made.append(arrays)
        sizes.append(_size(operator, read))
    return made


def _fan_in(operator: BaseOperator, weight: Shape) -> float:
    """Products that make one element of the output."""
    if isinstance(operator, TransposedConvolution):
        return operator.macs / prod(operator.output)
    return prod(weight[1:])


def _size(operator: BaseOperator, read: Sequence[float]) -> float:
    """About how large an operator's output is: only products of activations grow, until something evens them out."""
    if isinstance(operator, MatMul):
        return min(prod(read) * (1.0 if operator.scaled else sqrt(operator.input[2])), LARGEST)
    evened = isinstance(operator, Convolution | TransposedConvolution | Linear | LayerNorm | Softmax)
    return 1.0 if evened else max(read)


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
