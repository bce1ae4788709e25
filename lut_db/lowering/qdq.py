"""ONNX graphs in int8, said with QuantizeLinear and DequantizeLinear.

Every tensor between two nodes is quantised behind the one and dequantised before the other. A runtime takes these
pairs into its int8 kernels where it has one (ONNX Runtime from the optimisation `extended` on), and runs what is left
in float32 between them, as it would in any network. Nothing is dequantised between two int8 kernels; the graph's
inputs and outputs stay float32 and are converted once.

Activations are uint8, which x86 and Arm both have kernels for: int8 is made uint8 by ONNX Runtime on x86, but not
where a tensor has several readers, whose convolutions then run in float32. All 8 bits of the weights are used: without
VNNI, x86 saturates sums of two products, which changes values but no time.

A quantiser belongs to the node before it, a dequantiser to the one behind; at the graph's border both belong to the
node inside. Names say so.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from lut_db.lowering.int8 import LEVELS, Affine, Filters, Range, Samples, merged

MOVING = frozenset({"Reshape", "Transpose", "Slice", "Flatten", "MaxPool", "Resize", "Pad"})
"""What moves values as they are: one scale before and behind, so that it runs on int8."""
CLAMPS = frozenset({"Relu", "Clip"})
CLAMPED = frozenset({"Conv", "Gemm", "Add"})
"""What takes a clamp behind it into its own quantisation."""
FLOATING = frozenset({"ConvTranspose", "LayerNormalization", "HardSigmoid", "Gelu", "ReduceMean"})
"""What runtimes have no int8 kernel for: two in a row need no int8 between."""
WEIGHTED = frozenset({"Conv", "Gemm"})
"""Weights `(filters, …)` as the second input, and perhaps a bias as the third."""


def quantized(model: onnx.ModelProto, samples: Samples) -> onnx.ModelProto:
    """The graph in int8, with the ranges that its tensors have on these inputs.

    Raises InvalidInput where an activation overflows.
    """
    graph = _Graph(model, _ranges(model, samples))
    made = helper.make_graph(
        graph.nodes, model.graph.name, list(model.graph.input), list(model.graph.output), list(graph.constants.values())
    )
    return helper.make_model(
        made, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name=model.producer_name
    )


def _ranges(model: onnx.ModelProto, samples: Samples) -> dict[str, Range]:
    """Smallest and largest value of every tensor, zero among them."""
    import onnxruntime  # only whoever wants int8 needs a runtime to lower

    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    given = [value.name for value in whole.graph.input]
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for node in whole.graph.node for name in node.output)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(whole.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_outputs()]
    ranges: dict[str, Range] = {}
    for inputs in samples:
        feed = dict(zip(given, inputs, strict=True))
        merged(ranges, {**feed, **dict(zip(names, session.run(None, feed), strict=True))})
    return ranges


class _Graph:
    """Collects the nodes and constants of a graph in int8."""

    def __init__(self, model: onnx.ModelProto, ranges: dict[str, Range]):
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.arrays: dict[str, NDArray] = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        self.affine: dict[str, Affine] = {}
        self.outputs = {value.name for value in graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        joined = {node.output[0] for node in graph.node if self._joined(node)}
        ranges = self._widened(graph, ranges, joined)
        for value in graph.input:
            self.affine[value.name] = Affine.of(ranges[value.name], np.uint8)
            self._quantize(value.name, value.name, f"{self.readers[value.name][0].name}/{value.name}")
        for node in graph.node:
            self._say(node, ranges, joined)

    def _joined(self, node: onnx.NodeProto) -> bool:
        """Whether a node and the only reader of its output have no int8 between them."""
        readers = self.readers[node.output[0]]
        if len(readers) != 1 or node.output[0] in self.outputs:
            return False
        behind = readers[0].op_type
        if node.name.partition("/")[0] != readers[0].name.partition("/")[0]:
            return False  # parts of one operator only
        return (node.op_type in CLAMPED | FLOATING and behind in CLAMPS) or {node.op_type, behind} <= FLOATING

    def _widened(self, graph: onnx.GraphProto, ranges: dict[str, Range], joined: set[str]) -> dict[str, Range]:
        """Ranges in which a clamp that stands alone has something to clamp: runtimes leave out one that has not."""
        found = dict(ranges)
        wide: set[str] = set()
        for node in reversed(graph.node):
            clamps = node.op_type in CLAMPS and node.input[0] not in joined
            if clamps or (node.op_type in MOVING and node.output[0] in wide):
                low, high = found[node.input[0]]
                found[node.input[0]] = (min(low, -2 * high / LEVELS), high)
                wide.add(node.input[0])
        return found

    def _say(self, node: onnx.NodeProto, ranges: dict[str, Range], joined: set[str]) -> None:
        said = onnx.NodeProto()
        said.CopyFrom(node)
        floating = node.op_type in FLOATING
        weighted = node.op_type in WEIGHTED
        filters = self._filters(node) if weighted else None
        for number, name in enumerate(node.input):
            if name in self.affine:
                said.input[number] = self._dequantize(name, f"{node.name}_{number}")
            elif name not in self.arrays:
                continue  # left out, or float32 from the node before
            elif filters is not None:
                said.input[number] = self._filters_input(name, filters, bias=number == 2)
            elif floating or node.op_type in MOVING | CLAMPS:
                self._constant(name, self.arrays[name])
            else:
                said.input[number] = self._factor(name)
        self.nodes.append(said)
        output = node.output[0]
        if output in joined:
            return
        alone = node.op_type in CLAMPS and node.input[0] not in joined
        same = alone or node.op_type in MOVING
        self.affine[output] = self.affine[node.input[0]] if same else _within(node, self.arrays, ranges[output])
        said.output[0] = f"{output}_float"
        self._quantize(output, f"{output}_float", output)
        if output in self.outputs:
            self._dequantize(output, output)

    def _constant(self, name: str, value: NDArray | np.generic) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _parameters(self, name: str) -> tuple[str, str]:
        affine = self.affine[name]
        zero = np.array(affine.zero, affine.dtype)
        return self._constant(f"{name}_scale", affine.scale), self._constant(f"{name}_zero", zero)

    def _quantize(self, name: str, source: str, called: str) -> None:
        self.nodes.append(helper.make_node(
            "QuantizeLinear", [source, *self._parameters(name)], [f"{name}_int8"], name=f"{called}_quantize"
        ))  # fmt: skip

    def _dequantize(self, name: str, output: str) -> str:
        self.nodes.append(helper.make_node(
            "DequantizeLinear", [f"{name}_int8", *self._parameters(name)], [output], name=f"{output}_dequantize"
        ))  # fmt: skip
        return output

    def _filters(self, node: onnx.NodeProto) -> Filters:
        bias = self.arrays[node.input[2]] if len(node.input) > 2 else None
        return Filters.of(self.arrays[node.input[1]], bias, 0, self.affine[node.input[0]].scale)

    def _filters_input(self, name: str, filters: Filters, *, bias: bool) -> str:
        scales = filters.bias_scales if bias else filters.scales
        inputs = [self._constant(name, filters.bias if bias else filters.weight),
                  self._constant(f"{name}_scale", scales)]  # fmt: skip
        inputs.append(self._constant(f"{name}_zero", np.zeros(len(scales), np.int32 if bias else np.int8)))
        output = f"{name}_float"
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=f"{name}_dequantize", axis=0))
        return output

    def _factor(self, name: str) -> str:
        """A constant beside an activation."""
        array = self.arrays[name]
        self.affine[f"{name}_"] = affine = Affine.of((min(0.0, float(array.min())), float(array.max())), np.uint8)
        self._constant(f"{name}__int8", affine.quantize(array))
        return self._dequantize(f"{name}_", f"{name}_float")


def _within(node: onnx.NodeProto, arrays: dict[str, NDArray], found: Range) -> Affine:
    """The affine of a tensor. What a ceiling clamps must lie below it in full, or the clamp is not left out."""
    affine = Affine.of(found, np.uint8)
    if node.op_type == "Clip":
        ceiling = float(arrays[node.input[2]])
        scale = affine.scale
        while float(scale) * LEVELS > ceiling or scale * np.float32(LEVELS) > ceiling:
            scale = np.nextafter(scale, np.float32(0))
        affine = Affine(scale, affine.zero, affine.dtype)
    return affine
