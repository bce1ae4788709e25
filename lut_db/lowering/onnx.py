"""Networks said in ONNX: batch-norm folded, activations and residual additions where runtimes fuse them.

Every ONNX node is named `n<number>/<part>` after the network's node it belongs to, and tensor `i` of the network
is called `t<i>`, so that a runtime's profile can be read back in terms of operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lut_db.lowering.int8 import Samples, made_up_samples
from lut_db.lowering.qdq import quantized
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
    Pool,
    Rearrange,
    ResidualAdd,
    Softmax,
    SqueezeExcite,
    TransposedConvolution,
    Upsample,
)
from lut_db.targets import Precision

OPSET = 20
OLDEST_OPSET = 18
"""Has all operators that are emitted, but the `YOUNGEST`."""
YOUNGEST = frozenset({"Gelu"})
IR_VERSION = 9
"""Read by every ONNX Runtime since 1.15."""
ELEMENTS: dict[Precision, tuple[type[np.floating], int]] = {
    "fp32": (np.float32, TensorProto.FLOAT), "fp16": (np.float16, TensorProto.FLOAT16),
    "int8": (np.float32, TensorProto.FLOAT),
}  # fmt: skip
"""For each precision: the elements of inputs, outputs and weights, in numpy and in ONNX; int8 is made of float32."""


Bypass = Literal["concat", "sum"]
BYPASSES: tuple[Bypass, ...] = get_args(Bypass)
"""How a depthwise layer's bypass is joined to it: cut off and put back, or, where that is possible, as a sum of two
convolutions of all channels, each with zeros where the other has filters. Runtimes with a blocked layout need not leave
it for a sum."""

ZERO_AT_ZERO = frozenset({"none", "relu", "relu6", "hard_swish", "gelu"})


def tensor_name(tensor: int) -> str:
    return f"t{tensor}"


def node_number(name: str) -> int | None:
    """The network's node that an ONNX node's name belongs to, or None; also for names that a runtime derived."""
    start = name.find("n")
    while start >= 0:
        digits = name[start + 1 :].split("/", 1)
        if len(digits) == 2 and digits[0].isdigit():
            return int(digits[0])
        start = name.find("n", start + 1)
    return None


class _Emitter:
    """Collects the ONNX nodes and constants of one node of a network."""

    def __init__(
        self, number: int, output: str, arrays: dict[str, Array], dtype: type[np.floating], bypass: Bypass
    ):  # fmt: skip
        self.prefix = f"n{number}"
        self.dtype = dtype
        self.bypass = bypass
        self.output = output
        self.arrays = arrays
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, part: str, value: Any) -> str:
        name = f"{self.prefix}/{part}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, shape: Sequence[int] | None = None, *, filters: int | None = None) -> str:
        """One of the node's arrays, filled up with zeros to so many filters."""
        array = np.ascontiguousarray(self.arrays[name], dtype=self.dtype)
        if filters is not None:
            array = np.concatenate([array, np.zeros((filters - len(array), *array.shape[1:]), self.dtype)])
        return self.constant(name, array if shape is None else array.reshape(shape))

    def emit(self, op_type: str, *inputs: str, part: str, last: bool = False, **attributes: Any) -> str:
        output = self.output if last else f"{self.prefix}/{part}_out"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=f"{self.prefix}/{part}", **attributes))
        return output

    def activate(self, activation: str, tensor: str, *, last: bool) -> str:
        if activation == "relu":
            return self.emit("Relu", tensor, part="relu", last=last)
        if activation == "relu6":
            low = self.constant("zero", self.dtype(0))
            high = self.constant("six", self.dtype(6))
            return self.emit("Clip", tensor, low, high, part="relu6", last=last)
        if activation == "sigmoid":
            return self.emit("Sigmoid", tensor, part="sigmoid", last=last)
        if activation == "hard_sigmoid":
            return self.hard_sigmoid(tensor, last=last)
        if activation == "gelu":  # in one: of its parts runtimes make one too, but without a name
            return self.emit("Gelu", tensor, part="gelu", last=last)
        # Said as its two halves rather than as HardSwish, which runtimes without such a kernel rename.
        return self.emit("Mul", tensor, self.hard_sigmoid(tensor, last=False), part="hard_swish", last=last)

    def hard_sigmoid(self, tensor: str, *, last: bool) -> str:
        return self.emit("HardSigmoid", tensor, part="hard_sigmoid", last=last, alpha=1 / 6, beta=0.5)

    def reshape(self, tensor: str, shape: Sequence[int], part: str, *, last: bool = False) -> str:
        sizes = self.constant(f"{part}_shape", np.array(shape, dtype=np.int64))
        return self.emit("Reshape", tensor, sizes, part=part, last=last)

    def slice_channels(self, tensor: str, start: int, stop: int, part: str, *, last: bool = False) -> str:
        bounds = [self.constant(f"{part}_{name}", np.array([value], dtype=np.int64))
                  for name, value in (("start", start), ("stop", stop), ("axis", 1))]  # fmt: skip
        return self.emit("Slice", tensor, *bounds, part=part, last=last)


