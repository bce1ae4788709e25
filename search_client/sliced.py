"""Sub-networks on their own: a module for every operator, no masks, and their export.

A `SlicedNetwork` runs any network of the vocabulary. While it is trained, batch-norms are modules of their own;
`fold` folds them in, and what remains are exactly the weights that the network's operators name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lut_db.errors import LatencyLabError
from lut_db.lowering.weights import Array, Weights, checked
from lut_db.networks import Network
from lut_db.operators import (
    Activate,
    Add,
    BaseOperator,
    ChannelBypass,
    Convolution,
    LayerNorm,
    Linear,
    MatMul,
    Pool,
    Rearrange,
    TransposedConvolution,
    Upsample,
)
from search_client.architecture import Architecture
from search_client.description import Description, Source
from search_client.elastic import (
    BATCH_NORM_EPSILON,
    SuperNetwork,
    activate,
    add_padded,
    bypass_pool,
    initialise,
    squeeze_excite_scale,
)

EXPORT_TOLERANCE = 1e-4
"""Largest difference between torch and the exported file, relative to the largest logit where that exceeds 1."""


class ExportRefused(LatencyLabError):
    """The exported network does not compute what the trained one does."""


# --- one module for every kind of operator ---------------------------------------------------------------------


class OperatorModule(nn.Module):
    """An operator with its weights as parameters, named as `operator.weights` names them."""

    weight: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor

    def __init__(self, operator: Any, batch_norm: bool = False):
        super().__init__()
        self.operator = operator
        shapes = operator.weights
        folded = {"bias"} if batch_norm else set()
        for name in shapes.keys() - folded:
            self.register_parameter(name, nn.Parameter(torch.zeros(shapes[name])))
        self.batch_norm = (
            nn.BatchNorm2d(shapes["weight"][0], eps=BATCH_NORM_EPSILON) if batch_norm and "weight" in shapes else None
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return _RUN[self.operator.kind](self, *inputs)

    def parameter(self, name: str) -> Tensor | None:
        return self._parameters.get(name)

    def convolve(self, x: Tensor, groups: int, dilation: tuple[int, int] = (1, 1)) -> Tensor:
        """Convolution and batch-norm, without activation."""
        operator = self.operator
        top, left, bottom, right = operator.padding
        padding: tuple[int, int] = (top, left)
        if (top, left) != (bottom, right):
            x = functional.pad(x, (left, right, top, bottom))
            padding = (0, 0)
        y = functional.conv2d(x, self.weight, self.parameter("bias"), operator.stride, padding, dilation, groups)
        return y if self.batch_norm is None else self.batch_norm(y)

    @torch.no_grad()
    def folded(self) -> dict[str, Array]:
        """The weights with batch-norm folded in, computed in double precision."""
        arrays = {name: tensor.detach().double() for name, tensor in self.named_parameters(recurse=False)}
        if (norm := self.batch_norm) is not None:
            if norm.running_var is None or norm.running_mean is None:
                raise ExportRefused("batch-norm without statistics cannot be folded")
            scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
            arrays["weight"] = arrays["weight"] * scale.view(-1, *(1,) * (arrays["weight"].dim() - 1))
            arrays["bias"] = norm.bias.double() - norm.running_mean.double() * scale
        return {name: arrays[name].float().cpu().numpy() for name in self.operator.weights}


def _convolution(module: OperatorModule, x: Tensor, *shortcut: Tensor) -> Tensor:
    operator: Convolution = module.operator
    y = module.convolve(x, operator.groups, operator.dilation)
    return activate(operator.activation, y + shortcut[0] if operator.residual else y)


def _transposed_convolution(module: OperatorModule, x: Tensor) -> Tensor:
    operator: TransposedConvolution = module.operator
    y = functional.conv_transpose2d(
        x, module.weight, module.parameter("bias"), operator.stride, 0, operator.output_padding, operator.groups
    )
    top, left, _, _ = operator.padding
    height, width = operator.output_size
    return activate(operator.activation, y[:, :, top : top + height, left : left + width])


def _channel_bypass(module: OperatorModule, x: Tensor) -> Tensor:
    operator: ChannelBypass = module.operator
    filters = operator.filters
    stride = operator.stride
    rest = x[:, filters : operator.passed]
    if stride[0] == stride[1]:
        rest = bypass_pool(rest, stride[0])
    else:
        rest = functional.avg_pool2d(rest, stride, stride, ceil_mode=True, count_include_pad=False)
    if filters == 0:
        return rest
    y = module.convolve(x[:, :filters] if operator.depthwise else x, filters if operator.depthwise else 1)
    return torch.cat([activate(operator.activation, y), rest], dim=1)


def _linear(module: OperatorModule, x: Tensor) -> Tensor:
    operator: Linear = module.operator
    return activate(operator.activation, functional.linear(x, module.weight, module.parameter("bias")))


def _matmul(module: OperatorModule, x: Tensor, other: Tensor) -> Tensor:
    operator: MatMul = module.operator
    product = x @ (other.transpose(1, 2) if operator.transposed else other)
    return product * operator.input[2] ** -0.5 if operator.scaled else product


def _layer_norm(module: OperatorModule, x: Tensor) -> Tensor:
    operator: LayerNorm = module.operator
    return functional.layer_norm(x, x.shape[2:], module.weight, module.parameter("bias"), operator.epsilon)


def _softmax(module: OperatorModule, x: Tensor) -> Tensor:
    return x.softmax(-1)


def _rearrange(module: OperatorModule, x: Tensor) -> Tensor:
    operator: Rearrange = module.operator
    if operator.mode == "map_to_tokens":
        return x.flatten(2).transpose(1, 2)
    if operator.mode == "tokens_to_map":
        return x.transpose(1, 2).unflatten(2, operator.output[2:])
    heads = operator.heads or 1
    if operator.mode == "split_heads":
        return x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
    return x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def _squeeze_excite(module: OperatorModule, x: Tensor) -> Tensor:
    return x * squeeze_excite_scale(
        x, module.reduce_weight, module.reduce_bias, module.expand_weight, module.expand_bias
    )


def _residual_add(module: OperatorModule, x: Tensor, shortcut: Tensor) -> Tensor:
    return activate(module.operator.activation, add_padded(x, shortcut))


def _add(module: OperatorModule, x: Tensor, other: Tensor) -> Tensor:
    operator: Add = module.operator
    return activate(operator.activation, x + other)


def _global_pool(module: OperatorModule, x: Tensor) -> Tensor:
    return x.mean((2, 3) if x.dim() == 4 else 1)


def _pool(module: OperatorModule, x: Tensor) -> Tensor:
    operator: Pool = module.operator
    top, left, bottom, right = operator.padding
    sides = (left, right, top, bottom)
    if operator.mode == "max":
        return functional.max_pool2d(functional.pad(x, sides, value=-torch.inf), operator.kernel, operator.stride)
    mean = functional.avg_pool2d(functional.pad(x, sides), operator.kernel, operator.stride)
    if not any(sides):
        return mean
    inside = functional.pad(torch.ones_like(x[:1, :1]), sides)  # the padding is left out of the mean
    return mean / functional.avg_pool2d(inside, operator.kernel, operator.stride)


def _upsample(module: OperatorModule, x: Tensor) -> Tensor:
    operator: Upsample = module.operator
    return functional.interpolate(x, scale_factor=operator.scale, mode="nearest")


def _activation(module: OperatorModule, x: Tensor) -> Tensor:
    operator: Activate = module.operator
    return activate(operator.activation, x)


_RUN: dict[str, Callable[..., Tensor]] = {
    "convolution": _convolution,
    "channel_bypass": _channel_bypass,
    "linear": _linear,
    "squeeze_excite": _squeeze_excite,
    "residual_add": _residual_add,
    "add": _add,
    "global_pool": _global_pool,
    "pool": _pool,
    "upsample": _upsample,
    "activation": _activation,
    "transposed_convolution": _transposed_convolution,
    "matmul": _matmul,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "rearrange": _rearrange,
}
"""How each kind of the vocabulary is run; `(module, *inputs) -> output`."""


# --- networks --------------------------------------------------------------------------------------------------


class SlicedNetwork(nn.Module):
    """Runs a network of the vocabulary, one module per node, for batches of any size.

    sources: where the nodes come from; those with batch-norm get one. Without sources all batch-norm is folded.
    dropout: the share of features dropped before a linear last node while training.
    """

    def __init__(self, network: Network, sources: Sequence[Source] | None = None, dropout: float = 0.0):
        super().__init__()
        self.network = network
        self.dropout = dropout
        normed = [source.batch_norm for source in sources] if sources is not None else [False] * len(network.nodes)
        self.nodes = nn.ModuleList(
            OperatorModule(node.operator, batch_norm)
            for node, batch_norm in zip(network.nodes, normed, strict=True)
        )  # fmt: skip

    @property
    def operator_modules(self) -> list[OperatorModule]:
        return [module for module in self.nodes if isinstance(module, OperatorModule)]

    def forward(self, *inputs: Tensor) -> Any:
        """The network's output, or a tuple where it returns several."""
        tensors = list(inputs)
        last = len(self.nodes) - 1
        for number, (node, module) in enumerate(zip(self.network.nodes, self.nodes, strict=True)):
            read = [tensors[tensor] for tensor in node.inputs]
            if number == last and self.dropout and isinstance(node.operator, Linear):
                read = [functional.dropout(read[0], self.dropout, self.training)]
            tensors.append(module(*read))
        outputs = tuple(tensors[tensor] for tensor in self.network.output_tensors)
        return outputs[0] if len(outputs) == 1 else outputs

    def folded(self) -> SlicedNetwork:
        """The same network with batch-norm folded in, for evaluation."""
        return reference(*fold(self))


