"""Networks as PyTorch runs them: a module for every operator, the weights as parameters. The reference for all formats.

Also what a search trains is built of these modules, and what the backend `cuda-torch` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lut_db.lowering.weights import Weights, checked, made_up
from lut_db.networks import Network
from lut_db.operators import (
    Activate,
    Activation,
    Add,
    ChannelBypass,
    Convolution,
    LayerNorm,
    Linear,
    MatMul,
    Padding,
    Pool,
    Rearrange,
    TransposedConvolution,
    Upsample,
)

# --- what several kinds are made of ----------------------------------------------------------------------------


def activate(activation: Activation, x: Tensor) -> Tensor:
    """The activations of the vocabulary."""
    match activation:
        case "none":
            return x
        case "relu":
            return functional.relu(x)
        case "relu6":
            return functional.relu6(x)
        case "hard_swish":
            return functional.hardswish(x)
        case "hard_sigmoid":
            return functional.hardsigmoid(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "gelu":
            return functional.gelu(x)


def bypass_pool(x: Tensor, stride: int | tuple[int, int]) -> Tensor:
    """What a bypass does across a stride: averages windows of that size, rounding the size up."""
    if stride in (1, (1, 1)):
        return x
    return functional.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)


def squeeze_excite_scale(
    x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor
) -> Tensor:
    """(B, C, H, W) to the factors (B, C, 1, 1)."""
    hidden = functional.relu(functional.linear(x.mean((2, 3)), reduce_weight, reduce_bias))
    return functional.hardsigmoid(functional.linear(hidden, expand_weight, expand_bias))[:, :, None, None]


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """Zero channels at the end, up to `channels` in all; (B, C) or (B, C, H, W)."""
    return functional.pad(x, (*(0, 0) * (x.dim() - 2), 0, channels - x.shape[1]))


def add_padded(x: Tensor, y: Tensor) -> Tensor:
    """Sum of two tensors, the one with fewer channels padded with zero channels."""
    channels = max(x.shape[1], y.shape[1])
    x = x if x.shape[1] == channels else pad_channels(x, channels)
    y = y if y.shape[1] == channels else pad_channels(y, channels)
    return x + y


def _even(padding: Padding) -> tuple[int, int] | None:
    """Padding of rows and columns where it is the same on both sides, as torch's own operators take it."""
    top, left, bottom, right = padding
    return (top, left) if (top, left) == (bottom, right) else None


# --- one module for every kind of operator ---------------------------------------------------------------------


class OperatorModule(nn.Module):
    """An operator with its weights as parameters, named as `operator.weights` names them, less those left out."""

    weight: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor

    def __init__(self, operator: Any, left_out: Collection[str] = ()):
        super().__init__()
        self.operator = operator
        for name, shape in operator.weights.items():
            if name not in left_out:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return RUN[self.operator.kind](self, *inputs)

    def parameter(self, name: str) -> Tensor | None:
        return self._parameters.get(name)

    def convolve(self, x: Tensor, groups: int, dilation: tuple[int, int] = (1, 1)) -> Tensor:
        """The convolution, without activation."""
        operator = self.operator
        padding = _even(operator.padding)
        if padding is None:
            top, left, bottom, right = operator.padding
            x = functional.pad(x, (left, right, top, bottom))
            padding = (0, 0)
        return functional.conv2d(x, self.weight, self.parameter("bias"), operator.stride, padding, dilation, groups)


def _convolution(module: OperatorModule, x: Tensor, *shortcut: Tensor) -> Tensor:
    operator: Convolution = module.operator
    y = module.convolve(x, operator.groups, operator.dilation)
    return activate(operator.activation, y + shortcut[0] if operator.residual else y)