def _convolution(emit: _Emitter, operator: Convolution, inputs: Sequence[str]) -> None:
    arguments = [inputs[0], emit.weight("weight")]
    if operator.bias:
        arguments.append(emit.weight("bias"))
    activated = operator.activation != "none"
    tensor = emit.emit(
        "Conv", *arguments, part="conv", last=not (operator.residual or activated),
        kernel_shape=operator.kernel, strides=operator.stride, pads=operator.padding, group=operator.groups,
        dilations=operator.dilation,
    )  # fmt: skip
    if operator.residual:
        tensor = emit.emit("Add", tensor, inputs[1], part="residual", last=not activated)
    if activated:
        emit.activate(operator.activation, tensor, last=True)


def _transposed_convolution(emit: _Emitter, operator: TransposedConvolution, inputs: Sequence[str]) -> None:
    arguments = [inputs[0], emit.weight("weight")]
    if operator.bias:
        arguments.append(emit.weight("bias"))
    activated = operator.activation != "none"
    tensor = emit.emit(
        "ConvTranspose", *arguments, part="conv", last=not activated, kernel_shape=operator.kernel,
        strides=operator.stride, pads=operator.padding, output_padding=operator.output_padding, group=operator.groups,
    )  # fmt: skip
    if activated:
        emit.activate(operator.activation, tensor, last=True)


def _linear(emit: _Emitter, operator: Linear, inputs: Sequence[str]) -> None:
    """Tokens are put one below the other, as runtimes do themselves under names of their own."""
    tensor = inputs[0]
    tokens = len(operator.input) == 3
    if tokens:
        tensor = emit.reshape(tensor, (-1, operator.input[-1]), "stack")
    arguments = [tensor, emit.weight("weight")]
    if operator.bias:
        arguments.append(emit.weight("bias"))
    activated = operator.activation != "none"
    tensor = emit.emit("Gemm", *arguments, part="linear", last=not (activated or tokens), transB=1)
    if activated:
        tensor = emit.activate(operator.activation, tensor, last=not tokens)
    if tokens:
        emit.reshape(tensor, operator.output, "unstack", last=True)


def _matmul(emit: _Emitter, operator: MatMul, inputs: Sequence[str]) -> None:
    second = inputs[1]
    if operator.transposed:
        second = emit.emit("Transpose", second, part="transpose", perm=(0, 2, 1))
    product = emit.emit("MatMul", inputs[0], second, part="matmul", last=not operator.scaled)
    if operator.scaled:
        factor = emit.constant("factor", emit.dtype(operator.input[2] ** -0.5))
        emit.emit("Mul", product, factor, part="scale", last=True)


def _layer_norm(emit: _Emitter, operator: LayerNorm, inputs: Sequence[str]) -> None:
    emit.emit(
        "LayerNormalization", inputs[0], emit.weight("weight"), emit.weight("bias"), part="norm", last=True,
        axis=-1, epsilon=operator.epsilon,
    )  # fmt: skip


def _softmax(emit: _Emitter, operator: Softmax, inputs: Sequence[str]) -> None:
    emit.emit("Softmax", inputs[0], part="softmax", last=True, axis=-1)


def _rearrange(emit: _Emitter, operator: Rearrange, inputs: Sequence[str]) -> None:
    """A reshape stands between the transpose and whatever comes next, which runtimes would join otherwise."""
    tensor = inputs[0]
    if operator.mode == "map_to_tokens":
        channels_last = emit.emit("Transpose", tensor, part="transpose", perm=(0, 2, 3, 1))
        emit.reshape(channels_last, operator.output, "flatten", last=True)
    elif operator.mode == "tokens_to_map":
        batch, channels, height, width = operator.output
        channels_last = emit.reshape(tensor, (batch, height, width, channels), "unflatten")
        emit.emit("Transpose", channels_last, part="transpose", perm=(0, 3, 1, 2), last=True)
    else:
        (sequences, tokens, features), heads = operator.input, operator.heads or 1
        split = operator.mode == "split_heads"
        apart = (sequences, tokens, heads, -1) if split else (-1, heads, tokens, features)
        transposed = emit.emit("Transpose", emit.reshape(tensor, apart, "apart"), part="transpose", perm=(0, 2, 1, 3))
        emit.reshape(transposed, operator.output, "together", last=True)