def fresh(description: Description, architecture: Architecture, seed: int = 0, dropout: float = 0.0) -> SlicedNetwork:
    """A sub-network with new weights."""
    network, sources = description.network_with_sources(architecture)
    sliced = SlicedNetwork(network, sources, dropout)
    random = torch.Generator().manual_seed(seed)
    for module in sliced.operator_modules:
        for tensor in module.parameters(recurse=False):
            if tensor.dim() > 1:
                initialise(tensor, random)
    return sliced


def slice_network(super_network: SuperNetwork, architecture: Architecture, dropout: float = 0.0) -> SlicedNetwork:
    """A sub-network with copies of the super-network's weights and batch-norm statistics: the first filters of
    every layer, the first channels of each, the centre of the kernel."""
    network, sources = super_network.description.network_with_sources(architecture)
    sliced = SlicedNetwork(network, sources, dropout)
    for module, source in zip(sliced.operator_modules, sources, strict=True):
        if not source.has_weights:
            continue
        state = module.state_dict()
        copied = super_network.part(source.module).sliced(source)
        # A linear layer may be written as a pointwise convolution.
        module.load_state_dict({name: copied[name].reshape(tensor.shape) for name, tensor in state.items()})
    return sliced.train(super_network.training)


def fold(sliced: SlicedNetwork) -> tuple[Network, list[dict[str, Array]]]:
    """The network and, for every node, its weights with batch-norm folded in, as `operator.weights` names them."""
    return sliced.network, [module.folded() for module in sliced.operator_modules]


