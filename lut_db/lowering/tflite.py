"""Networks said in TFLite: batch-norm folded, activations fused where runtimes fuse them.

Feature maps are NHWC inside: an input or output `(N, C, H, W)` of the network is one of `(N, H, W, C)` of the model.
Vectors and tokens stay as they are: the vocabulary has no tensors of four dimensions but maps. `to_nhwc` and `to_nchw`
turn arrays.

Tensor `i` of the network is called `t<i>`, every other tensor `n<number>/<part>` after the network's node that it
belongs to. What an operator of the model makes says whose it is (`owners`), so that a runtime's profile, which counts
operators, can be read back in terms of nodes.

In int8 everything between the network's inputs and outputs is, as TFLite's quantisation specification asks; the inputs
and outputs stay float32 and are converted once. Only the parts of a layer norm are float32, whose reciprocal roots have
no 8 bits to spare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from lut_db.lowering.int8 import Affine, Filters, Range, Samples, made_up_samples, merged
from lut_db.lowering.weights import Array, Weights, checked, made_up
from lut_db.networks import Network
from lut_db.operators import (
    Activate,
    Add,
    BaseOperator,
    ChannelBypass,
    Convolution,
    GlobalPool,
    LayerNorm,
    Linear,
    MatMul,
    Padding,
    Pool,
    Rearrange,
    ResidualAdd,
    Shape,
    Softmax,
    SqueezeExcite,
    TransposedConvolution,
    Upsample,
    extent,
    window_output,
)
from lut_db.targets import Precision

SCHEMA_VERSION = 3
FILE_IDENTIFIER = b"TFL3"
ALIGNMENT = 16
"""Bytes that the schema aligns a buffer's data to."""

Code = schema.BuiltinOperator
FUSED = {
    "none": schema.ActivationFunctionType.NONE,
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
}
"""What the format's operators can do to their own output."""

HALF_PIXEL_VERSION = 3
GROUPED_CONVOLUTION_VERSION = 6
DILATED_DEPTHWISE_VERSION = 2
TOKENS_VERSION = 5
"""Of a linear layer that keeps the dimensions of its input."""
CLAMPED_TRANSPOSED_VERSION = 4
"""Of a transposed convolution that has a bias and can do an activation."""
TYPES = {np.dtype(np.float32): schema.TensorType.FLOAT32, np.dtype(np.int32): schema.TensorType.INT32,
         np.dtype(np.int8): schema.TensorType.INT8}  # fmt: skip

INT8_VERSIONS = {Code.CONV_2D: 3, Code.DEPTHWISE_CONV_2D: 3, Code.FULLY_CONNECTED: 4, Code.RESHAPE: 1,
                 Code.HARD_SWISH: 1}  # fmt: skip
INT8_VERSION = 2
"""From this version on an operator knows int8, where the one above does not say otherwise."""
MOVING = frozenset({
    Code.RESHAPE, Code.SLICE, Code.TRANSPOSE, Code.PAD, Code.PADV2, Code.MAX_POOL_2D, Code.AVERAGE_POOL_2D,
    Code.RESIZE_NEAREST_NEIGHBOR, Code.RELU, Code.RELU6,
})  # fmt: skip
"""What has one scale before and behind; a concatenation too, whose inputs are brought to it."""
PRODUCTS = frozenset({Code.MUL, Code.BATCH_MATMUL})
WEIGHTED = frozenset({Code.CONV_2D, Code.DEPTHWISE_CONV_2D, Code.FULLY_CONNECTED, Code.TRANSPOSE_CONV})
BELOW_ONE = Affine(np.float32(1 / 256), -128, np.int8)
"""What a sigmoid and a softmax make, of which the specification wants no other scale."""
FIXED = {Code.LOGISTIC: BELOW_ONE, Code.SOFTMAX: BELOW_ONE}


def tensor_name(tensor: int) -> str:
    return f"t{tensor}"


def to_nhwc(array: NDArray) -> NDArray:
    """`(N, C, H, W)` to `(N, H, W, C)`; vectors and tokens as they are."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


def to_nchw(array: NDArray) -> NDArray:
    """`(N, H, W, C)` to `(N, C, H, W)`; vectors and tokens as they are."""
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array


def _nhwc(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape


@dataclass(frozen=True)
class ModelOperator:
    """An operator of a model: its name in the format, like `CONV_2D`, the network's node that it belongs to, whether
    an activation is fused into it, the tensors that it reads and makes, constants left out, by their numbers, and
    whether all of these are int8."""

    code: str
    owner: int
    clamped: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    int8: bool = False


_CODE_NAMES = {number: name for name, number in vars(Code).items() if not name.startswith("_")}


def model_operators(model: bytes, network: Network) -> list[ModelOperator]:
    """The operators of a model that `to_tflite` made of this network, in their order."""
    root = schema.Model.GetRootAs(model)
    graph = root.Subgraphs(0)
    constant = [
        root.Buffers(graph.Tensors(number).Buffer()).DataLength() > 0 for number in range(graph.TensorsLength())
    ]
    found = []
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        outputs = tuple(int(operator.Outputs(i)) for i in range(operator.OutputsLength()))
        options = schema.OperatorT.InitFromObj(operator).builtinOptions
        given = (int(operator.Inputs(i)) for i in range(operator.InputsLength()))
        read = tuple(tensor for tensor in given if tensor >= 0 and not constant[tensor])
        found.append(
            ModelOperator(
                code=_CODE_NAMES[root.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()],
                owner=_owner(graph.Tensors(outputs[0]).Name().decode(), network),
                clamped=getattr(options, "fusedActivationFunction", FUSED["none"]) != FUSED["none"],
                inputs=read,
                outputs=outputs,
                int8=all(graph.Tensors(tensor).Type() == schema.TensorType.INT8 for tensor in (*read, *outputs)),
            )
        )
    return found


def owners(model: bytes, network: Network) -> list[int]:
    """For every operator of a model that `to_tflite` made, in order: the network's node that it belongs to."""
    return [operator.owner for operator in model_operators(model, network)]


