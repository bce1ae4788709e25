"""Sub-networks on their own: a module for every operator, no masks, and their export.

How PyTorch runs an operator is said in `lut_db.lowering.torch`. While a sub-network is trained, batch-norms are modules
of their own; `fold` folds them in, and what remains are exactly the weights that the network's operators name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lut_db.errors import LatencyLabError
from lut_db.lowering.torch import OperatorModule, TorchNetwork, to_torch
from lut_db.lowering.weights import Array
from lut_db.networks import Network
from lut_db.operators import BaseOperator, Linear
from search_client.architecture import Architecture
from search_client.description import Description, Source
from search_client.elastic import BATCH_NORM_EPSILON, SuperNetwork, initialise

if TYPE_CHECKING:
    from lut_db.lowering.onnx import Bypass

EXPORT_TOLERANCE = 1e-4
"""Largest difference between torch and the exported file, relative to the largest logit where that exceeds 1."""


class ExportRefused(LatencyLabError):
    """The exported network does not compute what the trained one does."""


# --- operators in training -------------------------------------------------------------------------------------


class TrainedOperator(OperatorModule):
    """An operator while it is trained: batch-norm, where it has one, is a module of its own and brings the bias."""

    def __init__(self, operator: Any, batch_norm: bool = False):
        super().__init__(operator, {"bias"} if batch_norm else ())
        shapes = operator.weights
        self.batch_norm = (
            nn.BatchNorm2d(shapes["weight"][0], eps=BATCH_NORM_EPSILON) if batch_norm and "weight" in shapes else None
        )

    def convolve(self, x: Tensor, groups: int, dilation: tuple[int, int] = (1, 1)) -> Tensor:
        """Convolution and batch-norm, without activation."""
        y = super().convolve(x, groups, dilation)
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


# --- networks --------------------------------------------------------------------------------------------------


class SlicedNetwork(TorchNetwork):
    """A sub-network while it is trained, one module per node, for batches of any size.

    sources: where the nodes come from; those with batch-norm get one.
    dropout: the share of features dropped before a linear last node while training.
    """

    def __init__(self, network: Network, sources: Sequence[Source], dropout: float = 0.0):
        modules = [
            TrainedOperator(operator, source.batch_norm)
            for operator, source in zip(network.operators, sources, strict=True)
        ]
        super().__init__(network, modules)
        self.dropout = dropout

    @property
    def operator_modules(self) -> list[TrainedOperator]:
        return [module for module in self.nodes if isinstance(module, TrainedOperator)]

    def step(self, number: int, *read: Tensor) -> Tensor:
        if number == len(self.nodes) - 1 and self.dropout and isinstance(self.network.operators[number], Linear):
            read = (functional.dropout(read[0], self.dropout, self.training),)
        return super().step(number, *read)

    def folded(self) -> TorchNetwork:
        """The same network with batch-norm folded in, for evaluation."""
        return to_torch(*fold(self))


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


def parameter_count(network: Network, sources: Sequence[Source]) -> int:
    """Parameters of a sub-network while it is trained: a scale and a shift per filter where there is batch-norm."""
    count = 0
    for node, source in zip(network.nodes, sources, strict=True):
        operator: BaseOperator = node.operator
        for name, shape in operator.weights.items():
            count += prod(shape) * (2 if name == "bias" and source.batch_norm else 1)
    return count


def export_onnx(sliced: SlicedNetwork, path: Path, seed: int = 0, *, bypass: Bypass = "concat") -> float:
    """Writes a sub-network as ONNX, batch-norm folded in, and returns how far ONNX Runtime's result is from torch's.

    `bypass` is how a target was measured, see `lut_db.lowering.onnx`.
    The file is checked on random inputs before it gets its name: it is refused (ExportRefused) and not kept if the
    results differ by more than `EXPORT_TOLERANCE`.
    """
    import onnx
    import onnxruntime

    from lut_db.lowering.onnx import to_onnx

    network, weights = fold(sliced)
    model = to_onnx(network, weights, bypass=bypass)
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