def reference(network: Network, weights: Weights) -> SlicedNetwork:
    """A network with given weights, as PyTorch computes it, in evaluation mode. Works for every kind of operator.

    Raises InvalidInput if the weights are not the network's.
    """
    sliced = SlicedNetwork(network)
    for module, arrays in zip(sliced.operator_modules, checked(network, weights), strict=True):
        module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    return sliced.eval().requires_grad_(False)


def parameter_count(network: Network, sources: Sequence[Source]) -> int:
    """Parameters of a sub-network while it is trained: a scale and a shift per filter where there is batch-norm."""
    count = 0
    for node, source in zip(network.nodes, sources, strict=True):
        operator: BaseOperator = node.operator
        for name, shape in operator.weights.items():
            count += prod(shape) * (2 if name == "bias" and source.batch_norm else 1)
    return count


def export_onnx(sliced: SlicedNetwork, path: Path, seed: int = 0) -> float:
    """Writes a sub-network as ONNX, batch-norm folded in, and returns how far ONNX Runtime's result is from torch's.

    The file is checked on random inputs before it gets its name: it is refused (ExportRefused) and not kept if the
    results differ by more than `EXPORT_TOLERANCE`.
    """
    import onnx
    import onnxruntime

    from lut_db.lowering.onnx import to_onnx

    network, weights = fold(sliced)
    model = to_onnx(network, weights)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        onnx.save(model, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        random = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(shape, generator=random) for shape in network.inputs]
        training = sliced.training
        with torch.inference_mode():
            expected = sliced.eval()(*inputs)
        sliced.train(training)
        expected = expected if isinstance(expected, tuple) else (expected,)
        names = [given.name for given in session.get_inputs()]
        results = session.run(None, {name: given.numpy() for name, given in zip(names, inputs, strict=True)})
        worst = 0.0
        for wanted, result in zip(expected, results, strict=True):
            scale = max(1.0, float(wanted.abs().max()))
            worst = max(worst, float((wanted - torch.from_numpy(result)).abs().max()) / scale)
        if not worst <= EXPORT_TOLERANCE:
            raise ExportRefused(
                f"ONNX Runtime and torch differ by {worst:.2g}, more than {EXPORT_TOLERANCE:g}",
                field=str(path), remedy="report the architecture; the file was not kept",
            )  # fmt: skip
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return worst