def _owner(name: str, network: Network) -> int:
    if inner := re.fullmatch(r"n(\d+)/.+", name):
        return int(inner[1])
    if output := re.fullmatch(r"t(\d+)", name):
        return int(output[1]) - len(network.inputs)
    raise ValueError(f"the tensor {name!r} belongs to no node")


class _Buffer(schema.BufferT):
    """A buffer whose data is aligned as the schema wants it, which the generated code forgets."""

    def Pack(self, builder: flatbuffers.Builder) -> int:
        if self.data is not None:
            builder.Prep(ALIGNMENT, len(self.data))
        return super().Pack(builder)


@dataclass
class _Model:
    """Collects a model's tensors, buffers and operators. With `ranges` of tensors, by name, it is one of int8; `fp16`
    is one to be calculated so."""

    fp16: bool = False
    ranges: dict[str, Range] | None = None
    affine: dict[int, Affine] = field(default_factory=dict)
    """Of the tensors of int8."""
    tied: set[int] = field(default_factory=set)
    """Tensors of int8 whose scale is not to be changed."""
    tensors: list[schema.TensorT] = field(default_factory=list)
    buffers: list[schema.BufferT] = field(default_factory=lambda: [_Buffer()])  # the first one must be empty
    operators: list[schema.OperatorT] = field(default_factory=list)
    codes: dict[tuple[int, int], int] = field(default_factory=dict)

    def tensor(self, name: str, shape: Sequence[int], dtype: Any = np.float32, buffer: int = 0) -> int:
        self.tensors.append(
            schema.TensorT(
                shape=np.array(shape, np.int32), type=TYPES[np.dtype(dtype)], buffer=buffer, name=name, hasRank=True
            )
        )
        return len(self.tensors) - 1

    def activation(self, name: str, shape: Sequence[int], affine: Affine | None = None) -> int:
        """A tensor that an operator makes, of int8 where the model is."""
        if self.ranges is None:
            return self.tensor(name, shape)
        made = self.tensor(name, shape, np.int8)
        # There is none of what takes that of its input.
        self.quantize(made, affine or Affine.of(self.ranges.get(name, (0.0, 0.0)), np.int8))
        return made

    def quantize(self, tensor: int, affine: Affine) -> None:
        """Gives a tensor of int8 its scale."""
        self.affine[tensor] = affine
        self.scale(tensor, [affine.scale], affine.zero)

    def scale(self, tensor: int, scales: Sequence[np.float32] | NDArray, zero: int = 0, axis: int = 0) -> None:
        self.tensors[tensor].quantization = schema.QuantizationParametersT(
            scale=np.array(scales, np.float32), zeroPoint=np.full(len(scales), zero, np.int64), quantizedDimension=axis
        )

    def values(self, tensor: int) -> NDArray[np.float32] | None:
        """What a constant of float32 holds; None for every other tensor."""
        described = self.tensors[tensor]
        if not described.buffer or described.type != schema.TensorType.FLOAT32:
            return None
        return self.buffers[described.buffer].data.view(np.float32).reshape(described.shape)

    def is_float(self, tensor: int) -> bool:
        """Whether an operator makes it, or the model is given it, in float32."""
        described = self.tensors[tensor]
        return bool(described.type == schema.TensorType.FLOAT32 and not described.buffer)

    def constant(self, name: str, value: NDArray) -> int:
        array = np.ascontiguousarray(value)
        self.buffers.append(_Buffer(data=array.reshape(-1).view(np.uint8)))
        return self.tensor(name, array.shape, array.dtype, len(self.buffers) - 1)

    def code(self, operator: schema.OperatorT) -> int:
        return next(code for (code, _), index in self.codes.items() if index == operator.opcodeIndex)

    def operator(self, code: int, version: int, inputs: Sequence[int], output: int, options: Any) -> None:
        index = self.codes.setdefault((code, version), len(self.codes))
        kind = 0 if options is None else getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=index, inputs=np.array(inputs, np.int32), outputs=np.array([output], np.int32),
                builtinOptionsType=kind, builtinOptions=options,
            )
        )  # fmt: skip

    def pack(self, inputs: Sequence[int], outputs: Sequence[int], name: str) -> bytes:
        graph = schema.SubGraphT(
            tensors=self.tensors, inputs=np.array(inputs, np.int32), outputs=np.array(outputs, np.int32),
            operators=self.operators, name=name,
        )  # fmt: skip
        codes = [
            schema.OperatorCodeT(
                deprecatedBuiltinCode=min(code, Code.PLACEHOLDER_FOR_GREATER_OP_CODES), builtinCode=code,
                version=version,
            )
            for code, version in self.codes
        ]  # fmt: skip
        model = schema.ModelT(
            version=SCHEMA_VERSION, operatorCodes=codes, subgraphs=[graph], description="latency-lab",
            buffers=self.buffers,
        )  # fmt: skip
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
        return bytes(builder.Output())