def _transposed_convolution(module: OperatorModule, x: Tensor) -> Tensor:
    operator: TransposedConvolution = module.operator
    padding = _even(operator.padding)
    y = functional.conv_transpose2d(
        x, module.weight, module.parameter("bias"), operator.stride, padding or (0, 0), operator.output_padding,
        operator.groups,
    )  # fmt: skip
    if padding is None:
        top, left, _, _ = operator.padding
        height, width = operator.output_size
        y = y[:, :, top : top + height, left : left + width]
    return activate(operator.activation, y)


def _channel_bypass(module: OperatorModule, x: Tensor) -> Tensor:
    operator: ChannelBypass = module.operator
    filters = operator.filters
    rest = bypass_pool(x[:, filters : operator.passed], operator.stride)
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
    padding = _even(operator.padding)
    # torch's pools pad by half a window at most.
    if padding is not None and all(2 * pad <= size for pad, size in zip(padding, operator.kernel, strict=True)):
        if operator.mode == "max":
            return functional.max_pool2d(x, operator.kernel, operator.stride, padding)
        return functional.avg_pool2d(x, operator.kernel, operator.stride, padding, count_include_pad=False)
    top, left, bottom, right = operator.padding
    sides = (left, right, top, bottom)
    if operator.mode == "max":
        return functional.max_pool2d(functional.pad(x, sides, value=-torch.inf), operator.kernel, operator.stride)
    mean = functional.avg_pool2d(functional.pad(x, sides), operator.kernel, operator.stride)
    inside = functional.pad(torch.ones_like(x[:1, :1]), sides)  # the padding is left out of the mean
    return mean / functional.avg_pool2d(inside, operator.kernel, operator.stride)


def _upsample(module: OperatorModule, x: Tensor) -> Tensor:
    operator: Upsample = module.operator
    return functional.interpolate(x, scale_factor=operator.scale, mode="nearest")


def _activation(module: OperatorModule, x: Tensor) -> Tensor:
    operator: Activate = module.operator
    return activate(operator.activation, x)


RUN: dict[str, Callable[..., Tensor]] = {
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


class TorchNetwork(nn.Module):
    """Runs a network of the vocabulary, one module for each node, for batches of any size."""

    def __init__(self, network: Network, modules: Sequence[OperatorModule] | None = None):
        super().__init__()
        self.network = network
        self.nodes = nn.ModuleList(map(OperatorModule, network.operators) if modules is None else modules)
        # A tensor that nobody reads any more is let go, so that its memory serves the next ones.
        self.done: list[list[int]] = [[] for _ in network.nodes]
        for tensor, readers in enumerate(network.consumers()):
            if readers and tensor not in network.output_tensors:
                self.done[readers[-1]].append(tensor)

    def forward(self, *inputs: Tensor) -> Any:
        """The network's output, or a tuple where it returns several."""
        outputs = self.run(inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, inputs: Sequence[Tensor], mark: Callable[[], None] = lambda: None) -> tuple[Tensor, ...]:
        """The network's outputs. `mark` is called before the first node and behind each."""
        tensors = dict(enumerate(inputs))
        mark()
        for number, node in enumerate(self.network.nodes):
            tensors[len(inputs) + number] = self.step(number, *(tensors[tensor] for tensor in node.inputs))
            for tensor in self.done[number]:
                del tensors[tensor]
            mark()
        return tuple(tensors[tensor] for tensor in self.network.output_tensors)

    def step(self, number: int, *read: Tensor) -> Tensor:
        """What one node makes of the tensors that it reads."""
        made: Tensor = self.nodes[number](*read)
        return made


def to_torch(network: Network, weights: Weights | None = None, seed: int = 0) -> TorchNetwork:
    """The network as a module in evaluation mode, without gradients. Works for every kind of operator.

    Without `weights` they are made up from `seed`. Raises InvalidInput where weights do not fit the network.
    """
    weights = made_up(network, seed) if weights is None else checked(network, weights)
    module = TorchNetwork(network)
    for node, arrays in zip(module.nodes, weights, strict=True):
        node.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    return module.eval().requires_grad_(False)