def _squeeze_excite(emit: _Emitter, operator: SqueezeExcite, inputs: Sequence[str]) -> None:
    channels, squeeze = operator.input[1], operator.squeeze
    pooled = emit.emit("GlobalAveragePool", inputs[0], part="pool")
    reduced = emit.emit(
        "Conv", pooled, emit.weight("reduce_weight", (squeeze, channels, 1, 1)), emit.weight("reduce_bias"),
        part="reduce", kernel_shape=(1, 1),
    )  # fmt: skip
    reduced = emit.emit("Relu", reduced, part="reduce_relu")
    expanded = emit.emit(
        "Conv", reduced, emit.weight("expand_weight", (channels, squeeze, 1, 1)), emit.weight("expand_bias"),
        part="expand", kernel_shape=(1, 1),
    )  # fmt: skip
    scale = emit.hard_sigmoid(expanded, last=False)
    emit.emit("Mul", inputs[0], scale, part="scale", last=True)


def _channel_bypass(emit: _Emitter, operator: ChannelBypass, inputs: Sequence[str]) -> None:
    if emit.bypass == "sum" and _may_be_sum(operator):
        _bypass_as_sum(emit, operator, inputs[0])
    else:
        _bypass_by_concat(emit, operator, inputs)


def _may_be_sum(operator: ChannelBypass) -> bool:
    """Whether it is depthwise, since others would calculate much for nothing; all windows of its pooling are full, and
    its activation leaves zeros zero."""
    full = not any(size % stride for size, stride in zip(operator.input[2:], operator.stride, strict=True))
    return operator.depthwise and full and operator.activation in ZERO_AT_ZERO


def _bypass_as_sum(emit: _Emitter, operator: ChannelBypass, source: str) -> None:
    channels = operator.passed
    if channels < operator.input[1]:
        source = emit.slice_channels(source, 0, channels, "leading")
    arguments = [source, emit.weight("weight", filters=channels)]
    if operator.bias:
        arguments.append(emit.weight("bias", filters=channels))
    filtered = emit.emit(
        "Conv", *arguments, part="conv", kernel_shape=operator.kernel, strides=operator.stride, pads=operator.padding,
        group=channels,
    )  # fmt: skip
    if operator.activation != "none":
        filtered = emit.activate(operator.activation, filtered, last=False)
    means = np.zeros((channels, 1, *operator.stride), emit.dtype)
    means[operator.filters :] = 1 / prod(operator.stride)
    bypassed = emit.emit(
        "Conv", source, emit.constant("means", means), part="bypass", kernel_shape=operator.stride,
        strides=operator.stride, group=channels,
    )  # fmt: skip
    emit.emit("Add", bypassed, filtered, part="sum", last=True)


def _bypass_by_concat(emit: _Emitter, operator: ChannelBypass, inputs: Sequence[str]) -> None:
    alone = operator.filters == 0
    pooled = operator.stride != (1, 1)
    bypassed = inputs[0]
    if not (alone and operator.passed == operator.input[1]):
        bypassed = emit.slice_channels(bypassed, operator.filters, operator.passed, "slice", last=alone and not pooled)
    if pooled:
        bottom, right = (-size % stride for size, stride in zip(operator.input[2:], operator.stride, strict=True))
        bypassed = emit.emit(
            "AveragePool", bypassed, part="pool", last=alone, kernel_shape=operator.stride, strides=operator.stride,
            pads=(0, 0, bottom, right), count_include_pad=0,
        )  # fmt: skip
    if alone:
        return
    source = inputs[0]
    if operator.depthwise:
        source = emit.slice_channels(source, 0, operator.filters, "leading")
    arguments = [source, emit.weight("weight")]
    if operator.bias:
        arguments.append(emit.weight("bias"))
    filtered = emit.emit(
        "Conv", *arguments, part="conv", kernel_shape=operator.kernel, strides=operator.stride,
        pads=operator.padding, group=operator.filters if operator.depthwise else 1,
    )  # fmt: skip
    if operator.activation != "none":
        filtered = emit.activate(operator.activation, filtered, last=False)
    emit.emit("Concat", filtered, bypassed, part="concat", last=True, axis=1)