class _Emitter:
    """Says one node of a network. Tensors are numbers of the model; `shape` of any is NHWC."""

    def __init__(self, model: _Model, number: int, output: int, arrays: dict[str, Array]):
        self.model = model
        self.prefix = f"n{number}"
        self.output = output
        self.arrays = arrays

    def shape(self, tensor: int) -> Shape:
        return tuple(int(size) for size in self.model.tensors[tensor].shape)

    def constant(self, part: str, value: Any, dtype: Any = np.float32) -> int:
        return self.model.constant(f"{self.prefix}/{part}", np.asarray(value, dtype))

    def emit(
        self, code: int, *inputs: int, part: str, shape: Sequence[int], options: Any = None, last: bool = False,
        version: int = 1,
    ) -> int:  # fmt: skip
        model = self.model
        if model.ranges is None:
            output = self.output if last else model.tensor(f"{self.prefix}/{part}", shape)
        elif any(model.is_float(tensor) for tensor in inputs):
            output = model.tensor(f"{self.prefix}/{part}", shape)
        else:
            output = self.output if last else model.activation(f"{self.prefix}/{part}", shape)
            inputs = tuple(self._in_int8(code, inputs, output))
            version = max(version, INT8_VERSIONS.get(code, INT8_VERSION))
        assert self.shape(output) == tuple(shape), f"{part} makes {tuple(shape)}, not {self.shape(output)}"
        model.operator(code, version, inputs, output, options)
        if last and output != self.output:
            model.operator(Code.QUANTIZE, 1, [output], self.output, schema.QuantizeOptionsT())
        return self.output if last else output

    def _in_int8(self, code: int, inputs: Sequence[int], output: int) -> Sequence[int]:
        """The inputs of an operator on int8, constants too, and the scales that it asks for."""
        model = self.model
        activations = [tensor for tensor in inputs if tensor in model.affine]
        for tensor in inputs:
            values = model.values(tensor)
            if values is None:
                continue
            if code == Code.PADV2:  # what is lower than everything
                affine = model.affine[activations[0]]
                quantized = np.full(values.shape, np.iinfo(np.int8).min, np.int8)
            else:
                affine = Affine.of((min(0.0, float(values.min())), max(0.0, float(values.max()))), np.int8)
                quantized = affine.quantize(values)
            constant = model.constant(model.tensors[tensor].name, quantized)
            model.quantize(constant, affine)
            inputs = [constant if given == tensor else given for given in inputs]
        if code in MOVING:
            model.quantize(output, model.affine[activations[0]])
        elif code in FIXED:
            model.quantize(output, FIXED[code])
        elif code == Code.CONCATENATION:
            return [self._brought(tensor, output) for tensor in inputs]
        else:
            scales = [float(model.affine[tensor].scale) for tensor in inputs if tensor in model.affine]
            step = prod(scales) if code in PRODUCTS else max(scales)
            if code not in WEIGHTED:
                model.quantize(output, model.affine[output].not_finer(step))
            return inputs
        model.tied.add(output)
        return inputs

    def _brought(self, tensor: int, output: int) -> int:
        """A tensor at the scale of another, by an operator only where its own scale is not free."""
        model = self.model
        wanted = model.affine[output]
        if model.affine[tensor] == wanted:
            return tensor
        name = model.tensors[tensor].name
        if tensor not in model.tied and name.startswith(f"{self.prefix}/"):
            model.quantize(tensor, wanted)
            return tensor
        made = model.activation(f"{self.prefix}/{name.rpartition('/')[2]}_scaled", self.shape(tensor), wanted)
        model.operator(Code.QUANTIZE, INT8_VERSION, [tensor], made, schema.QuantizeOptionsT())
        return made

    def floating(self, tensor: int) -> int:
        """The tensor in float32, and all that is made of it."""
        if self.model.ranges is None:
            return tensor
        made = self.model.tensor(f"{self.prefix}/float", self.shape(tensor))
        self.model.operator(Code.DEQUANTIZE, INT8_VERSION, [tensor], made, schema.DequantizeOptionsT())
        return made

    def activate(self, activation: str, tensor: int, *, last: bool) -> int:
        """An activation as operators of its own."""
        shape = self.shape(tensor)
        if activation == "hard_sigmoid":
            three = self.constant("three", 3.0)
            shifted = self.emit(
                Code.ADD, tensor, three, part="shifted", shape=shape,
                options=schema.AddOptionsT(fusedActivationFunction=FUSED["relu6"]),
            )  # fmt: skip
            return self.sixth(shifted, last=last)
        if activation == "hard_swish":
            options: Any = schema.HardSwishOptionsT()
            return self.emit(Code.HARD_SWISH, tensor, part="hard_swish", shape=shape, options=options, last=last)
        if activation == "gelu":
            options = schema.GeluOptionsT(approximate=False)
            return self.emit(Code.GELU, tensor, part="gelu", shape=shape, options=options, last=last)
        code = {"relu": Code.RELU, "relu6": Code.RELU6, "sigmoid": Code.LOGISTIC}[activation]
        return self.emit(code, tensor, part=activation, shape=shape, last=last)

    def sixth(self, tensor: int, *, last: bool) -> int:
        """The second half of a hard sigmoid, relu6(x + 3) / 6."""
        return self.emit(
            Code.MUL, tensor, self.constant("sixth", 1 / 6), part="hard_sigmoid", shape=self.shape(tensor),
            options=schema.MulOptionsT(), last=last,
        )  # fmt: skip

    def weigh(
        self, code: int, tensor: int, weight: Array, bias: Array | None, activation: str, shape: Sequence[int],
        options: Callable[[int], Any], *, part: str, last: bool, version: int = 1,
    ) -> int:  # fmt: skip
        """An operator with weights, and the activation. XNNPACK takes no convolution without a bias, so all have one;
        the 3 of a hard sigmoid is part of it. A transposed convolution reads in another order: the output's shape,
        the weights, then the input."""
        values = np.zeros(shape[-1], np.float32) if bias is None else np.asarray(bias, np.float32)
        fused, rest = (activation, "none") if activation in FUSED else ("none", activation)
        if activation == "hard_sigmoid":
            values, fused = values + np.float32(3), "relu6"
        if self.model.ranges is None:
            inputs = [tensor, self.constant(f"{part}_weight", weight)]
            bias_tensor = self.constant(f"{part}_bias", values)
        else:
            weights, bias_tensor = self._filters(code, tensor, weight, values, part)
            inputs = [tensor, weights]
        if code == Code.TRANSPOSE_CONV:
            inputs = [self.constant(f"{part}_shape", shape, np.int32), *reversed(inputs)]
        output = self.emit(
            code, *inputs, bias_tensor, part=part, shape=shape, options=options(FUSED[fused]),
            last=last and rest == "none", version=version,
        )  # fmt: skip
        if output in self.model.affine:
            step = float(max(self.model.tensors[bias_tensor].quantization.scale))
            self.model.quantize(output, self.model.affine[output].not_finer(step))
        if rest == "none":
            return output
        return self.sixth(output, last=last) if rest == "hard_sigmoid" else self.activate(rest, output, last=last)

    def _filters(self, code: int, tensor: int, weight: Array, bias: Array, part: str) -> tuple[int, int]:
        """Weights and bias of int8. The specification gives a linear layer one scale, a convolution one a filter."""
        axis = 3 if code == Code.DEPTHWISE_CONV_2D else 0
        alike = code == Code.FULLY_CONNECTED
        filters = Filters.of(weight, bias, axis, self.model.affine[tensor].scale, alike=alike)
        weights = self.constant(f"{part}_weight", filters.weight, np.int8)
        self.model.scale(weights, filters.scales[:1] if alike else filters.scales, axis=axis)
        bias_tensor = self.constant(f"{part}_bias", filters.bias, np.int32)
        self.model.scale(bias_tensor, filters.bias_scales[:1] if alike else filters.bias_scales)
        return weights, bias_tensor

    def pad(self, tensor: int, pads: Sequence[tuple[int, int]], part: str, value: float | None = None) -> int:
        """Adds rows, columns or channels, one pair for each axis; zeros without a value."""
        shape = [size + before + after for size, (before, after) in zip(self.shape(tensor), pads, strict=True)]
        amounts = self.constant(f"{part}_sizes", pads, np.int32)
        if value is None:
            return self.emit(Code.PAD, tensor, amounts, part=part, shape=shape, options=schema.PadOptionsT())
        filling = self.constant(f"{part}_value", value)
        return self.emit(Code.PADV2, tensor, amounts, filling, part=part, shape=shape, options=schema.PadV2OptionsT())

    def slice(self, tensor: int, begin: Sequence[int], shape: Sequence[int], part: str, *, last: bool = False) -> int:
        first = self.constant(f"{part}_begin", begin, np.int32)
        size = self.constant(f"{part}_size", shape, np.int32)
        return self.emit(
            Code.SLICE, tensor, first, size, part=part, shape=shape, options=schema.SliceOptionsT(), last=last
        )

    def slice_channels(self, tensor: int, start: int, stop: int, part: str, *, last: bool = False) -> int:
        shape = (*self.shape(tensor)[:3], stop - start)
        return self.slice(tensor, (0, 0, 0, start), shape, part, last=last)

    def reshape(self, tensor: int, shape: Sequence[int], part: str, *, last: bool = False) -> int:
        return self.emit(
            Code.RESHAPE, tensor, self.constant(f"{part}_shape", shape, np.int32), part=part, shape=shape, last=last,
            options=schema.ReshapeOptionsT(newShape=np.array(shape, np.int32)),
        )  # fmt: skip

    def mean(self, tensor: int, axes: Sequence[int], *, keep: bool, part: str, last: bool = False) -> int:
        sizes = enumerate(self.shape(tensor))
        shape = [1 if axis in axes else size for axis, size in sizes if keep or axis not in axes]
        return self.emit(
            Code.MEAN, tensor, self.constant(f"{part}_axes", axes, np.int32), part=part, shape=shape,
            options=schema.ReducerOptionsT(keepDims=keep), last=last,
        )  # fmt: skip

    def multiply(self, left: int, right: int, part: str, *, last: bool = False) -> int:
        """Of the left one's shape."""
        return self.emit(
            Code.MUL, left, right, part=part, shape=self.shape(left), options=schema.MulOptionsT(), last=last
        )

    def convolve(
        self, tensor: int, weight: Array, bias: Array | None, *, stride: tuple[int, int] = (1, 1),
        padding: Padding = (0, 0, 0, 0), groups: int = 1, dilation: tuple[int, int] = (1, 1),
        activation: str = "none", part: str, last: bool = False,
    ) -> int:  # fmt: skip
        """A convolution whose weights are `(filters, channels / groups, kernel height, kernel width)`."""
        spans = [extent(size, step) for size, step in zip(weight.shape[2:], dilation, strict=True)]
        window = _window(self.shape(tensor), spans, stride, padding)
        if window.pads is not None:
            tensor = self.pad(tensor, window.pads, f"{part}_pad")
        batch, _, _, channels = self.shape(tensor)
        filters = weight.shape[0]
        shape = (batch, *window.output, filters)

        if groups == channels and weight.shape[1] == 1 and groups > 1:

            def depthwise(fused: int) -> Any:
                return schema.DepthwiseConv2DOptionsT(
                    padding=window.mode, strideH=stride[0], strideW=stride[1], depthMultiplier=filters // channels,
                    dilationHFactor=dilation[0], dilationWFactor=dilation[1], fusedActivationFunction=fused,
                )  # fmt: skip

            return self.weigh(
                Code.DEPTHWISE_CONV_2D, tensor, weight.transpose(1, 2, 3, 0), bias, activation, shape, depthwise,
                part=part, last=last, version=1 if dilation == (1, 1) else DILATED_DEPTHWISE_VERSION,
            )  # fmt: skip

        def options(fused: int) -> Any:
            return schema.Conv2DOptionsT(
                padding=window.mode, strideH=stride[0], strideW=stride[1], dilationHFactor=dilation[0],
                dilationWFactor=dilation[1], fusedActivationFunction=fused,
            )  # fmt: skip

        return self.weigh(
            Code.CONV_2D, tensor, weight.transpose(0, 2, 3, 1), bias, activation, shape, options, part=part,
            last=last, version=1 if groups == 1 else GROUPED_CONVOLUTION_VERSION,
        )  # fmt: skip

    def average(
        self, tensor: int, kernel: tuple[int, int], stride: tuple[int, int], padding: Padding, *, part: str, last: bool
    ) -> int:
        """An average pool that leaves the padding out of the mean, as the format's own does with its own padding.

        Other padding is put in as zeros, and what that did to the means is undone.
        """
        before = self.shape(tensor)
        window = _window(before, kernel, stride, padding)
        if window.pads is not None:
            tensor = self.pad(tensor, window.pads, f"{part}_pad")
        shape = (before[0], *window.output, before[3])
        options = schema.Pool2DOptionsT(
            padding=window.mode, strideH=stride[0], strideW=stride[1], filterHeight=kernel[0], filterWidth=kernel[1]
        )
        uneven = window.pads is not None
        pooled = self.emit(
            Code.AVERAGE_POOL_2D, tensor, part=part, shape=shape, options=options, last=last and not uneven
        )
        if not uneven:
            return pooled
        rows, columns = (
            _positions_inside(before[1 + axis], kernel[axis], stride[axis], padding[axis], window.output[axis])
            for axis in (0, 1)
        )
        share = (kernel[0] * kernel[1] / np.outer(rows, columns))[None, :, :, None]
        return self.emit(
            Code.MUL, pooled, self.constant(f"{part}_share", share), part=f"{part}_mean", shape=shape,
            options=schema.MulOptionsT(), last=last,
        )  # fmt: skip

    def add(self, left: int, right: int, activation: str, *, part: str) -> int:
        """The sum as the node's output, with the activation."""
        fused = activation in FUSED
        total = self.emit(
            Code.ADD, left, right, part=part, shape=self.shape(left), last=fused,
            options=schema.AddOptionsT(fusedActivationFunction=FUSED[activation] if fused else FUSED["none"]),
        )  # fmt: skip
        return total if fused else self.activate(activation, total, last=True)


