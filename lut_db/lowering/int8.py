"""Arithmetic of int8: real = scale · (quantized − zero). Activations have one scale, weights mostly one a filter.

Weights are symmetric in [-127, 127], biases are int32 at the scale of the products. Both as ONNX Runtime and TFLite's
quantisation specification want them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lut_db.errors import InvalidInput
from lut_db.networks import Network

CALIBRATION_RUNS = 2
CALIBRATION_SEED = 7
LEVELS = 255
"""Steps from the lowest to the highest value of 8 bits."""
LARGEST_WEIGHT = 127
LARGEST_BIAS = float(1 << 30)
OVERFLOW = 1e36
"""Values from here on are no results: some runtimes clamp to the largest of float32 what is beyond."""
SMALLEST_SCALE = 1e-30
"""Products of two of these still are normal numbers."""
FINEST = 1 / 128
"""Of the step that an operator calculates in: finer steps of an output would be noise, and kernels refuse them."""

Samples = Sequence[Sequence[NDArray[np.float32]]]
"""Inputs of a network, `(N, C, H, W)` and so on, for several runs."""
Range = tuple[float, float]


def made_up_samples(network: Network) -> Samples:
    """Standard normal inputs, as what is timed is given."""
    random = np.random.default_rng(CALIBRATION_SEED)
    return [[random.standard_normal(shape, dtype=np.float32) for shape in network.inputs]
            for _ in range(CALIBRATION_RUNS)]  # fmt: skip


def merged(ranges: dict[str, Range], values: Mapping[str, NDArray]) -> None:
    """Widens the range of every tensor by its values in another run. Raises InvalidInput where one overflows."""
    for name, array in values.items():
        low, high = ranges.get(name, (0.0, 0.0))  # zero must always be exact
        found = (min(low, float(array.min())), max(high, float(array.max())))
        if not max(-found[0], found[1]) < OVERFLOW:
            raise InvalidInput(f"the tensor {name} overflows in float32", field="weights")
        ranges[name] = found


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of a tensor of int8 or uint8."""

    scale: np.float32
    zero: int
    dtype: Any

    @classmethod
    def of(cls, found: Range, dtype: Any) -> Affine:
        low, high = found
        lowest = int(np.iinfo(dtype).min)
        # What is zero everywhere gets an ordinary scale: kernels refuse those that differ by much.
        scale = np.float32(max((high - low or 1.0) / LEVELS, SMALLEST_SCALE))
        zero = int(np.clip(round(lowest - low / float(scale)), lowest, lowest + LEVELS))
        return cls(scale, zero, dtype)

    def not_finer(self, step: float) -> Affine:
        """With a scale of at least `FINEST` of this step."""
        return Affine(max(self.scale, np.float32(step * FINEST)), self.zero, self.dtype)

    def quantize(self, values: NDArray) -> NDArray:
        bounds = np.iinfo(self.dtype)
        return np.clip(np.round(values / self.scale) + self.zero, bounds.min, bounds.max).astype(self.dtype)


@dataclass(frozen=True)
class Filters:
    """Weights of int8 with a scale for each filter, and a bias of int32; `axis` of the weights counts filters."""

    weight: NDArray[np.int8]
    scales: NDArray
    bias: NDArray[np.int32]
    bias_scales: NDArray

    @classmethod
    def of(
        cls, weight: NDArray, bias: NDArray | None, axis: int, input_scale: np.float32, *, alike: bool = False
    ) -> Filters:
        """`alike`: one scale for all. A bias that int32 does not hold makes its filter's scale larger."""
        others = tuple(other for other in range(weight.ndim) if other != axis)
        largest = np.abs(weight).max(axis=others)
        scales = np.where(largest > 0, largest, 1.0) / LARGEST_WEIGHT
        values = np.zeros(weight.shape[axis]) if bias is None else np.asarray(bias, np.float64)
        scales = np.maximum(scales, np.abs(values) / LARGEST_BIAS / float(input_scale))
        scales = np.maximum(scales, SMALLEST_SCALE / min(float(input_scale), 1.0)).astype(np.float32)
        if alike:
            scales = np.full_like(scales, scales.max())
        along = [1] * weight.ndim
        along[axis] = -1
        quantized = np.clip(np.round(weight / scales.reshape(along)), -LARGEST_WEIGHT, LARGEST_WEIGHT)
        bias_scales = (scales * input_scale).astype(np.float32)
        return cls(quantized.astype(np.int8), scales, np.round(values / bias_scales).astype(np.int32), bias_scales)
