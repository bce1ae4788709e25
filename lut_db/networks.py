"""Networks: small graphs whose nodes are operators. A single operator is a graph of one node."""

from __future__ import annotations

from functools import cached_property
from math import prod

from pydantic import Field, field_validator, model_validator

from lut_db.operators import MAX_DIMENSION, MAX_ELEMENTS, Operator, Record, Shape, canonical_key

MAX_NODES = 4096
MAX_PARAMETERS = 1 << 29
"""Weights of a network at most: 2 GiB of float32, which is what a file in ONNX or TFLite can hold."""
MAX_ACTIVATIONS = 1 << 32
"""Elements at most that a network's inputs and nodes make in all. Runtimes hold but a part of them at a time."""


class Node(Record):
    """An operator and the tensors it reads, by number: the network's inputs come first, then each node's output."""

    operator: Operator
    inputs: tuple[int, ...]


class Network(Record):
    """A graph of operators in the order in which they run.

    Tensor `i` is the network's input `i` for `i < len(inputs)`, else the output of node `i - len(inputs)`.
    `outputs` are the tensors that the network returns; None stands for the output of the last node.
    """

    inputs: tuple[Shape, ...] = Field(min_length=1)
    nodes: tuple[Node, ...] = Field(min_length=1, max_length=MAX_NODES)
    outputs: tuple[int, ...] | None = None

    @cached_property
    def key(self) -> str:
        return canonical_key("network", self.model_dump(mode="json"))

    @classmethod
    def of(cls, operator: Operator) -> Network:
        """The graph of one node."""
        return cls(
            inputs=operator.inputs,
            nodes=(Node(operator=operator, inputs=tuple(range(len(operator.inputs)))),),
        )

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators in order, one for each node: equal operators come as often as they run."""
        return tuple(node.operator for node in self.nodes)

    @property
    def output_tensors(self) -> tuple[int, ...]:
        return self.outputs if self.outputs is not None else (len(self.inputs) + len(self.nodes) - 1,)

    @property
    def shapes(self) -> list[Shape]:
        """The shape of every tensor, by number."""
        return [*self.inputs, *(node.operator.output for node in self.nodes)]

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)

    @property
    def macs_with_elementwise(self) -> int:
        return sum(operator.macs_with_elementwise for operator in self.operators)

    @property
    def parameters(self) -> int:
        return sum(operator.parameters for operator in self.operators)

    def consumers(self) -> list[list[int]]:
        """For every tensor, the nodes that read it."""
        readers: list[list[int]] = [[] for _ in range(len(self.inputs) + len(self.nodes))]
        for number, node in enumerate(self.nodes):
            for tensor in dict.fromkeys(node.inputs):
                readers[tensor].append(number)
        return readers

    @field_validator("inputs")
    @classmethod
    def _check_inputs(cls, inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
        # First of all: with the product of what is no shape one could keep a processor busy for hours.
        for shape in inputs:
            if len(shape) not in (2, 3, 4) or min(shape) < 1 or max(shape) > MAX_DIMENSION:
                told = str(shape) if len(shape) <= 8 and max(map(abs, shape), default=0) < 1 << 64 else "what is given"
                raise ValueError(f"{told} is no shape; it must be (N, C, H, W), (N, T, F) or (N, F)")
            if prod(shape) > MAX_ELEMENTS:
                raise ValueError(f"one of shape {shape} has more than {MAX_ELEMENTS} elements")
        return inputs

    @model_validator(mode="after")
    def _check_sizes(self) -> Network:
        """Tensors that may each be there can be too much together: refused before anything is allocated."""
        if self.parameters > MAX_PARAMETERS:
            raise ValueError(f"nodes: they have {self.parameters} weights in all, more than {MAX_PARAMETERS}")
        activations = sum(prod(shape) for shape in self.shapes)
        if activations > MAX_ACTIVATIONS:
            raise ValueError(f"nodes: they make {activations} elements in all, more than {MAX_ACTIVATIONS}")
        return self

    @model_validator(mode="after")
    def _check_wiring(self) -> Network:
        shapes: list[Shape] = [tuple(shape) for shape in self.inputs]
        for number, node in enumerate(self.nodes):
            expected = node.operator.inputs
            if len(node.inputs) != len(expected):
                raise ValueError(
                    f"nodes[{number}]: {node.operator.kind} reads {len(expected)} tensors, not {len(node.inputs)}"
                )
            for tensor, shape in zip(node.inputs, expected, strict=True):
                if not 0 <= tensor < len(shapes):
                    raise ValueError(f"nodes[{number}]: tensor {tensor} does not exist before this node")
                if tuple(shapes[tensor]) != tuple(shape):
                    raise ValueError(
                        f"nodes[{number}]: {node.operator.kind} expects shape {tuple(shape)}, "
                        f"but tensor {tensor} has shape {tuple(shapes[tensor])}"
                    )
            shapes.append(node.operator.output)
        for tensor in self.outputs or ():
            if not 0 <= tensor < len(shapes):
                raise ValueError(f"outputs: tensor {tensor} does not exist")
        if self.outputs is not None and not self.outputs:
            raise ValueError("outputs: a network returns at least one tensor")
        return self


class NetworkBuilder:
    """Builds a network node by node.

    >>> build = NetworkBuilder()
    >>> image = build.input((1, 3, 32, 32))
    >>> features = build.add(Convolution(input=build.shape(image), filters=8, kernel=(3, 3)), image)
    >>> network = build.network()
    """

    def __init__(self) -> None:
        self._inputs: list[Shape] = []
        self._nodes: list[Node] = []

    def input(self, shape: Shape) -> int:
        """Adds an input of the network and returns its tensor. Inputs come before nodes."""
        if self._nodes:
            raise ValueError("inputs must be added before nodes")
        self._inputs.append(tuple(shape))
        return len(self._inputs) - 1

    def add(self, operator: Operator, *inputs: int) -> int:
        """Adds a node and returns the tensor that it makes."""
        self._nodes.append(Node(operator=operator, inputs=inputs))
        return len(self._inputs) + len(self._nodes) - 1

    def shape(self, tensor: int) -> Shape:
        if tensor < len(self._inputs):
            return self._inputs[tensor]
        return self._nodes[tensor - len(self._inputs)].operator.output

    def operator(self, tensor: int) -> Operator:
        """The operator that makes a tensor."""
        return self._nodes[tensor - len(self._inputs)].operator

    def read(self, tensor: int) -> tuple[int, ...]:
        """The tensors that the operator reads which makes a tensor."""
        return self._nodes[tensor - len(self._inputs)].inputs

    def __len__(self) -> int:
        return len(self._nodes)

    def network(self, *outputs: int) -> Network:
        """The finished network; without `outputs` it returns what its last node makes."""
        return Network(inputs=tuple(self._inputs), nodes=tuple(self._nodes), outputs=outputs or None)