def _residual_add(emit: _Emitter, operator: ResidualAdd, inputs: Sequence[str]) -> None:
    wide, narrow = (inputs[0], inputs[1]) if operator.input[1] > operator.shortcut_channels else (inputs[1], inputs[0])
    missing = abs(operator.input[1] - operator.shortcut_channels)
    pads = emit.constant("pads", np.array([0, 0, 0, 0, 0, missing, 0, 0], dtype=np.int64))
    padded = emit.emit("Pad", narrow, pads, part="pad")
    activated = operator.activation != "none"
    tensor = emit.emit("Add", wide, padded, part="add", last=not activated)
    if activated:
        emit.activate(operator.activation, tensor, last=True)


def _add(emit: _Emitter, operator: Add, inputs: Sequence[str]) -> None:
    activated = operator.activation != "none"
    tensor = emit.emit("Add", *inputs, part="add", last=not activated)
    if activated:
        emit.activate(operator.activation, tensor, last=True)


def _global_pool(emit: _Emitter, operator: GlobalPool, inputs: Sequence[str]) -> None:
    if len(operator.input) == 3:
        axes = emit.constant("axes", np.array([1], dtype=np.int64))
        emit.emit("ReduceMean", inputs[0], axes, part="pool", last=True, keepdims=0)
        return
    pooled = emit.emit("GlobalAveragePool", inputs[0], part="pool")
    emit.emit("Flatten", pooled, part="flatten", last=True, axis=1)


def _pool(emit: _Emitter, operator: Pool, inputs: Sequence[str]) -> None:
    window = {"kernel_shape": operator.kernel, "strides": operator.stride, "pads": operator.padding}
    if operator.mode == "max":
        emit.emit("MaxPool", *inputs, part="pool", last=True, **window)
    else:
        emit.emit("AveragePool", *inputs, part="pool", last=True, count_include_pad=0, **window)


def _upsample(emit: _Emitter, operator: Upsample, inputs: Sequence[str]) -> None:
    scales = emit.constant("scales", np.array([1, 1, operator.scale, operator.scale], dtype=np.float32))
    emit.emit(
        "Resize", inputs[0], "", scales, part="resize", last=True,
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _activate(emit: _Emitter, operator: Activate, inputs: Sequence[str]) -> None:
    emit.activate(operator.activation, inputs[0], last=True)


_LOWERINGS: dict[type[BaseOperator], Callable[[_Emitter, Any, Sequence[str]], None]] = {
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


def to_onnx(
    network: Network, weights: Weights | None = None, seed: int = 0, precision: Precision = "fp32",
    samples: Samples | None = None, *, oldest: bool = False, bypass: Bypass = "concat",
) -> onnx.ModelProto:  # fmt: skip
    """The network as an ONNX model, checked; inputs `t0`, `t1`, …, outputs named after their tensors.

    In fp16 weights, inputs, outputs and all between are halves. In int8 (`lut_db.lowering.qdq`) inputs and outputs are
    float32, and the ranges of activations are those on the inputs `samples`, made up where there are none; that takes
    ONNX Runtime. `oldest`: in the oldest version of ONNX's operators that has them all, for providers that do not know
    the newer ones. `bypass`: how the bypass of a depthwise layer is joined to it. Without `weights` they are made up
    from `seed`. Raises InvalidInput where weights do not fit the network, or where it overflows on the samples in int8.
    """
    dtype, element = ELEMENTS[precision]
    weights = made_up(network, seed) if weights is None else checked(network, weights)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for number, node in enumerate(network.nodes):
        emitter = _Emitter(number, tensor_name(len(network.inputs) + number), dict(weights[number]), dtype, bypass)
        _LOWERINGS[type(node.operator)](emitter, node.operator, [tensor_name(tensor) for tensor in node.inputs])
        nodes.extend(emitter.nodes)
        constants.extend(emitter.constants)
    shapes = network.shapes

    def described(tensor: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor_name(tensor), element, shapes[tensor])

    graph = helper.make_graph(
        nodes, f"network_{network.key}",
        [described(tensor) for tensor in range(len(network.inputs))],
        [described(tensor) for tensor in network.output_tensors],
        constants,
    )  # fmt: skip
    young = any(node.op_type in YOUNGEST for node in nodes)
    opset = helper.make_opsetid("", OLDEST_OPSET if oldest and not young else OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="latency-lab")
    if precision == "int8":
        model = quantized(model, samples or made_up_samples(network))
    onnx.checker.check_model(model)
    return model