@dataclass(frozen=True)
class _Window:
    """How the format says a window's padding: a mode of its own, after explicit padding where neither mode fits."""

    mode: int
    pads: tuple[tuple[int, int], ...] | None
    output: tuple[int, int]


def _window(shape: Shape, kernel: Sequence[int], stride: Sequence[int], padding: Padding) -> _Window:
    """SAME puts `max((ceil(n / s) - 1) s + k - n, 0)` rows around n, the smaller half in front; VALID none. They stand
    for explicit padding only where they cover the same elements at every position."""
    same = valid = True
    pads, output = [], []
    for axis in (0, 1):
        size, before, after = shape[1 + axis], padding[axis], padding[axis + 2]
        positions = window_output(size, kernel[axis], stride[axis], before + after)
        # What lies behind the last position is never read.
        needed = (positions - 1) * stride[axis] + kernel[axis] - size
        same &= positions == -(-size // stride[axis]) and before == max(needed, 0) // 2
        valid &= before == 0 and needed <= 0
        pads.append((before, max(needed - before, 0)))
        output.append(positions)
    explicit = None if valid or same else ((0, 0), *pads, (0, 0))
    mode = schema.Padding.SAME if same and not valid else schema.Padding.VALID
    return _Window(mode, explicit, (output[0], output[1]))


def _positions_inside(size: int, kernel: int, stride: int, before: int, positions: int) -> NDArray[np.int64]:
    """How many elements each position of a window covers that are not padding."""
    begin = np.arange(positions) * stride - before
    return np.minimum(begin + kernel, size) - np.maximum(begin, 0)


def _convolution(emit: _Emitter, operator: Convolution, inputs: Sequence[int]) -> None:
    tensor = emit.convolve(
        inputs[0], emit.arrays["weight"], emit.arrays.get("bias"), stride=operator.stride, padding=operator.padding,
        groups=operator.groups, dilation=operator.dilation,
        activation="none" if operator.residual else operator.activation, part="conv", last=not operator.residual,
    )  # fmt: skip
    if operator.residual:
        emit.add(tensor, inputs[1], operator.activation, part="residual")


def _transposed_convolution(emit: _Emitter, operator: TransposedConvolution, inputs: Sequence[int]) -> None:
    """The format's own has no groups and no explicit padding: groups are done one by one, and edges are cut off."""
    batch, height, width, channels = emit.shape(inputs[0])
    weight, bias = emit.arrays["weight"], emit.arrays.get("bias")
    same = all(
        _is_same(size, out, kernel, stride, before)
        for size, out, kernel, stride, before in zip(
            (height, width), operator.output_size, operator.kernel, operator.stride, operator.padding[:2], strict=True
        )
    )
    cut = any(operator.padding) and not same
    top, left, bottom, right = operator.padding
    rows, columns = operator.output_size
    size = (rows + top + bottom, columns + left + right) if cut else operator.output_size
    mode = schema.Padding.SAME if same and any(operator.padding) else schema.Padding.VALID
    filters, inputs_each = operator.filters // operator.groups, channels // operator.groups
    made = []
    for group in range(operator.groups):
        part = f"conv{group}"
        given = slice(group * inputs_each, (group + 1) * inputs_each)
        source = inputs[0]
        if operator.groups > 1:
            source = emit.slice_channels(source, given.start, given.stop, f"{part}_input")
        made.append(
            emit.weigh(
                Code.TRANSPOSE_CONV, source, weight[given].transpose(1, 2, 3, 0),
                None if bias is None else bias[group * filters : (group + 1) * filters], operator.activation,
                (batch, *size, filters), lambda fused: schema.TransposeConvOptionsT(
                    padding=mode, strideH=operator.stride[0], strideW=operator.stride[1], fusedActivationFunction=fused
                ), part=part, last=operator.groups == 1 and not cut, version=CLAMPED_TRANSPOSED_VERSION,
            )
        )  # fmt: skip
    tensor = made[0]
    if operator.groups > 1:
        tensor = emit.emit(
            Code.CONCATENATION, *made, part="concat", shape=(batch, *size, operator.filters), last=not cut,
            options=schema.ConcatenationOptionsT(axis=3),
        )  # fmt: skip
    if cut:
        emit.slice(tensor, (0, top, left, 0), _nhwc(operator.output), "cut", last=True)


def _is_same(size: int, output: int, kernel: int, stride: int, before: int) -> bool:
    """Whether SAME padding, which for a transposed convolution is that of the convolution back, takes away as much."""
    taken = max((size - 1) * stride + kernel - output, 0)
    return size == -(-output // stride) and before == taken // 2


def _linear(emit: _Emitter, operator: Linear, inputs: Sequence[int]) -> None:
    tokens = len(operator.input) == 3
    emit.weigh(
        Code.FULLY_CONNECTED, inputs[0], emit.arrays["weight"], emit.arrays.get("bias"), operator.activation,
        operator.output,
        lambda fused: schema.FullyConnectedOptionsT(fusedActivationFunction=fused, keepNumDims=tokens),
        part="linear", last=True, version=TOKENS_VERSION if tokens else 1,
    )  # fmt: skip


def _matmul(emit: _Emitter, operator: MatMul, inputs: Sequence[int]) -> None:
    """The smaller of the first matrix and the product is scaled."""
    first = inputs[0]
    factor = emit.constant("factor", operator.input[2] ** -0.5) if operator.scaled else None
    early = operator.input[2] <= operator.columns
    if factor is not None and early:
        first = emit.multiply(first, factor, "scale")
    product = emit.emit(
        Code.BATCH_MATMUL, first, inputs[1], part="matmul", shape=operator.output, last=factor is None or early,
        options=schema.BatchMatMulOptionsT(adjX=False, adjY=operator.transposed),
    )  # fmt: skip
    if factor is not None and not early:
        emit.multiply(product, factor, "scale", last=True)


def _layer_norm(emit: _Emitter, operator: LayerNorm, inputs: Sequence[int]) -> None:
    """The format has none: said in parts, as converters do."""
    tensor = emit.floating(inputs[0])
    shape = emit.shape(tensor)
    mean = emit.mean(tensor, (2,), keep=True, part="mean")
    centred = emit.emit(Code.SUB, tensor, mean, part="centre", shape=shape, options=schema.SubOptionsT())
    # Where squares are in fp16, XNNPACK calculates them and all behind them in fp32. The centred have no mean, so their
    # products with the others have the same.
    square = emit.multiply(tensor if emit.model.fp16 else centred, centred, "square")
    variance = emit.mean(square, (2,), keep=True, part="variance")
    raised = emit.emit(
        Code.ADD, variance, emit.constant("epsilon", operator.epsilon), part="raise", shape=emit.shape(variance),
        options=schema.AddOptionsT(),
    )  # fmt: skip
    inverse = emit.emit(Code.RSQRT, raised, part="inverse", shape=emit.shape(raised))
    normal = emit.multiply(centred, inverse, "normalise")
    weighted = emit.multiply(normal, emit.constant("weight", emit.arrays["weight"]), "weigh")
    emit.add(weighted, emit.constant("bias", emit.arrays["bias"]), "none", part="shift")


def _softmax(emit: _Emitter, operator: Softmax, inputs: Sequence[int]) -> None:
    emit.emit(
        Code.SOFTMAX, inputs[0], part="softmax", shape=operator.output, options=schema.SoftmaxOptionsT(beta=1.0),
        last=True,
    )  # fmt: skip


def _rearrange(emit: _Emitter, operator: Rearrange, inputs: Sequence[int]) -> None:
    """Between maps and tokens there is nothing to move, as maps are NHWC."""
    if operator.mode in ("map_to_tokens", "tokens_to_map"):
        emit.reshape(inputs[0], _nhwc(operator.output), "reshape", last=True)
        return
    (sequences, tokens, features), heads = operator.input, operator.heads or 1
    if operator.mode == "split_heads":
        apart = (sequences, tokens, heads, features // heads)
    else:
        apart = (sequences // heads, heads, tokens, features)
    order = (0, 2, 1, 3)
    transposed = emit.emit(
        Code.TRANSPOSE, emit.reshape(inputs[0], apart, "apart"), emit.constant("order", order, np.int32),
        part="transpose", shape=[apart[axis] for axis in order], options=schema.TransposeOptionsT(),
    )  # fmt: skip
    emit.reshape(transposed, operator.output, "together", last=True)


def _squeeze_excite(emit: _Emitter, operator: SqueezeExcite, inputs: Sequence[int]) -> None:
    arrays = emit.arrays
    pooled = emit.mean(inputs[0], (1, 2), keep=True, part="pool")
    reduced = emit.convolve(
        pooled, arrays["reduce_weight"][:, :, None, None], arrays["reduce_bias"], activation="relu", part="reduce"
    )
    scale = emit.convolve(
        reduced, arrays["expand_weight"][:, :, None, None], arrays["expand_bias"], activation="hard_sigmoid",
        part="expand",
    )  # fmt: skip
    emit.emit(
        Code.MUL, inputs[0], scale, part="scale", shape=emit.shape(inputs[0]), options=schema.MulOptionsT(), last=True
    )


def _channel_bypass(emit: _Emitter, operator: ChannelBypass, inputs: Sequence[int]) -> None:
    alone = operator.filters == 0
    pooled = operator.stride != (1, 1)
    bypassed = inputs[0]
    if not (alone and operator.passed == operator.input[1]):
        bypassed = emit.slice_channels(bypassed, operator.filters, operator.passed, "slice", last=alone and not pooled)
    if pooled:
        bottom, right = (-size % stride for size, stride in zip(operator.input[2:], operator.stride, strict=True))
        bypassed = emit.average(
            bypassed, operator.stride, operator.stride, (0, 0, bottom, right), part="pool", last=alone
        )
    if alone:
        return
    source = inputs[0]
    if operator.depthwise:
        source = emit.slice_channels(source, 0, operator.filters, "leading")
    filtered = emit.convolve(
        source, emit.arrays["weight"], emit.arrays.get("bias"), stride=operator.stride, padding=operator.padding,
        groups=operator.filters if operator.depthwise else 1, activation=operator.activation, part="conv",
    )  # fmt: skip
    emit.emit(
        Code.CONCATENATION, filtered, bypassed, part="concat", shape=_nhwc(operator.output), last=True,
        options=schema.ConcatenationOptionsT(axis=3),
    )  # fmt: skip


def _residual_add(emit: _Emitter, operator: ResidualAdd, inputs: Sequence[int]) -> None:
    wide, narrow = (inputs[0], inputs[1]) if operator.input[1] > operator.shortcut_channels else (inputs[1], inputs[0])
    missing = abs(operator.input[1] - operator.shortcut_channels)
    padded = emit.pad(narrow, ((0, 0), (0, 0), (0, 0), (0, missing)), "pad")
    emit.add(wide, padded, operator.activation, part="add")


def _add(emit: _Emitter, operator: Add, inputs: Sequence[int]) -> None:
    emit.add(inputs[0], inputs[1], operator.activation, part="add")


def _global_pool(emit: _Emitter, operator: GlobalPool, inputs: Sequence[int]) -> None:
    emit.mean(inputs[0], (1, 2) if len(operator.input) == 4 else (1,), keep=False, part="pool", last=True)


def _pool(emit: _Emitter, operator: Pool, inputs: Sequence[int]) -> None:
    tensor = inputs[0]
    if operator.mode == "average":
        emit.average(tensor, operator.kernel, operator.stride, operator.padding, part="pool", last=True)
        return
    window = _window(emit.shape(tensor), operator.kernel, operator.stride, operator.padding)
    if window.pads is not None:
        tensor = emit.pad(tensor, window.pads, "pad", value=-np.inf)
    options = schema.Pool2DOptionsT(
        padding=window.mode, strideH=operator.stride[0], strideW=operator.stride[1], filterHeight=operator.kernel[0],
        filterWidth=operator.kernel[1],
    )  # fmt: skip
    emit.emit(Code.MAX_POOL_2D, tensor, part="pool", shape=_nhwc(operator.output), options=options, last=True)


def _upsample(emit: _Emitter, operator: Upsample, inputs: Sequence[int]) -> None:
    shape = _nhwc(operator.output)
    # With half pixels the nearest element of a whole factor is never a matter of rounding.
    emit.emit(
        Code.RESIZE_NEAREST_NEIGHBOR, inputs[0], emit.constant("size", shape[1:3], np.int32), part="resize",
        shape=shape, options=schema.ResizeNearestNeighborOptionsT(halfPixelCenters=True), last=True,
        version=HALF_PIXEL_VERSION,
    )  # fmt: skip


def _activate(emit: _Emitter, operator: Activate, inputs: Sequence[int]) -> None:
    emit.activate(operator.activation, inputs[0], last=True)


_LOWERINGS: dict[type[BaseOperator], Callable[[_Emitter, Any, Sequence[int]], None]] = {
    Convolution: _convolution,
    Linear: _linear,
    SqueezeExcite: _squeeze_excite,
    ChannelBypass: _channel_bypass,
    ResidualAdd: _residual_add,
    Add: _add,
    GlobalPool: _global_pool,
    Pool: _pool,
    Upsample: _upsample,
    Activate: _activate,
    TransposedConvolution: _transposed_convolution,
    MatMul: _matmul,
    LayerNorm: _layer_norm,
    Softmax: _softmax,
    Rearrange: _rearrange,
}


def to_tflite(
    network: Network, weights: Weights | None = None, seed: int = 0, precision: Precision = "fp32",
    samples: Samples | None = None, *, inner: bool = False,
) -> bytes:  # fmt: skip
    """The network as a TFLite model; inputs `t0`, `t1`, …, outputs named after their tensors, all NHWC and float32.

    Without `weights` they are made up from `seed`. In int8 the ranges of activations are those on the inputs `samples`,
    made up too where there are none; it takes LiteRT. In fp16 runtimes calculate by themselves, from a model of
    float32. Raises InvalidInput where weights do not fit the network.
    """
    weights = made_up(network, seed) if weights is None else checked(network, weights)
    if precision != "int8":
        return _said(network, weights, fp16=precision == "fp16").packed()
    ranges = _ranges(network, weights, samples or made_up_samples(network))
    return _said(network, weights, ranges, inner=inner).packed()


@dataclass(frozen=True)
class _Said:
    """A model and its border."""

    model: _Model
    name: str
    inputs: list[int]
    outputs: list[int]

    def packed(self) -> bytes:
        return self.model.pack(self.inputs, self.outputs, self.name)


def _said(
    network: Network, weights: Weights, ranges: dict[str, Range] | None = None, *, fp16: bool = False,
    inner: bool = False,
) -> _Said:  # fmt: skip
    model = _Model(fp16, ranges)
    first, shapes, wanted = len(network.inputs), network.shapes, set(network.output_tensors)
    converted = ranges is not None and not inner
    border = {
        tensor: model.tensor(tensor_name(tensor), _nhwc(shape)) if ranges is None or converted
        else model.activation(tensor_name(tensor), _nhwc(shape))
        for tensor, shape in enumerate(shapes) if not converted or tensor < first or tensor in wanted
    }  # fmt: skip
    tensors = {} if converted else dict(border)
    for number, node in enumerate(network.nodes):
        made = first + number
        if converted:
            for tensor in node.inputs:
                if tensor not in tensors:  # an input of the network, for the first time
                    tensors[tensor] = _inside(model, number, tensor, shapes[tensor])
                    model.operator(Code.QUANTIZE, 1, [border[tensor]], tensors[tensor], schema.QuantizeOptionsT())
            tensors[made] = _inside(model, number, made, shapes[made])
        emitter = _Emitter(model, number, tensors[made], dict(weights[number]))
        _LOWERINGS[type(node.operator)](emitter, node.operator, [tensors[tensor] for tensor in node.inputs])
        if converted and made in wanted:
            model.operator(Code.DEQUANTIZE, INT8_VERSION, [tensors[made]], border[made], schema.DequantizeOptionsT())
    return _Said(
        model, f"network_{network.key}", [border[tensor] for tensor in range(first)],
        [border[tensor] for tensor in network.output_tensors],
    )  # fmt: skip


def _inside(model: _Model, number: int, tensor: int, shape: Shape) -> int:
    """The tensor of int8 for one of the network, which belongs to a node."""
    assert model.ranges is not None
    affine = Affine.of(model.ranges[tensor_name(tensor)], np.int8)
    return model.activation(f"n{number}/{tensor_name(tensor)}_int8", _nhwc(shape), affine)


def _ranges(network: Network, weights: Weights, samples: Samples) -> dict[str, Range]:
    """Smallest and largest value of every tensor that is not constant, zero among them."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType  # only int8 needs the runtime

    said = _said(network, weights)
    interpreter = Interpreter(
        model_content=said.packed(), experimental_preserve_all_tensors=True, num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )  # fmt: skip
    interpreter.allocate_tensors()
    lowered = {
        int(operator.outputs[0]) for operator in said.model.operators
        if said.model.code(operator) == Code.PADV2
    }  # fmt: skip
    wanted = {
        described.name: number for number, described in enumerate(said.model.tensors)
        if said.model.is_float(number) and number not in lowered
    }  # fmt: skip
    ranges: dict[str, Range] = {}
    for inputs in samples:
        for tensor, values in zip(said.inputs, inputs, strict=True):
            interpreter.set_tensor(tensor, to_nhwc(values))
        interpreter.invoke()
        merged(ranges, {name: interpreter.get_tensor(number) for name, number in wanted.items()})
    return ranges
